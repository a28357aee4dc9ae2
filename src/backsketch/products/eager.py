r"""Products of stochastically rounded 8-bit operands in plain PyTorch: the definition, on any device.

``int8.cpp`` does the same arithmetic in one pass over memory; both agree bit for bit in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from backsketch.products.numbers import BLOCK, INT8, Numbers, depth_of, padded, up
from backsketch.rounding import eager as rounding

__all__ = [
    "BLOCK",
    "depth_of",
    "dither",
    "is_by_columns",
    "magnitude",
    "pack",
    "round_by_columns",
    "round_by_rows",
    "unpack",
    "up",
    "vjps",
]

Key = tuple[int, int]


def dither(rows: range, columns: int, key: Key, device: torch.device) -> Tensor:
    """``(rows, columns)`` random integers below 65536 (int32): pure functions of row, column and key."""
    words = up(columns, 32) // 2
    first = rows.start * words
    counter = torch.arange(first, first + len(rows) * words, device=device).to(torch.int32)
    bits = rounding.mix(counter, key).view(len(rows), -1, 1, 16)
    halves = torch.cat([bits & 0xFFFF, (bits >> 16) & 0xFFFF], 2)
    return halves.flatten(1)[:, :columns]


def magnitude(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """The largest absolute entry of each group along ``dim``, which stays; NaN where there is one."""
    largest = x.abs().amax(dim, keepdim=True)
    return torch.where(x.isnan().any(dim, keepdim=True), torch.nan, largest)


def round_by_rows(x: Tensor, key: Key, numbers: Numbers = INT8) -> tuple[Tensor, Tensor]:
    """Codes of ``(rows, columns)`` and a scale for each row ``(rows, 1)``: ``E[codes * scales] = x``."""
    scale, rate = numbers.scale(magnitude(x, 1))
    bits = dither(range(x.shape[0]), x.shape[1], key, x.device)
    return numbers.round(x, rate, bits), scale


def round_by_columns(
    x: Tensor, key: Key, first_row: int = 0, numbers: Numbers = INT8
) -> tuple[Tensor, Tensor]:
    """Codes of ``(rows, columns)`` and a scale for each column ``(columns,)``."""
    scale, rate = numbers.scale(magnitude(x, 0))
    rows = range(first_row, first_row + x.shape[0])
    return numbers.round(x, rate, dither(rows, x.shape[1], key, x.device)), scale[0]


def pack(x: Tensor, key: Key, numbers: Numbers = INT8) -> tuple[Tensor, Tensor]:
    """Codes of ``(n, j)`` in the order in which the product reads them, and their statistics.

    Returns:
        uint8 ``(depth_of(n), j rounded up to 16)``, and ``(blocks, 2, j)``: scale and sum of the codes of each
        block of rows and each column. On a GPU, ``(padded(j), padded(n))``, by columns, and the scales only.
    """
    n, j = x.shape
    if is_by_columns(x.device):
        return _pack_by_columns(x, key, numbers)
    parts, stats = [], []
    for block in numbers.blocks(n):
        codes, scale = round_by_columns(x[block], key, block.start, numbers)
        stats.append(torch.stack([scale, codes.sum(0).to(scale.dtype)]))
        parts.append(numbers.to_bytes(codes))
    return torch.cat(parts).view(depth_of(n), up(j, 16)), torch.stack(stats)


def _pack_by_columns(x: Tensor, key: Key, numbers: Numbers) -> tuple[Tensor, Tensor]:
    n, j = x.shape
    parts = [round_by_columns(x[block], key, block.start, numbers) for block in numbers.blocks(n)]
    codes = numbers.to_byte(torch.cat([codes for codes, _ in parts]).T)
    filled = F.pad(codes, (0, padded(n) - n, 0, padded(j) - j))
    return filled, torch.stack([scale[None] for _, scale in parts])


def is_by_columns(device: torch.device) -> bool:
    """Whether packed codes lie by columns, as products on a GPU read them."""
    return device.type == "cuda"


def unpack(codes: Tensor, n: int, j: int, numbers: Numbers = INT8) -> Tensor:
    """``(n, j)`` codes from what :func:`pack` returned."""
    if is_by_columns(codes.device):
        return numbers.from_byte(codes[:j, :n].T)
    flat, wide = codes.flatten(), codes.shape[1]
    parts = []
    for block in numbers.blocks(n) or [slice(0, 0)]:
        rows = block.stop - block.start
        part = flat[block.start * wide : (block.start + depth_of(rows)) * wide]
        parts.append(numbers.from_bytes(part, rows, j))
    return torch.cat(parts)


def vjps(
    g: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    packed: tuple[Tensor, Tensor] | None,
    keys: tuple[Key, Key, Key, Key],
    with_bias: bool,
    numbers: Numbers = INT8,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``(grad_input, grad_weight, grad_bias)``; see :func:`backsketch.products.vjps`.

    The keys are those of g by row, of the weight, of x, and of g by column.
    """
    by_row = round_by_rows(g, keys[0], numbers) if weight is not None or x is not None else None
    grad_input = grad_weight = None
    if weight is not None:
        assert by_row is not None
        grad_input = _input_vjp(*by_row, weight, keys[1], numbers)
    if x is not None:
        assert by_row is not None
        grad_weight = _weight_vjp(*by_row, x, keys[2], numbers)
    elif packed is not None:
        grad_weight = _packed_weight_vjp(g, *packed, keys[3], numbers)
    return grad_input, grad_weight, g.sum(0) if with_bias else None


def _input_vjp(codes: Tensor, scale: Tensor, weight: Tensor, key: Key, numbers: Numbers) -> Tensor:
    of_weight, column = round_by_columns(weight, key, numbers=numbers)
    total: Tensor | None = None
    for start in range(0, weight.shape[0], numbers.depth):
        part = slice(start, start + numbers.depth)
        product = numbers.product(codes[:, part], of_weight[part], weight.dtype)
        total = _add(total, product * column * scale)
    assert total is not None
    return total


def _weight_vjp(codes: Tensor, scale: Tensor, x: Tensor, key: Key, numbers: Numbers) -> Tensor:
    """The rows of x take the scales of the rows of g with them, relative to the largest of their block."""
    total: Tensor | None = None
    for block in numbers.blocks(x.shape[0]):
        largest = magnitude(scale[block], 0)
        factor = torch.where(largest == 0, 0.0, scale[block] / largest)
        of_x, column = round_by_columns(x[block] * factor, key, block.start, numbers)
        product = numbers.product(codes[block].T, of_x, x.dtype)
        total = _add(total, product * (column * largest[0]))
    assert total is not None
    return total


def _packed_weight_vjp(
    g: Tensor, codes: Tensor, stats: Tensor, key: Key, numbers: Numbers
) -> Tensor:
    of_x = unpack(codes, g.shape[0], stats.shape[2], numbers)
    total: Tensor | None = None
    for number, block in enumerate(numbers.blocks(g.shape[0])):
        of_g, scale = round_by_columns(g[block], key, block.start, numbers)
        product = numbers.product(of_g.T, of_x[block], g.dtype)
        total = _add(total, product * stats[number, 0] * scale[:, None])
    assert total is not None
    return total


def _add(total: Tensor | None, term: Tensor) -> Tensor:
    return term if total is None else total + term
