"""Where the rows of a tensor are, and how to take and put them.

Shape suffixes: ``n`` rows of the batch, ``k`` kept rows, ``c`` tensor rows folded into one row of the
region (64 tokens of a sample, say), ``lead`` the leading sizes that count rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from backsketch import sampling
from backsketch.sampling import is_readable


@dataclass(frozen=True)
class Layout:
    """Rows run along ``dim``, slowest first; ``axes`` consecutive dimensions hold them.

    A size ``(64 n, 192)`` is ``Layout(0)``: each row is a block of 64. Tokens ``(b, t, 192)`` are
    ``Layout(0, axes=2)`` and, flattened to ``(b t, 192)``, ``Layout(0)``.
    """

    dim: int
    axes: int = 1


def kept_lead(lead: Sequence[int], axis: int, k: int) -> tuple[int, ...]:
    """The leading sizes of a tensor that holds ``k`` rows: ``k`` on one axis and 1 on the others."""
    return tuple(k if i == axis else 1 for i in range(len(lead)))


def _memory_order(x: Tensor) -> list[int] | None:
    """The dimensions of ``x`` in memory, outermost first; None where that is the plain order."""
    strides = x.stride()
    order = sorted(range(x.dim()), key=lambda d: (-strides[d], d))
    return None if order == list(range(x.dim())) else order


def dense_like(x: Tensor, layout: Layout) -> Tensor:
    """An empty tensor with the size of ``x`` and the order of strides that :func:`take` returns."""
    if x.is_contiguous():
        return x
    if layout.axes > 1:
        sizes = x.shape[layout.dim : layout.dim + layout.axes]
        flat = dense_like(x.flatten(layout.dim, layout.dim + layout.axes - 1), Layout(layout.dim))
        return flat.unflatten(layout.dim, sizes)
    shape = list(x.shape)
    for d, stride in enumerate(x.stride()):
        if stride == 0 and shape[d] != 1:
            x = x.narrow(d, 0, 1)
    order = _memory_order(x) or list(range(x.dim()))
    inverse = [order.index(d) for d in range(len(order))]
    return x.new_empty([x.shape[d] for d in order]).permute(inverse).expand(shape)


def _select(x: Tensor, dim: int, index: Tensor) -> Tensor:
    """``index_select`` that keeps the order of strides, so that captured views stay valid.

    Broadcast dimensions (stride 0) stay broadcast; gaps between strides are closed.
    """
    if x.is_contiguous():
        return x.index_select(dim, index)
    shape = list(x.shape)
    for d, stride in enumerate(x.stride()):
        if stride == 0 and shape[d] > 1:
            x = x.narrow(d, 0, 1)
    shape[dim] = index.shape[0]
    if x.shape[dim] == 1 and shape[dim] != 1:  # the same values in every row
        return x.expand(shape)
    order = _memory_order(x)
    if order is None:
        return x.index_select(dim, index).expand(shape)
    inverse = [order.index(d) for d in range(len(order))]
    taken = x.permute(order).index_select(order.index(dim), index)
    return taken.permute(inverse).expand(shape)


def take(x: Tensor, dim: int, axes: int, lead: Sequence[int], axis: int, index: Tensor) -> Tensor:
    """Rows ``index`` of ``x``: the tensor a forward pass on those rows alone would have saved.

    ``dim`` and ``axes`` are a :class:`Layout`, spelled out because captured graphs call this.
    """
    k = index.shape[0]
    if axes > 1:
        x = x.flatten(dim, dim + axes - 1)
    c = x.shape[dim] // math.prod(lead)
    if c != 1:
        x = x.unflatten(dim, (-1, c))
    x = _select(x, dim, index)
    if c != 1:
        x = x.flatten(dim, dim + 1)
    if axes > 1:
        sizes = kept_lead(lead, axis, k)
        x = x.unflatten(dim, (*sizes[:-1], sizes[-1] * c))
    return x


def put(g: Tensor, dim: int, axes: int, lead: Sequence[int], index: Tensor) -> Tensor:
    """The inverse of :func:`take` for a gradient: zeros everywhere but in the rows ``index``."""
    if axes == 1 and dim == 0 and g.shape[0] == index.shape[0]:
        return g.new_zeros((math.prod(lead), *g.shape[1:])).index_copy_(0, index, g)
    k = index.shape[0]
    if axes > 1:
        g = g.flatten(dim, dim + axes - 1)
    c = g.shape[dim] // k
    if c != 1:
        g = g.unflatten(dim, (k, c))
    n = math.prod(lead)
    full = g.new_zeros((*g.shape[:dim], n, *g.shape[dim + 1 :])).index_copy_(dim, index, g)
    if c != 1:
        full = full.flatten(dim, dim + 1)
    if axes > 1:
        full = full.unflatten(dim, (*lead[:-1], lead[-1] * c))
    return full


def tokens(lead: Sequence[int]) -> int:
    """How many consecutive rows belong to one sample, where ``lead`` are the leading sizes that count rows."""
    return math.prod(lead[1:])


def scores(cotangents: Sequence[Tensor], row_dims: int) -> Tensor:
    """Euclidean norms of the rows of several cotangents taken together, ``(n,)``."""
    norms = [row_norms(g.reshape(math.prod(g.shape[:row_dims]), -1)) for g in cotangents]
    if len(norms) == 1:
        return norms[0]
    return row_norms(torch.stack([x.to(torch.float64) for x in norms], dim=1))


def row_norms(rows: Tensor) -> Tensor:
    """Euclidean norms ``(n,)`` of the rows ``(n, d)``, in float32 or better, at any magnitude.

    Squares leave the range of float32 where entries are below 1e-22 or above 1e19: such norms, and those that
    cannot be looked at without waiting, are taken in float64.
    """
    if (norms := sampling.row_norms(rows)) is not None:
        return norms
    dtype = torch.promote_types(rows.dtype, torch.float32)
    if dtype == torch.float64:
        return _norms_in_double(rows)
    if is_readable(rows):
        norms = torch.linalg.vector_norm(rows, dim=1, dtype=dtype)
        if norms.numel() == 0 or 1e-10 < float(norms.max()) < 1e17:
            return norms
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)


def _norms_in_double(rows: Tensor) -> Tensor:
    largest = rows.abs().amax() if rows.numel() else rows.new_ones(())
    unit = torch.where(torch.isfinite(largest) & (largest > 0), largest, 1.0)
    return torch.linalg.vector_norm(rows / unit, dim=1) * unit
