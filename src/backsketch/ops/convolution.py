"""Convolutions over one, two or three dimensions, transposed ones included.

Rows are samples, or positions where the kernel has one entry. A transposed convolution keeps its weight as
``(in, out / groups, *kernel)``; here weights always have their columns, the output channels, first
(:func:`columns_first`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import torch
from torch import Tensor
from torch.nn import functional as F

from backsketch import products
from backsketch.estimators import Bilinear, Estimator
from backsketch.estimators.bilinear import gather_scaled, scatter
from backsketch.layout import in_format, positions_as_rows, rows_as_positions
from backsketch.ops.autocast import cast_for_autocast
from backsketch.ops.function import apply
from backsketch.ops.linear import Linear, check_estimator
from backsketch.products import Geometry, Packed, Source
from backsketch.products.convolution import is_channels_last

__all__ = [
    "Convolution",
    "PointwiseConvolution",
    "TransposedConvolution",
    "bilinear_convolution",
    "columns_first",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose",
]

Sizes = tuple[int, ...]  # one number a spatial dimension

_FORWARD = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@dataclass(frozen=True)
class Convolution(Bilinear):
    """A convolution over ``(samples, channels, *spatial)``; rows are samples.

    ``spatial`` is the size of the input, which the cotangent alone does not tell. ``channels_last`` is its memory
    format, which its gradient has, too: a batch norm below is slower, and rounds more, at a cotangent in another.
    """

    kernel: Sizes
    stride: Sizes
    padding: Sizes
    dilation: Sizes
    spatial: Sizes
    groups: int = 1
    channels_last: bool = field(default=False, kw_only=True)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        convolve = _FORWARD[len(self.kernel)]
        return convolve(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def rows(self, tensor: Tensor) -> Tensor:
        return tensor

    def unrows(self, grad_input: Tensor, shape: tuple[int, ...]) -> Tensor:
        if not self.channels_last:
            return grad_input
        return in_format(grad_input, torch.channels_last)

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

    def with_products(self, source: Source) -> Bilinear | None:
        return RoundedConvolution(self, source)

    def slow_products(self, device: torch.device) -> str:
        if device.type != "cpu":
            return "expect a loss of time: convolutions have 8-bit kernels on the CPU alone"
        if len(self.kernel) > 2:
            return "expect no gain in time: there are no fused kernels over three dimensions"
        return ""

    def pack(self, x: Tensor, seed: Tensor, numbers: str) -> Packed:
        return products.pack_images(x, self.geometry(self.groups), seed, numbers=numbers)

    def unpack(self, packed: Packed, cotangent: Tensor, numbers: str) -> Tensor:
        return products.unpack_images(packed, self.geometry(self.groups), numbers)

    def geometry(self, groups: int) -> Geometry:
        """How the convolution reads its input, for some of its groups or all."""
        sizes = self.kernel, self.stride, self.padding, self.dilation, self.spatial
        return Geometry(*sizes, groups)

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
            False, [0] * len(self.kernel), groups, mask,
        )  # fmt: skip


class RoundedConvolution(Convolution):
    """A convolution whose backward products are computed elsewhere, in low precision."""

    def __init__(self, exact: Convolution, source: Source) -> None:
        values = {f.name: getattr(exact, f.name) for f in fields(exact)}
        super().__init__(**values)
        object.__setattr__(self, "source", source)

    source: Source

    def vjps(
        self, cotangent: Tensor, x: Tensor, weight: Tensor, with_bias: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        geometry = self.geometry(self.groups)
        below, at_weight = self.source.convolution_vjps(cotangent, x, weight, geometry)
        assert below is not None
        assert at_weight is not None
        return below, at_weight, self.bias_vjp(cotangent) if with_bias else None

    def _input_vjp(self, cotangent: Tensor, weight: Tensor, groups: int) -> Tensor:
        geometry = self.geometry(groups)
        below = self.source.convolution_vjps(cotangent, None, weight, geometry)[0]
        assert below is not None
        return below

    def _weight_vjp(self, cotangent: Tensor, x: Tensor, groups: int) -> Tensor:
        geometry = self.geometry(groups)
        at_weight = self.source.convolution_vjps(cotangent, x, None, geometry)[1]
        assert at_weight is not None
        return at_weight


@dataclass(frozen=True)
class TransposedConvolution(Convolution):
    """A transposed convolution, whose weight is given with its columns first."""

    output_padding: Sizes = (0,)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        convolve = _TRANSPOSED[len(self.kernel)]
        weight = columns_first(weight, self.groups)
        return convolve(
            x, weight, bias, self.stride, self.padding, self.output_padding, self.groups,
            self.dilation,
        )  # fmt: skip

    def with_products(self, source: Source) -> Bilinear | None:
        return None

    def _backward(
        self, cotangent: Tensor, x: Tensor, weight: Tensor, groups: int, mask: list[bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad_input, grad_weight, grad_bias = torch.ops.aten.convolution_backward.default(
            cotangent, x, columns_first(weight, groups), [weight.shape[0]], self.stride,
            self.padding, self.dilation, True, self.output_padding, groups, mask,
        )  # fmt: skip
        if mask[1]:
            grad_weight = columns_first(grad_weight, groups).contiguous()
        return grad_input, grad_weight, grad_bias


def columns_first(weight: Tensor, groups: int) -> Tensor:
    """``(in, out / groups, *kernel)`` as ``(out, in / groups, *kernel)``, and the other way round.

    A view for one group, so that the exact layer is called with the very weight that the module holds.
    """
    if groups == 1:
        return weight.transpose(0, 1)
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


@dataclass(frozen=True)
class PointwiseConvolution(Linear):
    """A convolution of kernel 1 is a linear layer over positions: rows are positions, columns channels."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _FORWARD[x.ndim - 2](x, weight, bias)

    def rows(self, tensor: Tensor) -> Tensor:
        return positions_as_rows(tensor)

    def unrows(self, grad_input: Tensor, shape: tuple[int, ...]) -> Tensor:
        return rows_as_positions(grad_input, shape[0], shape[2:])

    def input_vjp(self, cotangent: Tensor, weight: Tensor) -> Tensor:
        return cotangent @ weight.flatten(1)

    def column_gram(self, cotangent: Tensor, weight: Tensor) -> Tensor:
        return super().column_gram(cotangent, weight.flatten(1))


