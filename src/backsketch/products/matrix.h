// Both backward products of a linear layer from stochastically rounded 8-bit operands, fused on the host.
//
// A chunk of rows is rounded while it is in the cache, multiplied, and forgotten: codes never reach the main
// memory.
//
// Legend: n rows, o output features (columns of G), j input features (columns of W and X).
//     grad_input[n, j]  = sum_o G[n, o] W[o, j]      G by row, W by column
//     grad_weight[o, j] = sum_n G[n, o] X[n, j]      in blocks of BLOCK rows, summed in float32
//
// A product takes its left operand as unsigned bytes (code + 128), its right one as signed bytes in panels of
// 64 columns, four rows of the contraction interleaved, with the sums of its columns to undo the 128.

#pragma once

#include "tiles.h"

namespace {

// --------------------------------------------------------------------------------------------------------------
// Rounding
// --------------------------------------------------------------------------------------------------------------

// 32 columns of up to four rows of G: codes to `flat` and, four rows interleaved, to `panels`.
template <bool WHOLE, class T>
inline void round_rows_at(i64 c, const T *g, i64 columns, i64 row, int count, i64 words, Key key, const f16 *rates, u8 *flat, i64 ld,
                          u8 *panels, i64 panel, float *sums) {
  const int rows = WHOLE ? 4 : count;
  const i64 left[2] = {columns - c, columns - c - 16};
  v16 packed[2] = {};
  f16 sum[2] = {};
  EACH_OF(r, rows) {
    const T *from = g + r * columns + c;
    if (WHOLE) fetch(from + 4 * columns), fetch(from + 4 * columns + 16);  // the next four, while these are rounded
    const w16 bits = mix((w16)iota() + (u32)((row + r) * words + c / 2), key);
    EACH_OF(h, 2) {
      const f16 x = WHOLE ? floats(from + 16 * h) : some_floats(from + 16 * h, left[h]);
      const v16 code = rounded(x, rates[r], (v16)(h ? bits >> 16 : bits & 0xffff));
      if (flat) store(flat + r * ld + c + 16 * h, __builtin_convertvector(code, b16));
      packed[h] |= code << (int)(8 * r);
      sum[h] += x;
    }
  }
  EACH_OF(h, 2) {
    if (!WHOLE && left[h] <= 0) break;
    if (panels) store(panels + (c / 16 + h) * panel, packed[h]);
    if (sums) store(sums + c + 16 * h, load<f16>(sums + c + 16 * h) + sum[h]);
  }
}

// Four rows of G, rounded by row: row by row to `flat`, and transposed to panels of LEFT columns at `panels`.
template <class T>
void round_rows(const T *g, i64 columns, i64 row, int count, Key key, float *steps, u8 *flat, i64 ld, u8 *panels, i64 panel,
                float *sums) {
  const i64 words = up(columns, 32) / 2;
  f16 rates[4];
  for (int r = 0; r < 4; r++) {
    v16 most = {};
    if (r < count) {
      const T *from = g + r * columns;
      v16 other = {};
      i64 c = 0;
      for (; c + 32 <= columns; c += 32) {
        most = larger(most, magnitude(floats(from + c)));
        other = larger(other, magnitude(floats(from + c + 16)));
      }
      most = larger(most, other);
      for (; c < columns; c += 16) most = larger(most, magnitude(some_floats(from + c, columns - c)));
    }
    float rate;
    scale_of(largest_of(most), steps[r], rate);
    rates[r] = f16{} + rate;
  }
  i64 c = 0;
  for (; count == 4 && c + 32 <= columns; c += 32)
    round_rows_at<true>(c, g, columns, row, 4, words, key, rates, flat, ld, panels, panel, sums);
  for (; c < columns; c += 32) round_rows_at<false>(c, g, columns, row, count, words, key, rates, flat, ld, panels, panel, sums);
}

// Where the codes of a panel go: four rows interleaved, `line` bytes from one four to the next and `apart` bytes from 16 columns to
// the next. Unsigned for a left operand, signed for a right one.
struct Out {
  u8 *codes;
  i64 line, apart;
  bool left;
};

template <class T, int V, bool FACTORS>
void round_panel(const T *x, i64 ld, i64 columns, i64 first, i64 row, i64 rows, const float *factors, Key key, Out out, float *steps,
                 float *sums) {
  const i64 words = up(columns, 32) / 2;
  const auto value = [&](i64 r, int v) {
    const i64 c = first + 16 * v;
    const f16 entry = columns - c >= 16 ? floats(x + r * ld + c) : some_floats(x + r * ld + c, columns - c);
    return FACTORS ? entry * factors[r] : entry;
  };
  v16 most[V] = {};
  for (i64 r = 0; r < rows; r++) EACH_OF(v, V) {
      fetch(x + (r + 8) * ld + first + 16 * v);
      most[v] = larger(most[v], magnitude(value(r, v)));
    }
  f16 rates[V];
  EACH_OF(v, V) {
    float step[16];
    for (int l = 0; l < 16; l++) {
      float rate;
      scale_of(most[v][l], step[l], rate);
      rates[v][l] = rate;
    }
    const i64 c = first + 16 * v;
    std::memcpy(steps + c, step, std::min<i64>(16, columns - c) * sizeof(float));
  }
  v16 total[V] = {};
  const v16 sign = (v16)((w16){} + (out.left ? 0 : 0x80808080u));
  const auto four = [&](i64 k, int count) __attribute__((always_inline)) {
    v16 packed[V] = {};
    EACH_OF(r, count) {
      const u32 at = (u32)((row + k + r) * words + first / 32 * 16);
      EACH_OF(pair, (V + 1) / 2) {
        const w16 bits = mix((w16)iota() + (at + 16 * pair), key);
        EACH_OF(h, 2) {
          const int v = 2 * pair + h;
          if (v >= V) break;
          const v16 code = rounded(value(k + r, v), rates[v], (v16)(h ? bits >> 16 : bits & 0xffff));
          packed[v] |= code << (int)(8 * r);
          total[v] += code;
        }
      }
    }
    // Rows beyond the last are code 0 of a right operand; what they are on the left does not matter then.
    v16 beyond = {};
    for (int r = count; r < 4; r++) beyond |= 128 << (int)(8 * r);
    EACH_OF(v, V) store(out.codes + k / 4 * out.line + v * out.apart, (packed[v] | beyond) ^ sign);
  };
  i64 k = 0;
  for (; k + 4 <= rows; k += 4) four(k, 4);
  if (k < rows) four(k, (int)(rows - k));
  if (sums) EACH_OF(v, V) {
    const i64 c = first + 16 * v;
    for (i64 l = 0; l < std::min<i64>(16, columns - c); l++) sums[c + l] = (float)(total[v][l] - 128 * (i32)rows);
  }
}

// A block of rows by column, each row times its factor: codes in a panel of up to RIGHT columns, from a multiple of RIGHT on.
template <class T>
void round_columns(const T *x, i64 ld, i64 columns, i64 first, i64 row, i64 rows, const float *factors, Key key, Out out, float *steps,
                   float *sums) {
  const auto as = [&](auto vectors) {
    constexpr int V = decltype(vectors)::value;
    factors ? round_panel<T, V, true>(x, ld, columns, first, row, rows, factors, key, out, steps, sums)
            : round_panel<T, V, false>(x, ld, columns, first, row, rows, factors, key, out, steps, sums);
  };
  switch (std::min(RIGHT, up(columns - first, 16)) / 16) {
    case 4: return as(std::integral_constant<int, 4>());
    case 3: return as(std::integral_constant<int, 3>());
    case 2: return as(std::integral_constant<int, 2>());
    default: return as(std::integral_constant<int, 1>());
  }
}

// --------------------------------------------------------------------------------------------------------------
// Products
// --------------------------------------------------------------------------------------------------------------

// A right operand: codes of one block of the contraction, its steps and the sums of its columns.
struct Right {
  const u8 *codes;
  const float *steps, *sums;
  i64 columns, depth;  // depth: a multiple of four

