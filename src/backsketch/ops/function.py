"""The autograd Function behind every sketched layer: exact forward, randomized backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from backsketch.estimators import Bilinear, Estimator
from backsketch.estimators.base import Gradients
from backsketch.ops.double_backward import without_double_backward
from backsketch.ops.opaque import OPAQUE
from backsketch.sampling import next_seed
from backsketch.torch_private import is_view, same_but_no_view, transforms_are_active

__all__ = ["apply", "as_own_tensor"]


def apply(
    op: Bilinear, x: Tensor, weight: Tensor, bias: Tensor | None, estimator: Estimator
) -> Tensor:
    """``op.forward(x, weight, bias)``, whose backward uses ``estimator``.

    The forward value is bit-identical to the exact layer. Nothing is randomized, saved or wrapped
    where no gradient can flow.
    """
    needed = x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    if not (needed and torch.is_grad_enabled()):
        return op.forward(x, weight, bias)
    stored: tuple[Tensor, ...] = ()
    if weight.requires_grad:
        stored = _store(op, x.detach(), weight.detach(), estimator)
    # The Function that transforms can see through looks up a signature in each call: a tenth of a millisecond.
    plain = not (torch.compiler.is_compiling() or transforms_are_active())
    function = _PlainLayer if plain else _SketchedLayer
    y: Tensor = function.apply(op, estimator, x, weight, bias, *stored)
    return y


@torch.no_grad()
def _store(op: Bilinear, x: Tensor, weight: Tensor, estimator: Estimator) -> tuple[Tensor, ...]:
    # The weight is a second anchor: layers that share an input (q, k, v) must not share a seed.
    seed = next_seed(x, weight) if estimator.needs_forward_seed else None
    return estimator.store(op, x, seed)


def as_own_tensor(y: Tensor) -> Tensor:
    """Return ``y`` as a tensor that is nobody's view, without a copy.

    PyTorch computes some layers as a view of something else, a Linear of a 3-D input for example. Autograd
    does not let such an output of a Function be changed in place, as an in-place activation would.
    """
    return same_but_no_view(y)


class _PlainLayer(Function):
    """The layer outside of compilers and function transforms."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        op, _, x, weight, bias, *_ = arguments
        y: Tensor = op.forward(x, weight, bias)
        _SketchedLayer.setup_context(ctx, arguments, y)
        return _owned(y)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
        at_op, at_estimator, below, *rest = _backward(ctx, cotangent)
        # Autograd adds gradients of one tensor in place, but not to a view, whose base others may hold.
        below = None if below is None else _owned(below)
        return at_op, at_estimator, below, *rest


def _owned(y: Tensor) -> Tensor:
    return as_own_tensor(y) if is_view(y) else y


class _SketchedLayer(Function):
    """The same for compilers and function transforms."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        op: Bilinear,
        estimator: Estimator,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *stored: Tensor,
    ) -> Tensor:
        return as_own_tensor(op.forward(x, weight, bias))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        op, estimator, x, weight, _, *stored = inputs
        ctx.op, ctx.estimator, ctx.input_shape = op, estimator, x.shape
        ctx.save_for_backward(weight, *stored)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
        return _backward(ctx, cotangent)


def _backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
    weight, *stored = ctx.saved_tensors
    gradients = without_double_backward(
        _vjp, ctx.op, ctx.estimator, tuple(ctx.input_shape), ctx.needs_input_grad[2:5],
        cotangent, weight, *stored,
    )  # fmt: skip
    return (None, None, *gradients, *([None] * len(stored)))


def _vjp(
    op: Bilinear,
    estimator: Estimator,
    input_shape: tuple[int, ...],
    needed: tuple[bool, bool, bool],
    cotangent: Tensor,
    weight: Tensor,
    *stored: Tensor,
) -> Gradients:
    # As in the forward pass: layers that share a cotangent (a sum of branches) must not share a seed.
    seed = next_seed(cotangent, weight)
    opaque = OPAQUE.get(type(op)) if torch.compiler.is_compiling() else None
    if opaque is not None:
        found = opaque(estimator, input_shape, needed, cotangent, weight, stored, seed)
        if found is not None:
            return found
    below, at_weight, at_bias = estimator.vjps(op, op.rows(cotangent), weight, stored, seed, needed)
    return (
        None if below is None else op.unrows(below, input_shape),
        None if at_weight is None else at_weight.view(weight.shape),
        at_bias,
    )
