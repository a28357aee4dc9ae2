"""Losses of a linear head and their gradients, from logits that exist for some rows at a time.

Two opaque operators: the loop over chunks is no compiler's business, and how many rows are drawn may depend
on the data. The mathematics is in :mod:`backsketch.ops.cross_entropy`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from backsketch.products import Products
from backsketch.sampling import Sample, draw, num_kept, operator

__all__ = ["head_gradients", "head_losses"]

_CHUNK_BYTES = 2**25


@dataclass(frozen=True)
class _Head:
    """A head and the form of its loss. Logits are computed in the dtype of the rows, then widened."""

    weight: Tensor
    bias: Tensor | None
    ignore_index: int
    smoothing: float
    z_loss: float
    soft_cap: float
    chunk_rows: int

    @property
    def num_classes(self) -> int:
        return self.weight.shape[0]

    def logits(self, x: Tensor) -> Tensor:
        """``(rows, classes)`` in float32 or better, a tensor of its own."""
        raw = F.linear(x, self.weight, self.bias)
        logits = raw.to(torch.promote_types(raw.dtype, torch.float32))
        return logits.div_(self.soft_cap).tanh_().mul_(self.soft_cap) if self.soft_cap else logits

    def chunks(self, count: int, element_size: int, at_least: int = 1) -> Iterator[slice]:
        """Slices of ``count`` rows, of ``at_least`` so many where the caller of the head names no number."""
        rows = _CHUNK_BYTES // max(self.num_classes * element_size, 1)
        size = self.chunk_rows or max(rows, at_least)
        return (slice(start, start + size) for start in range(0, count, size))

    def slope(self, lse: Tensor) -> Tensor:
        """Derivative of a row's loss by the log of the softmax's denominator."""
        return 1 + 2 * self.z_loss * lse


def _head_of(weight: Tensor, bias: Tensor | None, dtype: torch.dtype, *form: object) -> _Head:
    bias = None if bias is None else bias.to(dtype)
    return _Head(weight.to(dtype), bias, *form)  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------
# Forward: losses, log-denominators, scores
# --------------------------------------------------------------------------------------------------


def _losses_impl(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *form: object
) -> tuple[Tensor, Tensor, Tensor]:
    head = _head_of(weight, bias, x.dtype, *form)
    wide = torch.promote_types(x.dtype, torch.float32)
    losses, lse, scores = (x.new_empty(x.shape[0], dtype=wide) for _ in range(3))
    with torch.autocast(x.device.type, enabled=False):
        for part in head.chunks(x.shape[0], wide.itemsize):
            losses[part], lse[part], scores[part] = _statistics(head, x[part], targets[part])
        scores *= _input_factor(x, wide)
    live = targets != head.ignore_index
    return torch.where(live, losses, 0.0), lse, torch.where(live, scores, 0.0)


def _input_factor(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``(rows,)``: root of the squared norm and its mean over the rows, positive even where x is zero."""
    squares = torch.linalg.vector_norm(x, dim=1, dtype=dtype).square()
    # A row that is not finite must stand out, not make all rows alike.
    mean = squares.where(squares.isfinite(), 0.0).mean()
    return (squares + mean.where(mean > 0, 1.0)).sqrt()


