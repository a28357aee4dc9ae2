"""Seconds and saved bytes of each kind of place alone, on this device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from backsketch.convert import restore_, sketch_
from backsketch.memory import kept_by
from backsketch.nn.swap import exact
from backsketch.planning.measure.calls import Call, replay
from backsketch.planning.profiling.families import FAMILIES
from backsketch.planning.profiling.sites import Slot
from backsketch.untouched import repeatable

__all__ = ["Cost", "place_costs", "timed"]

T = TypeVar("T")
_ROUNDS = 3


@dataclass(frozen=True)
class Cost:
    """What a sketch adds to a step at one place: ``fixed + slope * keep`` seconds, and saved bytes."""

    fixed: float
    slope: float
    saved_bytes: int


def timed(work: Callable[[], T]) -> tuple[float, T]:
    """Wall time of a call, the device's work included, and what it returned."""
    _synchronize()
    start = time.perf_counter()
    result = work()
    _synchronize()
    return time.perf_counter() - start, result


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def place_costs(
    model: nn.Module, slots: Sequence[Slot], calls: Mapping[str, Call], tick: Callable[[str], None]
) -> dict[tuple[str, str], Cost]:
    """By place and family, one place of each kind standing for those like it.

    Exact and sketched take turns, so that another job on the machine slows down both.
    """
    first = [slot for slot in slots if slot.like == slot.name and slot.name in calls]
    size = {s.name: _bytes(model, s, calls[s.name]) for s in first}
    found: dict[tuple[str, str], Cost] = {}
    for family in FAMILIES:
        fitting = [s for s in first if family.fits(s)]
        if not fitting:
            continue
        tick(f"time of {family.name}")
        points: dict[str, list[tuple[float, float]]] = {s.name: [] for s in fitting}
        for keep in family.times:
            sketch_(model, {k: v for s in fitting for k, v in family.rules(s, keep).items()})
            for slot in fitting:
                points[slot.name].append((keep, _difference(model, slot, calls[slot.name])))
            if keep == family.times[-1]:
                saved = {s.name: _bytes(model, s, calls[s.name]) - size[s.name] for s in fitting}
            restore_(model)
        for name, measured in points.items():
            found[name, family.name] = Cost(*_affine(measured), saved[name])
    return {
        (slot.name, family.name): found[slot.like, family.name]
        for slot in slots
        for family in FAMILIES
        if (slot.like, family.name) in found
    }


def _difference(model: nn.Module, slot: Slot, call: Call) -> float:
    """Median of sketched minus exact."""
    module = model.get_submodule(slot.name)
    differences = []
    with repeatable(module, 0):
        replay(module, call)  # a region proves itself, caches warm up
        for _ in range(_ROUNDS):
            sketched, _ = timed(lambda: replay(module, call))
            with exact(module):
                plain, _ = timed(lambda: replay(module, call))
            differences.append(sketched - plain)
    return statistics.median(differences)


def _bytes(model: nn.Module, slot: Slot, call: Call) -> int:
    module = model.get_submodule(slot.name)
    with repeatable(module, 0), torch.enable_grad():
        return kept_by(module, lambda: module(*call.args, **call.kwargs)).total


def _affine(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Constant and slope of time in keep; a constant alone from one point."""
    if len(points) == 1:
        return points[0][1], 0.0
    (a, ta), (b, tb) = points[0], points[-1]
    slope = max((ta - tb) / (a - b), 0.0)
    return (ta + tb) / 2 - slope * (a + b) / 2, slope
