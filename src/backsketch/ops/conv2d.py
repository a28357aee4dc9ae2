"""Two-dimensional convolutions: rows are samples, or positions where the kernel is 1×1."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from backsketch.estimators import Bilinear, Estimator
from backsketch.estimators.bilinear import gather_scaled, scatter
from backsketch.ops.autocast import cast_for_autocast
from backsketch.ops.function import apply
from backsketch.ops.linear import Linear, check_estimator
from backsketch.products import Source
from backsketch.sampling import operator

__all__ = ["Conv2d", "PointwiseConv2d", "bilinear_conv2d", "conv2d"]

Pair = tuple[int, ...]  # of two: height, width


@dataclass(frozen=True)
class Conv2d(Bilinear):
    """A convolution over ``(samples, channels, height, width)``; rows are samples.

    ``spatial`` is the height and width of the input, which the cotangent alone does not tell.
    """

    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    spatial: Pair
    groups: int = 1

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def rows(self, tensor: Tensor) -> Tensor:
        return tensor

    def unrows(self, grad_input: Tensor, shape: tuple[int, ...]) -> Tensor:
        return grad_input

    def input_vjp(self, cotangent: Tensor, weight: Tensor) -> Tensor:
        return self._input_vjp(cotangent, weight, self.groups)

    def weight_vjp(self, cotangent: Tensor, x: Tensor) -> Tensor:
        return self._weight_vjp(cotangent, x, self.groups)

    def vjps(
        self, cotangent: Tensor, x: Tensor, weight: Tensor, with_bias: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        mask = [True, True, with_bias]
        grad_input, grad_weight, grad_bias = self._backward(cotangent, x, weight, self.groups, mask)
        return grad_input, grad_weight, grad_bias if with_bias else None

    def input_vjp_columns(
        self, cotangent: Tensor, weight: Tensor, indices: Tensor, weights: Tensor
    ) -> Tensor:
        if self.groups == 1:
            return super().input_vjp_columns(cotangent, weight, indices, weights)
        g = self._choose(cotangent, 1, indices, weights)
        w = self._choose(weight, 0, indices)
        part = self._input_vjp(g, w, indices.shape[0])
        return self._place(part, 1, indices)

    def weight_vjp_columns(
        self, cotangent: Tensor, x: Tensor, indices: Tensor, weights: Tensor
    ) -> Tensor:
        if self.groups == 1:
            return super().weight_vjp_columns(cotangent, x, indices, weights)
        g = self._choose(cotangent, 1, indices, weights)
        part = self._weight_vjp(g, self._choose(x, 1, indices), indices.shape[0])
        return self._place(part, 0, indices)

    def with_products(self, products: Source) -> Bilinear | None:
        return RoundedConv2d(self, products)

    def unfold(self, x: Tensor) -> Tensor:
        """``(positions, channels * kernel)``: what each position of the output sees, sample by sample."""
        columns = F.unfold(x, self.kernel, self.dilation, self.padding, self.stride)
        return columns.transpose(1, 2).flatten(0, 1)

    def fold(self, columns: Tensor, samples: int) -> Tensor:
        """The transpose of :meth:`unfold`."""
        columns = columns.unflatten(0, (samples, -1)).transpose(1, 2)
        # Opaque: inductor would accumulate by index.
        return _fold(columns, self.spatial, self.kernel, self.dilation, self.padding, self.stride)

    def _choose(
        self, tensor: Tensor, dim: int, indices: Tensor, weights: Tensor | None = None
    ) -> Tensor:
        """The channels of the chosen groups."""
        blocks = tensor.unflatten(dim, (self.groups, -1))
        chosen = (
            blocks.index_select(dim, indices)
            if weights is None
            else gather_scaled(blocks, dim, indices, weights)
        )
        return chosen.flatten(dim, dim + 1)

    def _place(self, part: Tensor, dim: int, indices: Tensor) -> Tensor:
        """Undo :meth:`_choose`: the channels of the other groups are zero."""
        blocks = part.unflatten(dim, (indices.shape[0], -1))
        return scatter(blocks, dim, indices, self.groups).flatten(dim, dim + 1)

    def _input_vjp(self, cotangent: Tensor, weight: Tensor, groups: int) -> Tensor:
        shape = (cotangent.shape[0], weight.shape[1] * groups, *self.spatial)
        x = cotangent.new_empty(1).expand(shape)
        return self._backward(cotangent, x, weight, groups, [True, False, False])[0]

    def _weight_vjp(self, cotangent: Tensor, x: Tensor, groups: int) -> Tensor:
        shape = (cotangent.shape[1], x.shape[1] // groups, *self.kernel)
        weight = cotangent.new_empty(1).expand(shape)
        return self._backward(cotangent, x, weight, groups, [False, True, False])[1]

    def _backward(
        self, cotangent: Tensor, x: Tensor, weight: Tensor, groups: int, mask: list[bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.aten.convolution_backward.default(
            cotangent, x, weight, [weight.shape[0]], self.stride, self.padding, self.dilation,
            False, [0, 0], groups, mask,
        )  # fmt: skip


class RoundedConv2d(Conv2d):
    """A convolution as matrix products over its positions, group by group, computed elsewhere in low precision."""

    def __init__(self, exact: Conv2d, products: Source) -> None:
        values = {field.name: getattr(exact, field.name) for field in fields(exact)}
        super().__init__(**values)
        object.__setattr__(self, "products", products)

    products: Source

    def input_vjp(self, cotangent: Tensor, weight: Tensor) -> Tensor:
        parts = zip(cotangent.chunk(self.groups, 1), weight.chunk(self.groups))
        return torch.cat([self._vjps(g, None, w)[0] for g, w in parts], 1)

    def weight_vjp(self, cotangent: Tensor, x: Tensor) -> Tensor:
        parts = zip(cotangent.chunk(self.groups, 1), x.chunk(self.groups, 1))
        return torch.cat([self._vjps(g, xi, None)[1] for g, xi in parts])

    def vjps(
        self, cotangent: Tensor, x: Tensor, weight: Tensor, with_bias: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        tensors = (
            cotangent.chunk(self.groups, 1),
            x.chunk(self.groups, 1),
            weight.chunk(self.groups),
        )
        results = [self._vjps(*parts) for parts in zip(*tensors)]
        below = torch.cat([part for part, _ in results], 1)
        at_weight = torch.cat([part for _, part in results])
        return below, at_weight, self.bias_vjp(cotangent) if with_bias else None

    def _vjps(self, cotangent: Tensor, x: Tensor | None, weight: Tensor | None) -> tuple[Any, Any]:
        """Of one group."""
        samples = cotangent.shape[0]
        if not samples:  # which unfolding refuses; there is nothing to round
            return (
                None if weight is None else self._input_vjp(cotangent, weight, 1),
                None if x is None else self._weight_vjp(cotangent, x, 1),
            )
        g = cotangent.flatten(2).transpose(1, 2).flatten(0, 1)
        columns = None if x is None else self.unfold(x)
        flat = None if weight is None else weight.flatten(1)
        below, at_weight, _ = self.products.vjps(g, columns, flat)
        if below is not None:
            below = self.fold(below, samples)
        if at_weight is not None:
            at_weight = at_weight.unflatten(1, (-1, *self.kernel))
        return below, at_weight


@dataclass(frozen=True)
class PointwiseConv2d(Linear):
    """A 1×1 convolution is a linear layer over positions: rows are positions, columns channels."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight, bias)

    def rows(self, tensor: Tensor) -> Tensor:
        return tensor.movedim(1, -1).reshape(-1, tensor.shape[1])

    def unrows(self, grad_input: Tensor, shape: tuple[int, ...]) -> Tensor:
        n, channels, height, width = shape
        return grad_input.view(n, height, width, channels).movedim(-1, 1)

    def input_vjp(self, cotangent: Tensor, weight: Tensor) -> Tensor:
        return cotangent @ weight.flatten(1)

    def column_gram(self, cotangent: Tensor, weight: Tensor) -> Tensor:
        return super().column_gram(cotangent, weight.flatten(1))