  const u8 *panel(i64 first) const { return codes + first * depth; }
  i64 width(i64 first) const { return std::min(RIGHT, up(columns - first, 16)); }
};

// A left operand: byte k of row i lies at base + row(i) + (k / 4) * step + k % 4; one step of its own for each row, or none.
struct Left {
  const u8 *base;
  i64 step, ld, panel;  // row-major rows of `ld` bytes, or panels of LEFT rows
  const float *steps;

  const u8 *row(i64 i) const { return ld ? base + i * ld : base + i / LEFT * panel + i % LEFT * 4; }
};

#if WITH_VNNI

template <int M, int V>
__attribute__((noinline)) void tile(const Left &a, i64 i, const Right &b, i64 first, float *c, i64 ld, bool add) {
  const u8 *rows[M], *right = b.panel(first);
  const i64 stride = 4 * b.width(first), step = a.step;
  __mmask16 masks[V];
  __m512i sum[M][V];
  EACH_ROW rows[m] = a.row(i + m);
  EACH_VECTOR {
    masks[v] = mask_of(b.columns - first - 16 * v);
    const __m512i totals = _mm512_cvtps_epi32(_mm512_maskz_loadu_ps(masks[v], b.sums + first + 16 * v));
    const __m512i start = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(totals, 7));
    EACH_ROW sum[m][v] = start;
  }
  for (i64 k = 0, count = b.depth / 4; k < count; k++) {
    __m512i columns[V];
    EACH_VECTOR columns[v] = _mm512_loadu_si512(right + 64 * v);
    EACH_ROW {
      const __m512i left = _mm512_set1_epi32(load<i32>(rows[m]));
      EACH_VECTOR add_products(sum[m][v], left, columns[v]);
      rows[m] += step;
    }
    right += stride;
  }
  EACH_ROW EACH_VECTOR {
    float *to = c + m * ld + first + 16 * v;
    const __m512 steps = _mm512_maskz_loadu_ps(masks[v], b.steps + first + 16 * v);
    __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(sum[m][v]), steps);
    if (a.steps) value = _mm512_mul_ps(value, _mm512_set1_ps(a.steps[i + m]));
    if (add) value = _mm512_add_ps(_mm512_maskz_loadu_ps(masks[v], to), value);
    _mm512_mask_storeu_ps(to, masks[v], value);
  }
}

