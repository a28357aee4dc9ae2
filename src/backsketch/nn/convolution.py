"""Convolutions and transposed convolutions over one, two and three dimensions."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from backsketch import ops
from backsketch.estimators import Bilinear
from backsketch.nn.registry import Adapter, register
from backsketch.nn.swap import Swapped
from backsketch.ops.convolution import (
    TransposedConvolution,
    bilinear_convolution,
    columns_first,
)
from backsketch.torch_private import ConvBase, ConvTransposeBase

__all__ = ["SketchedConvTranspose", "SketchedConvolution"]

_CONVOLVE = {1: ops.conv1d, 2: ops.conv2d, 3: ops.conv3d}


class SketchedConvolution(Swapped, ConvBase):
    """A convolution whose backward is sketched while it trains."""

    def forward(self, input: Tensor) -> Tensor:
        if not self._active():
            result: Tensor = super().forward(input)
            return result
        dims, padding = self.weight.ndim - 2, self.padding
        if self.padding_mode != "zeros":
            # As PyTorch does: pad first (autograd handles that exactly), then convolve without.
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = (0,) * dims
        return _CONVOLVE[dims](
            input, self.weight, self.bias, self.stride, padding, self.dilation, self.groups,
            sketch=self._backsketch,
        )  # fmt: skip


def _weights(module: nn.Module) -> list[tuple[Bilinear, Tensor]]:
    assert isinstance(module, ConvBase)
    m = module
    padding = m.padding if isinstance(m.padding, tuple) else (0,) * len(m.kernel_size)
    op = bilinear_convolution(m.kernel_size, m.stride, padding, m.dilation, m.groups, m.kernel_size)
    return [(op, m.weight)]


def _product(module: nn.Module, x: Tensor) -> Bilinear | None:
    assert isinstance(module, ConvBase)
    m = module
    if x.ndim != m.weight.ndim or isinstance(m.padding, str) or m.padding_mode != "zeros":
        return None
    sizes = m.kernel_size, m.stride, m.padding, m.dilation
    return bilinear_convolution(*sizes, m.groups, tuple(x.shape[2:]))


def _rows(dims: int) -> Callable[[Tensor], Tensor]:
    """Of batches as they are, of a single sample with a dimension for it."""
    return lambda tensor: tensor if tensor.ndim == dims + 2 else tensor[None]


class SketchedConvTranspose(Swapped, ConvTransposeBase):
    """A transposed convolution whose backward is sketched while it trains."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        if not self._active():
            result: Tensor = super().forward(input, output_size)
            return result
        assert isinstance(self.padding, tuple)
        stride, padding, dilation = list(self.stride), list(self.padding), list(self.dilation)
        output_padding = self._output_padding(
            input, output_size, stride, padding, list(self.kernel_size), len(stride), dilation
        )
        return ops.conv_transpose(
            input, self.weight, self.bias, self.stride, self.padding, tuple(output_padding),
            self.groups, self.dilation, sketch=self._backsketch,
        )  # fmt: skip


def _transposed(module: nn.Module, x: Tensor) -> TransposedConvolution:
    assert isinstance(module, ConvTransposeBase)
    m = module
    assert isinstance(m.padding, tuple)
    spatial = tuple(x.shape[2:])
    return TransposedConvolution(
        m.kernel_size, m.stride, m.padding, m.dilation, spatial, m.groups, m.output_padding
    )


def _transposed_weights(module: nn.Module) -> list[tuple[Bilinear, Tensor]]:
    assert isinstance(module, ConvTransposeBase)
    return [(_transposed(module, module.weight), columns_first(module.weight, module.groups))]


_PLAIN = "forward", "_conv_forward"
_TRANSPOSED = "forward", "_output_padding"
for _dims, _plain in enumerate((nn.Conv1d, nn.Conv2d, nn.Conv3d), 1):
    register(
        Adapter(_plain, SketchedConvolution, _weights, _PLAIN, rows=_rows(_dims), product=_product)
    )
for _dims, _kind in enumerate((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), 1):
    register(
        Adapter(
            _kind,
            SketchedConvTranspose,
            _transposed_weights,
            _TRANSPOSED,
            rows=_rows(_dims),
        )
    )
