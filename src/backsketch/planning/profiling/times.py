"""Seconds and saved bytes of each kind of site by itself, on this device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from backsketch.convert import restore_, sketch_
from backsketch.memory import kept_by
from backsketch.nn.swap import exact
from backsketch.planning.measure.recorder import Call, rerun
from backsketch.planning.measure.timing import Timing, compared, timed
from backsketch.planning.profiling.families import FAMILIES
from backsketch.planning.profiling.sites import Site
from backsketch.untouched import repeatable

__all__ = ["Cost", "Costs", "site_costs"]


@dataclass(frozen=True)
class Cost:
    """What a sketch adds to a step at one site: ``fixed + slope * keep`` seconds, and saved bytes.

    ``error`` is the standard error of the seconds.
    """

    fixed: float
    slope: float
    error: float
    saved_bytes: int


@dataclass
class Costs:
    """By site and family, and the seconds of each site's exact backward pass."""

    sketched: dict[tuple[str, str], Cost] = field(default_factory=dict)
    backward: dict[str, float] = field(default_factory=dict)


def site_costs(
    model: nn.Module, sites: Sequence[Site], calls: Mapping[str, Call], tick: Callable[[str], None]
) -> Costs:
    """Time every family where it fits, one site of each kind standing for those like it."""
    first = [site for site in sites if site.like == site.name and site.name in calls]
    size = {s.name: _bytes(model, s, calls[s.name]) for s in first}
    of_kind = Costs()
    for family in FAMILIES:
        fitting = [s for s in first if family.fits(s)]
        if not fitting:
            continue
        tick(f"time of {family.name}")
        points: dict[str, list[tuple[float, Timing]]] = {s.name: [] for s in fitting}
        saved: dict[str, int] = {}
        for keep in family.times:
            sketch_(model, {k: v for s in fitting for k, v in family.rules(s, keep).items()})
            for site in fitting:
                call = calls[site.name]
                difference, of_kind.backward[site.name] = _timed(model, site, call)
                points[site.name].append((keep, difference))
                saved[site.name] = _bytes(model, site, call) - size[site.name]
            restore_(model)
        for name, measured in points.items():
            of_kind.sketched[name, family.name] = _affine(measured, saved[name])
    return Costs(
        {
            (site.name, family.name): of_kind.sketched[site.like, family.name]
            for site in sites
            for family in FAMILIES
            if (site.like, family.name) in of_kind.sketched
        },
        {site.name: of_kind.backward.get(site.like, 0.0) for site in sites},
    )


def _timed(model: nn.Module, site: Site, call: Call) -> tuple[Timing, float]:
    """Sketched minus exact, and the exact backward pass by itself."""
    module = model.get_submodule(site.name)
    with repeatable(module, 0):
        difference, both = compared(lambda: rerun(module, call), lambda: exact(module))
        with exact(module):
            forward = min(timed(lambda: module(*call.args, **call.kwargs))[0] for _ in range(3))
    return difference, max(both.seconds - forward, 0.0)


def _bytes(model: nn.Module, site: Site, call: Call) -> int:
    module = model.get_submodule(site.name)
    with repeatable(module, 0), torch.enable_grad():
        return kept_by(module, partial(module, *call.args, **call.kwargs)).total


def _affine(points: Sequence[tuple[float, Timing]], saved: int) -> Cost:
    """Constant and slope of time in keep; a constant alone from one point."""
    (a, first), (b, last) = points[0], points[-1]
    error = max(first.error, last.error)
    slope = max((first.seconds - last.seconds) / (a - b), 0.0) if a != b else 0.0
    fixed = (first.seconds + last.seconds) / 2 - slope * (a + b) / 2
    return Cost(fixed, slope, error, saved)
