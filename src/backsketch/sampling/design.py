"""Inclusion probabilities by water-filling, and designs of fixed size: pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from backsketch.sampling.stream import generator_of
from backsketch.torch_private import is_functorch_wrapped

__all__ = [
    "DESIGNS",
    "ROW_DESIGNS",
    "few",
    "inclusion_probabilities",
    "is_readable",
    "num_kept",
    "num_live_kept",
    "order_of",
    "systematic",
]

_SORT_UP_TO = 1024  # on the CPU; above, linear passes that look at their result are faster


def num_kept(n: int, keep: float) -> int:
    """How many of ``n`` rows a fraction ``keep`` stands for: rounded up, at least one."""
    # The small slack keeps 0.1 * 10 at one row: products of decimal fractions overshoot by an ulp.
    return max(1, math.ceil(keep * n - 1e-6))


def num_live_kept(scores: Tensor, keep: float) -> int:
    """:func:`num_kept`, but no more than there are rows with a positive score.

    They are counted where that waits for nothing, in eager code on the CPU. Elsewhere zero rows, below a
    mask, say, may be drawn for nothing.
    """
    k = num_kept(scores.shape[0], keep)
    return max(1, min(k, int(torch.count_nonzero(scores)))) if is_readable(scores) else k


def is_readable(*tensors: Tensor) -> bool:
    """Whether Python may look at the values: in eager code on the CPU, where that waits for nothing."""
    return not torch.compiler.is_compiling() and all(
        t.device.type == "cpu" and type(t) in (Tensor, Parameter) and not is_functorch_wrapped(t)
        for t in tensors
    )


def inclusion_probabilities(scores: Tensor, k: int, floor: float = 0.0) -> Tensor:
    r"""Water-filling: the probabilities that minimise :math:`\sum_i s_i^2/\pi_i` at expected size k.

    .. math:: \pi_i = \min(1, s_i/\lambda), \qquad \sum_i \pi_i = k .

    By the Karush-Kuhn-Tucker conditions the minimiser is proportional to ``s`` below the cap and 1
    above it; :math:`\lambda` follows from one sort and one cumulative sum.

    Args:
        scores: ``(n,)``, non-negative. A non-finite score is drawn surely (up to ``k`` of them), so
            that NaN and Inf reach the gradients. If fewer than ``k`` scores are positive, those rows
            are sure and the rest share what is left.
        k: expected number of rows, ``1 <= k <= n``.
        floor: weight in [0, 1] of a uniform distribution mixed in, ``pi >= floor * k / n``. Needed
            where a zero score does not imply a zero contribution.

    Returns:
        float64 ``(n,)``, summing to ``k``.
    """
    n = scores.shape[0]
    s = scores.to(torch.float64)
    on_host = s.device.type == "cpu"
    if not on_host or not math.isfinite(float(s.sum())):
        bad = ~torch.isfinite(s)
        s = torch.where(bad.any(), bad.to(s.dtype), s)
    by_passes = on_host and n > _SORT_UP_TO
    lam = _level_by_passes(s, k) if by_passes else _level_by_sorting(s, k)
    pi = (s / lam).clamp(max=1.0)
    if not on_host or lam == 0:
        positive = s > 0
        num_positive = positive.sum().to(s.dtype)  # integers would divide in float32
        rest = (k - num_positive) / (n - num_positive).clamp(min=1)
        pi = torch.where(lam > 0, pi, torch.where(positive, 1.0, rest))
    return (1 - floor) * pi + floor * k / n if floor else pi


def _level_by_sorting(s: Tensor, k: int) -> Tensor:
    """The water level lambda, from one sort and one cumulative sum: no step waits for the device."""
    n = s.shape[0]
    ascending = torch.sort(s).values
    tail = ascending.cumsum(0)  # sums of the j+1 smallest: no cancellation, whatever the spread
    free = torch.arange(1 - (n - k), k + 1, device=s.device)  # budget left for a tail of j+1 rows
    fits = (free > 0) & (ascending * free <= tail)
    last = (fits * torch.arange(n, device=s.device)).amax()
    return tail[last] / free[last]


def _level_by_passes(s: Tensor, k: int) -> Tensor:
    """The same level by raising the number of sure rows until it is stable: some ten linear passes.

    The level only falls, so the sure rows only grow, and there are fewer than k of them.
    """
    sure, lam = 0, s.sum() / k
    # k rows above the level: k equal scores, whose mean was rounded down.
    while sure < (found := int((over := s > lam).sum())) < k:
        sure = found
        lam = s.masked_fill(over, 0.0).sum() / (k - sure)
    return lam


def systematic(pi: Tensor, k: int, u: float) -> Tensor:
    """Systematic sampling (Madow 1949): exactly k rows with inclusion probabilities ``pi``.

    One uniform number in [0, 1) and one cumulative sum. In the order given it also stratifies:
    neighbours are rarely drawn together.
    """
    edges = pi.cumsum(0)
    edges = edges * (k / edges[-1])
    points = torch.arange(k, device=pi.device, dtype=pi.dtype) + u
    return torch.searchsorted(edges, points, right=True).clamp(max=pi.shape[0] - 1)


def few(scores: Sequence[float], k: int, u: float, floor: float) -> tuple[list[int], list[float]]:
    """Water-filling and systematic sampling of a few rows in plain numbers.

    The same steps as :func:`inclusion_probabilities` and :func:`systematic`, of which each costs an
    operator's launch there.
    """
    n = len(scores)
    s = scores
    if not all(map(math.isfinite, s)):
        s = [0.0 if math.isfinite(x) else 1.0 for x in s]
    lam, tail = 0.0, 0.0
    for j, x in enumerate(sorted(s)):
        tail += x
        free = k - (n - 1 - j)
        if free > 0 and x * free <= tail:
            lam = tail / free
    if lam > 0:
        pi = [x / lam if x < lam else 1.0 for x in s]
    else:
        positive = sum(x > 0 for x in s)
        rest = (k - positive) / max(n - positive, 1)
        pi = [1.0 if x > 0 else rest for x in s]
    if floor:
        pi = [(1 - floor) * p + floor * k / n for p in pi]
    scale = k / sum(pi)
    edge = 0.0
    indices: list[int] = []
    for i, p in enumerate(pi):
        edge += p * scale
        while len(indices) < k and len(indices) + u < edge:
            indices.append(i)
    indices += [n - 1] * (k - len(indices))  # rounding at the very end
    return indices, [1 / pi[i] if pi[i] > 0 else 0.0 for i in indices]


def order_of(
    design: str, n: int, block: int, device: torch.device, seed: int, stream: int
) -> Tensor | None:
    """The order in which ``n`` rows come before the systematic draw; None for their natural one.

    Args:
        design: one of :data:`ROW_DESIGNS`.
        n: number of rows.
        block: how many consecutive rows stay together in the ``shuffled`` design.
        device: where the order is wanted.
        seed: with ``stream``, what the order is a function of.
        stream: see ``seed``.
    """
    size = {"shuffled": block, "permuted": 1}.get(design, n)
    if size >= n:
        return None
    blocks = torch.randperm(n // size, device=device, generator=generator_of(device, seed, stream))
    if size == 1:
        return blocks
    return (blocks[:, None] * size + torch.arange(size, device=device)).flatten()


DESIGNS = ("systematic", "permuted", "independent")
"""``systematic`` in the natural order, ``permuted`` (systematic in random order), and
``independent`` (Bernoulli: every row is returned, the dropped ones with weight zero; the reference
whose variance formulas are exact, it saves nothing)."""

ROW_DESIGNS = ("shuffled", *DESIGNS)
"""Designs for rows that are known to be samples, or tokens of samples: ``shuffled`` is systematic within a
random order of the samples, in which the tokens of a sample keep their natural order."""