def bilinear_convolution(
    kernel: Sizes,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    groups: int,
    spatial: Sizes,
    channels_last: bool = False,
) -> Bilinear:
    """The backward products of a convolution in their cheapest form."""
    if max(kernel) == max(stride) == groups == 1 and not any(padding):
        return PointwiseConvolution()
    return Convolution(
        kernel, stride, padding, dilation, spatial, groups, channels_last=channels_last
    )


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sizes = 1,
    padding: int | Sizes | str = 0,
    dilation: int | Sizes = 1,
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
    return _convolve(x, weight, bias, stride, padding, dilation, groups, sketch)


def conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sizes = 1,
    padding: int | Sizes | str = 0,
    dilation: int | Sizes = 1,
    groups: int = 1,
    *,
    sketch: Estimator,
) -> Tensor:
    """``F.conv1d`` with a sketched backward pass: :func:`conv2d` over ``(N, C, L)`` or ``(C, L)``."""
    return _convolve(x, weight, bias, stride, padding, dilation, groups, sketch)


def conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sizes = 1,
    padding: int | Sizes | str = 0,
    dilation: int | Sizes = 1,
    groups: int = 1,
    *,
    sketch: Estimator,
) -> Tensor:
    """``F.conv3d`` with a sketched backward pass: :func:`conv2d` over ``(N, C, D, H, W)`` or ``(C, D, H, W)``."""
    return _convolve(x, weight, bias, stride, padding, dilation, groups, sketch)


def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sizes = 1,
    padding: int | Sizes = 0,
    output_padding: int | Sizes = 0,
    groups: int = 1,
    dilation: int | Sizes = 1,
    *,
    sketch: Estimator,
) -> Tensor:
    """``F.conv_transpose1d``, ``2d`` or ``3d`` with a sketched backward pass.

    Args:
        x: ``(N, C, *spatial)`` or ``(C, *spatial)``, of one to three spatial dimensions.
        weight: ``(C, out / groups, *kernel)``.
        bias: ``(out,)`` or None; its gradient is exact.
        stride, padding, output_padding, groups, dilation: as in ``F.conv_transpose2d``.
        sketch: the estimator of the two products. Rows are samples, columns output channels or whole groups.

    Returns:
        The output of the exact function, bit-identical.

    Raises:
        RuntimeError: on double backward.
        TypeError: ``sketch`` is not a layer estimator.
    """
    check_estimator(sketch)
    dims = weight.ndim - 2
    if x.ndim == dims + 1:
        return conv_transpose(
            x.unsqueeze(0), weight, bias, stride, padding, output_padding, groups, dilation,
            sketch=sketch,
        ).squeeze(0)  # fmt: skip
    x, weight, bias = cast_for_autocast(x, weight, bias)
    stride, padding, dilation, output_padding = (
        _sizes(value, dims) for value in (stride, padding, dilation, output_padding)
    )
    op = TransposedConvolution(
        tuple(weight.shape[2:]), stride, padding, dilation, tuple(x.shape[2:]), groups,
        output_padding, channels_last=is_channels_last(x),
    )  # fmt: skip
    return apply(op, x, columns_first(weight, groups), bias, sketch)


def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sizes,
    padding: int | Sizes | str,
    dilation: int | Sizes,
    groups: int,
    sketch: Estimator,
) -> Tensor:
    check_estimator(sketch)
    dims = weight.ndim - 2
    if x.ndim == dims + 1:
        batch = x.unsqueeze(0)
        return _convolve(
            batch, weight, bias, stride, padding, dilation, groups, sketch
        ).squeeze(0)  # fmt: skip
    x, weight, bias = cast_for_autocast(x, weight, bias)
    kernel, dilation = tuple(weight.shape[2:]), _sizes(dilation, dims)
    if isinstance(padding, str):
        x, padding = _explicit_padding(x, kernel, dilation, padding)
    channels_last = is_channels_last(x)
    make = bilinear_convolution if sketch.needs_rows or channels_last else Convolution
    op = make(
        kernel, _sizes(stride, dims), _sizes(padding, dims), dilation,
        groups=groups, spatial=tuple(x.shape[2:]), channels_last=channels_last,
    )  # fmt: skip
    return apply(op, x, weight, bias, sketch)


def _sizes(value: int | Sizes, dims: int) -> Sizes:
    sizes = (value,) if isinstance(value, int) else tuple(value)
    return sizes * dims if len(sizes) == 1 else sizes


def _explicit_padding(
    x: Tensor, kernel: Sizes, dilation: Sizes, padding: str
) -> tuple[Tensor, Sizes]:
    """``"same"`` and ``"valid"`` as numbers; an odd total goes to the end, as in PyTorch."""
    if padding == "valid":
        return x, (0,) * len(kernel)
    if padding != "same":
        raise ValueError(f"padding must be numbers, 'same' or 'valid'; got {padding!r}")
    total = [d * (k - 1) for d, k in zip(dilation, kernel)]
    if any(t % 2 for t in total):
        # F.pad starts with the last dimension.
        x = F.pad(x, [end for t in reversed(total) for end in (0, t % 2)])
    return x, tuple(t // 2 for t in total)
