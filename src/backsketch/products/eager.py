r"""Products of stochastically rounded 8-bit operands in plain PyTorch: the definition, on any device.

``int8.cpp`` does the same arithmetic in one pass over memory; both agree bit for bit in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from backsketch.rounding import eager as rounding

__all__ = ["BLOCK", "depth_of", "pack", "round_by_columns", "round_by_rows", "vjps"]

Key = tuple[int, int]
BLOCK = 256  # rows that share the scale of a column in grad_weight
_DEPTH = 2048  # terms that grad_input sums in integers
_RIGHT = 64  # columns of a panel of packed codes
_LEVELS = 127.0 * 65536  # entries are rounded in units of 2^-16 of a step
_HALF = 128.0 * 65536
_TINY = 2.5e-32  # below it _LEVELS / x would overflow


def up(n: int, to: int) -> int:
    return (n + to - 1) // to * to


def depth_of(n: int) -> int:
    """Rows of the packed codes of ``n`` rows."""
    return up(n, 4)


def _dither(rows: range, columns: int, key: Key, device: torch.device) -> Tensor:
    """``(rows, columns)`` random integers below 65536 (int32): pure functions of row, column and key."""
    words = up(columns, 32) // 2
    first = rows.start * words
    counter = torch.arange(first, first + len(rows) * words, device=device).to(torch.int32)
    bits = rounding.mix(counter, key).view(len(rows), -1, 1, 16)
    halves = torch.cat([bits & 0xFFFF, (bits >> 16) & 0xFFFF], 2)
    return halves.flatten(1)[:, :columns]


def _scale(largest: Tensor) -> tuple[Tensor, Tensor]:
    """Step and rate of groups with these largest magnitudes; NaN and 0 where that is not finite."""
    bounded = largest.clamp(min=_TINY)
    live = (largest > 0) & largest.isfinite()
    step = torch.where(live, bounded / 127.0, torch.where(largest == 0, 0.0, torch.nan))
    return step, torch.where(live, torch.full_like(bounded, _LEVELS) / bounded, 0.0)


def _codes(x: Tensor, rate: Tensor, dither: Tensor) -> Tensor:
    """Signed codes (int32) of ``x``: ``E[codes] = x * rate / 65536`` to 2^-17."""
    units = (x * rate + _HALF).nan_to_num_(_HALF + _LEVELS)
    units = units.clamp_(max=_HALF + _LEVELS).to(torch.int32)
    return ((units + dither) >> 16) - 128


def _largest(x: Tensor, dim: int) -> Tensor:
    largest = x.abs().amax(dim, keepdim=True)
    return torch.where(x.isnan().any(dim, keepdim=True), torch.nan, largest)


def round_by_rows(x: Tensor, key: Key) -> tuple[Tensor, Tensor]:
    """Codes (int32) of ``(rows, columns)`` and a step for each row ``(rows, 1)``: ``E[codes * steps] = x``."""
    step, rate = _scale(_largest(x, 1))
    return _codes(x, rate, _dither(range(x.shape[0]), x.shape[1], key, x.device)), step


def round_by_columns(x: Tensor, key: Key, first_row: int = 0) -> tuple[Tensor, Tensor]:
    """Codes (int32) of ``(rows, columns)`` and a step for each column ``(columns,)``."""
    step, rate = _scale(_largest(x, 0))
    rows = range(first_row, first_row + x.shape[0])
    return _codes(x, rate, _dither(rows, x.shape[1], key, x.device)), step[0]


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """The exact product of two matrices of codes, as a float."""
    return (a.to(torch.float64) @ b.to(torch.float64)).to(dtype)


def _blocks(n: int) -> list[slice]:
    return [slice(start, min(start + BLOCK, n)) for start in range(0, n, BLOCK)]


def pack(x: Tensor, key: Key) -> tuple[Tensor, Tensor]:
    """Codes of ``(n, j)`` in the order in which the product reads them, and their statistics.

    Returns:
        uint8 ``(depth_of(n), j rounded up to 16)``, and ``(blocks, 2, j)``: step and sum of the codes of each
        block of 256 rows and each column.
    """
    n, j = x.shape
    parts, stats = [], []
    for block in _blocks(n):
        codes, step = round_by_columns(x[block], key, block.start)
        stats.append(torch.stack([step, codes.sum(0).to(step.dtype)]))
        padded = torch.nn.functional.pad(codes, (0, -j % 16, 0, -codes.shape[0] % 4))
        parts += [_interleaved(padded[:, c : c + _RIGHT]) for c in range(0, j, _RIGHT)]
    return torch.cat(parts).to(torch.uint8).view(depth_of(n), up(j, 16)), torch.stack(stats)


def _interleaved(panel: Tensor) -> Tensor:
    """Four rows next to each other for each column, flat."""
    return panel.view(-1, 4, panel.shape[1]).transpose(1, 2).flatten() & 0xFF


def unpack(codes: Tensor, n: int, j: int) -> Tensor:
    """``(n, j)`` signed codes (int32) from what :func:`pack` returned."""
    flat, wide = codes.flatten(), codes.shape[1]
    blocks = []
    for block in _blocks(n):
        depth = depth_of(block.stop - block.start)
        part = flat[block.start * wide : (block.start + depth) * wide]
        panels = [
            part[c * depth : (c + width) * depth]
            .view(-1, width, 4)
            .transpose(1, 2)
            .reshape(-1, width)
            for c in range(0, j, _RIGHT)
            for width in [min(_RIGHT, wide - c)]
        ]
        blocks.append(torch.cat(panels, 1)[: block.stop - block.start, :j])
    return torch.cat(blocks).view(torch.int8).to(torch.int32)


def vjps(
    g: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    packed: tuple[Tensor, Tensor] | None,
    keys: tuple[Key, Key, Key, Key],
    with_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``(grad_input, grad_weight, grad_bias)``; see :func:`backsketch.products.vjps`.

    The keys are those of g by row, of the weight, of x, and of g by column.
    """
    by_row = round_by_rows(g, keys[0]) if weight is not None or x is not None else None
    grad_input = grad_weight = None
    if weight is not None:
        assert by_row is not None
        grad_input = _input_vjp(*by_row, weight, keys[1])
    if x is not None:
        assert by_row is not None
        grad_weight = _weight_vjp(*by_row, x, keys[2])
    elif packed is not None:
        grad_weight = _packed_weight_vjp(g, *packed, keys[3])
    return grad_input, grad_weight, g.sum(0) if with_bias else None


