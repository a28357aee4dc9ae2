"""Time: one stopwatch, and comparisons that are repeated until their error is known."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import TypeVar

import torch

__all__ = [
    "OF_A_PLAN",
    "OF_A_SITE",
    "OF_A_TRIAL",
    "Effort",
    "Timing",
    "compared",
    "synchronize",
    "timed",
]

T = TypeVar("T")


def timed(work: Callable[[], T]) -> tuple[float, T]:
    """Seconds of a call, the device's work included, and what it returned.

    Work in one thread of the CPU is timed by that thread's own clock: other jobs on the machine do not count.
    """
    alone = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    clock = time.thread_time if alone else time.perf_counter
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


@dataclass(frozen=True)
class Effort:
    """How long a comparison of timings goes on.

    Attributes:
        fewest, most: turns that every way takes.
        known: a way is timed no more once the error of its difference is below this fraction of the exact time, or
            it is slower than exact by three errors.
        seconds: per way and exact; none is timed beyond the fewest turns once this time has passed.
    """

    fewest: int
    most: int
    known: float = 0.03
    seconds: float = 0.5


OF_A_SITE = Effort(3, 4, known=0.05)
"""Many sketches of many sites, in a profile."""

OF_A_TRIAL = Effort(2, 3)
"""A whole plan, before a profile proposes it."""

OF_A_PLAN = Effort(7, 15, known=0.015, seconds=2)
"""A plan that a user asks about."""


def compared(
    exactly: Callable[[], object],
    others: Sequence[Callable[[], object]],
    effort: Effort,
    *,
    warm: bool = False,
) -> tuple[list[Timing], Timing]:
    """Time exact work and others in turns, so that another job on the machine slows down all of them.

    Args:
        exactly: what the others are compared with.
        others: ways to do it.
        effort: how long.
        warm: whether the ways have been run before; else a turn that is not counted comes first.

    Returns:
        The differences to exact, and the exact time.
    """
    base: list[float] = []
    differences: list[list[float]] = [[] for _ in others]
    unknown = list(range(len(others)))
    end = time.perf_counter() + effort.seconds * (1 + len(others))
    for turn in range(warm, effort.most + 1):
        ways = [(None, exactly), *((i, others[i]) for i in unknown)]
        taken = {i: timed(way)[0] for i, way in ways[:: 1 if turn % 2 else -1]}
        if turn:
            base.append(taken[None])
            for i in unknown:
                differences[i].append(taken[i] - taken[None])
        if turn >= effort.fewest:
            least = effort.known * Timing.of(base).seconds
            unknown = [i for i in unknown if not _is_known(Timing.of(differences[i]), least)]
            if not unknown or time.perf_counter() > end:
                break
    return [Timing.of(d) for d in differences], Timing.of(base)


def _is_known(difference: Timing, least: float) -> bool:
    return difference.error <= least or difference.seconds > 3 * difference.error
