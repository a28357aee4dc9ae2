r"""The noise of single sites, put straight into an exact backward pass.

Gradients are linear in the cotangent at a site's output: with the error :math:`\varepsilon = \hat g - g` of a
draw there, the error of the gradient is :math:`J^\top \varepsilon`, one backward pass from that site down, on the
graph that the exact pass left. No site is sketched for that, and sites near the input cost little.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from backsketch.planning.measure.errors import squared_norm
from backsketch.planning.measure.passes import Passes
from backsketch.planning.measure.recorder import Call, Calls
from backsketch.planning.measure.rows import draw_errors
from backsketch.planning.profiling.families import REFERENCE
from backsketch.planning.profiling.sites import Site
from backsketch.regions import Mask, Region

__all__ = ["MASK_REFERENCE", "Noise", "mask_noise", "region_noise"]

MASK_REFERENCE = 0.7


@dataclass(frozen=True)
class Noise:
    """Of a region at the reference keep.

    ``error`` is ``E‖ĝ − g‖²`` of the gradient where nothing above is sketched; regions at all sites above increase
    it by the relative ``growth``. ``arriving`` is the energy of its noise at the cotangents of sites below.
    """

    error: float
    growth: float
    arriving: dict[str, float]


def region_noise(run: Passes, calls: Calls, sites: Sequence[Site], number: int) -> dict[str, Noise]:
    """Of a region at each site in turn: one draw of the exact cotangents, one of those with the noise above."""
    regions = [s for s in sites if s.row_dims is not None and calls[s.name][0].cotangents]
    order = sorted(regions, key=lambda s: calls[s.name][-1].turn, reverse=True)
    exact = {s.name: [g for call in calls[s.name] for g in call.cotangents] for s in regions}
    noisy = {name: list(cotangents) for name, cotangents in exact.items()}
    count, found = len(run.parameters), {}

    def drawn(site: Site, cotangents: Sequence[Tensor], below: list[GradientEdge]) -> Any:
        run.keys.restart(number, 0)
        run.keys.at(regions.index(site))
        edges = [edge for call in calls[site.name] for edge in call.edges]
        return _down(run, edges, _errors(calls[site.name], cotangents, site.row_dims), below)

    for i, site in enumerate(order):
        lower = order[i + 1 :]
        grads = drawn(
            site, exact[site.name], [e for s in lower for c in calls[s.name] for e in c.edges]
        )
        rest, arriving = iter(grads[count:]), {}
        error = squared_norm(grads[:count])
        grown = squared_norm(drawn(site, noisy[site.name], [])) if i else error
        for other in lower:
            parts = [next(rest) for _ in noisy[other.name]]
            arriving[other.name] = squared_norm(parts)
            pairs = zip(noisy[other.name], parts)
            noisy[other.name] = [a if b is None else a + b for a, b in pairs]
        growth = max(grown / max(error, 1e-300) - 1, 0.0)
        found[site.name] = Noise(error, growth, arriving)
    return found


def _errors(
    calls: Sequence[Call], cotangents: Sequence[Tensor], row_dims: int | None
) -> list[Tensor]:
    """Of a draw of the rows of each call; the calls' cotangents follow each other."""
    assert row_dims is not None
    region, rest = Region(REFERENCE, row_dims), iter(cotangents)
    return [
        error
        for call in calls
        for error in draw_errors(region, [next(rest) for _ in call.cotangents])
    ]


def mask_noise(run: Passes, call: Call, number: int) -> float:
    """Of a mask on the model's output at its reference keep, one draw."""
    (g,), (edge,) = call.cotangents, call.edges
    run.keys.restart(number, 0)
    return squared_norm(_down(run, [edge], draw_errors(Mask(MASK_REFERENCE), [g]), []))


def _down(
    run: Passes, edges: list[GradientEdge], errors: list[Tensor], below: list[GradientEdge]
) -> Sequence[Tensor | None]:
    inputs: list[Any] = [*run.parameters.values(), *below]
    return torch.autograd.grad(edges, inputs, errors, retain_graph=True, allow_unused=True)
