"""Backward passes that cannot be differentiated again, and that say so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

__all__ = ["without_double_backward"]


def without_double_backward(vjp: Callable[..., Any], *arguments: Any) -> Any:
    """Return ``vjp(*arguments)``; differentiating the result raises an error instead of being wrong."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _SingleBackward.apply(vjp, *arguments)
    return vjp(*arguments)


class _SingleBackward(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(vjp: Callable[..., Any], *arguments: Any) -> Any:
        return vjp(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        raise RuntimeError(
            "backsketch does not support double backward: the gradient of a sketched gradient would not "
            "be an unbiased second derivative. Put the call that needs it inside `with bs.exact(model):`."
        )
