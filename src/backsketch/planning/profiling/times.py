"""Seconds, saved bytes and rounding errors of each kind of site by itself, on this device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from backsketch.convert import sketch_
from backsketch.estimators import Sketch
from backsketch.memory import kept_by
from backsketch.planning.measure.errors import squared_distance, squared_norm
from backsketch.planning.measure.recorder import Call, rerun
from backsketch.planning.measure.timing import OF_A_SITE, compared, timed
from backsketch.planning.profiling.families import FAMILIES
from backsketch.planning.profiling.sites import Site
from backsketch.torch_private import twin_of
from backsketch.untouched import repeatable

__all__ = ["Cost", "SiteCosts", "site_costs"]


@dataclass(frozen=True)
class Cost:
    """What a sketch adds to a step at one site: ``fixed + slope * keep`` seconds, and saved bytes.

    ``error`` is the standard error of the seconds. ``own`` is ``‖ĝ − g‖²`` of one draw over ``‖g‖²`` in the
    gradients of the site's parameters, ``below`` that of its input's gradient over all that goes on from there.
    """

    fixed: float
    slope: float
    error: float
    saved_bytes: int
    own: float
    below: float

    def seconds(self, keep: float) -> float:
        """At a keep."""
        return self.fixed + self.slope * keep


@dataclass(frozen=True)
class SiteCosts:
    """By family, and the seconds of the site's exact backward pass."""

    families: Mapping[str, Cost]
    backward: float


def site_costs(
    model: nn.Module, sites: Sequence[Site], calls: Mapping[str, Call]
) -> dict[str, SiteCosts]:
    """Time every family where it fits, one site of each kind standing for those like it."""
    of_kind = {
        site.name: _of_kind(model.get_submodule(site.name), site, calls[site.name])
        for site in sites
        if site.like == site.name and site.name in calls
    }
    return {site.name: of_kind[site.like] for site in sites if site.like in of_kind}


def _of_kind(module: nn.Module, site: Site, call: Call) -> SiteCosts:
    """Combined sketches are timed where each of their parts is faster than exact."""
    found: dict[str, Cost] = {}
    with repeatable(module, 0):
        exact = _Twin(module, call)
        size = exact.bytes()
        forward = min(timed(exact.forward)[0] for _ in range(2))
        backward = 0.0
        for combined in (False, True):
            fitting = [f for f in FAMILIES if bool(f.parts) == combined and f.on(site)]
            fitting = [f for f in fitting if all(found[p].seconds(f.timed_at) < 0 for p in f.parts)]
            twins = [_Twin(module, call, f.rules(site, f.timed_at), site.name) for f in fitting]
            if not twins:
                continue
            times, base = compared(exact.run, [t.run for t in twins], OF_A_SITE)
            backward = backward or max(base.seconds - forward, 0.0)
            for f, twin, time in zip(fitting, twins, times):
                more = f.growth or (0.0, 0.0)
                slope = more[0] * forward + more[1] * backward
                errors = twin.errors(exact, site.kind == "branch")
                fixed = time.seconds - slope * f.timed_at
                found[f.name] = Cost(fixed, slope, time.error, twin.bytes() - size, *errors)
    return SiteCosts(found, backward)


class _Twin:
    """A copy of a module on the same parameters, under a sketch of its own."""

    def __init__(
        self,
        module: nn.Module,
        call: Call,
        rules: Mapping[str, Sketch] | None = None,
        top: str = "",
    ) -> None:
        self.module, self.call = twin_of(module), call
        self.gradients: list[Tensor] = []
        if rules:
            sketch_(
                self.module, {n.removeprefix(top).removeprefix("."): s for n, s in rules.items()}
            )

    def forward(self) -> object:
        return self.module(*self.call.args, **self.call.kwargs)

    def run(self) -> None:
        with repeatable(
            self.module, 0
        ):  # the same dropout as exact: else its noise were the sketch's
            self.gradients = rerun(self.module, self.call)

    def bytes(self) -> int:
        """Kept for the backward pass."""
        with torch.enable_grad():
            return kept_by(self.module, self.forward).total

    def errors(self, exact: _Twin, is_branch: bool) -> tuple[float, float]:
        """``own`` and ``below`` of :class:`Cost`. Below a branch goes the cotangent of its output as well."""
        n = sum(t.requires_grad for t in self.call.tensors)
        past = squared_norm(self.call.cotangents) if is_branch else 0.0
        below = squared_distance(self.gradients[:n], exact.gradients[:n])
        own = squared_distance(self.gradients[n:], exact.gradients[n:])
        return (
            own / max(squared_norm(exact.gradients[n:]), 1e-300),
            below / max(squared_norm(exact.gradients[:n]) + past, 1e-300),
        )
