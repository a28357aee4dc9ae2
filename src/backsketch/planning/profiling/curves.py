"""How extra variance at a boundary depends on keep and on a mask above: row curves of exact passes."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from backsketch.planning.measure.recorder import Calls
from backsketch.planning.measure.rows import RowCurve, layer_scores, row_curve
from backsketch.planning.profiling.families import LADDER
from backsketch.planning.profiling.sites import Site
from backsketch.regions.rows import scores
from backsketch.sampling import draw, next_seed, num_kept

__all__ = ["Curves", "curves", "mask_weights", "ratio"]

Curves = dict[tuple[str, str, float], RowCurve]
"""Row curves on the ladder by site, noise family and mask above (1 is none)."""


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
