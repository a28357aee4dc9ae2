"""The whole job: data, one or two runs, `result.json`, `plot.png`."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console

from backsketch.files import LOCK, make_folder, only_one, write_whole
from backsketch.train.checkpoint import CHECKPOINT, load_checkpoint
from backsketch.train.config import (
    AUTO,
    DEFAULT_SKETCH,
    TrainConfig,
    mismatch,
    parse_rules,
    resolve,
)
from backsketch.train.errors import StopRequest, TrainError
from backsketch.train.loop import Data, Trainer
from backsketch.train.result import result_of, write_json
from backsketch.train.setup import make_accelerator
from backsketch.train.show import (
    TrainProgress,
    automatic,
    comparison,
    headline,
    plot_result,
    verdict,
)
from backsketch.train.tasks import data_of
from backsketch.train.tokens import FILE

EXACT_CHECKPOINT = "exact.pt"
RESULT, PLOT, REPORT = "result.json", "plot.png", "sketch.txt"
OUTPUTS = (CHECKPOINT, EXACT_CHECKPOINT, RESULT, PLOT)


def train(
    options: Mapping[str, Any] | None = None,
    *,
    out: Path | None = None,
    resume: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train, write `result.json` and `plot.png` into `out`, and return the result.

    Args:
        options: fields of `TrainConfig`; what is not named has the defaults of the model's recipe.
        out: folder for the results; by default `runs/<model>-<data>-<sketch>`.
        resume: continue from the checkpoints in `out`. Options that are named must agree with them.
        console: where progress and the table go.

    Raises:
        TrainError: an option, the data or a checkpoint cannot be used.
        UserError: `out` cannot be written, or another process trains there.
        Interrupted: stopped by a signal, after a checkpoint.

    Example:
        >>> result = train({"epochs": 1, "sketch": "none"}, out=tmp_path)  # doctest: +SKIP
    """
    console = console or Console()
    options = dict(options or {})
    if options.get("init"):
        options |= _inherited(Path(options["init"]), options)
    out = out or default_folder(options)
    check_spec(options.get("sketch", DEFAULT_SKETCH))
    with StopRequest() as stop:
        return _train(options, out, resume, console, stop)


def _train(
    options: dict[str, Any], out: Path, resume: bool, console: Console, stop: StopRequest
) -> dict[str, Any]:
    began = time.perf_counter()
    if resume:
        options = _saved_options(out, options)
    data = data_of(options, out if resume else None)
    shape = getattr(data, "image_shape", None)
    config = resolve(options, num_train=data.num_train, image_shape=shape)
    if config.init and not resume:
        _refuse_misfit(Path(config.init), out, data)
    accelerator = make_accelerator(config.device, config.precision)
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    main = accelerator.is_main_process
    with ExitStack() as stack:
        if main and not out.exists():
            stack.callback(_forget, out)  # after the lock is given back
        if main:
            make_folder(out)
            stack.enter_context(only_one(out, "training"))
            _set_aside(out, resume, console)
            data.keep(out)
        accelerator.wait_for_everyone()
        stack.enter_context(torch.random.fork_rng(devices=devices))
        stack.enter_context(_threads(config.threads))
        result = _runs(config, data, accelerator, out, resume, console, stop, began)
        if main:
            write_json(out / RESULT, result)
            plot_result(result, out / PLOT)
            _say(console, result, out)
        accelerator.wait_for_everyone()
    accelerator.end_training()
    return result


def _forget(out: Path) -> None:
    """Remove a folder that was made for a run which could not begin."""
    if out.is_dir() and {path.name for path in out.iterdir()} <= {LOCK, FILE}:
        shutil.rmtree(out, ignore_errors=True)


def default_folder(options: Mapping[str, Any]) -> Path:
    """`runs/<model>-<data>-<sketch>`, the same for the same options, for `resume` to find."""
    data = Path(options.get("data", "digits")).name
    parts = [options.get("model", "mlp"), data, options.get("sketch", DEFAULT_SKETCH)]
    slugs = (re.sub(r"[^\w.=]+", "-", part).strip("-") for part in parts)
    return Path("runs") / "-".join(slugs)[:120]