#else

template <int M, int V>
__attribute__((noinline)) void tile(const Left &a, i64 i, const Right &b, i64 first, float *c, i64 ld, bool add) {
  const u8 *right = b.panel(first);
  const i64 stride = 4 * b.width(first), count = b.depth / 4;
  for (int m = 0; m < M; m++) {
    const u8 *row = a.row(i + m);
    i32 sum[16 * V] = {};
    for (i64 k = 0; k < count; k++) {
      const u8 *left = row + k * a.step;
      const i32 l0 = left[0] - 128, l1 = left[1] - 128, l2 = left[2] - 128, l3 = left[3] - 128;
      const i8 *columns = (const i8 *)(right + k * stride);
      for (int j = 0; j < 16 * V; j++)
        sum[j] += l0 * columns[4 * j] + l1 * columns[4 * j + 1] + l2 * columns[4 * j + 2] + l3 * columns[4 * j + 3];
    }
    const i64 columns = std::min<i64>(16 * V, b.columns - first);
    float *to = c + m * ld + first;
    for (i64 j = 0; j < columns; j++) {
      float value = (float)sum[j] * b.steps[first + j];
      if (a.steps) value = value * a.steps[i + m];
      to[j] = add ? to[j] + value : value;
    }
  }
}

#endif

template <int M>
inline void tile_of(int vectors, const Left &a, i64 i, const Right &b, i64 first, float *c, i64 ld, bool add) {
  switch (vectors) {
    case 4: return tile<M, 4>(a, i, b, first, c, ld, add);
    case 3: return tile<M, 3>(a, i, b, first, c, ld, add);
    case 2: return tile<M, 2>(a, i, b, first, c, ld, add);
    default: return tile<M, 1>(a, i, b, first, c, ld, add);
  }
}

