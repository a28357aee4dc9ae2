r"""The keep from which a sketch pays, in closed form.

Model. A sketch at keep p costs :math:`c = a + b p` (``fixed`` a and ``slope`` b: 1/3 and 2/3 where both
products are sketched, 2/3 and 1/3 for ``grad_weight`` alone, 1/3 and 1 for a recomputed region).

*Variance.* Contributions of norms :math:`s_i` drawn with :math:`\pi_i \propto s_i`, none capped at 1, have
:math:`\sum_i s_i^2/\pi_i = (\sum_i s_i)^2/k`, so that the second moment is multiplied by
:math:`(\sum s)^2/(k \sum s^2) = \kappa/p` with

.. math:: \kappa = \frac{(E s)^2}{E s^2} \in (0, 1] .

Equal norms (or uniform masks, whatever the norms) have :math:`\kappa = 1`. Caps only add variance:
:math:`v \ge \max(1, \kappa/p)`. Where SGD noise dominates, the second moment of the contributions *is* the SGD
variance and :math:`v = \kappa/p`.

*Break-even.* :math:`\rho = (a + bp)(1 + \beta\kappa/p)/(1+\beta) = 1` is the quadratic

.. math:: b p^2 - (1 + \beta - a - b\beta\kappa)\, p + a \beta \kappa = 0 ,

whose smaller root is the least keep that pays. For :math:`\beta \to \infty` it is
:math:`p = a\kappa/(1 - b\kappa)`, with both products :math:`\kappa/(3 - 2\kappa)`. For :math:`\kappa = 1` the
roots are :math:`\beta/2` and 1: a uniform mask pays against exact training only where :math:`\beta < 2`, and
against the smaller batch of the same cost never, because :math:`1/p \ge 3/(1+2p)`
(:func:`gain_over_smaller_batch`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from backsketch.theory.cost import smaller_batch_ratio, time_to_target_ratio
from backsketch.theory.variance import minimal_sampling

__all__ = [
    "break_even_keep",
    "gain_over_smaller_batch",
    "kappa",
    "sampling_multiplier",
    "unevenness_multiplier",
]


def kappa(scores: Tensor) -> float:
    r""":math:`\kappa = (E s)^2/E s^2` of non-negative scores ``(n,)``: 1 where all are equal.

    Example:
        >>> kappa(torch.ones(5)), kappa(torch.tensor([1.0, 0, 0, 0]))
        (1.0, 0.25)
    """
    s = scores.detach().flatten().to(torch.float64)
    square = float(s.square().mean())
    return float(s.mean()) ** 2 / square if square > 0 else 1.0


def unevenness_multiplier(kappa: float, keep: float) -> float:
    r""":math:`\max(1, \kappa/p)`: the least that any probabilities can do, reached where none is capped."""
    if not 0 < kappa <= 1 or not 0 < keep <= 1:
        raise ValueError(f"kappa and keep must lie in (0, 1]; got {kappa!r} and {keep!r}")
    return max(1.0, kappa / keep)


def sampling_multiplier(scores: Tensor, k: int) -> float:
    r"""The same with the caps: :math:`\sum_i s_i^2/\pi_i / \sum_i s_i^2` at the optimal probabilities.

    Example:
        >>> sampling_multiplier(torch.ones(8), 4)
        2.0
    """
    energy = float(scores.detach().to(torch.float64).square().sum())
    return 1 + float(minimal_sampling(scores, k)) / energy if energy > 0 else 1.0


def break_even_keep(
    kappa: float, beta: float = math.inf, *, fixed: float = 1 / 3, slope: float = 2 / 3
) -> float | None:
    r"""The least keep at which the sketch takes no longer than exact training, None if there is none.

    The law assumed is :math:`v = \kappa/p`. A result of 1 says that only the exact step breaks even.

    Args:
        kappa: unevenness of the scores, in (0, 1]; 1 for a uniform mask.
        beta: noise scale, 0 to infinity.
        fixed: cost of a step at keep 0.
        slope: what keep adds to it.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> round(break_even_keep(0.5), 6)  # kappa / (3 - 2 kappa)
        0.25
        >>> round(break_even_keep(1.0), 6)  # uniform masks never pay where noise dominates
        1.0
        >>> round(break_even_keep(0.5, fixed=1 / 3, slope=1.0), 6)  # a recomputed region
        0.333333
    """
    if not 0 < kappa <= 1 or not beta >= 0 or not fixed >= 0 or not slope > 0:
        raise ValueError(
            "kappa must lie in (0, 1], beta and fixed must be non-negative and slope positive; got "
            f"{kappa!r}, {beta!r}, {fixed!r}, {slope!r}"
        )
    if math.isinf(beta):
        root = fixed * kappa / (1 - slope * kappa) if slope * kappa < 1 else math.inf
    else:
        root = _smaller_root(slope, 1 + beta - fixed - slope * beta * kappa, fixed * beta * kappa)
    root = min(root, 1.0) if root <= 1 + 1e-9 else root
    return root if root <= 1 else None


def _smaller_root(a: float, b: float, c: float) -> float:
    """The smaller root of ``a p² - b p + c``, infinite where there is no positive one."""
    discriminant = b * b - 4 * a * c
    if b <= 0 or discriminant < -1e-12:
        return math.inf
    # The form without cancellation.
    return 2 * c / (b + math.sqrt(max(discriminant, 0.0)))


def gain_over_smaller_batch(c: float, v: float, beta: float) -> float:
    r"""Time of the sketch over that of the batch whose step costs the same: below 1 the sketch wins.

    :math:`(1 + \beta v)/(1 + \beta/c)`: the comparison is of v with :math:`1/c`, whatever :math:`\beta`.

    Example:
        >>> gain_over_smaller_batch(0.5, 1.5, math.inf)
        0.75
    """
    return time_to_target_ratio(c, v, beta) / smaller_batch_ratio(c, beta)
