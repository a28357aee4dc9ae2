"""The Triton kernels of rounding; :mod:`backsketch.rounding.gpu` calls them. Importing this imports Triton.

They compute what ``eager.py`` defines, bit for bit but for slopes and sums of rows, if they are compiled without
fused multiply-adds (``enable_fp_fusion=False``). Group sizes are powers of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from backsketch.sampling.triton_kernels import magnitude_bits, mix

__all__ = ["layer_norm", "mask", "masked", "pack", "restore"]


@triton.jit
def _slope(x, SLOPE: tl.constexpr):
    """``x``, or the slope there of GELU (1) or SiLU (2)."""
    if SLOPE == 1:
        below = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        return below + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    if SLOPE == 2:
        s = tl.sigmoid(x)
        return s * (1 + x * (1 - s))
    return x


@triton.jit
def _entries(
    x_at, n, groups,
    SIZE: tl.constexpr, GROUPS: tl.constexpr, PARTS: tl.constexpr, SLOPE: tl.constexpr,
):  # fmt: skip
    """A program's groups as ``(GROUPS, PARTS, SIZE / PARTS)``: numbers of groups, places in a group, entries."""
    WIDTH: tl.constexpr = SIZE // PARTS
    group = (tl.program_id(0) * GROUPS + tl.arange(0, GROUPS))[:, None, None]
    place = tl.arange(0, PARTS)[None, :, None] * WIDTH + tl.arange(0, WIDTH)[None, None, :]
    at = tl.program_id(0).to(tl.int64) * (GROUPS * SIZE) + tl.arange(0, GROUPS * SIZE)
    x = tl.load(x_at + at, at < n, 0.0).to(tl.float32)
    last = tl.load(x_at + n - 1).to(tl.float32)
    x = tl.where(at < n, x, last)  # the last group repeats its last entry
    return group, place, tl.reshape(_slope(x, SLOPE), [GROUPS, PARTS, WIDTH])


@triton.jit
def _scales(x, TOP: tl.constexpr):
    """Lowest entry and step of each group, NaN where one is not finite, and 65536 over the step."""
    bits = tl.max(tl.max(magnitude_bits(x), 2), 1)
    low, high = tl.min(tl.min(x, 2), 1), tl.max(tl.max(x, 2), 1)
    extent = high - low
    finite = (bits < 0x7F800000) & (extent < float("inf"))
    step = tl.div_rn(extent, tl.full(extent.shape, TOP, tl.float32))
    rate = tl.div_rn(tl.full(extent.shape, TOP * 65536, tl.float32), extent)
    rate = tl.where(finite & (extent > 1e-30), rate, 0.0)
    low, step = tl.where(finite, low, float("nan")), tl.where(finite, step, float("nan"))
    return low, step, rate, finite


@triton.jit
def _units(x, low, rate, finite, TOP: tl.constexpr):
    """Distance from the lowest entry in units of 65536 to a step."""
    low = tl.where(finite, low, 0.0)[:, None, None]
    distance = (x - low) * rate[:, None, None] + 0.5
    distance = tl.where(distance == distance, distance, 0.0)
    distance = tl.minimum(tl.maximum(distance, -65536.0), 2147483000.0)
    return tl.minimum(distance.to(tl.int32), TOP * 65536)


@triton.jit
def _squeezed(codes, finite, BITS: tl.constexpr, PARTS: tl.constexpr):
    """``(GROUPS, PARTS, WIDTH)`` codes to ``(GROUPS, WIDTH)`` bytes that hold PARTS of them."""
    shifts = tl.arange(0, PARTS)[None, :, None] * BITS
    bytes_ = tl.sum(codes << shifts, 1)
    return tl.where(finite[:, None], bytes_, 0).to(tl.uint8)


