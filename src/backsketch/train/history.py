"""The numbers that a run collects, from which the plot and most of the result are made."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import torch


@dataclass
class Evaluation:
    """The test split after some step; `epoch` counts the completed ones."""

    epoch: int
    step: int
    seconds: float
    accuracy: float
    loss: float


@dataclass
class History:
    """Per step: the training loss of its batch and its seconds. Per epoch: an `Evaluation`, and
    after some epochs the extra variance (None where it could not be measured).

    The seconds are those of training steps only, without evaluation and checkpoints; `wall_seconds`
    counts everything, over all sittings of a resumed run.
    """

    losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    extra_variances: dict[int, float | None] = field(default_factory=dict)
    wall_seconds: float = 0.0

    @property
    def train_seconds(self) -> float:
        return sum(self.step_seconds)

    def cumulative_seconds(self) -> list[float]:
        """Training seconds at the end of each step."""
        return torch.tensor(self.step_seconds, dtype=torch.float64).cumsum(0).tolist()

    def median_step_seconds(self) -> float:
        return float(torch.tensor(self.step_seconds, dtype=torch.float64).median())

    def mean_loss(self, last_steps: int) -> float:
        """Mean training loss over the last steps."""
        return float(torch.tensor(self.losses[-last_steps:], dtype=torch.float64).mean())

    def mean_extra_variance(self) -> float | None:
        """Mean over the run of what could be measured; None where nothing could."""
        known = [v for v in self.extra_variances.values() if v is not None]
        return sum(known) / len(known) if known else None

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> History:
        """The inverse of `state_dict`."""
        evaluations = [Evaluation(**e) for e in state["evaluations"]]
        return cls(**{**state, "evaluations": evaluations})


class StepClock:
    """Marks the end of each step; the seconds between marks are read once, at the end.

    On CUDA the marks are events in the stream, so that timing never makes the device wait; elsewhere
    they are readings of ``now``.
    """

    def __init__(self, device: torch.device, now: Callable[[], float] = time.perf_counter):
        self._cuda, self._now = device.type == "cuda", now
        self._marks: list[Any] = [self._mark()]

    def tick(self) -> None:
        """A step ends here and the next begins."""
        self._marks.append(self._mark())

    def seconds(self) -> list[float]:
        """Duration of each step so far."""
        if not self._cuda:
            return [b - a for a, b in pairwise(self._marks)]
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1000 for a, b in pairwise(self._marks)]

    def _mark(self) -> Any:
        if not self._cuda:
            return self._now()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
