r"""Closed-form variances of unbiased estimates: what the tests hold the Monte Carlo against.

All functions are pure, work in float64 and return ``E‖estimate − target‖²``, the sum over entries.
Source of the problem: arXiv 2602.14701, minimal-variance estimates under sparsity and rank constraints.
"""

from __future__ import annotations

import torch
from torch import Tensor

from backsketch.sampling import inclusion_probabilities

__all__ = [
    "elements",
    "horvitz_thompson",
    "joint_inclusion_systematic",
    "low_rank",
    "minimal_sampling",
    "norm_in_two_roundings",
    "pair_energy",
    "quantized",
    "rademacher",
    "srht",
    "systematic",
]


def _f64(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float64)


def horvitz_thompson(pi: Tensor, squared_norms: Tensor) -> Tensor:
    r""":math:`\sum_i (1/\pi_i - 1) \|c_i\|^2` for the estimate :math:`\sum_{i \in S} c_i / \pi_i`.

    Exact if rows are drawn independently, or if the contributions :math:`c_i` are mutually orthogonal
    (rows of ``grad_input``, columns of ``grad_weight``, singular triples), whatever the design.

    Args:
        pi: ``(n,)`` inclusion probabilities.
        squared_norms: ``(n,)``, :math:`\|c_i\|^2`; may be zero where ``pi`` is.
    """
    pi, sq = _f64(pi), _f64(squared_norms)
    return torch.where(sq > 0, (1 / pi - 1) * sq, 0.0).sum()


def minimal_sampling(norms: Tensor, k: int) -> Tensor:
    r"""The least :math:`\sum_i (1/\pi_i-1)\|c_i\|^2` with :math:`\sum_i \pi_i = k`: water-filling."""
    return horvitz_thompson(inclusion_probabilities(norms, k), _f64(norms).square())


def joint_inclusion_systematic(pi: Tensor) -> Tensor:
    r"""``(n, n)`` probabilities :math:`\pi_{ij}` that systematic sampling draws rows i and j together.

    The selected set is a step function of the one uniform number u: it changes only where u passes the
    fractional part of a cumulative sum, so the n intervals between those are enumerated exactly.
    """
    pi = _f64(pi)
    lengths, chosen = _systematic_samples(pi)
    member = pi.new_zeros(len(lengths), pi.shape[0]).scatter_(1, chosen, 1.0)
    return member.T @ (lengths[:, None] * member)


def _systematic_samples(pi: Tensor) -> tuple[Tensor, Tensor]:
    """The ``(m,)`` lengths of the intervals of u and the ``(m, k)`` rows that each draws, ascending."""
    k = round(float(pi.sum()))
    edges = pi.cumsum(0)
    edges = edges * (k / edges[-1])
    cuts = torch.cat([edges.new_tensor([0.0, 1.0]), edges.frac()]).unique(sorted=True)
    middles = (cuts[:-1] + cuts[1:]) / 2
    points = middles[:, None] + torch.arange(k, dtype=pi.dtype, device=pi.device)
    chosen = torch.searchsorted(edges, points, right=True).clamp(max=pi.shape[0] - 1)
    return cuts.diff(), chosen


def systematic(pi: Tensor, gram: Tensor) -> Tensor:
    r"""Exact variance of :math:`\sum_{i \in S} c_i/\pi_i` under systematic sampling in the given order.

    .. math:: \sum_{ij} \Bigl(\frac{\pi_{ij}}{\pi_i \pi_j} - 1\Bigr) \langle c_i, c_j\rangle

    in :math:`O(n^2)`, by enumerating the samples; :func:`joint_inclusion_systematic` is the slow twin.

    Args:
        pi: ``(n,)``.
        gram: ``(n, n)`` inner products of the contributions; for ``grad_weight`` of a linear layer
            :math:`(g_i \cdot g_j)(x_i \cdot x_j)`.
    """
    pi, gram = _f64(pi), _f64(gram)
    possible = (pi > 0).to(pi.dtype)
    scaled = gram * torch.where(pi > 0, 1 / pi, 0.0)
    scaled = scaled * torch.where(pi > 0, 1 / pi, 0.0)[:, None]
    lengths, chosen = _systematic_samples(pi)
    # From one interval to the next few rows change: inner products with the whole sample are updated.
    products = scaled.new_zeros(len(lengths), pi.shape[0])
    products[0] = scaled[chosen[0]].sum(0)
    after, which = (chosen[1:] != chosen[:-1]).nonzero(as_tuple=True)
    change = scaled[chosen[after + 1, which]] - scaled[chosen[after, which]]
    products = products.index_add_(0, after + 1, change).cumsum(0)
    squares = products.gather(1, chosen).sum(1)
    return ((lengths * squares).sum() - possible @ gram @ possible).clamp(min=0)  # rounding


