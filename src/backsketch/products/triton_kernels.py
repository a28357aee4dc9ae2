"""The Triton kernels of 8-bit products; :mod:`backsketch.products.gpu` calls them. Importing this imports Triton.

They compute what ``numbers.py`` and ``eager.py`` define, bit for bit, if they are compiled without fused
multiply-adds (``enable_fp_fusion=False``).
"""

from __future__ import annotations

import triton
import triton.language as tl

from backsketch.sampling.triton_kernels import largest_of_rows, magnitude_bits, mix

__all__ = [
    "largest_of_columns",
    "product_of_blocks",
    "product_of_rows",
    "rescale",
    "round_blocks",
    "round_columns",
    "round_rows",
]


# Rounding -------------------------------------------------------------------------------------------


@triton.jit
def _dither(row, column, words, first_key, second_key):
    """Random integers below 65536: half a word of a counter's hash for each entry."""
    word = mix(row * words + column // 32 * 16 + column % 16, first_key, second_key)
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


@triton.jit
def _code(x, rate, row, column, inside, words, first_key, second_key, FLOATS: tl.constexpr):
    dither = _dither(row, column, words, first_key, second_key)
    code = _float(x, rate, dither) if FLOATS else _integer(x, rate, dither)
    return tl.where(inside, code, 0).to(tl.uint8)


@triton.jit
def _scale(bits, FLOATS: tl.constexpr):
    """Scale and rate of groups with these largest magnitudes: ``scale`` of ``numbers.py``."""
    largest = bits.to(tl.float32, bitcast=True)
    if FLOATS:
        bounded = tl.maximum(bits, 27 << 23)  # 2^-100
        # 2^e with 448 = 0.875 * 2^9 as the largest number, for mantissas in [0.5, 1)
        power = (bounded >> 23) - 126 - 9 + ((bounded & 0x7FFFFF) > 0x600000).to(tl.int32)
        scale = ((power + 127) << 23).to(tl.float32, bitcast=True)
        rate = ((127 - power) << 23).to(tl.float32, bitcast=True)
    else:
        bounded = tl.maximum(largest, 2.5e-32)
        scale = tl.div_rn(bounded, tl.full(bounded.shape, 127.0, tl.float32))
        rate = tl.div_rn(tl.full(bounded.shape, 8323072.0, tl.float32), bounded)  # 127 * 2^16
    alive = (bits > 0) & (bits < 0x7F800000)
    dead = tl.where(bits == 0, 0.0, float("nan"))
    return tl.where(alive, scale, dead), tl.where(alive, rate, 0.0)


@triton.jit
def _relative(scale, largest):
    """What a row of a block is multiplied by: its scale over the largest scale of the block."""
    return tl.where(largest == 0, 0.0, tl.div_rn(scale, largest + tl.zeros_like(scale)))


@triton.jit(do_not_specialize=["first_key", "second_key"])  # or each step would compile anew
def round_rows(
    x_at, codes_at, turned_at, scale_at, n, k, deep, wide, words, first_key, second_key,
    FLOATS: tl.constexpr, HAS_CODES: tl.constexpr, HAS_TURNED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Codes of ``(n, k)`` with a scale for each row, by rows ``(deep, wide)`` and by columns ``(wide, deep)``.

    Both are filled up with zeros. A program reads its rows twice, the second time from the cache.
    """
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    start_of_row = x_at + row.to(tl.int64) * k
    scale, rate = _scale(largest_of_rows(x_at, row, n, k, ROWS, COLUMNS), FLOATS)
    tl.store(scale_at + row, scale, row < n)
    for start in range(0, wide, COLUMNS):
        column = (start + tl.arange(0, COLUMNS))[None, :]
        inside = (row < n) & (column < k)
        x = tl.load(start_of_row + column, inside, 0.0).to(tl.float32)
        code = _code(x, rate, row, column, inside, words, first_key, second_key, FLOATS)
        stored = (row < deep) & (column < wide)
        if HAS_CODES:
            tl.store(codes_at + row.to(tl.int64) * wide + column, code, stored)
        if HAS_TURNED:
            tl.store(turned_at + column.to(tl.int64) * deep + row, code, stored)


@triton.jit(do_not_specialize=["first_key", "second_key"])
def round_blocks(
    x_at, rows_at, turned_at, scale_at, n, k, deep, wide, words, first_key, second_key,
    HAS_ROWS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Integer codes ``(wide, deep)`` of ``(n, k)`` with a scale for each column of a block of ROWS rows.

    With scales of rows ``(n,)``, those of ``diag(rows) x``: the rows are multiplied by what is relative to the
    largest of their block, and the scales of the columns ``(blocks, k)`` by that.
    """
    block = tl.program_id(0)
    row = (block * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < n) & (column < k)
    x = tl.load(x_at + row.to(tl.int64) * k + column, inside, 0.0).to(tl.float32)
    if HAS_ROWS:
        of_rows = tl.load(rows_at + row, row < n, 0.0)
        largest = tl.max(magnitude_bits(of_rows), 0, keep_dims=True).to(tl.float32, bitcast=True)
        x *= _relative(of_rows, largest)
    scale, rate = _scale(tl.max(magnitude_bits(x), 0, keep_dims=True), False)
    code = _code(x, rate, row, column, inside, words, first_key, second_key, False)
    tl.store(turned_at + column.to(tl.int64) * deep + row, code, (row < deep) & (column < wide))
    if HAS_ROWS:
        scale *= largest
    tl.store(scale_at + block * k + column, scale, column < k)


@triton.jit
def largest_of_columns(
    x_at, rows_at, largest_at, out_at, n, k,
    HAS_ROWS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Largest magnitudes ``(blocks of ROWS rows, k)`` of ``diag(rows / largest) x``, by their bits."""
    block = tl.program_id(0)
    row = (block * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    x = tl.load(x_at + row.to(tl.int64) * k + column, (row < n) & (column < k), 0.0).to(tl.float32)
    if HAS_ROWS:
        x *= _relative(tl.load(rows_at + row, row < n, 0.0), tl.load(largest_at))
    tl.store(out_at + block * k + column, tl.max(magnitude_bits(x), 0, keep_dims=True), column < k)


@triton.jit(do_not_specialize=["first_key", "second_key"])
def round_columns(
    x_at, rows_at, largest_at, bits_at, turned_at, scale_at, n, k, deep, wide, words, first_key, second_key,
    FLOATS: tl.constexpr, HAS_ROWS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Codes ``(wide, deep)`` of ``diag(rows / largest) x``, given the bits of the largest of each column."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < n) & (column < k)
    x = tl.load(x_at + row.to(tl.int64) * k + column, inside, 0.0).to(tl.float32)
    scale, rate = _scale(tl.load(bits_at + column, column < k, 0), FLOATS)
    if HAS_ROWS:
        largest = tl.load(largest_at)
        x *= _relative(tl.load(rows_at + row, row < n, 0.0), largest)
        scale *= largest
    code = _code(x, rate, row, column, inside, words, first_key, second_key, FLOATS)
    tl.store(turned_at + column.to(tl.int64) * deep + row, code, (row < deep) & (column < wide))
    tl.store(scale_at + column, scale, (column < k) & (tl.program_id(0) == 0))


# Products -------------------------------------------------------------------------------------------


@triton.jit
def _tile(m, n, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """Rows and columns of this program's tile, in an order in which neighbours share operands."""
    down, across = tl.cdiv(m, ROWS), tl.cdiv(n, COLUMNS)
    program = tl.program_id(0)
    group = program // (GROUP * across)
    height = tl.minimum(down - group * GROUP, GROUP)
    place = program % (GROUP * across)
    row = (group * GROUP + place % height) * ROWS + tl.arange(0, ROWS)
    column = place // height * COLUMNS + tl.arange(0, COLUMNS)
    return row, column


@triton.jit
def product_of_rows(
    a_at, b_at, row_at, column_at, out_at, m, n, a_wide, b_wide, depth,
    PART: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """``out (m, n) = diag(row) (a @ b.T) diag(column)`` for codes ``(m, depth)`` and ``(n, depth)``.

    Sums of PART terms are integers; sums of parts are float32.
    """
    row, column = _tile(m, n, ROWS, COLUMNS, GROUP)
    along = tl.arange(0, DEPTH)
    a_row = a_at + (row % m).to(tl.int64)[:, None] * a_wide
    b_row = b_at + (column % n).to(tl.int64)[None, :] * b_wide
    of_column = tl.load(column_at + column, column < n, 0.0)[None, :]
    of_row = tl.load(row_at + row, row < m, 0.0)[:, None]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for part in range(0, depth, PART):
        terms = tl.zeros([ROWS, COLUMNS], tl.int32)
        for start in range(part, tl.minimum(part + PART, depth), DEPTH):
            at = start + along
            a = tl.load(a_row + at[None, :], at[None, :] < depth, 0)
            b = tl.load(b_row + at[:, None], at[:, None] < depth, 0)
            terms = tl.dot(a, b, terms, out_dtype=tl.int32)
        total += terms.to(tl.float32) * of_column * of_row
    at = out_at + row.to(tl.int64)[:, None] * n + column[None, :]
    tl.store(at, total.to(out_at.dtype.element_ty), (row < m)[:, None] & (column < n)[None, :])


@triton.jit
def product_of_blocks(
    a_at, b_at, row_at, column_at, out_at, m, n, a_wide, b_wide, depth,
    HAS_ROW: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """``out (m, n) = sum over blocks of diag(row) (a @ b.T) diag(column)``: codes ``(m, depth)``, ``(n, depth)``.

    Blocks of DEPTH terms have scales ``(blocks, m)`` and ``(blocks, n)`` of their own, and are summed in float32.
    """
    row, column = _tile(m, n, ROWS, COLUMNS, GROUP)
    along = tl.arange(0, DEPTH)
    a_row = a_at + (row % m).to(tl.int64)[:, None] * a_wide
    b_row = b_at + (column % n).to(tl.int64)[None, :] * b_wide
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for block in range(0, tl.cdiv(depth, DEPTH)):
        at = block * DEPTH + along
        a = tl.load(a_row + at[None, :], at[None, :] < depth, 0)
        b = tl.load(b_row + at[:, None], at[:, None] < depth, 0)
        terms = tl.dot(a, b, out_dtype=tl.int32).to(tl.float32)
        terms *= tl.load(column_at + block * n + column, column < n, 0.0)[None, :]
        if HAS_ROW:
            terms *= tl.load(row_at + block * m + row, row < m, 0.0)[:, None]
        total += terms
    at = out_at + row.to(tl.int64)[:, None] * n + column[None, :]
    tl.store(at, total.to(out_at.dtype.element_ty), (row < m)[:, None] & (column < n)[None, :])


@triton.jit
def rescale(
    product_at, row_at, column_at, out_at, n, k, stride,
    HAS_ROW: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``out (n, k) = diag(row) product diag(column)``, where the product has rows of ``stride`` entries."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < n) & (column < k)
    value = tl.load(product_at + row.to(tl.int64) * stride + column, inside, 0.0)
    value *= tl.load(column_at + column, column < k, 0.0)
    if HAS_ROW:
        value *= tl.load(row_at + row, row < n, 0.0)
    at = out_at + row.to(tl.int64) * k + column
    tl.store(at, value.to(out_at.dtype.element_ty), inside)
