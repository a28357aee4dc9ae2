"""When a controller looks: the steps of replays, of looks at row scores in between, and of exact phases."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["MOST_LOOKS", "Schedule"]

MOST_LOOKS = 20
"""Steps between two looks at the row scores, fewer at the start."""

_SAVED = ("steps", "due", "gap", "look", "retries")


@dataclass
class Schedule:
    """Counts optimizer steps, and says what is to be done at each.

    Attributes:
        warmup: so many first steps are exact.
        exact_from: the step from which on all are exact; None if none is.
        interval: steps between two replays after the first few; None takes it from measured times.
        overhead: share of the time for replays.
        clock: seconds.
        steps: made so far.
        due: the step of the next replay.
        gap: steps between the last two.
        look: the step of the next look at row scores.
        retries: replays in a row that showed nothing.
    """

    warmup: int = 0
    exact_from: int | None = None
    interval: int | None = None
    overhead: float = 0.01
    clock: Callable[[], float] = time.perf_counter
    steps: int = 0
    due: int = 1
    gap: int = 1
    look: int = 0
    retries: int = 0
    _began: float | None = field(default=None, repr=False)
    _first: int = field(default=0, repr=False)  # step at which the clock began
    _spent: float = field(default=0.0, repr=False)  # on replays since then

    def __post_init__(self) -> None:
        self.due = max(self.warmup, 1)

    def step(self) -> None:
        """One more optimizer step."""
        if self._began is None:
            self._began, self._first = self.clock(), self.steps
        self.steps += 1

    @property
    def is_finishing(self) -> bool:
        """Whether the exact last steps have come."""
        return self.exact_from is not None and self.steps >= self.exact_from

    @property
    def is_exact_phase(self) -> bool:
        """Whether the steps are exact by request."""
        return self.steps < self.warmup or self.is_finishing

    @property
    def replays_next(self) -> bool:
        """Whether the next step is to be recorded and replayed."""
        return not self.is_finishing and self.steps + 1 >= self.due

    @property
    def looks_next(self) -> bool:
        """Whether row scores of the next step are wanted."""
        return not self.is_exact_phase and self.steps + 1 >= self.look

    @property
    def looks_now(self) -> bool:
        """Whether row scores of this step are wanted."""
        return not self.is_exact_phase and self.steps >= self.look

    def looked(self) -> None:
        """Take note of a look: there are many at first, and few later."""
        self.look = self.steps + min(MOST_LOOKS, 1 + (self.steps - self.warmup) // 40)

    def seconds_per_step(self, now: float) -> float:
        """Mean time of a step, replays apart, up to a time of the clock."""
        assert self._began is not None
        return max(now - self._began - self._spent, 0.0) / (self.steps - self._first)

    def replayed(self, seconds: float, per_step: float) -> None:
        """Set the step of the next replay: after twice the last gap, until that is the interval."""
        self._spent += seconds
        most = self.interval
        if most is None:
            most = math.ceil(seconds / max(self.overhead * per_step, 1e-9))
        self.gap = max(1, min(2 * self.gap, most))
        self.due = self.steps + self.gap

    def retry(self) -> None:
        """Replay the next step, too: this one showed nothing."""
        self.gap, self.due = 1, self.steps + 1
        self.retries += 1

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers; the times are those of this process and are not kept."""
        return {name: getattr(self, name) for name in _SAVED}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        for name in _SAVED:
            setattr(self, name, state[name])
        self._began, self._spent = None, 0.0