def elements(keep: float, squared_norms: Tensor) -> Tensor:
    r""":math:`(1/p-1)\sum_{ij} \|c_{ij}\|^2` for an independent uniform mask on entries."""
    return (1 / keep - 1) * _f64(squared_norms).sum()


def low_rank(singular_values: Tensor, rank: int) -> Tensor:
    r"""The least variance of an unbiased estimate of rank at most r.

    .. math:: \frac{(\sum_{k>m} \sigma_k)^2}{r-m} - \sum_{k>m} \sigma_k^2

    with the m largest directions kept surely (m from water-filling on the singular values). Singular
    triples are orthogonal, so this is :func:`minimal_sampling` of the singular values.
    """
    if rank >= singular_values.shape[0]:
        return torch.zeros((), dtype=torch.float64)
    return minimal_sampling(singular_values, rank)


def pair_energy(g: Tensor, x: Tensor) -> Tensor:
    r""":math:`\sum_{i \ne j} \|g_i\|^2\|x_j\|^2 + (g_i \cdot g_j)(x_i \cdot x_j)` of a linear layer.

    Equal to :math:`\|G\|^2\|X\|^2 + \|G^\top X\|^2 - 2\sum_i \|g_i\|^2\|x_i\|^2`.

    Args:
        g: ``(n, a)``. x: ``(n, b)``.
    """
    g, x = _f64(g), _f64(x)
    diagonal = (g.square().sum(1) * x.square().sum(1)).sum()
    return g.square().sum() * x.square().sum() + (g.T @ x).square().sum() - 2 * diagonal


def rademacher(rank: int, pairs: Tensor) -> Tensor:
    r"""Variance of :math:`G^\top S^\top S X`, S of ``rank`` rows with independent entries :math:`\pm 1/\sqrt r`.

    :math:`(S^\top S)_{ij}` has mean :math:`\delta_{ij}`, no variance on the diagonal, variance 1/r off
    it, and is symmetric: what is left is :func:`pair_energy` / r.
    """
    return pairs / rank


def srht(rank: int, padded: int, pairs: Tensor) -> Tensor:
    r"""Variance of the subsampled randomized Hadamard transform: :func:`rademacher` times :math:`(m-r)/(m-1)`.

    The r of m rows of the Hadamard matrix are drawn without replacement, which the finite-population
    factor rewards: at r = m the estimate is exact.
    """
    return rademacher(rank, pairs) * (padded - rank) / max(padded - 1, 1)


def quantized(step: Tensor, fraction: Tensor) -> Tensor:
    r""":math:`\Delta^2 f (1-f)` per entry: the variance of stochastic rounding, float64, same shape.

    An entry at fraction f between two levels a step :math:`\Delta` apart is rounded up with probability
    f. At most :math:`\Delta^2/4`. Entries are rounded independently, so the variance of
    :math:`G^\top X` is the product applied to :math:`G^2` and this.
    """
    f = _f64(fraction)
    return _f64(step).square() * f * (1 - f)


def norm_in_two_roundings(
    g: Tensor, normalised: Tensor, spread: Tensor, rstd: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    r"""``E‖error‖²`` of (grad_input, grad_weight) of a layer norm that keeps two roundings of its input.

    With :math:`s_{ij}` the variance of a rounded :math:`\hat x_{ij}`, :math:`m_i = \overline{gw\hat x}` and
    :math:`v_i = \sum_j (g_{ij}w_j)^2 s_{ij} / K^2` that of its estimate, both factors being independent,

    .. math:: \sum_{ij} r_i^2 \left[(\hat x_{ij}^2 + s_{ij})(m_i^2 + v_i) - \hat x_{ij}^2 m_i^2\right],
              \qquad \sum_{ij} g_{ij}^2 s_{ij} / 2 .

    Args:
        g, normalised, spread: ``(rows, K)``: cotangent, :math:`\hat x`, and s in its units.
        rstd: ``(rows,)``. weight: ``(K,)``.
    """
    g, x, s, r, w = (_f64(t) for t in (g, normalised, spread, rstd, weight))
    gw = g * w
    m = (gw * x).mean(1, keepdim=True).square()
    v = (gw.square() * s).sum(1, keepdim=True) / x.shape[1] ** 2
    of_input = ((x.square() + s) * (m + v) - x.square() * m).sum(1) @ r.square()
    return of_input, (g.square() * s).sum() / 2
