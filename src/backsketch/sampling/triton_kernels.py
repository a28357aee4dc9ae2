"""The Triton kernels of draws; :mod:`backsketch.sampling.gpu` calls them. Importing this imports Triton."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["draw", "largest_of_rows", "magnitude_bits", "mix", "row_norms"]


@triton.jit
def mix(counter, first_key, second_key):
    """Counter to 32 random bits (uint32): the lowbias32 mixer (Wellons 2018) with two keys."""
    word = counter.to(tl.uint32) + first_key.to(tl.uint32)
    word = (word ^ (word >> 16)) * 0x7FEB352D ^ second_key.to(tl.uint32)
    word = (word ^ (word >> 15)) * 0x846CA68B
    return word ^ (word >> 16)


@triton.jit
def magnitude_bits(x):
    """Magnitudes of float32 as integers in the same order, where a NaN is the largest."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def largest_of_rows(x_at, row, n, k, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Bits ``(ROWS, 1)`` of the largest magnitude in each of some rows of ``(n, k)``."""
    start_of_row = x_at + row.to(tl.int64) * k
    bits = tl.zeros([ROWS, COLUMNS], tl.int32)
    for start in range(0, k, COLUMNS):
        column = (start + tl.arange(0, COLUMNS))[None, :]
        x = tl.load(start_of_row + column, (row < n) & (column < k), 0.0).to(tl.float32)
        bits = tl.maximum(bits, magnitude_bits(x))
    return tl.max(bits, 1, keep_dims=True)


