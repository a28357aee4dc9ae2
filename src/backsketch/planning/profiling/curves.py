"""How extra variance at a boundary depends on keep and on a mask above: closed forms on row scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from backsketch.planning.measure.calls import Calls
from backsketch.planning.profiling.families import LADDER
from backsketch.planning.profiling.sites import Slot
from backsketch.regions.rows import scores
from backsketch.sampling import draw, next_seed, num_kept

__all__ = ["Curves", "curves", "least_errors", "mask_weights", "ratio", "water_filling"]

Curves = dict[tuple[str, str, float], list[float]]
"""``E‖error‖²`` at each keep of the ladder, by place, noise family and mask above (1 is none)."""


def water_filling(row_scores: Tensor, kept: Sequence[int]) -> list[float]:
    """The least ``Σ (1/π_i − 1) s_i²`` with k rows, for each k."""
    s = torch.sort(row_scores.detach().double()).values[None]
    k = torch.tensor([kept], dtype=s.dtype, device=s.device)
    return least_errors(s, k)[0].tolist()


def least_errors(ascending: Tensor, kept: Tensor) -> Tensor:
    r"""The least :math:`\sum_i (1/\pi_i - 1) s_i^2` with k rows, for many k from one sort.

    With :math:`S_m = \sum_{i \le m} s_i`, the m smallest of n are below the water level at k draws if and only if
    :math:`f_m = S_m/s_m + n - m \ge k`, which decreases with m: one binary search for each k. Then
    :math:`\lambda = S_m/(k - n + m)` and the sum is :math:`\lambda S_m - \sum_{i \le m} s_i^2`. The twin for one k
    is :func:`backsketch.theory.variance.minimal_sampling`.

    Args:
        ascending: ``(vectors, n)`` non-negative scores in float64, each vector sorted.
        kept: ``(vectors, m)`` float64, from one row to those with a positive score, or all n.

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


def mask_weights(output_cotangent: Tensor) -> dict[float, Tensor]:
    """One draw of each mask on the output: ``1/π`` of the samples that are kept, zero of the others."""
    row_scores = scores([output_cotangent], 1)
    n = row_scores.shape[0]
    weights = {}
    for keep in LADDER:
        sample = draw(row_scores, num_kept(n, keep), next_seed(output_cotangent))
        weights[keep] = torch.zeros_like(row_scores).index_put((sample.indices,), sample.weights)
    return weights


def curves(slots: Sequence[Slot], calls: Calls, masks: Mapping[float, Tensor]) -> Curves:
    """The curves of one exact pass.

    Rows of a sample scale with its weight in the mask, for samples do not interact.
    """
    found: Curves = {}
    for slot in slots:
        for family, rows in _row_scores(slot, calls).items():
            for mask, weight in {1.0: None, **masks}.items():
                errors = [0.0] * len(LADDER)
                for s in rows:
                    below = s if weight is None else s * _spread(weight, s.shape[0])
                    live = int((below > 0).sum())
                    for i, error in enumerate(
                        water_filling(below, _kept(family, s.shape[0], live))
                    ):
                        errors[i] += error
                found[slot.name, family, mask] = errors
    return found


def _kept(family: str, n: int, live: int) -> list[int]:
    if family == "save":
        kept = [num_kept(max(live, 1), keep) for keep in LADDER]
    else:
        kept = [max(min(num_kept(n, keep), live), 1) for keep in LADDER]
    return [n if k >= live else k for k in kept]


def _spread(weight: Tensor, n: int) -> Tensor | float:
    """The weights of samples as those of n rows; their mean square where rows are not grouped by sample."""
    if n % weight.shape[0]:
        return float(weight.square().mean().sqrt())
    return weight.repeat_interleave(n // weight.shape[0])


def _row_scores(slot: Slot, calls: Calls) -> dict[str, list[Tensor]]:
    found: dict[str, list[Tensor]] = {}
    if slot.row_dims is not None:
        called = [c for c in calls[slot.name] if c.cotangents]
        found["save"] = [scores(c.cotangents, slot.row_dims) for c in called]
    found["weights"] = [
        _contributions(c.tensors[0], c.cotangents[0])
        for name in slot.layers
        for c in calls[name]
        if c.cotangents and c.tensors
    ]
    return {family: rows for family, rows in found.items() if rows}


def _contributions(x: Tensor, cotangent: Tensor) -> Tensor:
    """Rows of ``grad_weight`` are bounded by ``‖g_i‖ ‖x_i‖``; a convolution's rows are samples here."""
    if cotangent.ndim == 4:
        norms = [t.detach().flatten(1).norm(dim=1) for t in (x, cotangent)]
    else:
        norms = [t.detach().reshape(-1, t.shape[-1]).norm(dim=1) for t in (x, cotangent)]
    return norms[0] * norms[1]


def ratio(
    found: Sequence[Curves], place: tuple[str, str], mask: float, keep: float, reference: float
) -> float:
    """The error at a keep below a mask over that at a reference keep without one, over all passes."""
    top = math.fsum(c[place[0], place[1], mask][LADDER.index(keep)] for c in found)
    base = math.fsum(c[place[0], place[1], 1.0][LADDER.index(reference)] for c in found)
    return top / base if base > 0 else 0.0
