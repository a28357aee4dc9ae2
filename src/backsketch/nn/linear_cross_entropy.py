"""A linear head that knows its loss, so that one sketch can be put on both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backsketch import ops
from backsketch.estimators import Bilinear, Rows
from backsketch.nn.registry import Adapter, register
from backsketch.nn.swap import Swapped
from backsketch.ops.linear import Linear

__all__ = ["LinearCrossEntropy", "SketchedLinearCrossEntropy"]


class LinearCrossEntropy(nn.Linear):
    """``nn.Linear`` whose forward pass takes targets, too, and then returns the mean cross-entropy.

    A function cannot be given a sketch, a module can: under ``bs.Rows(keep=0.25)`` the loss is
    :func:`backsketch.ops.linear_cross_entropy`, which stores no logits and computes the gradient of a quarter
    of the tokens. Without a sketch, in eval mode and for logits it is PyTorch's own arithmetic. The keys of a
    state_dict are those of ``nn.Linear``.

    Args:
        in_features, out_features, bias: as for ``nn.Linear``.
        ignore_index, label_smoothing: as for ``F.cross_entropy``.
        **where: device and dtype.

    Shapes: ``(*, in)`` to ``(*, out)``; with targets ``(*)`` to a scalar.

    Example:
        >>> head = LinearCrossEntropy(4, 100)
        >>> x = torch.randn(2, 3, 4)
        >>> head(x).shape, head(x, torch.zeros(2, 3, dtype=torch.long)).shape
        (torch.Size([2, 3, 100]), torch.Size([]))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        **where: Any,
    ) -> None:
        super().__init__(in_features, out_features, bias, **where)
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing

    def forward(self, input: Tensor, targets: Tensor | None = None) -> Tensor:
        """The logits, or the loss where there are targets."""
        logits = F.linear(input, self.weight, self.bias)
        return logits if targets is None else self._loss(logits, targets)

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, -2)
        return F.cross_entropy(
            wide,
            targets.flatten(),
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
        )


class SketchedLinearCrossEntropy(Swapped, LinearCrossEntropy):
    """Head and loss in one under ``Rows``; a sketched linear layer and an exact loss under any other estimator."""

    def forward(self, input: Tensor, targets: Tensor | None = None) -> Tensor:
        if not self._active():
            return super().forward(input, targets)
        sketch = self._backsketch
        if targets is None or not _samples_tokens(sketch):
            logits = ops.linear(input, self.weight, self.bias, sketch)
            return logits if targets is None else self._loss(logits, targets)
        return ops.linear_cross_entropy(
            input,
            self.weight,
            targets,
            self.bias,
            keep=sketch.fraction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
        )


def _samples_tokens(sketch: object) -> bool:
    return isinstance(sketch, Rows) and (sketch.scores, sketch.design) == ("optimal", "systematic")


def _weights(module: nn.Module) -> list[tuple[Bilinear, Tensor]]:
    assert isinstance(module, nn.Linear)
    return [(Linear(), module.weight)]


register(Adapter(LinearCrossEntropy, SketchedLinearCrossEntropy, _weights))
