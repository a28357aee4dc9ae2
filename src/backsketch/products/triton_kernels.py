"""The Triton kernels of 8-bit products; :mod:`backsketch.products.gpu` calls them. Importing this imports Triton.

They compute what ``numbers.py`` and ``eager.py`` define, bit for bit, if they are compiled without fused
multiply-adds (``enable_fp_fusion=False``).
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["largest_of_columns", "rescale", "round_to_codes"]


@triton.jit
def largest_of_columns(
    x_at, factor_at, out_at, n, k,
    HAS_FACTOR: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Largest magnitudes ``(blocks of ROWS rows, k)`` of ``x * factor``, by their bits: a NaN is the largest."""
    block = tl.program_id(0)
    row = (block * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    x = tl.load(x_at + row.to(tl.int64) * k + column, (row < n) & (column < k), 0.0).to(tl.float32)
    if HAS_FACTOR:
        x *= tl.load(factor_at + row, row < n, 0.0)
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    largest = tl.max(bits, 0, keep_dims=True)
    tl.store(out_at + block * k + column, largest, column < k)


@triton.jit
def _dither(row, column, words, first_key, second_key):
    """Random integers below 65536: the lowbias32 mixer of a counter, half a word for each entry."""
    word = (row * words + column // 32 * 16 + column % 16).to(tl.uint32) + first_key.to(tl.uint32)
    word = (word ^ (word >> 16)) * 0x7FEB352D ^ second_key.to(tl.uint32)
    word = (word ^ (word >> 15)) * 0x846CA68B
    word = word ^ (word >> 16)
    return tl.where(column // 16 % 2 == 0, word & 0xFFFF, word >> 16).to(tl.int32)


@triton.jit
def _integer(x, rate, dither):
    """The code of an entry among integers: ``numbers.Integers.round``."""
    half, end = 8388608.0, 16711680.0  # 128 and 255 in units of 2^-16
    units = x * rate + half
    units = tl.where(units == units, tl.minimum(units, end), end)
    return ((units.to(tl.int32) + dither) >> 16) - 128


@triton.jit
def _float(x, rate, dither):
    """The byte of an entry among 8-bit floats: ``numbers.Floats.round``."""
    levels = x * rate
    levels = tl.where(levels == levels, levels, 0.0)
    bits = levels.to(tl.int32, bitcast=True)
    octave = tl.maximum(((bits >> 23) & 255) - 127, -6)
    one_over_spacing = ((127 + 3 - octave) << 23).to(tl.float32, bitcast=True)
    units = (tl.abs(levels) * one_over_spacing * 65536.0 + 0.5).to(tl.int32)
    # 8 to 16 eighths of an octave, 0 to 8 below the first: a carry leads into the next octave by itself.
    byte = ((octave + 7) << 3) + ((units + dither) >> 16) - 8
    return byte | ((bits >> 24) & 128)


@triton.jit(do_not_specialize=["first_key", "second_key"])  # or each step would compile anew
def round_to_codes(
    x_at, factor_at, rate_at, codes_at, turned_at, n, k, deep, wide, words, first_key, second_key,
    BY_ROW: tl.constexpr, BLOCK: tl.constexpr, FLOATS: tl.constexpr, HAS_FACTOR: tl.constexpr,
    HAS_CODES: tl.constexpr, HAS_TURNED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Codes of ``x * factor`` ``(n, k)``, by rows ``(deep, wide)`` or by columns ``(wide, deep)``.

    They are filled up with zeros. The rate belongs to a row, or to a column of a block of BLOCK rows (of all
    rows where BLOCK is 0).
    """
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < n) & (column < k)
    x = tl.load(x_at + row.to(tl.int64) * k + column, inside, 0.0).to(tl.float32)
    if HAS_FACTOR:
        x *= tl.load(factor_at + row, row < n, 0.0)
    if BY_ROW:
        rate = tl.load(rate_at + row, row < n, 0.0)
    elif BLOCK == 0:
        rate = tl.load(rate_at + column, column < k, 0.0)
    else:
        rate = tl.load(rate_at + row // BLOCK * k + column, inside, 0.0)
    dither = _dither(row, column, words, first_key, second_key)
    code = _float(x, rate, dither) if FLOATS else _integer(x, rate, dither)
    code = tl.where(inside, code, 0).to(tl.uint8)
    stored = (row < deep) & (column < wide)
    if HAS_CODES:
        tl.store(codes_at + row.to(tl.int64) * wide + column, code, stored)
    if HAS_TURNED:
        tl.store(turned_at + column.to(tl.int64) * deep + row, code, stored)


@triton.jit
def rescale(
    product_at, column_at, row_at, out_at, n, k, stride,
    HAS_ROW: tl.constexpr, ADDS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``out (+)= product * column * row`` for ``(n, k)``, of which ``product`` has rows of ``stride`` entries."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < n) & (column < k)
    value = tl.load(product_at + row.to(tl.int64) * stride + column, inside, 0).to(tl.float32)
    value *= tl.load(column_at + column, column < k, 0.0)
    if HAS_ROW:
        value *= tl.load(row_at + row, row < n, 0.0)
    at = out_at + row.to(tl.int64) * k + column
    if ADDS:
        value += tl.load(at, inside, 0.0)
    tl.store(at, value, inside)