def _statistics(head: _Head, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of some rows: loss, log of the denominator, and norm of the gradient by the logits."""
    z = head.logits(x)
    column = targets.where(targets != head.ignore_index, 0)[:, None]
    at_target = z.gather(1, column)[:, 0]
    mean = z.mean(1) if head.smoothing else 0.0
    top = z.amax(1, keepdim=True)
    e = z.sub_(top).exp_()
    e_target = e.gather(1, column)[:, 0]
    # The others apart from the target: 1 - p and p - y keep their digits where p is close to 1.
    e.scatter_(1, column, 0.0)
    others, square = e.sum(1), torch.linalg.vector_norm(e, dim=1).square()
    total = others + e_target
    lse = top[:, 0] + total.log()
    loss = lse - (1 - head.smoothing) * at_target - head.smoothing * mean
    if head.z_loss:
        loss = loss + head.z_loss * lse.square()
    norm = _gradient_norm(head, lse, e_target / total, others / total, square / total.square())
    return loss, lse, norm


def _gradient_norm(
    head: _Head, lse: Tensor, p_target: Tensor, p_others: Tensor, square_others: Tensor
) -> Tensor:
    """``‖a p - q‖`` from p at the target, and sum and sum of squares of p elsewhere.

    With a soft cap, whose slope is at most 1, it is an upper bound of the norm that is wanted.
    """
    spread = head.smoothing / head.num_classes
    a = head.slope(lse)
    own = (a - 1) * p_target - p_others + head.smoothing - spread
    rest = a.square() * square_others
    if head.smoothing:
        base = (head.num_classes - 1) * spread**2
        exact = rest - 2 * a * spread * p_others + base
        rest = exact.maximum(1e-6 * (rest + base))  # cancellation must not make it zero
    return (own.square() + rest).sqrt().maximum(own.abs())


# --------------------------------------------------------------------------------------------------
# Backward: gradients of the drawn rows
# --------------------------------------------------------------------------------------------------


def _gradients_impl(
    cotangent: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, lse: Tensor,
    scores: Tensor, seed: Tensor, keep: float, is_int8: bool,
    need_x: bool, need_weight: bool, need_bias: bool, *form: object,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    head = _head_of(weight, bias, x.dtype, *form)
    kept, weights = _drawn(scores * cotangent.abs(), keep, seed)
    scale = cotangent[kept] * weights
    needed = need_x, need_weight, need_bias
    sums = _Sums(head, x, needed, Products(seed) if is_int8 else None)
    # Each product in 8 bits rounds the whole weight: as many logits at a time as the weight has entries.
    at_least = weight.shape[1] if is_int8 else 1
    with torch.autocast(x.device.type, enabled=False):
        for part in head.chunks(len(kept), lse.element_size(), at_least):
            rows = kept[part]
            inputs = x[rows]
            g = _cotangent(head, inputs, targets[rows], lse[rows], scale[part]).to(x.dtype)
            sums.add(rows, g, inputs)
    return sums.results(weight.dtype)


def _drawn(scores: Tensor, keep: float, seed: Tensor) -> Sample:
    """A fraction of the rows whose score is not zero; all of those at ``keep=1``."""
    live = scores.nonzero()[:, 0]
    k = num_kept(len(live), keep)
    if k >= len(live):
        return Sample(live, scores.new_ones(len(live)))
    return draw(scores, k, seed)


def _cotangent(head: _Head, x: Tensor, targets: Tensor, lse: Tensor, scale: Tensor) -> Tensor:
    """``scale * (a p - q)`` of some rows, none of them ignored: ``(rows, classes)``."""
    z = head.logits(x)
    inner = z.div(head.soft_cap).square_().neg_().add_(1) if head.soft_cap else None
    g = z.sub_(lse[:, None]).exp_().mul_((head.slope(lse) * scale)[:, None])
    if head.smoothing:
        g.sub_((head.smoothing / head.num_classes * scale)[:, None])
    own = (head.smoothing - 1) * scale
    g.scatter_add_(1, targets.where(targets != head.ignore_index, 0)[:, None], own[:, None])
    return g if inner is None else g.mul_(inner)


class _Sums:
    """Sums over chunks of what is needed: rows of grad_input, grad_weight and grad_bias."""

    def __init__(
        self, head: _Head, x: Tensor, needed: tuple[bool, bool, bool], products: Products | None
    ) -> None:
        wide = torch.promote_types(x.dtype, torch.float32)
        shapes = (x.shape, head.weight.shape, head.weight.shape[:1])
        self.head, self.products = head, products
        self.input, self.weight, self.bias = (
            x.new_zeros(shape, dtype=dtype) if want else None
            for shape, want, dtype in zip(shapes, needed, (x.dtype, wide, wide))
        )

    def add(self, rows: Tensor, g: Tensor, x: Tensor) -> None:
        """The part of the rows ``rows``, with cotangent ``g`` and inputs ``x``."""
        weight = self.head.weight if self.input is not None else None
        inputs = x if self.weight is not None else None
        below: Tensor | None
        if self.products is not None:
            below, at_weight, _ = self.products.vjps(g, inputs, weight)
        else:
            below = None if weight is None else g @ weight
            at_weight = None if inputs is None else self._product(g, inputs)
        if self.input is not None and below is not None:
            self.input[rows] = below
        if self.weight is not None and at_weight is not None:
            self.weight += at_weight
        if self.bias is not None:
            self.bias += g.sum(0, dtype=self.bias.dtype)

    def _product(self, g: Tensor, x: Tensor) -> Tensor | None:
        assert self.weight is not None
        if g.dtype != self.weight.dtype:
            return g.T @ x
        self.weight.addmm_(g.T, x)
        return None

    def results(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """The three gradients, empty where they are not needed, those of the parameters in their ``dtype``."""
        none = self.head.weight.new_empty(0, dtype=dtype)
        weight = none if self.weight is None else self.weight.to(dtype)
        bias = none.clone() if self.bias is None else self.bias.to(dtype)
        return self.head.weight.new_empty(0) if self.input is None else self.input, weight, bias


# --------------------------------------------------------------------------------------------------
# Operators
# --------------------------------------------------------------------------------------------------


def _losses_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *form: object
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    losses, lse, scores = (x.new_empty(x.shape[0], dtype=wide) for _ in range(3))
    return losses, lse, scores


def _gradients_fake(
    cotangent: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, lse: Tensor,
    scores: Tensor, seed: Tensor, keep: float, is_int8: bool,
    need_x: bool, need_weight: bool, need_bias: bool, *form: object,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    below = x.new_empty(x.shape if need_x else 0)
    at_weight = weight.new_empty(weight.shape if need_weight else 0)
    return below, at_weight, weight.new_empty(weight.shape[0] if need_bias else 0)


_FORM = "int ignore_index, float smoothing, float z_loss, float soft_cap, int chunk_rows"
_THREE = "(Tensor, Tensor, Tensor)"

head_losses = operator(
    f"head_losses(Tensor x, Tensor weight, Tensor? bias, Tensor targets, {_FORM}) -> {_THREE}",
    _losses_impl,
    _losses_fake,
)
head_gradients = operator(
    "head_gradients(Tensor cotangent, Tensor x, Tensor weight, Tensor? bias, Tensor targets, Tensor lse,"
    " Tensor scores, Tensor seed, float keep, bool is_int8, bool need_x, bool need_weight, bool need_bias,"
    f" {_FORM}) -> {_THREE}",
    _gradients_impl,
    _gradients_fake,
)
