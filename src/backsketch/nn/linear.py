"""``nn.Linear``."""

from __future__ import annotations

from torch import Tensor, nn

from backsketch import ops
from backsketch.estimators import Bilinear
from backsketch.nn.registry import Adapter, register
from backsketch.nn.swap import Swapped
from backsketch.ops.linear import Linear

__all__ = ["SketchedLinear"]


class SketchedLinear(Swapped, nn.Linear):
    """A linear layer whose backward is sketched while it trains."""

    def forward(self, input: Tensor) -> Tensor:
        if not self._active():
            return super().forward(input)
        return ops.linear(input, self.weight, self.bias, self._backsketch)


def _weights(module: nn.Module) -> list[tuple[Bilinear, Tensor]]:
    assert isinstance(module, nn.Linear)
    return [(Linear(), module.weight)]


register(Adapter(nn.Linear, SketchedLinear, _weights, product=lambda module, x: Linear()))
