r"""Both products of a convolution from stochastically rounded 8-bit operands, in plain PyTorch: the definition.

A position of the input meets many positions of the cotangent, which therefore share a scale:

.. math::
    \mathrm{grad\_input}  &\approx s_n\, t_c\, (Q * \tilde W) \\
    \mathrm{grad\_weight} &\approx \sum_b s_{bo}\, t_{bc}\, (Q_b * \tilde X_b)

First, G has a scale for each sample n and group, W for each input channel c. Second, both have one for each
channel of a block b of samples that hold some 256 positions; the sum over blocks is one of floats.
``convolution.h`` does the same arithmetic without unfolding anything; both agree bit for bit in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from backsketch.layout import format_of, in_format, positions_as_rows, rows_as_positions
from backsketch.products import eager
from backsketch.products.eager import Key, magnitude
from backsketch.products.numbers import BLOCK, INT8, Numbers

__all__ = [
    "Geometry", "convolution_vjps", "is_channels_last", "layout_of", "over_positions", "pack",
]  # fmt: skip

Sizes = tuple[int, ...]  # one number a spatial dimension


def is_channels_last(x: Tensor) -> bool:
    """Whether the positions of images are the rows of a matrix as it lies in memory."""
    if x.ndim != 4 or x.is_contiguous():
        return False
    return x.is_contiguous(memory_format=torch.channels_last)


def layout_of(x: Tensor) -> torch.memory_format:
    """The memory format that the products leave an input or a cotangent in; any other one becomes contiguous."""
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format


@dataclass(frozen=True)
class Geometry:
    """How a convolution reads its input, ``(samples, channels, *spatial)``."""

    kernel: Sizes
    stride: Sizes
    padding: Sizes
    dilation: Sizes
    spatial: Sizes
    groups: int = 1

    def outputs(self) -> Sizes:
        """The size of the cotangent."""
        each = zip(self.spatial, self.kernel, self.stride, self.padding, self.dilation)
        return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in each)

    def dense(self) -> Geometry | None:
        """The same over the positions that it reads, where it passes over some: one tap that strides."""
        if {*self.kernel} != {1} or {*self.stride} == {1} or any(self.padding):
            return None
        ones = (1,) * len(self.kernel)
        return Geometry(self.kernel, ones, self.padding, ones, self.outputs(), self.groups)

    def read(self, x: Tensor) -> Tensor:
        """The positions of an input that belong to :meth:`dense`, in its memory format."""
        return in_format(x[self._steps], format_of(x))

    def place(self, read: Tensor) -> Tensor:
        """Undo :meth:`read`: zero elsewhere."""
        n, channels = read.shape[:2]
        if format_of(read) is torch.contiguous_format:
            whole = read.new_zeros(n, channels, *self.spatial)
        else:
            whole = read.new_zeros(n, *self.spatial, channels).movedim(-1, 1)
        whole[self._steps] = read
        return whole

    @property
    def _steps(self) -> tuple[slice, ...]:
        return (slice(None), slice(None), *(slice(None, None, s) for s in self.stride))

    def is_over_positions(self, g: Tensor, x: Tensor | None) -> bool:
        """Whether both products are those of matrices that lie in memory as they are, whose rows are positions."""
        if {*self.kernel, *self.stride, self.groups} != {1} or any(self.padding):
            return False
        return format_of(g if x is None else x) is not torch.contiguous_format

    def samples_of_block(self) -> int:
        """How many samples share the step of a channel."""
        return max(1, BLOCK // max(1, prod(self.outputs())))

    def plane(self) -> Geometry:
        """The same over two dimensions: a line is a plane of height 1, a product over positions one of a line."""
        sizes = (self.kernel, self.stride, self.padding, self.dilation, self.spatial)
        kernel, stride, padding, dilation, spatial = map(tuple, sizes)
        if len(spatial) < 3 and {*kernel, *stride} == {1} and not any(padding):
            return Geometry((1, 1), (1, 1), (0, 0), (1, 1), (1, prod(spatial)), self.groups)
        if len(spatial) == 1:
            one = ((1, *kernel), (1, *stride), (0, *padding), (1, *dilation), (1, *spatial))
            return Geometry(*one, self.groups)
        return Geometry(kernel, stride, padding, dilation, spatial, self.groups)

    def inputs_of(self, x: Tensor) -> Tensor:
        """An input or codes in the shape that belongs to :meth:`plane`."""
        return x.reshape(*x.shape[:2], *self.spatial)

    def cotangents_of(self, g: Tensor) -> Tensor:
        """A cotangent in the shape that belongs to :meth:`plane`."""
        return g.reshape(*g.shape[:2], *self.outputs())

    def taps(self, weight: Tensor) -> Tensor:
        """A weight in the shape that belongs to :meth:`plane`."""
        return weight.reshape(*weight.shape[:2], *self.kernel)

    def fits_integers(self, channels_out: int) -> bool:
        """Whether no sum of products of codes leaves 32 bits, and the dimensions are two."""
        terms = max(channels_out * prod(self.kernel), prod(self.outputs()))
        return len(self.spatial) == 2 and terms < 130_000

    def input_vjp(self, g: Tensor, weight: Tensor) -> Tensor:
        x = g.new_empty(1).expand(g.shape[0], weight.shape[1] * self.groups, *self.spatial)
        return self._backward(g, x, weight, [True, False, False])[0]

    def weight_vjp(self, g: Tensor, x: Tensor) -> Tensor:
        weight = g.new_empty(1).expand(g.shape[1], x.shape[1] // self.groups, *self.kernel)
        return self._backward(g, x, weight, [False, True, False])[1]

    def _backward(
        self, g: Tensor, x: Tensor, weight: Tensor, mask: list[bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.aten.convolution_backward.default(
            g, x, weight, None, self.stride, self.padding, self.dilation, False,
            [0] * len(self.kernel), self.groups, mask,
        )  # fmt: skip


def over_positions(
    vjps: Callable[..., tuple[Tensor | None, Tensor | None, Tensor | None]],
    g: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    geometry: Geometry,
) -> tuple[Tensor | None, Tensor | None]:
    """Both products where :meth:`Geometry.is_over_positions`; ``vjps`` has those of matrices."""
    below, at_weight, _ = vjps(
        positions_as_rows(g),
        None if x is None else positions_as_rows(x),
        None if weight is None else weight.flatten(1),
    )
    return (
        None if below is None else rows_as_positions(below, g.shape[0], geometry.spatial),
        None if at_weight is None else at_weight.view(*at_weight.shape, *geometry.kernel),
    )


def convolution_vjps(
    g: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    packed: tuple[Tensor, Tensor] | None,
    keys: tuple[Key, Key, Key, Key],
    geometry: Geometry,
    numbers: Numbers = INT8,
) -> tuple[Tensor | None, Tensor | None]:
    """``(grad_input, grad_weight)``; see :func:`backsketch.products.convolution_vjps`.

    The keys are those of g by sample, of the weight, of x, and of g by channel.
    """
    if x is not None:
        packed = pack(x, keys[2], geometry, numbers)
    return (
        None if weight is None else _input_vjp(g, weight, keys, geometry, numbers),
        None if packed is None else _weight_vjp(g, *packed, keys[3], geometry, numbers),
    )


def pack(x: Tensor, key: Key, geometry: Geometry, numbers: Numbers = INT8) -> tuple[Tensor, Tensor]:
    """Codes of ``x`` ``(n, c, *spatial)``, and the scale of each block of samples and channel.

    Returns:
        uint8 in the shape of x and ``(blocks, c)``.
    """
    first, codes, scales = 0, [], []
    for part in x.split(geometry.samples_of_block()):
        signed, scale = _by_channel(part, key, first, numbers)
        codes.append(numbers.encode(signed))
        scales.append(scale)
        first += part.shape[0]
    return torch.cat(codes), torch.stack(scales)


def _input_vjp(
    g: Tensor, weight: Tensor, keys: tuple[Key, ...], geometry: Geometry, numbers: Numbers
) -> Tensor:
    groups = geometry.groups
    by_group = g.unflatten(1, (groups, -1))
    scale, rate = numbers.scale(magnitude(by_group, tuple(range(2, by_group.ndim))))
    of_g = numbers.round(g, rate.expand_as(by_group).flatten(1, 2), _dither(g, keys[0], 0))

    by_channel = weight.unflatten(0, (groups, -1))
    others = (1, *range(3, by_channel.ndim))
    column, rate = numbers.scale(magnitude(by_channel, others))
    lines = weight.flatten(1)
    bits = eager.dither(range(len(lines)), lines.shape[1], keys[1], g.device).view_as(weight)
    of_weight = numbers.round(weight, rate.expand_as(by_channel).flatten(0, 1), bits)

    product = geometry.input_vjp(_wide(of_g), _wide(of_weight)).to(g.dtype)
    parts = product.unflatten(1, (groups, -1))
    columns = column.view(1, groups, -1, *_ones(geometry))
    return (parts * columns * scale.view(-1, groups, 1, *_ones(geometry))).flatten(1, 2)


def _weight_vjp(
    g: Tensor, codes: Tensor, scales: Tensor, key: Key, geometry: Geometry, numbers: Numbers
) -> Tensor:
    together, groups = geometry.samples_of_block(), geometry.groups
    total: Tensor | None = None
    for number, (part, bytes_) in enumerate(zip(g.split(together), codes.split(together))):
        of_g, scale = _by_channel(part, key, number * together, numbers)
        of_x = _wide(numbers.decode(bytes_))
        product = geometry.weight_vjp(_wide(of_g), of_x).to(g.dtype).unflatten(0, (groups, -1))
        rows = scale.view(groups, -1, 1, *_ones(geometry))
        columns = scales[number].view(groups, 1, -1, *_ones(geometry))
        term = (product * rows * columns).flatten(0, 1)
        total = term if total is None else total + term
    assert total is not None
    return total


def _ones(geometry: Geometry) -> Sizes:
    return (1,) * len(geometry.kernel)


def _wide(codes: Tensor) -> Tensor:
    """In a dtype in which sums of products of integers are exact, where convolutions in it are not very slow."""
    return codes.to(torch.float64 if codes.device.type == "cpu" else torch.float32)


def _by_channel(x: Tensor, key: Key, first_sample: int, numbers: Numbers) -> tuple[Tensor, Tensor]:
    """Codes of ``(samples, channels, ...)`` and a scale for each channel."""
    scale, rate = numbers.scale(magnitude(x, (0, *range(2, x.ndim))))
    return numbers.round(x, rate, _dither(x, key, first_sample)), scale.flatten()


def _dither(x: Tensor, key: Key, first_sample: int) -> Tensor:
    """Random integers for ``(samples, channels, ...)``: rows are channels of samples, columns positions."""
    n, c = x.shape[:2]
    rows = range(first_sample * c, (first_sample + n) * c)
    return eager.dither(rows, prod(x.shape[2:]), key, x.device).view_as(x)
