"""``transformers.pytorch_utils.Conv1D``: a linear layer that holds its weight as ``(in, out)``."""

from __future__ import annotations

from torch import Tensor, nn

from backsketch import ops
from backsketch.estimators import Bilinear
from backsketch.nn.registry import Adapter, foreign
from backsketch.nn.swap import Swapped
from backsketch.ops.linear import TransposedLinear

__all__ = ["SketchedTransposedLinear"]


class SketchedTransposedLinear(Swapped):
    """The linear layer of GPT-2, whose backward is sketched while it trains."""

    weight: Tensor
    bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if not self._active():
            result: Tensor = super().forward(x)
            return result
        return ops.transposed_linear(x, self.weight, self.bias, self._backsketch)


def _weights(module: nn.Module) -> list[tuple[Bilinear, Tensor]]:
    assert isinstance(module.weight, Tensor)
    return [(TransposedLinear(), module.weight.T)]


@foreign("transformers.pytorch_utils.Conv1D")
def adapter(kind: type[nn.Module]) -> Adapter:
    """The adapter of that class."""
    return Adapter(
        kind, SketchedTransposedLinear, _weights, product=lambda module, x: TransposedLinear()
    )
