"""Seconds of a training step, all arms in turn in one process: what steps to a target are multiplied by."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from backsketch.experiments.bench import checkpointed, clock_of
from backsketch.experiments.problems.data import data_for
from backsketch.experiments.problems.training import Training, WatchedTrainer, config_of
from backsketch.planning.measure import step as measure
from backsketch.train.setup import make_accelerator

__all__ = ["StepTime", "run"]

WARM_UP = 4
PARTS = ("forward", "backward", "optimizer")


@dataclass(frozen=True)
class StepTime:
    """Whole training steps: forward, backward and optimizer, on batches as in training.

    Attributes:
        arms: name to options of :class:`Training` (``batch_size``, ``sketch``, ...), ``checkpoint``,
            patterns of submodules under activation checkpointing, and ``compile``, for ``torch.compile``.
        rounds: in each of which every arm makes one step.
        clock: ``"cpu"`` for the processor time of this process, meant for one thread; ``"wall"`` for a GPU.
    """

    model: str
    data: str
    arms: Mapping[str, Mapping[str, Any]]
    limit: int | None = None
    rounds: int = 30
    device: str = "cpu"
    clock: str = "cpu"
    train: Mapping[str, Any] = field(default_factory=dict)


class _Arm:
    """A trainer that steps when it is told to."""

    def __init__(self, options: StepTime, arm: str, folder: str) -> None:
        given = dict(options.arms[arm])
        patterns, compiled = given.pop("checkpoint", ()), given.pop("compile", False)
        job = Training(
            arm, options.model, options.data, limit=options.limit, device=options.device,
            **{"train": options.train, **given},
        )  # fmt: skip
        data = data_for(job)
        config = config_of(job, data)
        accelerator = make_accelerator(config.device, config.precision)
        self.trainer = WatchedTrainer(config, data, accelerator, Path(folder) / "unused.pt")
        if patterns:
            self.trainer.model = checkpointed(self.trainer.core, patterns)
        if compiled:
            self.trainer.model = torch.compile(self.trainer.model)
        self.trainer.model.train()
        self.now = clock_of(options.clock, config.device)
        self.seconds: dict[str, list[float]] = {part: [] for part in PARTS}
        self.count = 0

    def step(self) -> None:
        """One step and the time of its parts; loading the batch does not count."""
        trainer = self.trainer
        (batch,) = next(trainer.batches.train(*divmod(self.count, trainer.batches.steps_per_epoch)))
        marks = [self.now()]
        with trainer.accelerator.autocast():
            loss = trainer.data.loss(trainer.model, batch)
        marks.append(self.now())
        trainer.accelerator.backward(loss)
        marks.append(self.now())
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        marks.append(self.now())
        for part, (begin, end) in zip(PARTS, pairwise(marks)):
            self.seconds[part].append(end - begin)
        self.count += 1

    def saved_bytes(self) -> int:
        batch = next(self.trainer.batches.train(0))[0]
        return measure.saved_bytes(self.trainer.model, batch, self.trainer.loss)


def run(options: StepTime) -> dict[str, Any]:
    """By arm: median ``seconds`` of a step with its quartiles, those of its parts, and ``saved_bytes``.

    The arms take turns, in another order each round, so that a slow moment of the machine is shared.
    """
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        arms = {name: _Arm(options, name, folder) for name in options.arms}
        names = list(arms)
        for turn in range(WARM_UP + options.rounds):
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                arms[name].step()
        return {"arms": {name: _summary(arm) for name, arm in arms.items()}}


def _summary(arm: _Arm) -> dict[str, Any]:
    parts = {part: seconds[WARM_UP:] for part, seconds in arm.seconds.items()}
    low, middle, high = statistics.quantiles([sum(step) for step in zip(*parts.values())], n=4)
    found = {"seconds": middle, "quartiles": [low, high], "saved_bytes": arm.saved_bytes()}
    return {**found, **{part: statistics.median(seconds) for part, seconds in parts.items()}}
