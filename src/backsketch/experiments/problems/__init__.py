"""The problems that a sweep can run. Adding one is a file and a row here.

A problem is a frozen dataclass of options and a function from it to a dict of plain values. Its result must
be a function of the options alone: that is what makes a job idempotent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from backsketch.experiments.problems import depth, descent, ledger, noise, step_time, training

__all__ = ["PROBLEMS", "Problem"]


@dataclass(frozen=True)
class Problem:
    """A row of the registry."""

    options: type
    run: Callable[[Any], dict[str, Any]]


PROBLEMS: Mapping[str, Problem] = MappingProxyType(
    {
        "descent": Problem(descent.Descent, descent.run),
        "noise": Problem(noise.Noise, noise.run),
        "depth": Problem(depth.Depth, depth.run),
        "ledger": Problem(ledger.LedgerOf, ledger.run),
        "training": Problem(training.Training, training.run),
        "step_time": Problem(step_time.StepTime, step_time.run),
    }
)
