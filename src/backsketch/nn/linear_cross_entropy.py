"""A linear head that knows its loss, so that one sketch can be put on both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backsketch import ops
from backsketch.estimators import Bilinear, Int8, Rows
from backsketch.nn.registry import Adapter, register
from backsketch.nn.swap import Swapped
from backsketch.ops.linear import Linear

__all__ = ["LinearCrossEntropy", "SketchedLinearCrossEntropy"]


class LinearCrossEntropy(nn.Linear):
    """``nn.Linear`` whose forward pass takes targets, too, and then returns the mean cross-entropy.

    A function cannot be given a sketch, a module can: under ``bs.Rows(keep=0.25)`` the loss is
    :func:`backsketch.ops.linear_cross_entropy`, which stores no logits and computes the gradient of a quarter
    of the tokens, under ``bs.Int8(sketch=bs.Rows(keep=0.25))`` with products in 8 bits. Under any other
    estimator the logits are those of a sketched linear layer, and without a sketch and in eval mode all is
    PyTorch's own arithmetic. The keys of a state_dict are those of ``nn.Linear``.

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
    """Head and loss in one where tokens are sampled; otherwise a sketched linear layer and an exact loss."""

    def forward(self, input: Tensor, targets: Tensor | None = None) -> Tensor:
        if not self._active():
            return super().forward(input, targets)
        keep = _keep_of(self._backsketch)
        if targets is None or keep is None:
            logits = ops.linear(input, self.weight, self.bias, self._backsketch)
            return logits if targets is None else self._loss(logits, targets)
        return ops.linear_cross_entropy(
            input,
            self.weight,
            targets,
            self.bias,
            keep=keep,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            arithmetic="int8" if isinstance(self._backsketch, Int8) else "exact",
        )


class _Head(Linear):
    """A linear layer whose logits are computed for the drawn tokens alone a second time, not gathered."""

    gathers_rows = False


def _keep_of(sketch: object) -> float | None:
    """The fraction of tokens whose gradient ``linear_cross_entropy`` computes in place of a sketch, if it can."""
    if isinstance(sketch, Int8):
        # Alone it would make all logits twice to save memory, where it is asked to save time.
        return None if sketch.save else _keep_of(sketch.sketch)
    if isinstance(sketch, Rows) and (sketch.scores, sketch.design) == ("optimal", "systematic"):
        return sketch.fraction
    return None


def _weights(module: nn.Module) -> list[tuple[Bilinear, Tensor]]:
    assert isinstance(module, nn.Linear)
    return [(_Head(), module.weight)]


register(Adapter(LinearCrossEntropy, SketchedLinearCrossEntropy, _weights))
