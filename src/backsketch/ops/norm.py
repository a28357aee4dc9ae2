r"""Norms that keep their input in a few bits.

With :math:`\hat x = (x - \mu) r` over the entries that share a mean :math:`\mu` and an inverse deviation r,
weight w and cotangent g, the backward pass of :math:`y = w \hat x + b` is

.. math:: \nabla x = r\,(gw - \overline{gw} - \hat x\, \overline{gw\,\hat x}), \qquad
          \nabla w = \sum g \hat x, \qquad \nabla b = \sum g

(a bar is a mean; without :math:`\mu` and :math:`\overline{gw}` for RMSNorm). It is *quadratic* in
:math:`\hat x`, so a single rounding would be biased on the diagonal. Two roundings of x, independent of each
other and sharing their floor (:mod:`backsketch.rounding`), make it exactly unbiased:

.. math:: E[\hat x_1\,\overline{gw\,\hat x_2}] = \hat x\,\overline{gw\,\hat x} .

:math:`\nabla w` uses their average; :math:`\mu` and r are kept as they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from backsketch.estimators import Estimator
from backsketch.ops.linear import check_estimator
from backsketch.ops.once import once
from backsketch.rounding import Rounding
from backsketch.sampling import next_seed

__all__ = ["batch_norm", "group_norm", "layer_norm", "rms_norm"]

Stats = tuple[Tensor, ...]


@dataclass(frozen=True)
class Norm:
    """One kind of norm: its forward pass, and how its entries are grouped in the backward pass.

    ``grouped`` views a tensor so that the entries that share statistics lie along ``dims``; ``per_entry``
    is the shape of the weight in that view.
    """

    dims: ClassVar[tuple[int, ...]]
    centered: ClassVar[bool] = True

    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, *state: Tensor
    ) -> Stats:
        """``(y, mean, rstd, *new state)``, y by the very call that the unconverted module makes."""
        raise NotImplementedError

    def grouped(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def per_entry(self, channels: int) -> tuple[int, ...]:
        raise NotImplementedError


@dataclass(frozen=True)
class LayerNorm(Norm):
    shape: tuple[int, ...]
    eps: float

    dims: ClassVar[tuple[int, ...]] = (1,)

    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, *state: Tensor
    ) -> Stats:
        return torch.native_layer_norm(x, list(self.shape), weight, bias, self.eps)

    def grouped(self, x: Tensor) -> Tensor:
        return x.reshape(-1, math.prod(self.shape))

    def per_entry(self, channels: int) -> tuple[int, ...]:
        return (1, channels)


@dataclass(frozen=True)
class RMSNorm(LayerNorm):
    eps: float | None  # type: ignore[assignment]

    centered: ClassVar[bool] = False

    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, *state: Tensor
    ) -> Stats:
        y = F.rms_norm(x, list(self.shape), weight, self.eps)
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        wide = self.grouped(x).to(torch.promote_types(x.dtype, torch.float32))
        norm = torch.linalg.vector_norm(wide, dim=1)
        return y, norm.new_empty(0), (norm.square() / wide.shape[1] + eps).rsqrt()


@dataclass(frozen=True)
class GroupNorm(Norm):
    groups: int
    eps: float

    dims: ClassVar[tuple[int, ...]] = (2, 3)

    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, *state: Tensor
    ) -> Stats:
        n, channels = x.shape[:2]
        positions = math.prod(x.shape[2:])
        return torch.native_group_norm(
            x.contiguous(), weight, bias, n, channels, positions, self.groups, self.eps
        )

    def grouped(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], self.groups, x.shape[1] // self.groups, -1)

    def per_entry(self, channels: int) -> tuple[int, ...]:
        return (1, self.groups, channels // self.groups, 1)


@dataclass(frozen=True)
class BatchNorm(Norm):
    """In training mode: statistics of the batch; the state is (running mean, running variance)."""

    momentum: float
    eps: float

    dims: ClassVar[tuple[int, ...]] = (0, 2)

    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, *state: Tensor
    ) -> Stats:
        # On copies: what a Function changes in place a compiler would have to be told of.
        mean, var = [s.clone() for s in state] or (None, None)
        y, center, rstd, _, _ = torch._batch_norm_impl_index(
            x, weight, bias, mean, var, True, self.momentum, self.eps, torch.backends.cudnn.enabled
        )
        return (y, center, rstd) if mean is None or var is None else (y, center, rstd, mean, var)

    def grouped(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], x.shape[1], -1)

    def per_entry(self, channels: int) -> tuple[int, ...]:
        return (1, channels, 1)


# --------------------------------------------------------------------------------------------------
# Function
# --------------------------------------------------------------------------------------------------


class _SavedInBits(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        norm: Norm,
        rounding: Rounding,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        seed: Tensor,
        *state: Tensor,
    ) -> tuple[Tensor, ...]:
        y, mean, rstd, *new = norm.forward(x, weight, bias, *state)
        return y, mean, rstd, *rounding.pack(x, seed, twice=True), *new

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        norm, rounding, x, weight, *_ = inputs
        ctx.norm, ctx.rounding, ctx.shape, ctx.dtype = norm, rounding, x.shape, x.dtype
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weight, *output[1:5])

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor | None, *_: Any) -> tuple[Any, ...]:
        gradients: tuple[Any, ...] = (None, None, None)
        if cotangent is not None:
            gradients = once(
                _vjp, ctx.norm, ctx.rounding, tuple(ctx.shape), ctx.needs_input_grad[2:5],
                cotangent, *ctx.saved_tensors,
            )  # fmt: skip
            if gradients[0] is not None:
                gradients = (gradients[0].to(ctx.dtype), *gradients[1:])
        return (None, None, *gradients, *[None] * (len(ctx.needs_input_grad) - 5))


def _vjp(
    norm: Norm,
    rounding: Rounding,
    shape: tuple[int, ...],
    needed: tuple[bool, bool, bool],
    cotangent: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    codes: Tensor,
    scales: Tensor,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    g = norm.grouped(cotangent).to(scales.dtype)
    ones = [1 if d in norm.dims else n for d, n in enumerate(g.shape)]
    rstd = rstd.to(g.dtype).view(ones)
    first, second = (
        norm.grouped(rounding.restore((codes, scales), shape, cotangent, which)) for which in (0, 1)
    )
    for normalised in (first, second):
        if norm.centered:
            normalised -= mean.to(g.dtype).view(ones)
        normalised *= rstd
    entries = () if weight is None else norm.per_entry(weight.numel())
    grad_x = grad_weight = grad_bias = None
    if weight is not None and (needed[1] or needed[2]):
        over = [d for d, n in enumerate(entries) if n == 1]
        if needed[1]:
            both = (first + second).mul_(0.5).mul_(g)
            grad_weight = both.sum(over).view(weight.shape).to(weight.dtype)
        if needed[2]:
            grad_bias = g.sum(over).view(weight.shape).to(weight.dtype)
    if needed[0]:
        gw = g if weight is None else g * weight.to(g.dtype).view(entries)
        slope = second.mul_(gw).mean(norm.dims, keepdim=True)
        grad_x = torch.addcmul(gw, first, slope, value=-1)
        if norm.centered:
            grad_x -= gw.mean(norm.dims, keepdim=True)
        grad_x = grad_x.mul_(rstd).view(shape)
    return grad_x, grad_weight, grad_bias


def _apply(
    norm: Norm,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    sketch: Estimator,
    *state: Tensor,
) -> tuple[Tensor, ...]:
    """``(y, *new state)``."""
    check_estimator(sketch)
    rounding = sketch.rounding()
    needs = any(t is not None and t.requires_grad for t in (x, weight, bias))
    if rounding is None or not needs or not torch.is_grad_enabled() or x.numel() == 0:
        y, _, _, *new = norm.forward(x, weight, bias, *state)
        return y, *new
    seed = next_seed(x) if weight is None else next_seed(x, weight)
    y, _, _, _, _, *new = _SavedInBits.apply(norm, rounding, x, weight, bias, seed, *state)
    return y, *new


def _as_autocast(x: Tensor, call: Any) -> Tensor:
    """Cast ``x`` as autocast would for ``call``, which is asked with an empty tensor."""
    if not torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(call(x.new_empty((0, *x.shape[1:]))).dtype)


def layer_norm(
    x: Tensor,
    shape: tuple[int, ...],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    sketch: Estimator,
) -> Tensor:
    """``F.layer_norm``, bit-identical, whose input is saved in a few bits.

    Args:
        x: ``(*, *shape)``. shape, weight, bias, eps: as in ``F.layer_norm``.
        sketch: a memory saver that rounds (``bs.Quantized``); any other leaves the norm exact.

    Raises:
        RuntimeError: on double backward.
        TypeError: ``sketch`` is not a layer estimator.
    """
    if x.dim() > len(shape):
        x = _as_autocast(x, lambda e: F.layer_norm(e, shape))
    return _apply(LayerNorm(tuple(shape), eps), x, weight, bias, sketch)[0]


def rms_norm(
    x: Tensor,
    shape: tuple[int, ...],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    sketch: Estimator,
) -> Tensor:
    """``F.rms_norm``, bit-identical, whose input is saved in a few bits; see :func:`layer_norm`."""
    if x.dim() > len(shape):
        x = _as_autocast(x, lambda e: F.rms_norm(e, list(shape)))
    return _apply(RMSNorm(tuple(shape), eps), x, weight, None, sketch)[0]


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    sketch: Estimator,
) -> Tensor:
    """``F.group_norm``, bit-identical, whose input is saved in a few bits; see :func:`layer_norm`."""
    x = _as_autocast(x, lambda e: F.group_norm(e, num_groups))
    return _apply(GroupNorm(num_groups, eps), x, weight, bias, sketch)[0]


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    sketch: Estimator,
) -> Tensor:
    """``F.batch_norm(..., training=True)``, bit-identical, whose input is saved in a few bits.

    The running statistics are updated in place; otherwise see :func:`layer_norm`.

    Raises:
        ValueError: one value per channel, as ``F.batch_norm`` does.
    """
    per_channel = x.shape[0] * math.prod(x.shape[2:])
    if per_channel == 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {x.size()}"
        )
    norm = BatchNorm(momentum, eps)
    if running_mean is None or running_var is None:
        return _apply(norm, x, weight, bias, sketch)[0]
    y, mean, var = _apply(norm, x, weight, bias, sketch, running_mean, running_var)
    with torch.no_grad():
        running_mean.copy_(mean)
        running_var.copy_(var)
    return y
