"""One training run, whole, with what an equal-cost comparison needs: a record of it."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import backsketch as bs
from backsketch.experiments.problems.data import data_for
from backsketch.planning.measure import step as measure
from backsketch.theory.noise import GradientSums
from backsketch.train.config import TrainConfig, resolve
from backsketch.train.errors import StopRequest
from backsketch.train.loop import Trainer
from backsketch.train.result import curve
from backsketch.train.setup import make_accelerator
from backsketch.train.show import TrainProgress
from backsketch.train.tasks import TaskData
from backsketch.untouched import untouched

__all__ = ["Training", "WatchedTrainer", "config_of", "run", "sketch_text"]

CURVE_POINTS = 40
NOISE_BATCHES = 16
_OF_AUTO = ("plan", "reason", "profile_seconds", "exact_steps_before", "keeps")
_OWN = ("arm", "limit", "limit_test", "train")


@dataclass(frozen=True)
class Training:
    """A run of ``backsketch train``.

    Attributes:
        arm: what it is called in tables.
        sketch: text for :func:`backsketch.train.config.parse_rules`, a mapping from pattern to such
            texts, ``"auto"`` or ``"none"``.
        limit, limit_test: how many images, or tokens of text; all by default.
        evaluations: looks at the test split, per epoch.
        train: further options of :class:`backsketch.train.config.TrainConfig`; the recipe of the model
            decides the rest.
    """

    arm: str
    model: str
    data: str
    sketch: str | Mapping[str, str | None] = "none"
    lr: float | None = None
    batch_size: int | None = None
    epochs: int | None = None
    seed: int = 0
    limit: int | None = None
    limit_test: int | None = None
    evaluations: int = 1
    device: str = "cpu"
    train: Mapping[str, Any] = field(default_factory=dict)


def sketch_text(sketch: str | Mapping[str, str | None]) -> str:
    """A sketch as ``backsketch train`` takes it."""
    return sketch if isinstance(sketch, str) else json.dumps(dict(sketch))


def config_of(options: Training, data: TaskData) -> TrainConfig:
    """The configuration of the run, with everything decided."""
    given = {k: v for k, v in vars(options).items() if k not in _OWN and v is not None}
    given |= {"sketch": sketch_text(options.sketch), **options.train}
    shape = getattr(data, "image_shape", None)
    return resolve(given, num_train=data.num_train, image_shape=shape)


class WatchedTrainer(Trainer):
    """A trainer that also measures the noise scale of exact gradients, wherever the extra variance is due."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.noise_scales: dict[int, float] = {}

    def extra_variance(self) -> float | None:
        if not self.sketched:
            self.noise_scales[self.epoch] = self._noise_scale()
        return super().extra_variance()

    def _noise_scale(self) -> float:
        sums = GradientSums()
        parameters = list(self.core.parameters())
        with untouched(self.core, training=True, seed=0):
            for number in range(NOISE_BATCHES):
                batch = self.batch_of(self.total_steps + number)
                sums.add(torch.autograd.grad(self.loss(self.core, batch), parameters))
        return sums.noise_scale


def run(options: Training) -> dict[str, Any]:
    """The run over time, its cost, its extra variance and, of exact runs, its noise scale.

    ``evaluations`` and ``curve`` hold steps; ``seconds`` is processor time of the training steps of this
    process (meant for one thread), evaluation and measurements excluded. ``backward_flops`` is that of the
    matrix products in one backward pass, under ``auto`` the mean over the run.
    """
    data = data_for(options)
    config = config_of(options, data)
    accelerator = make_accelerator(config.device, config.precision)
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=devices):
        checkpoint = Path(folder) / "checkpoint.pt"
        trainer = WatchedTrainer(config, data, accelerator, checkpoint, now=time.process_time)
        if config.init:
            trainer.start_from(Path(config.init))
        trainer.fit(TrainProgress(Console(quiet=True), enabled=False), StopRequest())
        with bs.exact(trainer.core):
            exact = measure.backward_flops(trainer.core, trainer.batch_of(0), trainer.loss)
    return {**record(trainer), "backward_flops": exact * trainer.cost["backward_flops_ratio"]}


def record(trainer: WatchedTrainer) -> dict[str, Any]:
    """What a finished run has to say, with plain values."""
    history = trainer.history
    loss = curve(history, CURVE_POINTS)
    auto = trainer.auto.result() if trainer.auto is not None else {}
    return {
        **({"auto": {key: auto[key] for key in _OF_AUTO if key in auto}} if auto else {}),
        "evaluations": {
            key: [getattr(e, key) for e in history.evaluations]
            for key in ("step", "accuracy", "loss")
        },
        "curve": {key: loss[key] for key in ("step", "train_loss")},
        "accuracy": history.evaluations[-1].accuracy,
        "train_loss": trainer.last_epoch_loss(),
        "steps": len(history.losses),
        "steps_per_epoch": trainer.batches.steps_per_epoch,
        "seconds": history.train_seconds,
        "batch_size": trainer.config.batch_size,
        "epochs": trainer.config.epochs,
        "lr": trainer.config.lr,
        "saved_bytes": trainer.cost["peak_saved_bytes"],
        "backward_flops_ratio": trainer.cost["backward_flops_ratio"],
        "extra_variance": {str(k): v for k, v in history.extra_variances.items()},
        "noise_scale": {str(k): v for k, v in trainer.noise_scales.items()},
    }
