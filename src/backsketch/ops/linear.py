"""Linear layers of any leading shape; with the weight transposed; several of them over groups of rows."""

from __future__ import annotations

import itertools
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from backsketch import products
from backsketch.estimators import Bilinear, Estimator
from backsketch.ops.autocast import cast_for_autocast
from backsketch.ops.function import apply
from backsketch.ops.opaque import OPAQUE, OpaqueVJP
from backsketch.products import Packed, Source
from backsketch.theory import variance

__all__ = ["Linear", "TransposedLinear", "grouped_linear", "linear", "transposed_linear"]


class Linear(Bilinear):
    """``Z = X Wᵀ + b`` with X ``(rows, in)``, W ``(out, in)``: the products are ``G W`` and ``Gᵀ X``."""

    gram_rows: ClassVar[int] = 4096
    pair_rows: ClassVar[int] = 4096

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def rows(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(-1, tensor.shape[-1])

    def unrows(self, grad_input: Tensor, shape: tuple[int, ...]) -> Tensor:
        return grad_input.view(shape)

    def input_vjp(self, cotangent: Tensor, weight: Tensor) -> Tensor:
        return cotangent @ weight

    def weight_vjp(self, cotangent: Tensor, x: Tensor) -> Tensor:
        return cotangent.T @ x

    def with_products(self, source: Source) -> Bilinear | None:
        return RoundedLinear(self, source)

    def pack(self, x: Tensor, seed: Tensor, numbers: str) -> Packed:
        return products.pack(self.rows(x), seed, numbers=numbers)

    def unpack(self, packed: Packed, cotangent: Tensor, numbers: str) -> Tensor:
        return products.unpack(packed, cotangent.shape[0], numbers)

    def row_gram(self, cotangent: Tensor, x: Tensor) -> Tensor:
        g, x = cotangent.double(), x.double()
        return (g @ g.T) * (x @ x.T)

    def pair_energy(self, cotangent: Tensor, x: Tensor) -> Tensor:
        return variance.pair_energy(cotangent, x)

    def column_gram(self, cotangent: Tensor, weight: Tensor) -> Tensor:
        g, w = cotangent.double(), weight.double()
        return (g.T @ g) * (w @ w.T)


class RoundedLinear(Linear):
    """A linear layer whose backward products are computed elsewhere, in low precision."""

    def __init__(self, exact: Linear, source: Source) -> None:
        self.exact, self.source = exact, source

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.exact.forward(x, weight, bias)

    def rows(self, tensor: Tensor) -> Tensor:
        return tensor if tensor.ndim == 2 else self.exact.rows(tensor)

    def unrows(self, grad_input: Tensor, shape: tuple[int, ...]) -> Tensor:
        return self.exact.unrows(grad_input, shape)

    def input_vjp(self, cotangent: Tensor, weight: Tensor) -> Tensor:
        below = self.source.vjps(cotangent, None, weight.flatten(1))[0]
        assert below is not None
        return below

    def weight_vjp(self, cotangent: Tensor, x: Tensor) -> Tensor:
        at_weight = self.source.vjps(cotangent, x, None)[1]
        assert at_weight is not None
        return at_weight

    def vjps(
        self, cotangent: Tensor, x: Tensor, weight: Tensor, with_bias: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        flat = weight.flatten(1)
        below, at_weight, at_bias = self.source.vjps(cotangent, x, flat, with_bias=with_bias)
        assert below is not None
        assert at_weight is not None
        return below, at_weight, at_bias


class TransposedLinear(Linear):
    """A linear layer by the call of ``transformers.pytorch_utils.Conv1D``; the weight here is ``(out, in)``."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        assert bias is not None
        flat = torch.addmm(bias, x.view(-1, x.shape[-1]), weight.T)
        return flat.view(*x.shape[:-1], weight.shape[0])


_LINEAR, _TRANSPOSED = Linear(), TransposedLinear()
OPAQUE[Linear] = OPAQUE[TransposedLinear] = OpaqueVJP("linear_vjps", _LINEAR)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, sketch: Estimator) -> Tensor:
    """``F.linear`` with a sketched backward pass.

    Args:
        x: ``(*, in)``, any leading shape, any strides, empty included.
        weight: ``(out, in)``.
        bias: ``(out,)`` or None; its gradient is exact.
        sketch: the estimator of the two products.

    Returns:
        ``(*, out)``, bit-identical to ``F.linear(x, weight, bias)``.

    Raises:
        RuntimeError: on double backward.
        TypeError: ``sketch`` is not a layer estimator.

    Example:
        >>> import torch, backsketch as bs
        >>> x, w = torch.randn(8, 3), torch.randn(5, 3, requires_grad=True)
        >>> bs.ops.linear(x, w, None, bs.Rows(keep=0.5)).sum().backward()
        >>> w.grad.shape
        torch.Size([5, 3])
    """
    check_estimator(sketch)
    return apply(_LINEAR, *cast_for_autocast(x, weight, bias), sketch)


def transposed_linear(x: Tensor, weight: Tensor, bias: Tensor, sketch: Estimator) -> Tensor:
    """:func:`linear` for a weight that is held as ``(in, out)``.

    Args:
        x: ``(*, in)``, whose leading dimensions can be viewed as one.
        weight: ``(in, out)``.
        bias: ``(out,)``; its gradient is exact.
        sketch: the estimator of the two products.

    Returns:
        ``(*, out)``, bit-identical to ``torch.addmm(bias, x.view(-1, in), weight)`` in that shape.

    Raises:
        RuntimeError: on double backward.
        TypeError: ``sketch`` is not a layer estimator.
    """
    check_estimator(sketch)
    x, weight, cast_bias = cast_for_autocast(x, weight, bias)
    return apply(_TRANSPOSED, x, weight.T, cast_bias, sketch)


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor, sketch: Estimator) -> Tensor:
    """Linear layers over consecutive groups of rows, as ``F.grouped_mm`` does them, each with its own draws.

    Args:
        x: ``(rows, in)``.
        weight: ``(groups, out, in)``.
        ends: ``(groups,)`` index after the last row of each group; rows after the last end give zeros.
        sketch: the estimator of each group's two products.

    Returns:
        ``(rows, out)``.

    Raises:
        RuntimeError: on double backward.
        TypeError: ``sketch`` is not a layer estimator.
    """
    check_estimator(sketch)
    bounds = [0, *ends.tolist()]
    sizes = [after - before for before, after in itertools.pairwise(bounds)]
    *groups, rest = x.split([*sizes, x.shape[0] - bounds[-1]])
    with torch.autocast(x.device.type, enabled=False):  # F.grouped_mm does not know it
        parts = [linear(rows, w, None, sketch) for rows, w in zip(groups, weight.unbind())]
    return torch.cat([*parts, rest.new_zeros(rest.shape[0], weight.shape[1])])


def check_estimator(sketch: object) -> None:
    """Raise TypeError unless ``sketch`` can act at a layer."""
    if not isinstance(sketch, Estimator):
        raise TypeError(
            f"sketch must be a layer estimator such as bs.Rows(keep=0.25); got {sketch!r}"
        )