def check_spec(spec: str) -> None:
    """Refuse a sketch that cannot be used, before any work is done.

    Raises:
        TrainError: it does not parse.
    """
    if spec not in ("none", AUTO):
        try:
            parse_rules(spec)
        except ValueError as error:
            raise TrainError(f"{error}; or say auto, or none for exact training") from error


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _saved_options(out: Path, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of an earlier run in `out`, checked against what is asked for now."""
    found = [path for path in (out / CHECKPOINT, out / EXACT_CHECKPOINT) if path.is_file()]
    if not found:
        raise TrainError(f"there is no checkpoint in {out} to resume from")
    saved = load_checkpoint(found[0])["config"]
    if "model_options" in asked:  # some of them may be named
        named = {**saved.get("model_options", {}), **asked["model_options"]}
        asked = {**asked, "model_options": named}
    if reason := mismatch(saved, asked):
        raise TrainError(f"the checkpoint {found[0]} does not fit this run: {reason}")
    return {**saved, **asked}


def _inherited(folder: Path, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Model and tokenizer of a run that starts from weights: theirs, unless others are asked for."""
    saved = load_checkpoint(folder / CHECKPOINT)["config"]
    if asked.get("model", saved["model"]) != saved["model"]:
        raise TrainError(f"the weights of {folder} are of {saved['model']}, not {asked['model']}")
    options = {**saved["model_options"], **asked.get("model_options", {})}
    tokenizer = str(folder / FILE) if (folder / FILE).is_file() else saved.get("tokenizer")
    tokenizer = asked.get("tokenizer") or tokenizer
    found = {"model": saved["model"], "model_options": options, "tokenizer": tokenizer}
    return {name: value for name, value in found.items() if value}


def _refuse_misfit(init: Path, out: Path, data: Data) -> None:
    """Compare the data that weights were made for with those of this run, before anything is written."""
    if init.resolve() == out.resolve():
        raise TrainError(f"a run cannot start from {init} and write there: choose another --out")
    made, ours = load_checkpoint(init / CHECKPOINT)["data"], data.summary()
    for name in ("vocabulary", "tokenizer", "context", "num_classes", "image_shape"):
        if made.get(name) != ours.get(name):
            raise TrainError(
                f"the weights of {init} were made with {name} {made.get(name)!r}, not {ours.get(name)!r}"
            )


def _set_aside(out: Path, resume: bool, console: Console) -> None:
    """Remove the outputs of a finished run, and set the checkpoint of an unfinished one aside."""
    if resume:
        return
    finished = (out / RESULT).is_file()
    for path in filter(Path.is_file, [out / name for name in OUTPUTS]):
        if finished:
            path.unlink()
        else:
            os.replace(path, aside := path.with_suffix(".old.pt"))
            _print(console, f"an unfinished run was here: its checkpoint is now {aside}")


def _runs(
    config: TrainConfig,
    data: Data,
    accelerator: Accelerator,
    out: Path,
    resume: bool,
    console: Console,
    stop: StopRequest,
    began: float,
) -> dict[str, Any]:
    """The run, and before it the exact run where the two are compared."""
    checkpoints = [out / CHECKPOINT]
    if config.compare:
        checkpoints.insert(0, out / EXACT_CHECKPOINT)
    loading = time.perf_counter() - began
    results = []
    with TrainProgress(console, accelerator.is_main_process) as progress:
        for checkpoint in checkpoints:
            began = time.perf_counter()
            exact_run = checkpoint.name == EXACT_CHECKPOINT
            trainer = Trainer(config, data, accelerator, checkpoint, exact=exact_run)
            if resume and checkpoint.is_file():
                trainer.load()
            elif config.init:
                trainer.start_from(Path(config.init))
            _write_report(trainer, out, console)
            setup = loading + time.perf_counter() - began
            trainer.fit(progress, stop)
            results.append(result_of(trainer, setup))
            accelerator.free_memory()
    if accelerator.is_main_process:
        data.keep_model(trainer.core, out)
    *exact, result = results
    return {**result, "exact": exact[0]} if exact else result


def _write_report(trainer: Trainer, out: Path, console: Console) -> None:
    """What the sketch applies to, before it is paid for: a table in a file, one line to read."""
    report = trainer.report
    if report is None or not trainer.accelerator.is_main_process:
        return
    path = out / REPORT
    write_whole(path, f"{report}\n".encode())
    _print(console, f"{len(report.sketched)} of {len(report)} layers sketched, see {path}")


def _say(console: Console, result: Mapping[str, Any], out: Path) -> None:
    _print(console, headline(result), style="bold")
    console.print(comparison(result))
    if "exact" in result:
        _print(console, verdict(result))
    if "auto" in result:
        _print(console, automatic(result))
    if result.get("sample"):
        _print(console, f"it writes:\n{result['sample']}")
    if result["diverged"]:
        told = "the training loss is not finite: lower --lr or raise keep"
        _print(console, told, style="bold red")
    _print(console, f"wrote {out / RESULT} and {out / PLOT}")


def _print(console: Console, text: str, style: str | None = None) -> None:
    """Print as it is: paths and sketches may hold what looks like rich's markup."""
    console.print(text, style=style, markup=False, highlight=False)
