"""Time per training step, on asynchronous devices too."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch


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
