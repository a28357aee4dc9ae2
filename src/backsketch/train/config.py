"""What is trained and how: the frozen configuration and the table of defaults."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from math import ceil
from types import MappingProxyType
from typing import Any

import backsketch as bs
from backsketch.estimators import Sketch
from backsketch.train.errors import TrainError

OPTIMIZERS = ("adamw", "sgd")
SCHEDULES = ("one-cycle", "cosine", "constant")
PRECISIONS = ("fp32", "bf16", "fp16")
DEFAULT_SKETCH = "rows:keep=0.25"
AUTO = "auto"  # the sketches are those of `bs.Auto`


@dataclass(frozen=True)
class Recipe:
    """Defaults of a model: one row of `RECIPES`.

    Attributes:
        task: what the model is for, a row of `backsketch.train.tasks.TASKS`.
        epochs: passes over the data, raised where needed to make `min_steps` steps, so that small
            data is trained to the end too.
        rates: optimizer -> (peak learning rate, weight decay); the first is the default optimizer.
        warmup: share of all steps in which the learning rate rises to its peak.
    """

    task: str
    epochs: int
    min_steps: int
    batch_size: int
    rates: Mapping[str, tuple[float, float]]
    schedule: str
    warmup: float


def _rates(
    adamw_lr: float, adamw_decay: float, sgd_lr: float, sgd_decay: float
) -> dict[str, tuple[float, float]]:
    return {"adamw": (adamw_lr, adamw_decay), "sgd": (sgd_lr, sgd_decay)}


RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "mlp": Recipe("images", 3, 250, 128, _rates(2e-3, 0.01, 0.1, 1e-4), "one-cycle", 0.1),
        "bagnet": Recipe("images", 10, 800, 128, _rates(3e-3, 0.05, 0.1, 5e-4), "one-cycle", 0.2),
        "vit": Recipe("images", 16, 800, 128, _rates(2e-3, 0.05, 0.1, 1e-4), "one-cycle", 0.2),
        "gpt": Recipe("text", 4, 800, 32, _rates(2e-3, 0.1, 0.1, 1e-4), "one-cycle", 0.1),
        "hf": Recipe("text", 1, 200, 16, _rates(3e-4, 0.1, 0.03, 1e-4), "one-cycle", 0.1),
    }
)

# Fields of `TrainConfig` that mean something for one task alone.
OWN_OPTIONS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"images": ("augment", "label_column", "image_size", "classes"), "text": ("tokenizer",)}
)


def recipe_of(model: str) -> Recipe:
    """The recipe of a model's name, whose part before a colon names a family.

    Raises:
        TrainError: there is no such model.
    """
    family, colon, _ = model.partition(":")
    if family not in RECIPES or (colon and family != "hf"):
        names = ", ".join(name if name != "hf" else "hf:CONFIG_OR_FOLDER" for name in RECIPES)
        raise TrainError(f"model must be one of {names}, got {model!r}")
    return RECIPES[family]


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the result of a run. `resolve` fills in what is not asked for.

    Attributes:
        sketch: text for `parse_rules` (a sketch, or a JSON object from pattern to sketch), `"auto"` or `"none"`.
        compare: train the exact model beside the sketched one.
        batch_size: images, or rows of text, per optimizer step, over all processes and accumulated micro-batches.
        grad_accumulation: micro-batches per optimizer step.
        augment: random crop and horizontal flip; by default for colour images only.
        device: `"auto"`, or a torch device; it does not take part in `mismatch`.
        threads: of a CPU; by default PyTorch's choice.
        limit_train: so many images, or tokens of text, at most.
        classes: train and test on images of these classes alone; the model keeps an output for every class.
        evaluations: how often an epoch looks at the test split, evenly spread, the last at its end.
        tokenizer: of text: `"bytes"`, `"bpe:4096"`, or a file or hub name.
        init: the folder of an earlier run, whose weights this one starts from.
    """

    model: str
    data: str
    sketch: str
    compare: bool
    epochs: int
    batch_size: int
    lr: float
    optimizer: str
    momentum: float
    nesterov: bool
    weight_decay: float
    schedule: str
    warmup: float
    precision: str
    grad_accumulation: int
    augment: bool
    seed: int
    device: str
    threads: int | None = None
    limit_train: int | None = None
    label_column: str | None = None
    image_size: int | None = None
    classes: Sequence[int] | None = None
    evaluations: int = 1
    model_options: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None
    init: str | None = None

    def __post_init__(self) -> None:
        recipe_of(self.model)
        for name, allowed in _CHOICES.items():
            if (value := getattr(self, name)) not in allowed:
                raise TrainError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        for name in ("epochs", "batch_size", "grad_accumulation", "lr", "evaluations"):
            if not (value := getattr(self, name)) > 0:
                raise TrainError(f"{name} must be positive, got {value}")
        if self.threads is not None and self.threads < 1:
            raise TrainError(f"threads must be positive, got {self.threads}")
        for name in ("seed", "weight_decay"):
            if not (value := getattr(self, name)) >= 0:
                raise TrainError(f"{name} must not be negative, got {value}")
        for name in ("warmup", "momentum"):
            if not 0 <= (value := getattr(self, name)) < 1:
                raise TrainError(f"{name} must be in [0, 1), got {value}")
        if self.nesterov and (self.optimizer != "sgd" or self.momentum == 0):
            raise TrainError("nesterov needs the sgd optimizer with momentum")
        if self.compare and self.sketch == "none":
            raise TrainError("there is nothing to compare without a sketch")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON and checkpoints."""
        return asdict(self)


_CHOICES: Mapping[str, tuple[str, ...]] = {
    "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES,
    "precision": PRECISIONS,
}


def resolve(
    options: Mapping[str, Any],
    *,
    num_train: int,
    image_shape: tuple[int, int, int] | None = None,
) -> TrainConfig:
    """The full configuration from the options that were given and the data.

    Args:
        options: fields of `TrainConfig`.
        num_train: images, or rows of text, to train on.
        image_shape: of images.

    Raises:
        TrainError: an option that does not exist or a value that makes no sense.
    """
    if unknown := set(options) - {f.name for f in fields(TrainConfig)}:
        raise TrainError(f"there is no option {min(unknown)!r}")
    model = options.get("model", "mlp")
    recipe = recipe_of(model)
    _refuse_foreign(options, model, recipe.task)
    optimizer = options.get("optimizer", next(iter(recipe.rates)))
    lr, weight_decay = recipe.rates.get(optimizer, (1e-3, 0.0))
    batch_size = options.get("batch_size", min(recipe.batch_size, num_train))
    steps_per_epoch = max(num_train // max(batch_size, 1), 1)
    defaults: dict[str, Any] = {
        "model": model,
        "data": "digits",
        "sketch": DEFAULT_SKETCH,
        "compare": False,
        "epochs": max(recipe.epochs, ceil(recipe.min_steps / steps_per_epoch)),
        "batch_size": batch_size,
        "lr": lr,
        "optimizer": optimizer,
        "momentum": 0.9,
        "nesterov": optimizer == "sgd" and options.get("momentum", 0.9) > 0,
        "weight_decay": weight_decay,
        "schedule": recipe.schedule,
        "warmup": recipe.warmup,
        "precision": "fp32",
        "grad_accumulation": 1,
        "augment": image_shape is not None and image_shape[0] == 3,
        "seed": 0,
        "device": "auto",
    }
    return TrainConfig(**{**defaults, **options})


def _refuse_foreign(options: Mapping[str, Any], model: str, task: str) -> None:
    for other, names in OWN_OPTIONS.items():
        for name in names if other != task else ():
            if options.get(name):  # what was filled in by an earlier run is None or False
                raise TrainError(f"{name} is for {other}, and the model {model} is for {task}")


def mismatch(saved: Mapping[str, Any], asked: Mapping[str, Any]) -> str | None:
    """The first option asked for that differs from a checkpoint's configuration, in words."""
    for name, value in asked.items():
        if name != "device" and saved.get(name) != value:
            return f"it was made with {name} = {saved.get(name)!r}, not {value!r}"
    return None


def parse_rules(text: str) -> Sketch | dict[str, Sketch | None]:
    """What :func:`backsketch.sketch_` takes, from text.

    Args:
        text: one sketch for :func:`backsketch.parse`, or a JSON object from patterns to such texts, in
            which ``null`` leaves a module exact.

    Raises:
        ValueError: a text that is neither, or an empty object.

    Example:
        >>> parse_rules("rows:keep=0.5")
        Rows(keep=0.5, scores='optimal', design='systematic')
        >>> parse_rules('{"head": null, "": "mask:keep=0.75"}')
        {'head': None, '': Mask(keep=0.75, row_dims=1, design='shuffled')}
    """
    if not text.lstrip().startswith("{"):
        return bs.parse(text)
    try:
        rules: dict[str, Any] = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"the sketch {text} is not a JSON object: {error}") from error
    if not rules:
        raise ValueError("the sketch {} has no rules; say none for exact training")
    return {pattern: None if rule is None else bs.parse(rule) for pattern, rule in rules.items()}
