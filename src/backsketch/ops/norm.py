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
from backsketch.layout import channels_first, format_of, in_format
from backsketch.ops.double_backward import without_double_backward
from backsketch.ops.linear import check_estimator
from backsketch.rounding import Rounding
from backsketch.sampling import next_seed
from backsketch.torch_private import batch_norm_with_statistics, layout_of

__all__ = ["batch_norm", "group_norm", "layer_norm", "rms_norm"]

Stats = tuple[Tensor, ...]


Packed = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Norm:
    """One kind of norm: its forward pass, and its backward pass from two roundings of the input."""

    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, *state: Tensor
    ) -> Stats:
        """``(y, mean, rstd, *new state)``, y by the very call that the unconverted module makes."""
        raise NotImplementedError

    def vjp(
        self,
        rounding: Rounding,
        g: Tensor,
        weight: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        packed: Packed,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of (input, weight, bias), all in the dtype of the scales."""
        raise NotImplementedError


@dataclass(frozen=True)
class LayerNorm(Norm):
    shape: tuple[int, ...]
    eps: float

    centered: ClassVar[bool] = True

    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, *state: Tensor
    ) -> Stats:
        return torch.native_layer_norm(x, list(self.shape), weight, bias, self.eps)

    def vjp(
        self,
        rounding: Rounding,
        g: Tensor,
        weight: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        packed: Packed,
    ) -> tuple[Tensor, Tensor, Tensor]:
        flat = None if weight is None else weight.reshape(-1)
        center = mean.reshape(-1) if self.centered else None
        rows = g.reshape(-1, math.prod(self.shape))
        return rounding.layer_norm(rows, flat, center, rstd.reshape(-1), packed)


@dataclass(frozen=True)
class RMSNorm(LayerNorm):
    eps: float | None  # type: ignore[assignment]

    centered: ClassVar[bool] = False

    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, *state: Tensor
    ) -> Stats:
        y = F.rms_norm(x, list(self.shape), weight, self.eps)
        wide = x.reshape(-1, math.prod(self.shape)).to(torch.promote_types(x.dtype, torch.float32))
        # By default that of the type which PyTorch computes in, not of the input's, as its documentation says.
        eps = torch.finfo(wide.dtype).eps if self.eps is None else self.eps
        norm = torch.linalg.vector_norm(wide, dim=1)
        return y, norm.new_empty(0), (norm.square() / wide.shape[1] + eps).rsqrt()


class ChannelNorm(Norm):
    """A norm with one weight per channel: rows are the positions of one channel of one sample."""

    def shared(self, per_row: Tensor) -> Tensor:
        """``(n, channels)`` sums over rows, summed over the rows that share statistics, spread again."""
        raise NotImplementedError

    def count(self, n: int, channels: int, positions: int) -> int:
        """How many entries share statistics."""
        raise NotImplementedError

    def per_channel(self, stats: Tensor, n: int, channels: int) -> Tensor:
        """Statistics as ``(n, channels)``."""
        raise NotImplementedError

    def vjp(
        self,
        rounding: Rounding,
        g: Tensor,
        weight: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        packed: Packed,
    ) -> tuple[Tensor, Tensor, Tensor]:
        n, channels = g.shape[:2]
        rows = channels_first(g).view(n * channels, -1)
        mean, rstd = (self.per_channel(t, n, channels) for t in (mean, rstd))
        stats = torch.stack([mean, rstd], 2).view(-1, 2)
        total, first, second = rounding.row_sums(rows, stats, packed).view(n, channels, 3).unbind(2)
        w = g.new_ones(channels) if weight is None else weight
        entries = self.count(n, channels, rows.shape[1])
        slope = self.shared(second * w) / entries
        offset = self.shared(total * w) / entries
        factors = torch.stack([w * rstd, -rstd * slope, -rstd * offset], 2).view(-1, 3)
        grad = rounding.row_affine(rows, stats, factors, packed)
        return grad, (first + second).sum(0) / 2, total.sum(0)


@dataclass(frozen=True)
class GroupNorm(ChannelNorm):
    groups: int
    eps: float

    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, *state: Tensor
    ) -> Stats:
        n, channels = x.shape[:2]
        positions = math.prod(x.shape[2:])
        # As F.group_norm does it: on the CPU the result has the memory format of the input.
        layout = layout_of(x) if x.device.type == "cpu" else torch.contiguous_format
        x = x.contiguous(memory_format=layout)
        return torch.native_group_norm(
            x, weight, bias, n, channels, positions, self.groups, self.eps
        )

    def shared(self, per_row: Tensor) -> Tensor:
        n, channels = per_row.shape
        return self.per_channel(per_row.view(n, self.groups, -1).sum(2), n, channels)

    def count(self, n: int, channels: int, positions: int) -> int:
        return positions * (channels // self.groups)

    def per_channel(self, stats: Tensor, n: int, channels: int) -> Tensor:
        each = channels // self.groups
        return stats.view(n, self.groups, 1).expand(-1, -1, each).reshape(n, channels)


@dataclass(frozen=True)
class BatchNorm(ChannelNorm):
    """In training mode: statistics of the batch; the state is (running mean, running variance)."""

    momentum: float
    eps: float

    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, *state: Tensor
    ) -> Stats:
        # On copies: what a Function changes in place a compiler would have to be told of.
        mean, var = [s.clone() for s in state] or (None, None)
        y, center, rstd = batch_norm_with_statistics(
            x, weight, bias, (mean, var), self.momentum, self.eps
        )
        return (y, center, rstd) if mean is None or var is None else (y, center, rstd, mean, var)

    def shared(self, per_row: Tensor) -> Tensor:
        return per_row.sum(0).expand_as(per_row)

    def count(self, n: int, channels: int, positions: int) -> int:
        return n * positions

    def per_channel(self, stats: Tensor, n: int, channels: int) -> Tensor:
        return stats.expand(n, channels)


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
        norm, rounding, x, weight, bias, *_ = inputs
        ctx.norm, ctx.rounding = norm, rounding
        ctx.likes = tuple(
            None if t is None else (t.shape, t.dtype, format_of(t)) for t in (x, weight, bias)
        )
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weight, *output[1:5])

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor | None, *_: Any) -> tuple[Any, ...]:
        gradients: tuple[Any, ...] = (None, None, None)
        if cotangent is not None:
            gradients = without_double_backward(
                _vjp, ctx.norm, ctx.rounding, cotangent, *ctx.saved_tensors
            )
            gradients = tuple(
                in_format(grad.view(like[0]).to(like[1]), like[2]) if needed else None
                for grad, like, needed in zip(gradients, ctx.likes, ctx.needs_input_grad[2:5])
            )
        return (None, None, *gradients, *[None] * (len(ctx.needs_input_grad) - 5))


def _vjp(
    norm: Norm,
    rounding: Rounding,
    cotangent: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    codes: Tensor,
    scales: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = [None if t is None else t.to(scales.dtype) for t in (cotangent, weight, mean, rstd)]
    return norm.vjp(rounding, *wide, (codes, scales))  # type: ignore[arg-type, call-arg]


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
