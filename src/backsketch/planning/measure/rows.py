"""Row curves: the error of a draw of rows at every keep, in closed form from the rows' scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from backsketch.nn.registry import adapter_of
from backsketch.regions import Mask, Region
from backsketch.regions.mask import masked_rows
from backsketch.regions.rows import scores, tokens
from backsketch.sampling import draw_live

__all__ = [
    "RowCurve",
    "column_scores",
    "draw_errors",
    "layer_scores",
    "least_errors",
    "row_curve",
]


@dataclass(frozen=True)
class RowCurve:
    """``E‖error‖²`` that a draw of rows puts on a cotangent at each keep of a ladder, and ``‖cotangent‖²``.

    Both are sums over ``count`` cotangents.
    """

    errors: tuple[float, ...]
    energy: float
    count: int = 1

    def __add__(self, other: RowCurve) -> RowCurve:
        errors = tuple(a + b for a, b in zip(self.errors, other.errors))
        return RowCurve(errors, self.energy + other.energy, self.count + other.count)


def row_curve(row_scores: Tensor, keeps: Sequence[float], live_only: bool = True) -> RowCurve:
    """The water-filling variance of vectors of scores at all keeps, summed over the vectors.

    Args:
        row_scores: ``(vectors, n)`` or ``(n,)``, non-negative.
        keeps: fractions in (0, 1].
        live_only: keeps count the rows with a positive score, as those of regions do below a mask; else all
            rows, of which those without a score are not drawn.
    """
    s = torch.atleast_2d(row_scores.detach()).to(torch.float64)
    n = s.shape[1]
    if n == 0:
        return RowCurve((0.0,) * len(keeps), 0.0)
    fractions = torch.tensor(keeps, dtype=s.dtype, device=s.device)
    counted = (s > 0).sum(1, keepdim=True) if live_only else torch.full_like(s[:, :1], n)
    k = (fractions * counted - 1e-6).ceil().clamp(min=1)  # as sampling.num_kept
    errors = least_errors(torch.sort(s).values, k).sum(0)
    *found, energy = torch.cat([errors, s.square().sum()[None]]).tolist()
    by_keep = tuple(0.0 if keep >= 1 else e for keep, e in zip(keeps, found))
    return RowCurve(by_keep, energy, s.shape[0])


def least_errors(ascending: Tensor, kept: Tensor) -> Tensor:
    r"""The least :math:`\sum_i (1/\pi_i - 1) s_i^2` with k rows, for many k from one sort.

    With :math:`S_m = \sum_{i \le m} s_i`, the m smallest of n are below the water level at k draws if and only if
    :math:`f_m = S_m/s_m + n - m \ge k`, which decreases with m: one binary search for each k. Then
    :math:`\lambda = S_m/(k - n + m)` and the sum is :math:`\lambda S_m - \sum_{i \le m} s_i^2`. The twin for one k
    is :func:`backsketch.theory.variance.minimal_sampling`.

    Args:
        ascending: ``(vectors, n)`` non-negative scores in float64, each vector sorted.
        kept: ``(vectors, m)`` float64, from one row to all n.

    Returns:
        ``(vectors, m)``.
    """
    s, n = ascending, ascending.shape[1]
    sums, squares = s.cumsum(1), s.square().cumsum(1)
    larger = torch.arange(n - 1, -1, -1, dtype=s.dtype, device=s.device)
    below = torch.where(s > 0, sums / s, torch.inf) + larger
    last = torch.searchsorted(-below, -kept, right=True).sub_(1).clamp_(min=0)
    total = sums.gather(1, last)
    return (total.square() / (kept - larger[last]) - squares.gather(1, last)).clamp(min=0)


# --- scores and draws -----------------------------------------------------------------------------------------


def layer_scores(layer: nn.Module, x: Tensor | None, cotangent: Tensor) -> Tensor:
    """``(rows,)``: ``‖g_i‖ ‖x_i‖``, which bound what the rows of a layer contribute to its ``grad_weight``.

    Of the cotangent by itself where the input has other rows, or is not known.
    """
    g = _rows(layer, cotangent).norm(dim=1)
    norms = None if x is None else _rows(layer, x).norm(dim=1)
    return g if norms is None or norms.shape != g.shape else g * norms


def column_scores(layer: nn.Module, cotangent: Tensor) -> Tensor:
    """``(columns,)``: the norms of the output channels of a layer's cotangent."""
    adapter = adapter_of(layer)
    assert adapter is not None
    return adapter.rows(cotangent.detach()).transpose(0, 1).flatten(1).norm(dim=1)


def _rows(layer: nn.Module, t: Tensor) -> Tensor:
    adapter = adapter_of(layer)
    assert adapter is not None
    return adapter.rows(t.detach()).flatten(1)


def draw_errors(sketch: Region | Mask, cotangents: Sequence[Tensor]) -> list[Tensor]:
    """What the next draw of a region or mask is off by, at each of several cotangents that share their rows."""
    dims = sketch.row_dims
    if isinstance(sketch, Mask):
        return [masked_rows(g, sketch.keep, dims, sketch.design) - g for g in cotangents]
    row_scores, shape = scores(cotangents, dims), cotangents[0].shape[:dims]
    sample = draw_live(row_scores, sketch.keep, design=sketch.design, block=tokens(shape))
    if sample is None:  # all rows are kept
        return [torch.zeros_like(g) for g in cotangents]
    factors = torch.full_like(row_scores, -1.0).index_add(0, sample.indices, sample.weights)
    return [g * factors.to(g.dtype).view(*shape, *[1] * (g.ndim - dims)) for g in cotangents]
