"""The time that may be spent on finding and controlling sketches, by what an exact step takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

from backsketch.planning.control.ranks import of_first
from backsketch.planning.measure.timing import synchronize

__all__ = ["Budget", "Stopwatch"]


@dataclass
class Budget:
    """Seconds that may be spent on finding and controlling sketches: a share of those of an exact training.

    Attributes:
        expected: seconds of the exact training.
        share: of them.
        spent: so far, the same on all of several ranks.
        pending: seconds of this rank that :meth:`settle` has not counted yet.
    """

    expected: float
    share: float = 0.03
    spent: float = 0.0
    pending: float = 0.0

    @property
    def left(self) -> float:
        """Seconds that may still be spent; negative after too much was."""
        return self.share * self.expected - self.spent

    def affords(self, seconds: float) -> bool:
        """Whether so much is left."""
        return seconds <= self.left

    def settle(self) -> float:
        """Count what is pending, by the clock of the first rank; every rank calls this. Returns the seconds."""
        seconds = of_first(self.pending)
        self.spent, self.pending = self.spent + seconds, 0.0
        return seconds


@dataclass
class Stopwatch:
    """Times steps one by one.

    Attributes:
        clock: seconds.
        seconds: of each step so far.
    """

    clock: Callable[[], float]
    seconds: list[float] = field(default_factory=list)
    _began: float | None = None

    def start(self) -> None:
        """A step begins."""
        synchronize()
        self._began = self.clock()

    def stop(self) -> None:
        """The step that was begun ends, if there is one."""
        if self._began is not None:
            synchronize()
            self.seconds.append(self.clock() - self._began)
            self._began = None

    @property
    def median(self) -> float:
        """Of the steps so far."""
        return median(self.seconds)