#if WITH_TILES

// 32 columns of sums become floats: minus what the 128 of the left operand added, times the steps, added to `c` or put there.
template <bool STEPS, bool ADD>
void scale_sums(const i32 *sums, i64 rows, const Right &b, i64 first, const float *steps_of, float *c, i64 ld) {
  __mmask16 masks[2];
  __m512i zeros[2];
  __m512 steps[2];
  EACH_OF(v, 2) {
    const i64 at = first + 16 * v;
    masks[v] = mask_of(b.columns - at);
    zeros[v] = _mm512_slli_epi32(_mm512_cvtps_epi32(_mm512_maskz_loadu_ps(masks[v], b.sums + at)), 7);
    steps[v] = _mm512_maskz_loadu_ps(masks[v], b.steps + at);
  }
  for (i64 m = 0; m < rows; m++, c += ld, sums += 32) EACH_OF(v, 2) {
      __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_load_si512(sums + 16 * v), zeros[v])), steps[v]);
      if (STEPS) value = _mm512_mul_ps(value, _mm512_set1_ps(steps_of[m]));
      if (ADD) value = _mm512_add_ps(_mm512_maskz_loadu_ps(masks[v], c + 16 * v), value);
      _mm512_mask_storeu_ps(c + 16 * v, masks[v], value);
    }
}

// The same in matrix registers, 32 x 32 sums at a time, up to GROUP rows and 64 columns. Panels of `a` are squares: 16 rows of 64 terms
// each. 32 columns of 1,024 terms stay in the first cache while the rows pass.
void multiply_tiles(const Left &a, i64 begin, i64 end, const Right &b, i64 first, float *c, i64 ld, bool add) {
  constexpr i64 TERMS = 1024;
  alignas(64) i32 sums[GROUP * 32];
  const i64 width = b.width(first), stride = 4 * width;
  for (i64 j = 0; j < width; j += 32)
    for (i64 k = 0; k < b.depth; k += TERMS) {
      const u8 *right = b.panel(first) + k * width + 4 * j;
      const i64 terms = std::min(TERMS, b.depth - k);
      for (i64 i = begin; i < end; i += 32) {
        const i64 rows = std::min<i64>(32, end - i);
        const Rows left = a.ld ? Rows{a.base + i * a.ld + k, a.ld, BYTES, TILE * a.ld}
                               : Rows{a.base + i / LEFT * a.panel + k * TILE, 64, SQUARE, a.panel};
        i32 *here = sums + (i - begin) * 32;
        for (i64 m = i + 32; k + terms == b.depth && m < std::min(end, i + 64); m++)
          EACH_OF(v, 2) fetch<true>(c + (m - begin) * ld + first + j + 16 * v);
        with_registers(rows, width - j, [&](auto m, auto v) { sum_tiles<m.value, v.value>(left, Columns{right, stride, 64}, terms, here, k > 0); });
        if (k + terms < b.depth) continue;
        float *to = c + (i - begin) * ld + first + j;
        const float *steps = a.steps ? a.steps + i : nullptr;
        if (steps) add ? scale_sums<true, true>(here, rows, b, first + j, steps, to, ld) : scale_sums<true, false>(here, rows, b, first + j, steps, to, ld);
        else add ? scale_sums<false, true>(here, rows, b, first + j, steps, to, ld) : scale_sums<false, false>(here, rows, b, first + j, steps, to, ld);
      }
    }
}

#endif

