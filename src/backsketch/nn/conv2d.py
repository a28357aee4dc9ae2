"""``nn.Conv2d``."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from backsketch import ops
from backsketch.estimators import Bilinear
from backsketch.nn.registry import Adapter, register
from backsketch.nn.swap import Swapped
from backsketch.ops.conv2d import bilinear_conv2d

__all__ = ["SketchedConv2d"]


class SketchedConv2d(Swapped, nn.Conv2d):
    """A convolution whose backward is sketched while it trains."""

    def forward(self, input: Tensor) -> Tensor:
        if not self._active():
            return super().forward(input)
        padding = self.padding
        if self.padding_mode != "zeros":
            # As nn.Conv2d does: pad first (autograd handles that exactly), then convolve without.
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = (0, 0)
        return ops.conv2d(
            input, self.weight, self.bias, self.stride, padding, self.dilation, self.groups,
            sketch=self._backsketch,
        )  # fmt: skip


def _weights(module: nn.Module) -> list[tuple[Bilinear, Tensor]]:
    assert isinstance(module, nn.Conv2d)
    m = module
    padding = m.padding if isinstance(m.padding, tuple) else (0, 0)
    op = bilinear_conv2d(m.kernel_size, m.stride, padding, m.dilation, m.groups, m.kernel_size)
    return [(op, m.weight)]


def _product(module: nn.Module, x: Tensor) -> Bilinear | None:
    assert isinstance(module, nn.Conv2d)
    if x.ndim != 4 or isinstance(module.padding, str) or module.padding_mode != "zeros":
        return None
    sizes = module.kernel_size, module.stride, module.padding, module.dilation
    return bilinear_conv2d(*sizes, module.groups, (x.shape[2], x.shape[3]))


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.ndim == 4 else tensor[None]


register(
    Adapter(
        nn.Conv2d,
        SketchedConv2d,
        _weights,
        ("forward", "_conv_forward"),
        rows=_rows,
        product=_product,
    )
)
