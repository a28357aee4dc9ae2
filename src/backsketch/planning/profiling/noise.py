r"""The noise of single sites: of one draw in an exact backward pass, and at any keep by the scores of its rows.

Gradients are linear in the cotangent at a site's output: with the error :math:`\varepsilon = \hat g - g` of a
draw there, the error of the gradient is :math:`J^\top \varepsilon`, one backward pass from that site down, on the
graph that the exact pass left. No site is sketched for that, and sites near the input cost little. Row curves
carry it to other keeps, and below masks on the output.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from backsketch.planning.measure.errors import squared_norm
from backsketch.planning.measure.passes import Passes
from backsketch.planning.measure.recorder import Call, Calls
from backsketch.planning.measure.rows import RowCurve, draw_errors, layer_scores, row_curve
from backsketch.planning.profiling.families import LADDER, REFERENCE
from backsketch.planning.profiling.sites import Site
from backsketch.regions import Mask, Region
from backsketch.regions.rows import scores
from backsketch.sampling import draw, next_seed, num_kept

__all__ = [
    "MASK_REFERENCE",
    "Curves",
    "Noise",
    "curves",
    "mask_noise",
    "mask_weights",
    "ratio",
    "region_noise",
]

MASK_REFERENCE = 0.7

Curves = dict[tuple[str, str, float], RowCurve]
"""Row curves on the ladder by site, noise family and mask above (1 is none)."""


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


# --- other keeps ------------------------------------------------------------------------------------


def mask_weights(output_cotangent: Tensor) -> dict[float, Tensor]:
    """One draw of each mask on the output: ``1/π`` of the samples that are kept, zero of the others."""
    row_scores = scores([output_cotangent], 1)
    n = row_scores.shape[0]
    weights = {}
    for keep in LADDER:
        sample = draw(row_scores, num_kept(n, keep), next_seed(output_cotangent))
        weights[keep] = torch.zeros_like(row_scores).index_put((sample.indices,), sample.weights)
    return weights


def curves(
    model: torch.nn.Module, sites: Sequence[Site], calls: Calls, masks: Mapping[float, Tensor]
) -> Curves:
    """The curves of one exact pass.

    Rows of a sample scale with its weight in the mask, for samples do not interact.
    """
    found: Curves = {}
    for site in sites:
        for family, rows in _row_scores(model, site, calls).items():
            for mask, weight in {1.0: None, **masks}.items():
                below = [s if weight is None else s * _by_row(weight, s.shape[0]) for s in rows]
                parts = [row_curve(s, LADDER, live_only=family == "save") for s in below]
                found[site.name, family, mask] = functools.reduce(operator.add, parts)
    return found


def _by_row(weight: Tensor, n: int) -> Tensor | float:
    """The weights of samples as those of n rows; their mean square where rows are not grouped by sample."""
    if n % weight.shape[0]:
        return float(weight.square().mean().sqrt())
    return weight.repeat_interleave(n // weight.shape[0])


def _row_scores(model: torch.nn.Module, site: Site, calls: Calls) -> dict[str, list[Tensor]]:
    found: dict[str, list[Tensor]] = {}
    if site.row_dims is not None:
        called = [c for c in calls[site.name] if c.cotangents]
        found["save"] = [scores(c.cotangents, site.row_dims) for c in called]
    found["weights"] = [
        layer_scores(model.get_submodule(name), c.tensors[0], c.cotangents[0])
        for name in site.layers
        for c in calls[name]
        if c.cotangents and c.tensors
    ]
    return {family: rows for family, rows in found.items() if rows}


def ratio(
    found: Sequence[Curves], site: tuple[str, str], mask: float, keep: float, reference: float
) -> float:
    """The error at a keep below a mask over that at a reference keep without one, over the passes with it."""
    name, family = site
    pairs = [
        (c[name, family, mask], c[name, family, 1.0]) for c in found if (name, family, mask) in c
    ]
    top = math.fsum(masked.errors[LADDER.index(keep)] for masked, _ in pairs)
    base = math.fsum(plain.errors[LADDER.index(reference)] for _, plain in pairs)
    return top / base if base > 0 else 0.0
