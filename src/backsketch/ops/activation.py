r"""Element-wise activations that keep what their backward needs in a few bits.

The backward pass of :math:`y = f(x)` is :math:`g \circ f'(x)`, linear in the derivative:

- piecewise linear functions have two slopes: one bit an entry, **exact**;
- for the others :math:`f'(x)` is computed in the forward pass and stochastically rounded:
  :math:`E[g \circ \widetilde{f'}] = g \circ f'(x)`, **unbiased**, of variance
  :math:`\sum g^2 \Delta^2 \varphi(1-\varphi)` with :math:`\varphi` the fractional part of the rounded number.
  (Rounding x and computing :math:`f'(\tilde x)` in the backward pass would be biased.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from backsketch import rounding as bits
from backsketch.estimators import Estimator
from backsketch.layout import format_of, in_memory_order
from backsketch.ops.double_backward import without_double_backward
from backsketch.ops.linear import check_estimator
from backsketch.rounding import Rounding
from backsketch.sampling import next_seed

__all__ = ["PiecewiseLinear", "Smooth", "activation"]


@dataclass(frozen=True)
class PiecewiseLinear:
    """``f`` has slope 1 where ``low < x < high`` and slope ``outside`` elsewhere."""

    forward: Callable[[Tensor], Tensor]
    low: float = 0.0
    high: float = math.inf
    outside: float = 0.0

    def __post_init__(self) -> None:
        text = tuple(map(repr, (self.low, self.high, self.outside)))
        object.__setattr__(self, "_text", text)

    @property
    def numbers(self) -> tuple[float, float, float]:
        """``low, high, outside`` as code that ``torch.compile`` traces must read them.

        A float attribute may become a symbol there, which an autograd Function cannot hold; see
        :attr:`backsketch.estimators.base.Sketch.fraction`.
        """
        low, high, outside = self._text  # type: ignore[attr-defined]
        return float(low), float(high), float(outside)


@dataclass(frozen=True)
class Smooth:
    """``derivative(x, y)`` is ``f'(x)``, given ``y = f(x)``, both in float32 or better.

    Where it is a name, :meth:`backsketch.rounding.Rounding.pack_slope` knows the function.
    """

    forward: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor, Tensor], Tensor] | str


def activation(
    x: Tensor, kind: PiecewiseLinear | Smooth, sketch: Estimator, inplace: bool = False
) -> Tensor:
    """``kind.forward(x)`` that saves a few bits an entry for its backward pass.

    Args:
        x: any shape.
        kind: what to compute, and its derivative.
        sketch: a memory saver; for a :class:`Smooth` function one that can round (``bs.Quantized``).
        inplace: write the result over ``x``, as the in-place module does.

    Returns:
        ``kind.forward(x)``, bit-identical.

    Raises:
        RuntimeError: on double backward.
        TypeError: ``sketch`` is not a layer estimator.

    Example:
        >>> import torch, backsketch as bs
        >>> from backsketch.nn.activation import RELU
        >>> x = torch.tensor([-1.0, 2.0], requires_grad=True)
        >>> bs.ops.activation(x, RELU, bs.Quantized(bits=4)).sum().backward()
        >>> x.grad
        tensor([0., 1.])
    """
    check_estimator(sketch)
    y = _activation(x, kind, sketch.rounding())
    return x.copy_(y) if inplace else y


def _activation(x: Tensor, kind: PiecewiseLinear | Smooth, rounding: Rounding | None) -> Tensor:
    if not (x.requires_grad and torch.is_grad_enabled()) or x.numel() == 0:
        return kind.forward(x)
    if isinstance(kind, PiecewiseLinear):
        y: Tensor = _Masked.apply(kind, x)[0]
        return y
    if rounding is None:
        return kind.forward(x)
    rounded: Tensor = _Rounded.apply(kind, rounding, x, next_seed(x))[0]
    return rounded


class _Masked(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(kind: PiecewiseLinear, x: Tensor) -> tuple[Tensor, Tensor]:
        low, high, _ = kind.numbers
        return kind.forward(x), bits.mask(in_memory_order(x, format_of(x)), low, high)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.outside, ctx.format = inputs[0].numbers[2], format_of(inputs[1])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor | None, _: Any) -> tuple[Any, ...]:
        if cotangent is None:
            return None, None
        g = in_memory_order(cotangent, ctx.format)
        grad = without_double_backward(bits.masked, g, *ctx.saved_tensors, ctx.outside)
        return None, _back(grad, ctx.format)


class _Rounded(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        kind: Smooth, rounding: Rounding, x: Tensor, seed: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        y = kind.forward(x)
        a, b = (in_memory_order(t, format_of(x)) for t in (x, y))
        if isinstance(kind.derivative, str):
            return y, *rounding.pack_slope(a, b, kind.derivative, seed)
        wide = torch.promote_types(x.dtype, torch.float32)
        slope = kind.derivative(a.to(wide), b.to(wide))
        return y, *rounding.pack(slope, seed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.rounding, ctx.dtype, ctx.format = inputs[1], inputs[2].dtype, format_of(inputs[2])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output[1:])

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if cotangent is None:
            return None, None, None, None
        g = in_memory_order(cotangent, ctx.format)
        grad = without_double_backward(_times, ctx.rounding, g, *ctx.saved_tensors)
        return None, None, _back(grad.to(ctx.dtype), ctx.format), None


def _back(grad: Tensor, layout: torch.memory_format) -> Tensor:
    """Undo :func:`backsketch.layout.in_memory_order`."""
    return grad if layout is torch.contiguous_format else grad.movedim(-1, 1)


def _times(rounding: Rounding, cotangent: Tensor, *packed: Tensor) -> Tensor:
    return rounding.times(cotangent, (packed[0], packed[1]))
