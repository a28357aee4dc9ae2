"""Dot-product attention as a module, so that a sketch can be put on it."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from backsketch import ops
from backsketch.estimators import Estimator
from backsketch.nn.registry import Adapter, register
from backsketch.nn.swap import Swapped

__all__ = ["DotProductAttention", "SketchedDotProductAttention"]


class DotProductAttention(nn.Module):
    """``F.scaled_dot_product_attention`` as a module without parameters: use it where a model calls the function.

    A function cannot be given a sketch, a module can. No key of a state_dict changes.

    Args:
        dropout: probability of dropping an attention weight, in training.
        is_causal: whether a query sees earlier keys only.

    Shapes: ``(*, queries, channels)``, ``(*, keys, channels)``, ``(*, keys, values)`` to ``(*, queries, values)``.

    Example:
        >>> import torch
        >>> q = torch.randn(2, 4, 8)
        >>> DotProductAttention()(q, q, q).shape
        torch.Size([2, 4, 8])
    """

    def __init__(self, dropout: float = 0.0, is_causal: bool = False) -> None:
        super().__init__()
        self.dropout = dropout
        self.is_causal = is_causal

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}, is_causal={self.is_causal}"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend; ``mask`` is boolean (True takes part) or additive."""
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, self.is_causal)


class SketchedDotProductAttention(Swapped, DotProductAttention):
    """Attention that keeps its operands in a few bits while it trains."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        if not self._active() or self.dropout > 0:
            return super().forward(q, k, v, mask)
        return ops.attention(q, k, v, mask, self.is_causal, sketch=self._backsketch)


def _kept(module: nn.Module, estimator: Estimator) -> float | None:
    rounding = estimator.rounding()
    assert isinstance(module, DotProductAttention)
    return None if rounding is None or module.dropout > 0 else rounding.share()


_NOTE = "keeps probabilities, q, k, v and output, where that pays"
register(Adapter(DotProductAttention, SketchedDotProductAttention, keeps=_kept, note=_NOTE))