def _folded_shape(
    columns: Tensor, spatial: Pair, kernel: Pair, dilation: Pair, padding: Pair, stride: Pair
) -> Tensor:
    channels = columns.shape[1] // (kernel[0] * kernel[1])
    return columns.new_empty(columns.shape[0], channels, spatial[0], spatial[1])


_fold = operator(
    "fold(Tensor columns, SymInt[] spatial, int[] kernel, int[] dilation, int[] padding, int[] stride)"
    " -> Tensor",
    F.fold,
    _folded_shape,
)


def bilinear_conv2d(
    kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, groups: int, spatial: Pair
) -> Bilinear:
    """The backward products of a convolution in their cheapest form."""
    if kernel == (1, 1) and stride == (1, 1) and padding == (0, 0) and groups == 1:
        return PointwiseConv2d()
    return Conv2d(kernel, stride, padding, dilation, spatial, groups)


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Pair = 1,
    padding: int | Pair | str = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
    *,
    sketch: Estimator,
) -> Tensor:
    """``F.conv2d`` with a sketched backward pass.

    Args:
        x: ``(N, C, H, W)`` or ``(C, H, W)``.
        weight: ``(out, C / groups, kh, kw)``.
        bias: ``(out,)`` or None; its gradient is exact.
        stride, padding, dilation, groups: as in ``F.conv2d``, ``"same"`` and ``"valid"`` included.
        sketch: the estimator of the two products. Rows are samples; for a 1×1 kernel with stride 1
            they are positions. Columns are output channels, or whole groups where ``groups > 1``.

    Returns:
        The output of ``F.conv2d``, bit-identical.

    Raises:
        RuntimeError: on double backward.
        TypeError: ``sketch`` is not a layer estimator.
    """
    check_estimator(sketch)
    if x.ndim == 3:
        return conv2d(
            x.unsqueeze(0), weight, bias, stride, padding, dilation, groups, sketch=sketch
        ).squeeze(0)
    x, weight, bias = cast_for_autocast(x, weight, bias)
    kernel, dilation = (weight.shape[2], weight.shape[3]), _pair(dilation)
    if isinstance(padding, str):
        x, padding = _explicit_padding(x, kernel, dilation, padding)
    spatial = (x.shape[2], x.shape[3])
    make = bilinear_conv2d if sketch.needs_rows else Conv2d
    op = make(kernel, _pair(stride), _pair(padding), dilation, groups=groups, spatial=spatial)
    return apply(op, x, weight, bias, sketch)


def _pair(value: int | Pair) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _explicit_padding(x: Tensor, kernel: Pair, dilation: Pair, padding: str) -> tuple[Tensor, Pair]:
    """``"same"`` and ``"valid"`` as numbers; an odd total goes to the end, as in PyTorch."""
    if padding == "valid":
        return x, (0, 0)
    if padding != "same":
        raise ValueError(f"padding must be numbers, 'same' or 'valid'; got {padding!r}")
    total = [d * (k - 1) for d, k in zip(dilation, kernel)]
    if any(t % 2 for t in total):
        x = F.pad(x, (0, total[1] % 2, 0, total[0] % 2))
    return x, (total[0] // 2, total[1] // 2)
