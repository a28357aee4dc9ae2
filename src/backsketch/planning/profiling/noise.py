r"""The noise of single places, put straight into an exact backward pass.

Gradients are linear in the cotangent at a place's output: with the error :math:`\varepsilon = \hat g - g` of a
draw there, the error of the gradient is :math:`J^\top \varepsilon`, one backward pass from that place down, on the
graph that the exact pass left. No place is sketched for that, and places near the input cost little.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from backsketch import sampling
from backsketch.planning.measure.calls import Call, Calls
from backsketch.planning.measure.passes import Passes
from backsketch.planning.profiling.families import REFERENCE
from backsketch.planning.profiling.sites import Slot
from backsketch.regions.mask import masked_rows
from backsketch.regions.rows import scores

__all__ = ["MASK_REFERENCE", "Noise", "mask_noise", "region_noise"]

MASK_REFERENCE = 0.7
_MASK_DRAWS = 2


@dataclass(frozen=True)
class Noise:
    """Of a region at the reference keep.

    ``alone`` and ``company`` are ``E‖error‖²`` of the gradient, the latter with regions at all places above;
    ``arriving`` is the energy of the noise in company at the cotangents of the places below.
    """

    alone: float
    company: float
    arriving: dict[str, float]


def region_noise(run: Passes, calls: Calls, slots: Sequence[Slot], number: int) -> dict[str, Noise]:
    """Of a region at each slot in turn, one draw.

    In company, noise is put on the cotangent that the noise of the places above has reached.
    """
    regions = [s for s in slots if s.row_dims is not None and calls[s.name][0].cotangents]
    noise = {s.name: [torch.zeros_like(g) for g in _cotangents(calls, s)] for s in regions}
    found = {}
    for slot in sorted(regions, key=lambda s: calls[s.name][-1].turn, reverse=True):
        index = regions.index(slot)
        exact = _cotangents(calls, slot)
        noisy = [g + e for g, e in zip(exact, noise[slot.name])]
        below = [other for other in regions if other is not slot]
        edges = [e for other in below for call in calls[other.name] for e in call.edges]
        company, *reached = _put(run, calls, slot, noisy, (number, index), edges)
        arriving = {}
        rest = iter(reached)
        for other in below:
            parts = [next(rest) for _ in noise[other.name]]
            noise[other.name] = [
                a if b is None else a + b for a, b in zip(noise[other.name], parts)
            ]
            arriving[other.name] = _square(parts)
        (alone,) = _put(run, calls, slot, exact, (number, index), [])
        found[slot.name] = Noise(alone, company, arriving)
    return found


def _cotangents(calls: Calls, slot: Slot) -> list[Tensor]:
    return [g for call in calls[slot.name] for g in call.cotangents]


def _put(
    run: Passes,
    calls: Calls,
    slot: Slot,
    cotangents: list[Tensor],
    name: tuple[int, int],
    below: list[GradientEdge],
) -> list[Any]:
    """``‖error‖²`` of the gradient from the error of a draw on these cotangents, and what arrives below."""
    number, index = name
    run.keys.restart(number, 0)
    run.keys.at(index)
    assert slot.row_dims is not None
    rest = iter(cotangents)
    errors = []
    for call in calls[slot.name]:
        errors += _region_error([next(rest) for _ in call.cotangents], slot.row_dims)
    edges = [edge for call in calls[slot.name] for edge in call.edges]
    grads = _down(run, edges, errors, below)
    count = len(run.parameters)
    return [_square(grads[:count]), *grads[count:]]


def mask_noise(run: Passes, call: Call, number: int) -> float:
    """Of a mask on the model's output at its reference keep, the mean of a few draws."""
    (g,), (edge,) = call.cotangents, call.edges
    total = 0.0
    for draw in range(_MASK_DRAWS):
        run.keys.restart(number, draw)
        error = masked_rows(g, MASK_REFERENCE, 1) - g
        grads = _down(run, [edge], [error], [])
        total += _square(grads)
    return total / _MASK_DRAWS


def _region_error(cotangents: Sequence[Tensor], row_dims: int) -> list[Tensor]:
    row_scores = scores(cotangents, row_dims)
    sample = sampling.draw_live(row_scores, REFERENCE)
    if sample is None:
        return [torch.zeros_like(g) for g in cotangents]
    factors = torch.full_like(row_scores, -1.0).index_add(0, sample.indices, sample.weights)
    return [
        g * factors.to(g.dtype).view(*g.shape[:row_dims], *[1] * (g.ndim - row_dims))
        for g in cotangents
    ]


def _down(
    run: Passes, edges: list[GradientEdge], errors: list[Tensor], below: list[GradientEdge]
) -> Sequence[Tensor | None]:
    inputs: list[Any] = [*run.parameters.values(), *below]
    return torch.autograd.grad(edges, inputs, errors, retain_graph=True, allow_unused=True)


def _square(tensors: Sequence[Tensor | None]) -> float:
    return sum(float(t.detach().double().square().sum()) for t in tensors if t is not None)
