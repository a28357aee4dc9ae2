r"""Variance of 8-bit products in closed form: ``V = Δ² f (1 - f)`` of each operand, through the product.

Δ is the distance of the two levels around an entry, f its fraction of the way between them.

For independent roundings of A and B, entry by entry, with A² and V taken entry by entry,

.. math:: E(\tilde A \tilde B - A B)^2 = V_A B^2 + A^2 V_B + V_A V_B .
"""

from __future__ import annotations

import torch
from torch import Tensor

from backsketch.products import Geometry, Packed
from backsketch.products.convolution import over_positions
from backsketch.products.numbers import NUMBERS
from backsketch.theory import variance

__all__ = ["Variances"]


class Variances:
    """Stands in for :class:`backsketch.products.Products`: variances of the products, entry by entry, in float64.

    Args:
        saved: whether x was rounded in the forward pass, so that g is rounded by column for ``grad_weight``.
        numbers: ``"int8"`` or ``"float8"``.
    """

    def __init__(self, saved: bool = False, numbers: str = "int8") -> None:
        self._saved, self._numbers = saved, NUMBERS[numbers]

    def vjps(
        self, g: Tensor, x: Tensor | Packed | None, weight: Tensor | None, with_bias: bool = False
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Variances of what :func:`backsketch.products.vjps` estimates; zero for the bias."""
        assert not isinstance(x, Packed)
        g = g.double()
        below = None if weight is None else self._by_rows(g, weight.double())
        rule = self._by_columns if self._saved else self._folded
        at_weight = None if x is None else rule(g, x.double())
        return below, at_weight, g.new_zeros(g.shape[1]) if with_bias else None

    def convolution_vjps(
        self, g: Tensor, x: Tensor | Packed | None, weight: Tensor | None, geometry: Geometry
    ) -> tuple[Tensor | None, Tensor | None]:
        """Variances of what :func:`backsketch.products.convolution_vjps` estimates."""
        assert not isinstance(x, Packed)
        if (dense := geometry.dense()) is not None:
            x = None if x is None else geometry.read(x)
            below, at_weight = self.convolution_vjps(g, x, weight, dense)
            return None if below is None else geometry.place(below), at_weight
        if not self._saved and geometry.is_over_positions(g, x):
            return over_positions(self.vjps, g, x, weight, geometry)
        g = g.double()
        below = at_weight = None
        if weight is not None:
            w = weight.double()
            of_g = self._in_channels(g, 1, geometry.groups, (2,))
            of_w = self._in_channels(w, 0, geometry.groups, (1,))
            below = geometry.input_vjp(of_g, w.square() + of_w)
            below = below + geometry.input_vjp(g.square(), of_w)
        if x is not None:
            x = x.double()
            of_g, of_x = (self._by_channel(t, geometry.samples_of_block()) for t in (g, x))
            at_weight = geometry.weight_vjp(of_g, x.square() + of_x)
            at_weight = at_weight + geometry.weight_vjp(g.square(), of_x)
        return below, at_weight

    def _in_channels(self, t: Tensor, dim: int, groups: int, shared: tuple[int, ...]) -> Tensor:
        """Of each entry of a cotangent or weight, where groups of channels share a scale."""
        grouped = t.unflatten(dim, (groups, -1))
        shared = (*shared, *range(3, grouped.ndim))
        return self._of_entries(grouped, shared).flatten(dim, dim + 1)

    def _by_channel(self, t: Tensor, together: int) -> Tensor:
        dims = (0, *range(2, t.ndim))
        return torch.cat([self._of_entries(part, dims) for part in t.split(together)])

    def _by_rows(self, g: Tensor, weight: Tensor) -> Tensor:
        """g rounded by row and the weight by column."""
        return _through_product(g, self._of_entries(g, 1), weight, self._of_entries(weight, 0))

    def _folded(self, g: Tensor, x: Tensor) -> Tensor:
        """g rounded by row, and x times the scales of these rows by block and column."""
        scale = self._scale(g, 1)
        levels = torch.where(scale > 0, g / scale, 0.0)
        of_levels = self._of_entries(g, 1) / torch.where(scale > 0, scale, 1.0).square()
        return self._in_blocks(levels, of_levels, x * scale)

    def _by_columns(self, g: Tensor, x: Tensor) -> Tensor:
        """Both rounded by block and column."""
        parts = [self._of_entries(g[block], 0) for block in self._numbers.blocks(len(g))]
        return self._in_blocks(g, torch.cat(parts), x)

    def _in_blocks(self, g: Tensor, of_g: Tensor, x: Tensor) -> Tensor:
        terms = [
            _through_product(g[b].T, of_g[b].T, x[b], self._of_entries(x[b], 0))
            for b in self._numbers.blocks(len(g))
        ]
        return torch.stack(terms).sum(0)

    def _scale(self, x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
        return self._numbers.scale(x.abs().amax(dim, keepdim=True))[0]

    def _of_entries(self, x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
        """Variance of each entry, rounded in groups along ``dim``."""
        scale = self._scale(x, dim)
        levels = torch.where(scale > 0, x / scale, 0.0)
        spacing = self._numbers.spacing(levels)
        return variance.quantized(scale * spacing, (levels / spacing).frac().abs())


def _through_product(a: Tensor, of_a: Tensor, b: Tensor, of_b: Tensor) -> Tensor:
    return of_a @ (b.square() + of_b) + a.square() @ of_b