def _input_vjp(codes: Tensor, step: Tensor, weight: Tensor, key: Key) -> Tensor:
    of_weight, column = round_by_columns(weight, key)
    total: Tensor | None = None
    for start in range(0, weight.shape[0], _DEPTH):
        part = slice(start, start + _DEPTH)
        term = _product(codes[:, part], of_weight[part], weight.dtype) * column * step
        total = term if total is None else total + term
    assert total is not None
    return total


def _weight_vjp(codes: Tensor, step: Tensor, x: Tensor, key: Key) -> Tensor:
    """The rows of x take the steps of the rows of g with them, relative to the largest of their block."""
    total: Tensor | None = None
    for block in _blocks(x.shape[0]):
        largest = _largest(step[block], 0)
        factor = torch.where(largest == 0, 0.0, step[block] / largest)
        of_x, column = round_by_columns(x[block] * factor, key, block.start)
        term = _product(codes[block].T, of_x, x.dtype) * (column * largest[0])
        total = term if total is None else total + term
    assert total is not None
    return total


def _packed_weight_vjp(g: Tensor, codes: Tensor, stats: Tensor, key: Key) -> Tensor:
    of_x = unpack(codes, g.shape[0], stats.shape[2])
    total: Tensor | None = None
    for number, block in enumerate(_blocks(g.shape[0])):
        of_g, step = round_by_columns(g[block], key, block.start)
        term = _product(of_g.T, of_x[block], g.dtype) * stats[number, 0] * step[:, None]
        total = term if total is None else total + term
    assert total is not None
    return total