@triton.jit(do_not_specialize=["first_key", "second_key"])  # or each step would compile anew
def pack(
    x_at, codes_at, scales_at, n, groups, first_key, second_key,
    BITS: tl.constexpr, SIZE: tl.constexpr, TWICE: tl.constexpr, SLOPE: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Codes ``(groups, bytes)`` and scales ``(groups, 2)`` of ``(n,)`` entries: ``eager.pack``."""
    PARTS: tl.constexpr = 8 // BITS
    WIDTH: tl.constexpr = SIZE // PARTS
    LINE: tl.constexpr = SIZE * (BITS + 2 * TWICE) // 8
    TOP: tl.constexpr = (1 << BITS) - (0 if TWICE else 1)
    group, place, x = _entries(x_at, n, groups, SIZE, GROUPS, PARTS, SLOPE)
    low, step, rate, finite = _scales(x, TOP)
    row = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    tl.store(scales_at + row * 2, low, row < groups)
    tl.store(scales_at + row * 2 + 1, step, row < groups)
    units = _units(x, low, rate, finite, TOP)
    line = codes_at + row.to(tl.int64)[:, None] * LINE
    if not TWICE:
        bits = mix(group * (SIZE // 2) + place % (SIZE // 2), first_key, second_key)
        units += tl.where(place < SIZE // 2, bits & 0xFFFF, bits >> 16).to(tl.int32)
        codes = tl.reshape(_squeezed(units >> 16, finite, BITS, PARTS), [GROUPS * WIDTH])
        at = tl.program_id(0).to(tl.int64) * (GROUPS * WIDTH) + tl.arange(0, GROUPS * WIDTH)
        tl.store(codes_at + at, codes, at // WIDTH < groups)
    else:
        whole = tl.minimum(units >> 16, (1 << BITS) - 1)
        at = line + tl.arange(0, WIDTH)[None, :]
        tl.store(at, _squeezed(whole, finite, BITS, PARTS), (row < groups)[:, None])
        # The two bits of an entry, four entries to a byte.
        group, place, x = _entries(x_at, n, groups, SIZE, GROUPS, 4, SLOPE)
        units = _units(x, low, rate, finite, TOP)
        rest = units - (tl.minimum(units >> 16, (1 << BITS) - 1) << 16)
        bits = mix(group * SIZE + place, first_key, second_key)
        first = ((bits & 0xFFFF).to(tl.int32) + rest) >> 16
        second = ((bits >> 16).to(tl.int32) + rest) >> 16
        at = line + WIDTH + tl.arange(0, SIZE // 4)[None, :]
        tl.store(at, _squeezed(first | second << 1, finite, 2, 4), (row < groups)[:, None])


@triton.jit
def _restored(
    codes_at, scales_at, entry, inside,
    WHICH: tl.constexpr, BITS: tl.constexpr, SIZE: tl.constexpr, TWICE: tl.constexpr,
):  # fmt: skip
    """Rounded entries by their number."""
    WIDTH: tl.constexpr = SIZE * BITS // 8
    LINE: tl.constexpr = WIDTH + SIZE // 4 * TWICE
    group, place = entry // SIZE, entry % SIZE
    line = codes_at + group * LINE
    level = tl.load(line + place % WIDTH, inside, 0).to(tl.int32)
    level = (level >> (place // WIDTH * BITS)) & ((1 << BITS) - 1)
    if WHICH >= 0:
        ups = tl.load(line + WIDTH + place % (SIZE // 4), inside, 0).to(tl.int32)
        level += (ups >> (place // (SIZE // 4) * 2 + WHICH)) & 1
    step = tl.load(scales_at + group * 2 + 1, inside, 0.0)
    return level.to(tl.float32) * step + tl.load(scales_at + group * 2, inside, 0.0)


@triton.jit
def restore(
    codes_at, scales_at, factor_at, out_at, n,
    HAS_FACTOR: tl.constexpr, WHICH: tl.constexpr, BITS: tl.constexpr, SIZE: tl.constexpr, TWICE: tl.constexpr,
    ENTRIES: tl.constexpr,
):  # fmt: skip
    """``(n,)`` rounded entries, times a cotangent where there is one."""
    entry = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    inside = entry < n
    value = _restored(codes_at, scales_at, entry, inside, WHICH, BITS, SIZE, TWICE)
    if HAS_FACTOR:
        value = tl.load(factor_at + entry, inside, 0.0).to(tl.float32) * value
    tl.store(out_at + entry, value.to(out_at.dtype.element_ty), inside)


@triton.jit
def mask(x_at, out_at, n, blocks, low, high, BLOCKS: tl.constexpr):
    """One bit an entry, in blocks of 512 entries and 64 bytes: ``eager.mask``."""
    block = (tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS))[:, None, None]
    bit = tl.arange(0, 8)[None, :, None]
    byte = tl.arange(0, 64)[None, None, :]
    entry = block.to(tl.int64) * 512 + bit * 64 + byte
    x = tl.load(x_at + entry, entry < n, 0.0).to(tl.float32)
    is_set = (entry < n) & (((x <= low) | (x >= high)) == 0)
    bytes_ = tl.sum(is_set.to(tl.int32) << bit, 1)
    row = (tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS))[:, None]
    tl.store(out_at + row * 64 + tl.arange(0, 64)[None, :], bytes_.to(tl.uint8), row < blocks)


@triton.jit
def masked(g_at, bits_at, out_at, n, outside, HAS_OUTSIDE: tl.constexpr, ENTRIES: tl.constexpr):
    """A cotangent where the bit is set, ``outside`` times it elsewhere: ``eager.masked``."""
    entry = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    inside = entry < n
    byte = tl.load(bits_at + entry // 512 * 64 + entry % 64, inside, 0).to(tl.int32)
    is_set = (byte >> (entry % 512 // 64).to(tl.int32)) & 1
    g = tl.load(g_at + entry, inside, 0.0)
    other = g * outside if HAS_OUTSIDE else tl.zeros_like(g)
    tl.store(out_at + entry, tl.where(is_set != 0, g, other).to(out_at.dtype.element_ty), inside)


@triton.jit
def layer_norm(
    g_at, weight_at, mean_at, rstd_at, codes_at, scales_at, out_at, parts_at, rows, width, programs,
    HAS_WEIGHT: tl.constexpr, HAS_MEAN: tl.constexpr, BITS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The backward pass of a layer norm of an input packed twice: ``eager.layer_norm``.

    A program takes every ``programs``-th row; its sums for weight and bias go to ``(programs, 2, width)``.
    """
    program = tl.program_id(0)
    column = tl.arange(0, WIDTH)
    there = column < width
    of_weight, of_bias = tl.zeros([WIDTH], tl.float32), tl.zeros([WIDTH], tl.float32)
    for row in range(program, rows, programs):
        entry = (tl.zeros([WIDTH], tl.int64) + row) * width + column
        g = tl.load(g_at + entry, there, 0.0).to(tl.float32)
        rstd = tl.load(rstd_at + row)
        first = _restored(codes_at, scales_at, entry, there, 0, BITS, SIZE, True)
        second = _restored(codes_at, scales_at, entry, there, 1, BITS, SIZE, True)
        if HAS_MEAN:
            mean = tl.load(mean_at + row)
            first, second = first - mean, second - mean
        first, second = tl.where(there, first * rstd, 0.0), tl.where(there, second * rstd, 0.0)
        scaled = g * tl.load(weight_at + column, there, 0.0).to(tl.float32) if HAS_WEIGHT else g
        grad = scaled - first * (tl.sum(scaled * second, 0) / width)
        if HAS_MEAN:
            grad -= tl.sum(scaled, 0) / width
        tl.store(out_at + entry, grad * rstd, there)
        of_weight += (first + second) * 0.5 * g
        of_bias += g
    at = parts_at + program * 2 * width + column
    tl.store(at, of_weight, there)
    tl.store(at + width, of_bias, there)
