"""Fused experts: all experts of a layer in one module, with weights of three dimensions.

Recognised by what the ``transformers`` library gives every such class. The products are sketched expert by
expert, where they are made by ``F.linear``, by a product of matrices or by one grouped product.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from backsketch import ops
from backsketch.estimators import Bilinear, Estimator
from backsketch.nn.registry import Adapter, foreign
from backsketch.nn.swap import Swapped
from backsketch.ops.linear import Linear
from backsketch.torch_private import grouped_matmul

__all__ = ["SketchedExperts"]

_IMPLEMENTATIONS = (None, "eager", "grouped_mm")
_MATMUL = (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)


class SketchedExperts(Swapped):
    """Experts whose products have a sketched backward while they train."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self._active():
            return super().forward(*args, **kwargs)
        with _Sketching(self._backsketch, {tuple(w.shape[1:]) for w in _stacked(self)}):
            return super().forward(*args, **kwargs)


class _Sketching(TorchFunctionMode):
    """Gives the products with weights of certain shapes a sketched backward."""

    def __init__(self, sketch: Estimator, shapes: Collection[tuple[int, ...]]) -> None:
        super().__init__()
        self.sketch = sketch
        self.shapes = {*shapes, *(shape[::-1] for shape in shapes)}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and self._is_expert(args, 2):
            x, weight, bias = (*args, kwargs.get("bias"))[:3]
            return ops.linear(x, weight, bias, self.sketch)
        if func in _MATMUL and self._is_expert(args, 2):
            return ops.linear(args[0], args[1].T, None, self.sketch)
        if func is grouped_matmul() and self._is_expert(args, 3) and args[0].ndim == 2:
            weight, ends = args[1].transpose(-2, -1), kwargs["offs"]
            return ops.grouped_linear(args[0], weight, ends, self.sketch)
        return func(*args, **kwargs)

    def _is_expert(self, args: Any, dims: int) -> bool:
        weight = args[1] if len(args) > 1 else None
        return (
            isinstance(weight, Tensor)
            and weight.ndim == dims
            and tuple(weight.shape[-2:]) in self.shapes
        )


def _stacked(module: nn.Module) -> list[Tensor]:
    return [p for p in module.parameters(recurse=False) if p.ndim == 3]


def _weights(module: nn.Module) -> list[tuple[Bilinear, Tensor]]:
    return [(Linear(), expert) for stacked in _stacked(module) for expert in stacked.unbind()]


def _check(module: nn.Module) -> str | None:
    config: Any = getattr(module, "config", None)
    used = getattr(config, "_experts_implementation", None)
    if used in _IMPLEMENTATIONS:
        return None
    return (
        f"its experts run as {used!r}, which shows no single product; "
        "set experts_implementation='grouped_mm' or 'eager'"
    )


@foreign("fused experts", lambda cls: "_apply_gate" in vars(cls))
def adapter(kind: type[nn.Module]) -> Adapter:
    """The adapter of one such class."""
    return Adapter(kind, SketchedExperts, _weights, check=_check)
