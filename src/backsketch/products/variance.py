r"""Variance of 8-bit products in closed form: ``V = Δ² f (1 - f)`` of each operand, through the product.

For independent roundings of A and B, entry by entry, with A² and V taken entry by entry,

.. math:: E(\tilde A \tilde B - A B)^2 = V_A B^2 + A^2 V_B + V_A V_B .
"""

from __future__ import annotations

import torch
from torch import Tensor

from backsketch.products.eager import BLOCK
from backsketch.theory import variance

__all__ = ["Variances"]


class Variances:
    """Stands in for :class:`backsketch.products.Products`: variances of the products, entry by entry, in float64.

    Args:
        saved: whether x was rounded in the forward pass, so that g is rounded by column for ``grad_weight``.
    """

    def __init__(self, saved: bool = False) -> None:
        self.saved = saved

    def vjps(
        self,
        g: Tensor,
        x: Tensor | None,
        weight: Tensor | None,
        *,
        packed: tuple[Tensor, Tensor] | None = None,
        with_bias: bool = False,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Variances of what :func:`backsketch.products.vjps` estimates; zero for the bias."""
        g = g.double()
        below = None if weight is None else _by_rows(g, weight.double())
        rule = _by_columns if self.saved else _folded
        at_weight = None if x is None else rule(g, x.double())
        return below, at_weight, g.new_zeros(g.shape[1]) if with_bias else None


def _by_rows(g: Tensor, weight: Tensor) -> Tensor:
    """g rounded by row and the weight by column."""
    return _through_product(g, _of_entries(g, 1), weight, _of_entries(weight, 0))


def _folded(g: Tensor, x: Tensor) -> Tensor:
    """g rounded by row, and x times the steps of these rows by block and column."""
    step = _step(g, 1)
    levels = torch.where(step > 0, g / step, 0.0)
    of_levels = _of_entries(g, 1) / torch.where(step > 0, step, 1.0).square()
    return _in_blocks(levels, of_levels, x * step)


def _by_columns(g: Tensor, x: Tensor) -> Tensor:
    """Both rounded by block and column."""
    return _in_blocks(g, torch.cat([_of_entries(part, 0) for part in g.split(BLOCK)]), x)


def _in_blocks(g: Tensor, of_g: Tensor, x: Tensor) -> Tensor:
    parts = zip(g.split(BLOCK), of_g.split(BLOCK), x.split(BLOCK))
    terms = [_through_product(a.T, v.T, b, _of_entries(b, 0)) for a, v, b in parts]
    return torch.stack(terms).sum(0)


def _through_product(a: Tensor, of_a: Tensor, b: Tensor, of_b: Tensor) -> Tensor:
    return of_a @ (b.square() + of_b) + a.square() @ of_b


def _step(x: Tensor, dim: int) -> Tensor:
    return x.abs().amax(dim, keepdim=True) / 127


def _of_entries(x: Tensor, dim: int) -> Tensor:
    """Variance of each entry, rounded in groups along ``dim``."""
    step = _step(x, dim)
    levels = torch.where(step > 0, x / step, 0.0)
    return variance.quantized(step.expand_as(x), levels - levels.floor())
