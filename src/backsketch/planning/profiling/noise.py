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

from backsketch import sampling
from backsketch.planning.measure.errors import squared_norm
from backsketch.planning.measure.passes import Passes
from backsketch.planning.measure.recorder import Call, Calls
from backsketch.planning.measure.rows import relative_errors
from backsketch.planning.profiling.families import REFERENCE
from backsketch.planning.profiling.sites import Site
from backsketch.regions.mask import masked_rows
from backsketch.regions.rows import scores

__all__ = ["MASK_REFERENCE", "Noise", "mask_noise", "region_noise"]

MASK_REFERENCE = 0.7
_MASK_DRAWS = 2


@dataclass(frozen=True)
class Noise:
    """Of a region at the reference keep.

    ``isolated`` and ``joint`` are ``E‖error‖²`` of the gradient, the latter with regions at all sites above;
    ``arriving`` is the energy of the joint noise at the cotangents of the sites below.
    """

    isolated: float
    joint: float
    arriving: dict[str, float]


def region_noise(run: Passes, calls: Calls, sites: Sequence[Site], number: int) -> dict[str, Noise]:
    """Of a region at each site in turn, one draw.

    For the joint error, noise is put on the cotangent that the noise of the sites above has reached.
    """
    regions = [s for s in sites if s.row_dims is not None and calls[s.name][0].cotangents]
    noise = {s.name: [torch.zeros_like(g) for g in _cotangents(calls, s)] for s in regions}
    found = {}
    for site in sorted(regions, key=lambda s: calls[s.name][-1].turn, reverse=True):
        index = regions.index(site)
        exact = _cotangents(calls, site)
        noisy = [g + e for g, e in zip(exact, noise[site.name])]
        below = [other for other in regions if other is not site]
        edges = [e for other in below for call in calls[other.name] for e in call.edges]
        joint, *reached = _put(run, calls, site, noisy, (number, index), edges)
        arriving = {}
        rest = iter(reached)
        for other in below:
            parts = [next(rest) for _ in noise[other.name]]
            noise[other.name] = [
                a if b is None else a + b for a, b in zip(noise[other.name], parts)
            ]
            arriving[other.name] = squared_norm(parts)
        (isolated,) = _put(run, calls, site, exact, (number, index), [])
        found[site.name] = Noise(isolated, joint, arriving)
    return found


def _cotangents(calls: Calls, site: Site) -> list[Tensor]:
    return [g for call in calls[site.name] for g in call.cotangents]


def _put(
    run: Passes,
    calls: Calls,
    site: Site,
    cotangents: list[Tensor],
    name: tuple[int, int],
    below: list[GradientEdge],
) -> list[Any]:
    """``‖error‖²`` of the gradient from the error of a draw on these cotangents, and what arrives below."""
    number, index = name
    run.keys.restart(number, 0)
    run.keys.at(index)
    assert site.row_dims is not None
    rest = iter(cotangents)
    errors = []
    for call in calls[site.name]:
        errors += _region_error([next(rest) for _ in call.cotangents], site.row_dims)
    edges = [edge for call in calls[site.name] for edge in call.edges]
    grads = _down(run, edges, errors, below)
    count = len(run.parameters)
    return [squared_norm(grads[:count]), *grads[count:]]


def mask_noise(run: Passes, call: Call, number: int) -> float:
    """Of a mask on the model's output at its reference keep, the mean of a few draws."""
    (g,), (edge,) = call.cotangents, call.edges
    total = 0.0
    for draw in range(_MASK_DRAWS):
        run.keys.restart(number, draw)
        error = masked_rows(g, MASK_REFERENCE, 1) - g
        grads = _down(run, [edge], [error], [])
        total += squared_norm(grads)
    return total / _MASK_DRAWS


def _region_error(cotangents: Sequence[Tensor], row_dims: int) -> list[Tensor]:
    row_scores = scores(cotangents, row_dims)
    factors = relative_errors(row_scores, sampling.draw_live(row_scores, REFERENCE))
    return [
        g * factors.to(g.dtype).view(*g.shape[:row_dims], *[1] * (g.ndim - row_dims))
        for g in cotangents
    ]


def _down(
    run: Passes, edges: list[GradientEdge], errors: list[Tensor], below: list[GradientEdge]
) -> Sequence[Tensor | None]:
    inputs: list[Any] = [*run.parameters.values(), *below]
    return torch.autograd.grad(edges, inputs, errors, retain_graph=True, allow_unused=True)
