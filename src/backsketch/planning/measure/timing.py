"""Time: one stopwatch, and comparisons that are repeated until their error is known."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from statistics import fmean, median
from typing import TypeVar

import torch

__all__ = ["Timing", "compared", "synchronize", "timed"]

T = TypeVar("T")


def timed(work: Callable[[], T], clock: Callable[[], float] = time.perf_counter) -> tuple[float, T]:
    """Seconds of a call, the device's work included, and what it returned."""
    synchronize()
    start = clock()
    result = work()
    synchronize()
    return clock() - start, result


def synchronize() -> None:
    """Wait for the device's work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@dataclass(frozen=True)
class Timing:
    """A median of several measurements in seconds, and its standard error."""

    seconds: float
    error: float = 0.0

    @classmethod
    def of(cls, measured: Sequence[float]) -> Timing:
        """The error is that of the median of normal noise with the mean absolute deviation that was seen."""
        n, middle = len(measured), median(measured)
        deviation = 1.2533 * fmean(abs(x - middle) for x in measured)
        return cls(middle, 1.2533 * deviation / max(n - 1, 1) ** 0.5 if n > 1 else abs(middle))


def compared(
    work: Callable[[], object],
    exactly: Callable[[], AbstractContextManager[object]] = nullcontext,
    *,
    rounds: tuple[int, int] = (3, 10),
    known: float = 0.03,
    seconds: float = 0.5,
) -> tuple[Timing, Timing]:
    """Time sketched and exact work in turns, so that another job on the machine slows down both.

    Args:
        work: what is timed.
        exactly: a context in which it is exact.
        rounds: the fewest and the most; one before them warms up, and is not counted.
        known: no more than the fewest rounds once the error of the difference is below this fraction of the exact
            time.
        seconds: nor once this time has passed.

    Returns:
        The difference sketched minus exact, and the exact time.
    """
    pairs: list[tuple[float, float]] = []
    start = time.perf_counter()
    for turn in range(rounds[1] + 1):
        sketched, _ = timed(work)
        with exactly():
            exact, _ = timed(work)
        if turn:
            pairs.append((sketched - exact, exact))
        if turn >= rounds[0]:
            difference, base = (Timing.of(times) for times in zip(*pairs))
            late = time.perf_counter() - start > seconds
            if late or difference.error <= known * base.seconds:
                break
    return difference, base
