"""A layer seen from its backward pass: two bilinear products, with rows and columns to sample.

The estimators know a layer only through this interface, so that each is written once and works for
linear layers, convolutions and attention projections alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from backsketch.sampling import is_readable, operator

if TYPE_CHECKING:
    from backsketch.products import Packed, Source

__all__ = ["Bilinear", "energy", "gather_scaled", "norms", "scale_free", "scatter", "unit"]


class Bilinear:
    """The products ``input_vjp(G, W)`` and ``weight_vjp(G, X)`` of one layer, linear in each argument.

    Rows (dimension 0 of ``G`` and ``X``) never interact. Columns are the output channels (dimension 1
    of ``G``, dimension 0 of ``W``) or, where ``groups > 1``, whole groups of channels, because a
    selection of groups is a grouped layer again.

    ``gram_rows`` and ``pair_rows`` are the most rows for which :meth:`row_gram` and :meth:`pair_energy` take
    less time than the passes whose variance they explain. ``gathers_rows`` says whether kept rows are copied out
    before they are multiplied.
    """

    groups: int = 1
    gathers_rows: ClassVar[bool] = True
    gram_rows: ClassVar[int] = 256
    pair_rows: ClassVar[int] = 0

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The exact layer, by the very call that the unconverted module makes."""
        raise NotImplementedError

    def rows(self, tensor: Tensor) -> Tensor:
        """An input or a cotangent with its rows along dimension 0 and its columns along dimension 1."""
        raise NotImplementedError

    def unrows(self, grad_input: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Undo :meth:`rows` on the gradient of an input of the given ``shape``."""
        raise NotImplementedError

    def bias_vjp(self, cotangent: Tensor) -> Tensor:
        """``(columns,)``: the exact gradient of the bias."""
        return cotangent.flatten(2).sum((0, 2)) if cotangent.ndim > 2 else cotangent.sum(0)

    def input_vjp(self, cotangent: Tensor, weight: Tensor) -> Tensor:
        """Gradient of the rows of the input."""
        raise NotImplementedError

    def weight_vjp(self, cotangent: Tensor, x: Tensor) -> Tensor:
        """Gradient of the weight."""
        raise NotImplementedError

    def vjps(
        self, cotangent: Tensor, x: Tensor, weight: Tensor, with_bias: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """:meth:`input_vjp`, :meth:`weight_vjp` and, if wanted, :meth:`bias_vjp`: cheaper in one for some."""
        grad_bias = self.bias_vjp(cotangent) if with_bias else None
        return self.input_vjp(cotangent, weight), self.weight_vjp(cotangent, x), grad_bias

    def with_products(self, source: Source) -> Bilinear | None:
        """The same layer with its backward products computed by ``source``, or None where there is no way."""
        return None

    def slow_products(self, device: torch.device) -> str:
        """Why the products of :meth:`with_products` gain no time for this kind of layer; empty if they may."""
        return ""

    def pack(self, x: Tensor, seed: Tensor, numbers: str) -> Packed:
        """The codes of an input as the products of :meth:`with_products` read them."""
        raise NotImplementedError

    def unpack(self, packed: Packed, cotangent: Tensor, numbers: str) -> Tensor:
        """The rows of the input of which :meth:`pack` kept the codes."""
        raise NotImplementedError

    def row_gram(self, cotangent: Tensor, x: Tensor) -> Tensor:
        """``(rows, rows)`` inner products of the rows' contributions to ``grad_weight``."""
        parts = [self.weight_vjp(g[None], xi[None]) for g, xi in zip(cotangent, x)]
        return _gram(torch.stack(parts))

    def pair_energy(self, cotangent: Tensor, x: Tensor) -> Tensor:
        """``sum_{i != j} ‖c_ij‖² + <c_ij, c_ji>`` with ``c_ij = weight_vjp(g_i, x_j)``."""
        n = x.shape[0]
        parts = torch.stack(
            [self.weight_vjp(g[None], xj[None]).flatten() for g in cotangent for xj in x]
        )
        c = parts.view(n, n, -1).to(torch.float64)
        energy = c.square().sum(-1) + (c * c.transpose(0, 1)).sum(-1)
        return energy.sum() - energy.diagonal().sum()

    # Columns -------------------------------------------------------------------------------------

    def num_columns(self, cotangent: Tensor) -> int:
        """How many columns there are to choose from."""
        return cotangent.shape[1] if self.groups == 1 else self.groups

    def by_column(self, channels: Tensor, dim: int) -> Tensor:
        """Sum a quantity per channel to one per column, along ``dim``."""
        if self.groups == 1:
            return channels
        return channels.unflatten(dim, (self.groups, -1)).sum(dim + 1)

    def input_vjp_columns(
        self, cotangent: Tensor, weight: Tensor, indices: Tensor, weights: Tensor
    ) -> Tensor:
        """``input_vjp`` summed over the chosen columns only, each times its weight."""
        return self.input_vjp(
            gather_scaled(cotangent, 1, indices, weights), weight.index_select(0, indices)
        )

    def weight_vjp_columns(
        self, cotangent: Tensor, x: Tensor, indices: Tensor, weights: Tensor
    ) -> Tensor:
        """``weight_vjp`` with only the chosen columns computed, each times its weight."""
        part = self.weight_vjp(gather_scaled(cotangent, 1, indices, weights), x)
        return scatter(part, 0, indices, cotangent.shape[1])

    def column_gram(self, cotangent: Tensor, weight: Tensor) -> Tensor:
        """``(columns, columns)`` inner products of the columns' contributions to ``grad_input``."""
        one = cotangent.new_ones(1)
        each = torch.arange(self.num_columns(cotangent), device=cotangent.device)
        return _gram(
            torch.stack([self.input_vjp_columns(cotangent, weight, j[None], one) for j in each])
        )


def _gram(parts: Tensor) -> Tensor:
    flat = parts.flatten(1).to(torch.float64)
    return flat @ flat.T


def gather_scaled(tensor: Tensor, dim: int, indices: Tensor, weights: Tensor) -> Tensor:
    """The chosen slices of ``tensor`` along ``dim``, each multiplied by its weight."""
    shape = [1] * tensor.ndim
    shape[dim] = -1
    # In place on the fresh copy, which saves an allocation. The weights keep their precision: in 16 bits
    # their rounding would be an error common to all draws.
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return tensor.index_select(dim, indices).mul_(weights.to(wide).view(shape))


def _scatter_impl(part: Tensor, dim: int, indices: Tensor, n: int) -> Tensor:
    return _zeros(part, dim, n).index_add_(dim, indices, part)


def _zeros(part: Tensor, dim: int, n: int) -> Tensor:
    return part.new_zeros((*part.shape[:dim], n, *part.shape[dim + 1 :]))


# An operator that compilers do not look into: the code that inductor generates for an accumulating scatter
# writes to wrong addresses for some strides (docs/upstream/inductor-index-add.md).
_scatter = operator(
    "scatter(Tensor part, int dim, Tensor indices, SymInt n) -> Tensor",
    _scatter_impl,
    lambda part, dim, indices, n: _zeros(part, dim, n),
)


def scatter(part: Tensor, dim: int, indices: Tensor, n: int) -> Tensor:
    """Put the slices of ``part`` along ``dim`` at ``indices`` of an otherwise zero tensor with ``n`` slices."""
    return _scatter(part, dim, indices, n)


def scale_free(scores: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Return ``scores(*tensors)`` up to a common positive factor, for tensors of any magnitude.

    Scores are norms, and squares leave the range of float32 where entries are below 1e-22 or above 1e19.
    The tensors are then divided by their largest entries first. Where the scores cannot be read without
    waiting for a device or breaking a compiler's graph, that is always done.

    Args:
        scores: a function that is homogeneous in each tensor; it returns ``(n,)``, non-negative.
        tensors: its arguments.
    """
    if is_readable(*tensors):
        plain = scores(*tensors)
        if plain.numel() == 0 or 1e-10 < float(plain.max()) < 1e17:
            return plain
    return scores(*map(unit, tensors))


def unit(tensor: Tensor) -> Tensor:
    """``tensor`` in float32 or better, divided by its largest absolute entry."""
    wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    if wide.numel() == 0:
        return wide
    largest = wide.abs().amax()
    return wide / torch.where(largest > 0, largest, 1.0)


def energy(cotangent: Tensor) -> Tensor:
    """Squared norms ``(rows, columns)`` of the entries of a cotangent, positions summed, in float32."""
    g = cotangent.to(torch.promote_types(cotangent.dtype, torch.float32))
    return g.square() if g.ndim == 2 else g.square().flatten(2).sum(2)


def norms(tensor: Tensor, dim: int = 0, order: float = 2) -> Tensor:
    """The norm of each slice of ``tensor`` along ``dim``, in float32 or better."""
    t = tensor.movedim(dim, 0).flatten(1)
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    return torch.linalg.vector_norm(t, ord=order, dim=1, dtype=dtype)