// Rows begin .. end of a product, at most ROWS at a time; `c` is the row `begin` of the result.
void multiply_vectors(const Left &a, i64 begin, i64 end, const Right &b, i64 first, float *c, i64 ld, bool add) {
  const int vectors = (int)(b.width(first) / 16);
  for (i64 i = begin; i < end;) {
    const i64 rows = std::min<i64>(ROWS, end - i);
    float *to = c + (i - begin) * ld;
    switch (rows) {
      case 6: tile_of<6>(vectors, a, i, b, first, to, ld, add); break;
      case 5: tile_of<5>(vectors, a, i, b, first, to, ld, add); break;
      case 4: tile_of<4>(vectors, a, i, b, first, to, ld, add); break;
      case 3: tile_of<3>(vectors, a, i, b, first, to, ld, add); break;
      case 2: tile_of<2>(vectors, a, i, b, first, to, ld, add); break;
      default: tile_of<1>(vectors, a, i, b, first, to, ld, add);
    }
    i += rows;
  }
}

// Whole panels of the left operand are transposed where tiles are used: 16 rows of 64 terms each, not 16 terms of 16 rows.
inline void multiply([[maybe_unused]] bool tiles, const Left &a, i64 begin, i64 end, const Right &b, i64 first, float *c, i64 ld, bool add) {
#if WITH_TILES
  if (tiles) return multiply_tiles(a, begin, end, b, first, c, ld, add);
#endif
  multiply_vectors(a, begin, end, b, first, c, ld, add);
}

inline void into_squares([[maybe_unused]] u8 *panel, [[maybe_unused]] i64 rows) {
#if WITH_TILES
  for (i64 k = 0; k < rows; k += BYTES, panel += SQUARE) transpose(panel);
#endif
}

struct Problem {
  const void *g, *x, *w;     // x: rows, or null; w: null if there is no grad_input
  const u8 *codes;           // of a rounded x, with its steps and sums
  const float *stats;
  i64 n, o, j;
  Key keys[4];               // g by row, w, x, g by column
  float *grad_input, *grad_weight, *grad_bias;
  int threads;
};

// Where the codes of a block of a packed x begin, and how deep it is.
inline i64 depth_of(i64 n, i64 block) { return up(std::min(BLOCK, n - block * BLOCK), 4); }