@triton.jit
def row_norms(
    x_at, factors_at, out_at, n, d,
    HAS_FACTORS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Euclidean norms ``(n,)`` of rows of any magnitude, columns multiplied by ``factors`` ``(d,)``.

    A program reads its rows twice, the second time from the cache.
    """
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    start_of_row = x_at + row.to(tl.int64) * d
    top = largest_of_rows(x_at, row, n, d, ROWS, COLUMNS)
    largest = top.to(tl.float32, bitcast=True)
    unit = tl.where((top > 0) & (top < 0x7F800000), largest, 1.0)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, d, COLUMNS):
        column = (start + tl.arange(0, COLUMNS))[None, :]
        x = tl.load(start_of_row + column, (row < n) & (column < d), 0.0).to(tl.float32) / unit
        if HAS_FACTORS:
            x *= tl.load(factors_at + column, column < d, 0.0)
        total += x * x
    norm = largest.to(tl.float64) * tl.sqrt(tl.sum(total, 1, keep_dims=True)).to(tl.float64)
    # What is not finite stays so, whatever it is multiplied by.
    norm = tl.where(top < 0x7F800000, norm, largest.to(tl.float64))
    tl.store(out_at + row, norm, row < n)


@triton.jit
def _at_place(place, blocks, size, left, right, first_key, second_key, SHUFFLED: tl.constexpr):
    """The row at each place: its own, or that of a random order of the blocks of ``size`` rows.

    The order is a Feistel network over the next power of two, walked until it is back inside.
    """
    if not SHUFFLED:
        return place
    block = tl.minimum(place // size, blocks - 1)  # places beyond the end are left alone
    low, high = (1 << right) - 1, (1 << left) - 1
    outside = tl.full(place.shape, 1, tl.int32)
    while tl.max(outside, 0) != 0:
        a, b = block >> right, block & low
        for turn in tl.static_range(3):
            a ^= mix(b + 0x10000000 * (2 * turn + 1), first_key, second_key).to(tl.int32) & high
            b ^= mix(a + 0x10000000 * (2 * turn + 2), first_key, second_key).to(tl.int32) & low
        block = tl.where(outside != 0, (a << right) | b, block)
        outside = (block >= blocks).to(tl.int32)
    return block * size + place % size


@triton.jit
def _score(scores_at, at, inside, any_bad):
    """Scores in float64; where one is not finite, those are 1 and all others 0."""
    s = tl.load(scores_at + at, inside, 0.0).to(tl.float64)
    bad = (s - s) != 0
    return tl.where(any_bad != 0, bad.to(tl.float64), s)


@triton.jit
def _probability(s, level, rest, floor, share):
    """Inclusion probabilities: ``inclusion_probabilities`` of ``design.py``."""
    filled = tl.where(
        level > 0, tl.minimum(s / tl.where(level > 0, level, 1.0), 1.0), tl.where(s > 0, 1.0, rest)
    )
    return (1 - floor) * filled + floor * share


@triton.jit(do_not_specialize=["point", "first_key", "second_key"])
def draw(
    scores_at, chosen_at, indices_at, weights_at, n, k, point, floor,
    blocks, size, left, right, first_key, second_key,
    SHUFFLED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Water-filling and systematic sampling of ``k`` of ``n`` rows by one program.

    ``chosen`` is scratch memory ``(n,)``: the weight of a drawn row, -1 elsewhere. ``point`` is the uniform number
    in units of 2^-32.
    """
    lane = tl.arange(0, CHUNK)
    u = point.to(tl.float64) / 4294967296.0
    kept = tl.full([], 0.0, tl.float64) + k

    bad = tl.zeros([CHUNK], tl.int32)
    for start in range(0, n, CHUNK):
        s = tl.load(scores_at + start + lane, start + lane < n, 0.0).to(tl.float64)
        bad = bad | ((s - s) != 0).to(tl.int32)
    any_bad = tl.max(bad, 0)

    # The level only falls, so the sure rows only grow, and there are fewer than k of them.
    level = tl.full([], float("inf"), tl.float64)
    sure = tl.full([], -1, tl.int32)
    moves = tl.full([], 1, tl.int32)
    while moves != 0:
        over, tail = tl.zeros([CHUNK], tl.int32), tl.zeros([CHUNK], tl.float64)
        for start in range(0, n, CHUNK):
            s = _score(scores_at, start + lane, start + lane < n, any_bad)
            is_over = s > level
            over += is_over.to(tl.int32)
            tail += tl.where(is_over, 0.0, s)
        found = tl.sum(over, 0)
        moves = ((found > sure) & (found < k)).to(tl.int32)
        new = tl.sum(tail, 0) / (kept - tl.minimum(found, k - 1))
        level = tl.where(moves != 0, new, level)
        sure = tl.where(moves != 0, found, sure)

    positive, total = tl.zeros([CHUNK], tl.int32), tl.zeros([CHUNK], tl.float64)
    for start in range(0, n, CHUNK):
        s = _score(scores_at, start + lane, start + lane < n, any_bad)
        positive += (s > 0).to(tl.int32)
    alive = tl.sum(positive, 0)
    rest = (kept - alive) / tl.maximum(n - alive, 1)
    share = kept / n
    for start in range(0, n, CHUNK):
        s = _score(scores_at, start + lane, start + lane < n, any_bad)
        total += tl.where(start + lane < n, _probability(s, level, rest, floor, share), 0.0)
    stretch = kept / tl.sum(total, 0)

    edge = tl.full([], 0.0, tl.float64)
    for start in range(0, n, CHUNK):
        inside = start + lane < n
        at = _at_place(start + lane, blocks, size, left, right, first_key, second_key, SHUFFLED)
        pi = _probability(_score(scores_at, at, inside, any_bad), level, rest, floor, share)
        width = tl.where(inside, pi * stretch, 0.0)
        upper = edge + tl.cumsum(width, 0)
        hit = tl.ceil(upper - u) > tl.ceil(upper - width - u)
        weight = tl.where(pi > 0, 1 / tl.where(pi > 0, pi, 1.0), 0.0)
        tl.store(chosen_at + at, tl.where(hit, weight, -1.0), inside)
        edge += tl.sum(width, 0)

    tl.debug_barrier()  # what other threads of the program have written is read below
    before = tl.full([], 0, tl.int32)
    for start in range(0, n, CHUNK):
        weight = tl.load(chosen_at + start + lane, start + lane < n, -1.0)
        hit = (weight >= 0).to(tl.int32)
        place = before + tl.cumsum(hit, 0) - 1
        stored = (hit != 0) & (place < k)
        tl.store(indices_at + place, (start + lane).to(tl.int64), stored)
        tl.store(weights_at + place, weight.to(weights_at.dtype.element_ty), stored)
        before += tl.sum(hit, 0)
    # Rounding at the very end may miss a row.
    missing = (lane < k - before) & (lane >= 0)
    tl.store(
        indices_at + before + lane, (tl.zeros([CHUNK], tl.int32) + n - 1).to(tl.int64), missing
    )
    tl.store(weights_at + before + lane, tl.zeros([CHUNK], weights_at.dtype.element_ty), missing)
