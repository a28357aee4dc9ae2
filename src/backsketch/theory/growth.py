r"""How variance travels through the graph: growth along a chain, and the martingale over sites.

**Growth.** A sketch is unbiased given the cotangent it receives, so a site of relative variance
:math:`\omega_l` turns second moment :math:`M` into :math:`(1+\omega_l) M`. Along L independently sketched
layers that is :math:`\prod_l (1+\omega_l)`: exponential in depth. The three cures: one shared draw (the
factor is paid once), residual branches (only the branch's share of the energy pays), and sketching
``grad_weight`` only (no factor at all).

**Martingale.** Number the sites in backward order and let :math:`\hat g_k` be the gradient with sites
1..k sketched and the rest exact, all with the same draws. Site k's error has mean zero given the draws
before it, so :math:`D_k = \hat g_k - \hat g_{k-1}` are martingale differences,
:math:`E\langle D_j, D_k\rangle = 0`, and

.. math:: E\|\hat g - g\|^2 = \sum_k E\|D_k\|^2 .

Source: arXiv 2602.14701, variance through the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

__all__ = [
    "Martingale",
    "martingale_decomposition",
    "residual_relative_variance",
    "second_moment_growth",
    "shared_growth",
]


def second_moment_growth(omegas: Sequence[float]) -> list[float]:
    r""":math:`\prod_{j \le l} (1+\omega_j)` after each of the sites of a chain, independent draws.

    Args:
        omegas: relative variance :math:`E\|\varepsilon_l\|^2 / \|G_l\|^2` of each site, in backward order.

    Example:
        >>> second_moment_growth([1.0, 0.5])
        [2.0, 3.0]
    """
    _check(omegas)
    return list(accumulate(omegas, lambda m, w: m * (1 + w), initial=1.0))[1:]


def shared_growth(omega: float, length: int) -> list[float]:
    r""":math:`1+\omega` at every depth: one draw, made once and used by the whole chain.

    Exact where a row's share of the energy is the same at every depth; otherwise
    :math:`\sum_i e_{il}/\pi_i / \sum_i e_{il}` with the energies of the layer.

    Example:
        >>> shared_growth(0.5, 3)
        [1.5, 1.5, 1.5]
    """
    _check([omega])
    return [1 + omega] * length


def residual_relative_variance(omega: float, share: float) -> float:
    r"""Relative variance of a residual block whose branch alone is sketched: :math:`\omega s`.

    :math:`G' = G + J^\top G` has error :math:`\varepsilon` with
    :math:`E\|\varepsilon\|^2 = \omega\|J^\top G\|^2`; ``share`` is
    :math:`s = \|J^\top G\|^2/\|G + J^\top G\|^2`, well below 1 where branches are small.

    Example:
        >>> residual_relative_variance(1.0, 0.1)
        0.1
    """
    _check([omega, share])
    return omega * share


def _check(values: Sequence[float]) -> None:
    if any(not value >= 0 for value in values):
        raise ValueError(f"relative variances must be non-negative; got {list(values)!r}")


@dataclass(frozen=True)
class Martingale:
    """The decomposition of a variance over sites, with standard errors over the draws.

    Attributes:
        parts: ``E‖D_k‖²`` per site, in backward order.
        total: ``E‖ĝ − g‖²`` from the same draws.
        cross: ``total − sum(parts)``, which theory says is zero.
        cross_error: standard error of ``cross``.
    """

    parts: tuple[float, ...]
    total: float
    cross: float
    cross_error: float


def martingale_decomposition(prefixes: Sequence[Tensor]) -> Martingale:
    r"""Split the variance of the last of some gradient estimates over the steps that lead to it.

    Args:
        prefixes: :math:`\hat g_0, \dots, \hat g_S`, each ``(draws, d)``; row r of all of them uses the
            same random draws; :math:`\hat g_0` is exact.

    Raises:
        ValueError: fewer than two estimates or draws, or differing shapes.

    Example:
        >>> z = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
        >>> martingale_decomposition([torch.zeros(2, 2), z]).total
        1.0
    """
    if len(prefixes) < 2 or len({p.shape for p in prefixes}) != 1 or prefixes[0].shape[0] < 2:
        raise ValueError(
            "need at least two estimates of one shape (draws, d), with two draws or more"
        )
    stack = [p.detach().to(torch.float64) for p in prefixes]
    parts = torch.stack([(b - a).square().sum(1) for a, b in pairwise(stack)])
    total = (stack[-1] - stack[0]).square().sum(1)
    cross = total - parts.sum(0)
    error = float(cross.std() / cross.shape[0] ** 0.5)
    means = tuple(parts.mean(1).tolist())
    return Martingale(means, float(total.mean()), float(cross.mean()), error)
