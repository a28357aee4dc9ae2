"""The obvious slow twins: dense random matrices, exact products, nothing clever.

:func:`sketched_vjp` draws from the same seeds as the fast path, writes the sketch down as a dense tensor,
and lets the exact products do the rest. The tests hold the fast path against it draw by draw.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from backsketch.estimators import (
    Bilinear,
    Columns,
    Elements,
    Estimator,
    Exact,
    Float8,
    Int8,
    LowRank,
    Projection,
    Quantized,
    Rows,
    Split,
    StoredRows,
)
from backsketch.products import Geometry
from backsketch.products import eager as eight_bit
from backsketch.products.convolution import over_positions
from backsketch.products.numbers import NUMBERS, Numbers
from backsketch.sampling import Sample, draw, key_of, num_kept, uniform_like

__all__ = ["sketched_vjp"]

Products = tuple[Tensor, Tensor]


def sketched_vjp(
    estimator: Estimator,
    op: Bilinear,
    cotangent: Tensor,
    weight: Tensor,
    x: Tensor,
    seed: Tensor,
    store_seed: Tensor,
) -> Products:
    """``(grad_input, grad_weight)`` in rows form, for the draws that ``seed`` and ``store_seed`` name.

    Args:
        cotangent: rows form (``op.rows``). x: as the forward pass received it.
        seed: of the backward pass. store_seed: of the forward pass.
    """
    twin = _TWINS[type(estimator)]
    return twin(estimator, op, cotangent, weight, x, seed, store_seed)


def _diagonal(sample: Sample, n: int) -> Tensor:
    """The dense diagonal of R = diag(z / pi)."""
    r = torch.zeros(n, dtype=sample.weights.dtype)
    for index, w in zip(sample.indices.tolist(), sample.weights.tolist()):
        r[index] += w
    return r


def _sketch_dim(tensor: Tensor, dim: int, diagonal: Tensor) -> Tensor:
    return (tensor.movedim(dim, -1) * diagonal.to(tensor.dtype)).movedim(-1, dim)


def _exact(_: Any, op: Bilinear, g: Tensor, w: Tensor, x: Tensor, *__: Tensor) -> Products:
    return op.input_vjp(g, w), op.weight_vjp(g, op.rows(x))


def _elements(
    e: Elements, op: Bilinear, g: Tensor, w: Tensor, x: Tensor, s: Tensor, _: Tensor
) -> Products:
    mask = (uniform_like(g, s) < e.probability).to(g.dtype)
    masked = g * mask / e.probability
    return op.input_vjp(masked, w), op.weight_vjp(masked, op.rows(x))


def _rows(e: Rows, op: Bilinear, g: Tensor, w: Tensor, x: Tensor, s: Tensor, _: Tensor) -> Products:
    n = g.shape[0]
    k = num_kept(n, e.keep)
    if k >= n:
        return _exact(e, op, g, w, x)
    scores = e.input_scores(g, w), e.weight_scores(g, op.rows(x))
    first, second = (
        draw(t, max(1, min(k, int((t > 0).sum()))), s, stream, e.design)
        for stream, t in enumerate(scores)
    )
    return (
        op.input_vjp(_sketch_dim(g, 0, _diagonal(first, n)), w),
        op.weight_vjp(_sketch_dim(g, 0, _diagonal(second, n)), op.rows(x)),
    )


def _columns(
    e: Columns, op: Bilinear, g: Tensor, w: Tensor, x: Tensor, s: Tensor, _: Tensor
) -> Products:
    n = op.num_columns(g)
    k = num_kept(n, e.keep)
    if k >= n:
        return _exact(e, op, g, w, x)
    first = draw(e.input_scores(op, g, w), k, s, 0, e.design)
    second = draw(e.weight_scores(op, g, op.rows(x)), k, s, 1, e.design)
    width = g.shape[1] // n
    wide = [_diagonal(sample, n).repeat_interleave(width) for sample in (first, second)]
    return (
        op.input_vjp(_sketch_dim(g, 1, wide[0]), w),
        op.weight_vjp(_sketch_dim(g, 1, wide[1]), op.rows(x)),
    )


def _low_rank(
    e: LowRank, op: Bilinear, g: Tensor, w: Tensor, x: Tensor, s: Tensor, _: Tensor
) -> Products:
    if e.method == "subspace":
        raise NotImplementedError("the subspace method is its own definition: no slower twin")
    sketched = []
    for stream, target in enumerate(_exact(e, op, g, w, x)):
        u, sigma, vh = torch.linalg.svd(target.flatten(1), full_matrices=False)
        rank = num_kept(len(sigma), e.keep)
        if rank >= len(sigma):
            sketched.append(target)
            continue
        diagonal = _diagonal(draw(sigma, rank, s, stream), len(sigma))
        dense = u @ torch.diag(sigma * diagonal) @ vh
        sketched.append(dense.view(target.shape))
    return sketched[0], sketched[1]


def _stored_rows(
    e: StoredRows, op: Bilinear, g: Tensor, w: Tensor, x: Tensor, _: Tensor, s: Tensor
) -> Products:
    rows = op.rows(x)
    n = rows.shape[0]
    k = num_kept(n, e.keep)
    if k >= n:
        return _exact(e, op, g, w, x)
    order = {"uniform": 0, "l1": 1, "l2": 2}[e.scores]
    norms = rows.flatten(1).abs().pow(order).sum(1) ** (1 / max(order, 1))
    diagonal = _diagonal(draw(norms, k, s, 0, e.design), n)
    return op.input_vjp(g, w), op.weight_vjp(g, _sketch_dim(rows, 0, diagonal))


def _projection(
    e: Projection, op: Bilinear, g: Tensor, w: Tensor, x: Tensor, _: Tensor, s: Tensor
) -> Products:
    rows = op.rows(x)
    n = rows.shape[0]
    if num_kept(n, e.keep) >= n:
        return _exact(e, op, g, w, x)
    sketch = e._project(torch.eye(n, dtype=rows.dtype), s)  # the matrix S itself
    mixed = torch.einsum("ri,rj,j...->i...", sketch, sketch, rows)
    return op.input_vjp(g, w), op.weight_vjp(g, mixed)


def _quantized(
    e: Quantized, op: Bilinear, g: Tensor, w: Tensor, x: Tensor, _: Tensor, s: Tensor
) -> Products:
    rounded = rounded_slowly(x, s, e.bits, e.group_size)
    return op.input_vjp(g, w), op.weight_vjp(g, op.rows(rounded))


def rounded_slowly(x: Tensor, seed: Tensor, bits: int, size: int, stream: int = 0) -> Tensor:
    """Stochastic rounding entry by entry, in Python's own integers and numbers."""
    flat, top, key = x.flatten().tolist(), 2**bits - 1, key_of(seed, stream)
    decoded = []
    for number in range(0, len(flat), size):
        group = flat[number : number + size]
        low, extent = min(group), max(group) - min(group)
        for i, value in enumerate(group):
            half, j = divmod(i, size // 2)
            word = _hash(number // size * (size // 2) + j, *key)
            random = word >> 16 if half else word & 0xFFFF
            units = math.floor((value - low) * (top * 65536 / extent) + 0.5) if extent else 0
            decoded.append(low + extent / top * ((units + random) >> 16))
    return torch.tensor(decoded, dtype=x.dtype).view(x.shape)


def _hash(counter: int, first: int, second: int) -> int:
    """lowbias32 with a second key in its middle."""
    word = (counter + first) & 0xFFFFFFFF
    word ^= word >> 16
    word = (word * 0x7FEB352D) & 0xFFFFFFFF ^ second
    word ^= word >> 15
    word = word * 0x846CA68B & 0xFFFFFFFF
    return word ^ (word >> 16)


class _SlowProducts:
    """The 8-bit products from dequantized operands, in float64; the counterpart of ``products.Products``.

    Both kinds of products are counted apart: an estimator begins anew for each.
    """

    def __init__(self, seed: Tensor, numbers: Numbers) -> None:
        self.seed, self.calls, self.numbers = seed, [1000, 1000], numbers

    def vjps(self, g: Tensor, x: Any, weight: Any, with_bias: bool = False) -> tuple[Any, Any, Any]:
        self.calls[weight is None] += 1
        keys = [key_of(self.seed, 4 * self.calls[weight is None] + i) for i in range(3)]
        codes, steps = eight_bit.round_by_rows(g, keys[0], self.numbers)
        below = at_weight = None
        if weight is not None:
            of_weight, column = eight_bit.round_by_columns(weight, keys[1], numbers=self.numbers)
            below = (codes * steps).double() @ (of_weight * column).double()
        if x is not None:
            at_weight = torch.zeros(g.shape[1], x.shape[1], dtype=torch.float64)
            for rows in self.numbers.blocks(len(x)):
                of_x, column = eight_bit.round_by_columns(
                    x[rows] * (steps[rows] / steps[rows].max()), keys[2], rows.start, self.numbers
                )
                at_weight += codes[rows].double().T @ (of_x * column * steps[rows].max()).double()
        below, at_weight = (None if t is None else t.to(g.dtype) for t in (below, at_weight))
        return below, at_weight, None

    def convolution_vjps(
        self, g: Tensor, x: Any, weight: Any, geometry: Geometry
    ) -> tuple[Any, Any]:
        if (dense := geometry.dense()) is not None:  # the rest of x is as if it were not there
            read = (..., *(slice(None, None, stride) for stride in geometry.stride))
            read_x = None if x is None else x[read]
            part, at_weight = self.convolution_vjps(g, read_x, weight, dense)
            if part is None:
                return None, at_weight
            below = part.new_zeros(*part.shape[:2], *geometry.spatial)
            below[read] = part
            return below, at_weight
        if geometry.is_over_positions(g, x):
            return over_positions(self.vjps, g, x, weight, geometry)
        self.calls[weight is None] += 1
        keys = [key_of(self.seed, 4 * self.calls[weight is None] + i) for i in range(4)]
        below = at_weight = None
        if weight is not None:
            wide = [
                self._by_slices(
                    g, _dither(g, keys[0]), lambda t: [p for s in t for p in s.chunk(geometry.groups)]
                ),
                self._by_slices(
                    weight,
                    eight_bit.dither(range(len(weight)), weight[0].numel(), keys[1], g.device).view_as(weight),
                    lambda t: [c for p in t.chunk(geometry.groups) for c in p.unbind(1)],
                ),
            ]  # fmt: skip
            below = geometry.input_vjp(*wide).to(g.dtype)
        if x is not None:
            blocks = geometry.samples_of_block()
            wide = [
                self._by_slices(t, _dither(t, key), lambda t: [c for b in t.split(blocks) for c in b.unbind(1)])
                for t, key in ((g, keys[3]), (x, keys[2]))
            ]  # fmt: skip
            at_weight = geometry.weight_vjp(*wide).to(g.dtype)
        return below, at_weight

    def _by_slices(
        self, x: Tensor, dither: Tensor, slices: Callable[[Tensor], list[Tensor]]
    ) -> Tensor:
        """``x`` rounded and restored, float64; each of its slices, which are views, has a scale of its own."""
        result = torch.empty_like(x, dtype=torch.float64)
        for to, part, bits in zip(slices(result), slices(x), slices(dither)):
            scale, rate = self.numbers.scale(part.abs().max())
            to.copy_(self.numbers.round(part, rate, bits) * scale)
        return result


def _dither(x: Tensor, key: tuple[int, int]) -> Tensor:
    rows = x.flatten(0, 1).flatten(1)
    return eight_bit.dither(range(len(rows)), rows.shape[1], key, x.device).view_as(x)


def _eight_bit(
    e: Int8 | Float8, op: Bilinear, g: Tensor, w: Tensor, x: Tensor, s: Tensor, f: Tensor
) -> Products:
    if e.save:
        raise NotImplementedError(
            "codes kept by the forward pass have their twin in products.eager"
        )
    rounded = op.with_products(_SlowProducts(s, NUMBERS[e.numbers]))
    assert rounded is not None
    return sketched_vjp(e.sketch or Exact(), rounded, g, w, x, s, f)


def _split(e: Split, *arguments: Any) -> Products:
    return (
        sketched_vjp(e.grad_input or Exact(), *arguments)[0],
        sketched_vjp(e.grad_weight or Exact(), *arguments)[1],
    )


_TWINS: dict[type[Estimator], Callable[..., Products]] = {
    Exact: _exact,
    Elements: _elements,
    Rows: _rows,
    Columns: _columns,
    LowRank: _low_rank,
    StoredRows: _stored_rows,
    Projection: _projection,
    Int8: _eight_bit,
    Float8: _eight_bit,
    Quantized: _quantized,
    Split: _split,
}