// False where there is no memory.
template <class T>
bool run(const Problem &p) {
  const T *g = (const T *)p.g, *x = (const T *)p.x, *w = (const T *)p.w;
  const bool below = w != nullptr, fresh = x != nullptr, kept = p.codes != nullptr;
  const i64 ld = up(p.o, 64), wide = up(p.j, 16), tall = up(p.o, LEFT);
  const i64 chunk = std::min(up(p.n, BLOCK), CHUNK), blocks = chunk / BLOCK, pad = 64;
  const i64 depths = (p.o + DEPTH - 1) / DEPTH, panel = BLOCK * LEFT + pad, left_block = tall / LEFT * panel;
  const i64 lines = up(p.o, 32);
  const i64 bytes = chunk * ld + blocks * left_block + blocks * BLOCK * wide + up(p.o, 4) * wide + depths * wide * 4 +
                    wide * 4 + blocks * wide * 8 + blocks * tall * 4 + chunk * 8 + (p.n / BLOCK + 2) * lines * 4 + 4096;
  if (!scratch.reserve(bytes)) return false;
  u8 *flat = scratch.take<u8>(chunk * ld);
  u8 *panels = scratch.take<u8>(blocks * left_block);
  u8 *right = scratch.take<u8>(blocks * BLOCK * wide);
  u8 *weight = scratch.take<u8>(up(p.o, 4) * wide);
  float *weight_sums = scratch.take<float>(depths * wide), *weight_steps = scratch.take<float>(wide);
  float *right_steps = scratch.take<float>(blocks * wide), *right_sums = scratch.take<float>(blocks * wide);
  float *left_steps = scratch.take<float>(blocks * tall);
  float *steps = scratch.take<float>(chunk), *factors = scratch.take<float>(chunk);
  const i64 all = (p.n + BLOCK - 1) / BLOCK;
  float *partial = p.grad_bias ? scratch.take<float>(all * lines) : nullptr;

  const bool tiles = with_tiles();
  const i64 group = tiles ? std::clamp<i64>(chunk / p.threads / 32 * 32, 32, GROUP) : 96;
#pragma omp parallel num_threads(p.threads)
  {
    const Tiles registers(tiles);
    if (partial) {
#pragma omp for schedule(static)
      for (i64 b = 0; b < all; b++) std::fill(partial + b * lines, partial + (b + 1) * lines, 0.0f);
    }
    if (below) {
      // One step for each column of W, over all of its rows: the blocks of the contraction share it.
#pragma omp for schedule(static)
      for (i64 first = 0; first < p.j; first += RIGHT) {
        const i64 width = std::min(RIGHT, up(p.j - first, 16));
        // The panel of a block begins at block * DEPTH * wide + first * (depth of the block).
        std::vector<u8> codes(up(p.o, 4) * width);
        round_columns<T>(w, p.j, p.j, first, 0, p.o, nullptr, p.keys[1], Out{codes.data(), 4 * width, 64, false}, weight_steps,
                         nullptr);
        for (i64 d = 0; d < depths; d++) {
          const i64 begin = d * DEPTH, depth = std::min(DEPTH, up(p.o, 4) - begin);
          const u8 *from = codes.data() + begin * width;
          std::memcpy(weight + begin * wide + first * depth, from, depth * width);
          i32 sums[RIGHT] = {};
          for (i64 k = 0; k < depth; k += 4)
            for (i64 c = 0; c < width; c++)
              for (int r = 0; r < 4; r++) sums[c] += (i8)from[k * width + 4 * c + r];
          for (i64 c = 0; c < width; c++) weight_sums[d * wide + first + c] = (float)sums[c];
        }
      }
    }
    for (i64 start = 0; start < p.n; start += chunk) {
      const i64 rows = std::min(chunk, p.n - start), here = (rows + BLOCK - 1) / BLOCK;
      const bool by_row = below || fresh || partial;
      if (by_row) {
#pragma omp for schedule(static)
        for (i64 b = 0; b < here; b++) {
          for (i64 r = b * BLOCK; r < std::min(rows, (b + 1) * BLOCK); r += 4)
            round_rows<T>(g + (start + r) * p.o, p.o, start + r, (int)std::min<i64>(4, rows - r), p.keys[0], steps + r,
                          below ? flat + r * ld : nullptr, ld,
                          fresh ? panels + b * left_block + (r - b * BLOCK) / 4 * 64 : nullptr, panel,
                          partial ? partial + (start / BLOCK + b) * lines : nullptr);
          for (i64 t = 0; tiles && fresh && t < tall / LEFT; t++)
            into_squares(panels + b * left_block + t * panel, std::min(BLOCK, rows - b * BLOCK));
        }
      }
      if (fresh) {
        // Rows are scaled relative to the largest of their block, whose step comes back with the columns' ones.
        const i64 count = (p.j + RIGHT - 1) / RIGHT;
#pragma omp for schedule(static)
        for (i64 b = 0; b < here; b++) {
          const i64 from = b * BLOCK, to = std::min(rows, from + BLOCK);
          float largest = 0;
          for (i64 r = from; r < to; r++) largest = steps[r] > largest || steps[r] != steps[r] ? steps[r] : largest;
          for (i64 r = from; r < to; r++) factors[r] = largest == 0 ? 0 : steps[r] / largest;
        }
#pragma omp for schedule(static)
        for (i64 t = 0; t < here * count; t++) {
          const i64 b = t / count, first = t % count * RIGHT, from = b * BLOCK, many = std::min(BLOCK, rows - from);
          const i64 width = std::min(RIGHT, up(p.j - first, 16));
          const Out out{right + b * BLOCK * wide + first * up(many, 4), 4 * width, 64, false};
          round_columns<T>(x + (start + from) * p.j, p.j, p.j, first, start + from, many, factors + from, p.keys[2], out,
                           right_steps + b * wide, right_sums + b * wide);
          float largest = 0;
          for (i64 r = from; r < from + many; r++) largest = steps[r] > largest || steps[r] != steps[r] ? steps[r] : largest;
          for (i64 c = first; c < std::min(p.j, first + RIGHT); c++) right_steps[b * wide + c] *= largest;
        }
      }
      if (kept) {
        const i64 count = (p.o + RIGHT - 1) / RIGHT;
#pragma omp for schedule(static)
        for (i64 t = 0; t < here * count; t++) {
          const i64 b = t / count, first = t % count * RIGHT, from = b * BLOCK, many = std::min(BLOCK, rows - from);
          u8 *to = panels + b * left_block + first / LEFT * panel;
          round_columns<T>(g + (start + from) * p.o, p.o, p.o, first, start + from, many, nullptr, p.keys[3], Out{to, 64, panel, true},
                           left_steps + b * tall, nullptr);
          for (i64 c = first; tiles && c < std::min(p.o, first + RIGHT); c += LEFT, to += panel) into_squares(to, many);
        }
      }
      if (below) {
#pragma omp for schedule(static) nowait
        for (i64 r = 0; r < rows; r += group)
          for (i64 d = 0; d < depths; d++) {
            const i64 begin = d * DEPTH, depth = std::min(DEPTH, up(p.o, 4) - begin);
            const Left a{flat + begin, 4, ld, 0, steps};
            const Right b{weight + begin * wide, weight_steps, weight_sums + d * wide, p.j, depth};
            for (i64 first = 0; first < p.j; first += RIGHT)
              multiply(tiles, a, r, std::min(rows, r + group), b, first, p.grad_input + (start + r) * p.j, p.j, d > 0);
          }
      }
      if (fresh || kept) {
        const i64 step = tiles ? 32 : ROWS, together = tiles ? here : 2;  // two fit into the first cache
#pragma omp for schedule(static)
        for (i64 i = 0; i < p.o; i += 96)
          for (i64 pair = 0; pair < here; pair += together)
          for (i64 first = 0; first < p.j; first += RIGHT)
            for (i64 m = i; m < std::min(p.o, i + 96); m += step)
              for (i64 block = pair; block < std::min(here, pair + together); block++) {
                const i64 number = start / BLOCK + block;
                const Left a{panels + block * left_block, 64, 0, panel, kept ? left_steps + block * tall : nullptr};
                const Right b =
                    kept ? Right{p.codes + number * BLOCK * wide, p.stats + number * 2 * p.j,
                                 p.stats + (number * 2 + 1) * p.j, p.j, depth_of(p.n, number)}
                         : Right{right + block * BLOCK * wide, right_steps + block * wide, right_sums + block * wide, p.j,
                                 up(std::min(BLOCK, rows - block * BLOCK), 4)};
                multiply(tiles, a, m, std::min<i64>({m + step, i + 96, p.o}), b, first, p.grad_weight + m * p.j, p.j, number > 0);
              }
      }
#pragma omp barrier
    }
    if (partial) {
#pragma omp for schedule(static)
      for (i64 c = 0; c < p.o; c++) {
        float sum = 0;
        for (i64 b = 0; b < all; b++) sum += partial[b * lines + c];
        p.grad_bias[c] = sum;
      }
    }
  }
  scratch.trim(64 << 20);
  return true;
}

template <class T>
void pack(const T *x, i64 n, i64 j, Key key, u8 *codes, float *stats, int threads) {
  const i64 wide = up(j, 16), count = (j + RIGHT - 1) / RIGHT, blocks = (n + BLOCK - 1) / BLOCK;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (i64 t = 0; t < blocks * count; t++) {
    const i64 b = t / count, first = t % count * RIGHT, rows = std::min(BLOCK, n - b * BLOCK);
    const Out out{codes + b * BLOCK * wide + first * depth_of(n, b), 4 * std::min(RIGHT, up(j - first, 16)), 64, false};
    round_columns<T>(x + b * BLOCK * j, j, j, first, b * BLOCK, rows, nullptr, key, out, stats + b * 2 * j, stats + (b * 2 + 1) * j);
  }
}

}  // namespace
