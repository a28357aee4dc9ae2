"""`backsketch train`: its options, and its errors as one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from backsketch.commands.guard import told, writer
from backsketch.train.config import DEFAULT_SKETCH, OPTIMIZERS, PRECISIONS, RECIPES, SCHEDULES
from backsketch.train.errors import Interrupted

# Asking for nothing but these still means the demonstration, which compares. It is small, and threads
# that wait for each other on a busy machine would decide its timing, so it has one.
NEUTRAL = frozenset({"device", "seed", "threads"})
# Large enough for the backward products to outweigh the draws: smaller layers gain nothing.
DEMONSTRATION = {
    "compare": True,
    "threads": 1,
    "batch_size": 256,
    "model_options": {"widths": [1024, 1024, 1024]},
}
MODELS = (*(name for name in RECIPES if name != "hf"), "hf:CONFIG_OR_FOLDER")
MODEL_OPTIONS = (
    "dim",
    "depth",
    "patch",
    "heads",
    "widths",
    "receptive_field",
    "width",
    "context",
    "tied",
)


def _model(text: str, *names: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel="Model and data")


def _training(text: str, *names: str) -> Any:
    panel = "Training (the defaults depend on the model)"
    return typer.Option(*names, help=text, rich_help_panel=panel)


def _run(text: str, *names: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel="Run")


def _one_of(values: tuple[str, ...]) -> str:
    return " | ".join(values)


def train_command(
    model: Annotated[str | None, _model(f"{_one_of(MODELS)}; default: mlp")] = None,
    data: Annotated[
        str | None,
        _model(
            "digits, or a dataset id or local folder that datasets.load_dataset reads; for text also "
            "a text file or a folder of them; default: digits"
        ),
    ] = None,
    sketch: Annotated[
        str | None,
        _model(
            "none, auto, a sketch such as rows:keep=0.5,scores=l2, or a JSON object from pattern to sketch; "
            f"default: {DEFAULT_SKETCH}"
        ),
    ] = None,
    dim: Annotated[int | None, _model("vit, gpt: width of the tokens")] = None,
    depth: Annotated[int | None, _model("vit, gpt: number of blocks")] = None,
    patch: Annotated[int | None, _model("vit: side of a patch")] = None,
    heads: Annotated[int | None, _model("vit, gpt: attention heads")] = None,
    widths: Annotated[str | None, _model("mlp: hidden widths, as 512,512,512")] = None,
    receptive_field: Annotated[int | None, _model("bagnet: 5, 9, 17 or 33")] = None,
    width: Annotated[int | None, _model("bagnet: channels of the stem")] = None,
    context: Annotated[int | None, _model("text: tokens in a row; default: 128")] = None,
    tied: Annotated[
        bool | None,
        _model("gpt: one matrix for embedding and head; default: yes", "--tied/--untied"),
    ] = None,
    tokenizer: Annotated[
        str | None,
        _model(
            "text: bytes, bpe:4096 (learnt from the data), a file or a hub name; default: bytes"
        ),
    ] = None,
    init: Annotated[
        str | None, _model("folder of an earlier run, to start from its weights and its model")
    ] = None,
    image_size: Annotated[int | None, _model("resize and crop images to so many pixels")] = None,
    label_column: Annotated[str | None, _model("column of the classes")] = None,
    classes: Annotated[
        str | None, _model("train and test on these classes alone, as 0,1,2; the head keeps all")
    ] = None,
    limit_train: Annotated[
        int | None, _model("train on a random subset of so many images, or the first tokens")
    ] = None,
    epochs: Annotated[int | None, _training("passes over the train split")] = None,
    batch_size: Annotated[
        int | None, _training("images, or rows of text, per step, over all processes")
    ] = None,
    lr: Annotated[float | None, _training("peak learning rate")] = None,
    optimizer: Annotated[str | None, _training(_one_of(OPTIMIZERS))] = None,
    momentum: Annotated[float | None, _training("of sgd; default: 0.9")] = None,
    nesterov: Annotated[
        bool | None, _training("of sgd; default: on", "--nesterov/--no-nesterov")
    ] = None,
    weight_decay: Annotated[float | None, _training("on weight matrices only")] = None,
    schedule: Annotated[str | None, _training(_one_of(SCHEDULES))] = None,
    warmup: Annotated[float | None, _training("share of the steps before the peak")] = None,
    grad_accumulation: Annotated[int | None, _training("micro-batches a step; default: 1")] = None,
    precision: Annotated[str | None, _training(f"{_one_of(PRECISIONS)}; default: fp32")] = None,
    augment: Annotated[
        bool | None,
        _training("crop and mirror; default: for colour images", "--augment/--no-augment"),
    ] = None,
    evaluations: Annotated[
        int | None, _run("looks at the test split, per epoch; default: 1")
    ] = None,
    seed: Annotated[int | None, _run("default: 0")] = None,
    device: Annotated[str | None, _run("auto | cpu | cuda | cuda:0; default: auto")] = None,
    threads: Annotated[int | None, _run("of the CPU; default: as PyTorch chooses")] = None,
    out: Annotated[
        Path | None, _run("folder of the results; default: runs/MODEL-DATA-SKETCH")
    ] = None,
    resume: Annotated[bool, _run("continue from the checkpoint in --out", "--resume")] = False,
    compare: Annotated[
        bool | None,
        _run(
            "train the exact model beside the sketched one; default: if nothing else is asked for",
            "--compare/--no-compare",
        ),
    ] = None,
) -> None:
    """Train an image classifier or a language model with cheaper, unbiased gradients.

    Without options: an MLP on the digits of scikit-learn, exact and sketched side by side.

    Results go to result.json and plot.png in --out, beside the checkpoint that --resume needs.
    """
    given = {k: v for k, v in locals().items() if v is not None and k not in ("out", "resume")}
    options = _options(given)
    if not resume and set(options) <= NEUTRAL:
        options = {**DEMONSTRATION, **options}
    _guarded(options, out, resume)


def _options(given: dict[str, Any]) -> dict[str, Any]:
    """The options as fields of `TrainConfig`, those of the model apart."""
    model_options = {name: given.pop(name) for name in MODEL_OPTIONS if name in given}
    if "widths" in model_options:
        model_options["widths"] = _integers(model_options["widths"])
    if "classes" in given:
        given["classes"] = _integers(given["classes"])
    return {**given, "model_options": model_options} if model_options else given


def _integers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list such as 512,512,512") from None


def _guarded(options: dict[str, Any], out: Path | None, resume: bool) -> None:
    with told("stopped before the first step"):
        from backsketch.train.run import train

        try:
            train(options, out=out, resume=resume)
        except Interrupted as stopped:
            folder = escape(str(stopped.checkpoint.parent))
            writer().print(f"stopped; to continue here: backsketch train --out {folder} --resume")
            raise typer.Exit(stopped.exit_code) from None
