// Both backward products of a two-dimensional convolution from stochastically rounded 8-bit operands.
//
// Nothing is unfolded: each tap of the kernel reads the codes of an image at an offset of its own.
//
// Legend: n samples, c channels in, o channels out (of one group), y and x positions, i and j taps of the kernel.
//     grad_input[n, c, ...]  = sum_(o, i, j) W[o, c, i, j] G[n, o, ...]    G by sample, W by input channel
//     grad_weight[o, c, i, j] = sum_(n, y, x) G[n, o, y, x] X[n, c, ...]   both by channel, in blocks of samples that
//                                                                         hold some BLOCK positions, summed in float32
//
// A product reads four terms of the contraction at once. One operand is broadcast, four bytes of a row; the other is
// a vector of 16 columns with four bytes each. In grad_input the columns are positions of the padded cotangent, the
// rows input channels; in grad_weight the columns are output channels, the rows taps of the padded input. With stride
// s an input has s * s phases: its positions modulo s, each of which meets taps of its own.

#pragma once

#include "../transpose.h"
#include "tiles.h"

namespace {

// One axis of the image: sizes of input, output and kernel.
struct Axis {
  i64 in, out, kernel, stride, padding, dilation;
};

struct Convolution {
  const void *g, *x, *w;    // x: or null; w: null if there is no grad_input
  const u8 *codes;          // of a rounded x, with the steps of its blocks and channels
  const float *steps;
  i64 n, c, o, groups;      // channels: of all groups
  Axis y, x_axis;
  Key keys[4];              // g by sample, w, x, g by channel
  float *grad_input, *grad_weight;
  bool channels_last;       // of g, x and grad_input in memory
  int threads;

  i64 samples_of_block() const { return std::max<i64>(1, BLOCK / std::max<i64>(1, y.out * x_axis.out)); }
};

// --------------------------------------------------------------------------------------------------------------
// Rounding
// --------------------------------------------------------------------------------------------------------------

template <class T>
i32 largest_of(const T *x, i64 count) {
  v16 most = {};
  i64 k = 0;
  for (; k + 16 <= count; k += 16) {
    fetch(x + k + 512);
    most = larger(most, magnitude(floats(x + k)));
  }
  if (k < count) most = larger(most, magnitude(some_floats(x + k, count - k)));
  return largest_of(most);
}

// Codes + 128 of one row of the matrix that the dither is laid out for. `rates`: one, or one for each entry.
// Up to 15 bytes behind the last are written. Returns the sum of the codes.
template <bool EACH, class T>
i32 round_line(const T *x, i64 count, i64 row, Key key, const float *rates, u8 *to) {
  const u32 first = (u32)(row * (up(count, 32) / 2));
  v16 total = {};
  for (i64 k = 0; k < count; k += 32) {
    const w16 bits = mix((w16)iota() + (first + (u32)(k / 2)), key);
    for (int h = 0; h < 2; h++) {
      const i64 at = k + 16 * h, left = count - at;
      if (left <= 0) break;
      const f16 value = left >= 16 ? floats(x + at) : some_floats(x + at, left);
      const f16 rate = EACH ? some_floats(rates + at, left) : f16{} + rates[0];
      const v16 codes = rounded(value, rate, (v16)(h ? bits >> 16 : bits & 0xffff));
      total += codes;
      store(to + at, __builtin_convertvector(codes, b16));
    }
  }
  return sum_of(total) - (i32)(128 * up(count, 16));  // entries behind the last have code 0
}

// --------------------------------------------------------------------------------------------------------------
// Products
// --------------------------------------------------------------------------------------------------------------

constexpr i64 WIDE = 64;  // columns of a tile

// Sums over `depth` steps of four terms each. Columns come in vectors of 16, each with a place of its own.
// FIRST: step k reads at rows[m] + offsets[k] and columns[v] + k * stride; the rows hold unsigned bytes.
// Else: at rows[m] + 4 k and columns[v] + offsets[k]; the columns hold unsigned bytes.
#if WITH_VNNI

template <bool FIRST, int M, int V>
__attribute__((noinline)) void dot(const u8 *const *rows, const u8 *const *columns, const i32 *offsets, i64 stride, i64 depth, i32 *sums) {
  __m512i sum[M][V];
  const u8 *row[M], *column[V];
  EACH_ROW row[m] = rows[m];
  EACH_VECTOR column[v] = columns[v];
  EACH_ROW EACH_VECTOR sum[m][v] = _mm512_setzero_si512();
  for (i64 k = 0, at = 0; k < depth; k++, at += FIRST ? stride : 4) {
    const i64 offset = offsets[k];
    __m512i vector[V];
    EACH_VECTOR vector[v] = _mm512_loadu_si512(column[v] + (FIRST ? at : offset));
    EACH_ROW {
      const __m512i four = _mm512_set1_epi32(load<i32>(row[m] + (FIRST ? offset : at)));
      EACH_VECTOR {
        if (FIRST) add_products(sum[m][v], four, vector[v]);
        else add_products(sum[m][v], vector[v], four);
      }
    }
  }
  EACH_ROW EACH_VECTOR _mm512_storeu_si512(sums + m * WIDE + 16 * v, sum[m][v]);
}

#else

template <bool FIRST, int M, int V>
void dot(const u8 *const *rows, const u8 *const *columns, const i32 *offsets, i64 stride, i64 depth, i32 *sums) {
  for (int m = 0; m < M; m++)
    for (int v = 0; v < V; v++) {
      i32 sum[16] = {};
      for (i64 k = 0; k < depth; k++) {
        const u8 *row = rows[m] + (FIRST ? offsets[k] : 4 * k), *column = columns[v] + (FIRST ? k * stride : offsets[k]);
        for (int j = 0; j < 16; j++)
          for (int r = 0; r < 4; r++)
            sum[j] += FIRST ? (i32)row[r] * (i8)column[4 * j + r] : (i32)(i8)row[r] * column[4 * j + r];
      }
      std::memcpy(sums + m * WIDE + 16 * v, sum, sizeof sum);
    }
}

#endif

template <bool FIRST, int M>
inline void dot_of(int vectors, const u8 *const *rows, const u8 *const *columns, const i32 *offsets, i64 stride, i64 depth, i32 *sums) {
  switch (vectors) {
    case 4: return dot<FIRST, M, 4>(rows, columns, offsets, stride, depth, sums);
    case 3: return dot<FIRST, M, 3>(rows, columns, offsets, stride, depth, sums);
    case 2: return dot<FIRST, M, 2>(rows, columns, offsets, stride, depth, sums);
    default: return dot<FIRST, M, 1>(rows, columns, offsets, stride, depth, sums);
  }
}

template <bool FIRST>
inline void dots(int count, int vectors, const u8 *const *rows, const u8 *const *columns, const i32 *offsets, i64 stride, i64 depth,
                 i32 *sums) {
  switch (count) {
    case 6: return dot_of<FIRST, 6>(vectors, rows, columns, offsets, stride, depth, sums);
    case 5: return dot_of<FIRST, 5>(vectors, rows, columns, offsets, stride, depth, sums);
    case 4: return dot_of<FIRST, 4>(vectors, rows, columns, offsets, stride, depth, sums);
    case 3: return dot_of<FIRST, 3>(vectors, rows, columns, offsets, stride, depth, sums);
    case 2: return dot_of<FIRST, 2>(vectors, rows, columns, offsets, stride, depth, sums);
    default: return dot_of<FIRST, 1>(vectors, rows, columns, offsets, stride, depth, sums);
  }
}

// --------------------------------------------------------------------------------------------------------------
// Where taps read
// --------------------------------------------------------------------------------------------------------------

struct Tap {
  i64 index, offset;  // reads the cotangent at (position of the phase) + offset
};

// The positions of an input that are equal to `phase` modulo the stride, and the taps that reach them.
std::vector<Tap> taps_of(const Axis &a, i64 phase) {
  std::vector<Tap> taps;
  for (i64 i = 0; i < a.kernel; i++) {
    const i64 at = phase + a.padding - i * a.dilation;
    if ((at % a.stride + a.stride) % a.stride == 0) taps.push_back({i, at / a.stride});
  }
  return taps;
}

inline i64 positions_of(const Axis &a, i64 phase) { return phase < a.in ? (a.in - phase + a.stride - 1) / a.stride : 0; }

// How far beyond the ends of the cotangent its taps read.
void reach_of(const Axis &a, i64 &before, i64 &behind) {
  before = behind = 0;
  for (i64 phase = 0; phase < a.stride; phase++)
    for (const Tap &tap : taps_of(a, phase)) {
      before = std::max(before, -tap.offset);
      behind = std::max(behind, positions_of(a, phase) - 1 + tap.offset - (a.out - 1));
    }
}

// The cotangent of a sample and group: padded, four channels interleaved, as unsigned bytes. The zeros at the right
// of a row are those at the left of the next one.
struct Padded {
  i64 above, before, width, rows, plane;  // plane: bytes of four channels
  bool is_bare;                           // no padding is read

  Padded(const Axis &y, const Axis &x) {
    i64 below, behind;
    reach_of(y, above, below), reach_of(x, before, behind);
    width = std::max(x.out + std::max(before, behind), (x.in + x.stride - 1) / x.stride);
    rows = std::max(y.out + above + below, above + (y.in + y.stride - 1) / y.stride + below) + 1;
    plane = up((rows * width + before + WIDE) * 4, 64);
    is_bare = !(above || below || before || behind) && width == x.out;
  }
};

// The input of a sample and channel, padded, as bytes. Where the stride is s, it lies in s * s planes of the positions that are equal
// modulo s, so that what a tap reads lies side by side.
struct Image {
  struct Line { i64 from, to; };          // where one begins, in what is given and in its planes
  struct Part { i64 from, to, count; };   // of a line, in steps of the stride

  i64 height, width, plane, bytes, stride;
  bool is_given;  // byte for byte
  std::vector<Line> lines;
  std::vector<Part> parts;  // of every line

  Image(const Axis &y, const Axis &x) : stride(x.stride) {
    height = y.out + (y.kernel - 1) * y.dilation / y.stride, width = x.out + (x.kernel - 1) * x.dilation / x.stride;
    plane = height * width, bytes = y.stride * x.stride * plane;
    is_given = !y.padding && !x.padding && y.stride == 1 && x.stride == 1 && height == y.in && width == x.in;
    for (i64 r = 0; r < height * y.stride; r++) {
      const i64 from = r - y.padding;
      if (from >= 0 && from < y.in && is_read(y, r % y.stride))
        lines.push_back({from * x.in, r % y.stride * x.stride * plane + r / y.stride * width});
    }
    for (i64 q = 0; q < x.stride; q++) {
      const i64 first = std::max<i64>(0, (x.padding - q + x.stride - 1) / x.stride);
      const i64 last = std::min(width, (x.in - 1 + x.padding - q + x.stride) / x.stride);
      if (is_read(x, q) && first < last) parts.push_back({first * x.stride + q - x.padding, q * plane + first, last - first});
    }
  }
  // Where tap (i, j) begins to read; it reads its next line `width` bytes on.
  i64 tap(const Axis &y, const Axis &x, i64 i, i64 j) const {
    const i64 r = i * y.dilation, c = j * x.dilation;
    return (r % y.stride * x.stride + c % x.stride) * plane + r / y.stride * width + c / x.stride;
  }

 private:
  // Whether a tap reads positions that are equal to `phase` modulo the stride.
  static bool is_read(const Axis &a, i64 phase) {
    for (i64 i = 0; i < a.kernel; i++)
      if (i * a.dilation % a.stride == phase) return true;
    return false;
  }
};

inline void every_other(const u8 *from, i64 count, u8 *to) {
  i64 k = 0;
#if WITH_VNNI
  for (; k < count; k += 16) {
    const i64 left = std::min<i64>(16, count - k);
    const __m256i pairs = _mm256_maskz_loadu_epi8((__mmask32)((1ull << (2 * left - 1)) - 1), from + 2 * k);
    _mm256_mask_cvtepi16_storeu_epi8(to + k, mask_of(left), pairs);
  }
#endif
  for (; k < count; k++) to[k] = from[2 * k];
}

void fill_image(const u8 *codes, const Image &image, u8 *to) {
  if (image.is_given) {
    std::memcpy(to, codes, image.bytes);
    return;
  }
  std::memset(to, 128, image.bytes);
  for (const Image::Line &line : image.lines)
    for (const Image::Part &part : image.parts) {
      const u8 *read = codes + line.from + part.from;
      u8 *write = to + line.to + part.to;
      if (image.stride == 1) std::memcpy(write, read, part.count);
      else if (image.stride == 2) every_other(read, part.count, write);
      else for (i64 k = 0; k < part.count; k++) write[k] = read[k * image.stride];
    }
}

// --------------------------------------------------------------------------------------------------------------
// The weight, for grad_input
// --------------------------------------------------------------------------------------------------------------

// Signed codes of the weight, the contraction of each input channel in one piece; for each phase.
struct Phase {
  i64 y, x, rows, columns;            // positions
  std::vector<Tap> below, across;     // taps of the two axes
  i64 depth, first;                   // steps of four terms; where its codes begin, in steps
  std::vector<i32> offsets;           // into the padded cotangent, of each step or, with tiles, of 16 steps
};

struct Weights {
  std::vector<Phase> phases;
  bool tiles;                // steps of a tap are padded to whole registers
  i64 fours;                 // steps of a tap
  std::vector<u8> codes;     // [group][phase][channel][tap][step][4]
  std::vector<i32> sums;     // [group][phase][channel]
  std::vector<float> steps;  // [channel of all groups]
  i64 of_group;              // bytes
};

template <class T>
void round_weight(const Convolution &p, const Padded &padded, Weights &weights) {
  const T *w = (const T *)p.w;
  const i64 in = p.c / p.groups, out = p.o / p.groups, area = p.y.kernel * p.x_axis.kernel, fours = up(out, 4) / 4;
  weights.tiles = with_tiles() && fours >= 8 && in >= 8;
  weights.fours = weights.tiles ? up(fours, TILE) : fours;
  i64 steps = 0, deepest = 0;
  for (i64 y = 0; y < p.y.stride; y++)
    for (i64 x = 0; x < p.x_axis.stride; x++) {
      Phase phase{y, x, positions_of(p.y, y), positions_of(p.x_axis, x), taps_of(p.y, y), taps_of(p.x_axis, x), 0, steps, {}};
      for (const Tap &i : phase.below)
        for (const Tap &j : phase.across)
          for (i64 four = 0; four < fours; four += weights.tiles ? TILE : 1)
            phase.offsets.push_back((i32)(four * padded.plane + (i.offset * padded.width + j.offset) * 4));
      phase.depth = (i64)(phase.below.size() * phase.across.size()) * weights.fours;
      steps += phase.depth * in, deepest = std::max(deepest, phase.depth);
      weights.phases.push_back(phase);
    }
  const i64 phases = (i64)weights.phases.size();
  weights.of_group = steps * 4;
  weights.codes.assign(p.groups * weights.of_group + (weights.tiles ? 32 * 4 * deepest : 0), 0);  // registers read whole rows
  weights.sums.assign(p.groups * phases * in, 0);
  weights.steps.resize(p.c);

  std::vector<float> rates(p.c);
  std::vector<i32> most(p.c, 0);
  for (i64 o = 0; o < p.o; o++)
    for (i64 c = 0; c < in; c++) {
      i32 &to = most[o / out * in + c];
      for (i64 k = 0; k < area; k++) to = std::max(to, magnitude_of(w[(o * in + c) * area + k]));
    }
  for (i64 c = 0; c < p.c; c++) scale_of(most[c], weights.steps[c], rates[c]);

  // Where tap (i, j) of a channel goes: every tap belongs to one phase.
  struct Place { i64 start, depth, step; };
  std::vector<Place> places(area);
  for (i64 f = 0; f < phases; f++) {
    const Phase &phase = weights.phases[f];
    const i64 across = (i64)phase.across.size();
    for (i64 a = 0; a < (i64)phase.below.size(); a++)
      for (i64 b = 0; b < across; b++) {
        const i64 tap = phase.below[a].index * p.x_axis.kernel + phase.across[b].index;
        places[tap] = {phase.first, phase.depth, (a * across + b) * weights.fours};
      }
  }
#pragma omp parallel num_threads(p.threads)
  {
    const i64 ld = up(in * area, 16) + 16;
    std::vector<u8> lines(4 * ld);
    std::vector<float> rate(in * area);
#pragma omp for schedule(static)
    for (i64 four = 0; four < p.groups * fours; four++) {
      const i64 group = four / fours, first = four % fours * 4, many = std::min<i64>(4, out - first);
      for (i64 k = 0; k < in * area; k++) rate[k] = rates[group * in + k / area];
      std::fill(lines.begin(), lines.end(), 128);
      for (i64 r = 0; r < many; r++) {
        const i64 o = group * out + first + r;
        round_line<true>(w + o * in * area, in * area, o, p.keys[1], rate.data(), lines.data() + r * ld);
      }
      u8 *to = weights.codes.data() + group * weights.of_group;
      for (i64 c = 0; c < in; c++)
        for (i64 tap = 0; tap < area; tap++) {
          const u8 *from = lines.data() + c * area + tap;
          const u32 word = from[0] | from[ld] << 8 | from[2 * ld] << 16 | (u32)from[3 * ld] << 24;
          const Place &at = places[tap];
          store(to + 4 * (at.start + c * at.depth + at.step + first / 4), word ^ 0x80808080u);
        }
    }
  }
  for (i64 group = 0; group < p.groups; group++)
    for (i64 f = 0; f < phases; f++) {
      const Phase &phase = weights.phases[f];
      for (i64 c = 0; c < in; c++) {
        const i8 *from = (const i8 *)weights.codes.data() + group * weights.of_group + 4 * (phase.first + c * phase.depth);
        i32 sum = 0;
        for (i64 k = 0; k < 4 * phase.depth; k++) sum += from[k];
        weights.sums[(group * phases + f) * in + c] = sum;
      }
    }
}

// --------------------------------------------------------------------------------------------------------------
// The whole
// --------------------------------------------------------------------------------------------------------------

constexpr i64 VECTORS = 16;  // whose codes meet all rows of the weight before the next ones do

// grad_input of one group of some samples from their padded cotangents, `apart` bytes from each other.
void input_of(const Convolution &p, const Padded &padded, const Weights &weights, i64 group, i64 samples, const u8 *codes, i64 apart,
              const float *steps, float *to_samples, float *plane) {
  const i64 in = p.c / p.groups, area = p.y.in * p.x_axis.in, phases = (i64)weights.phases.size();
  float *out = to_samples + group * in * (p.channels_last ? 1 : area);
  const float *column_steps = weights.steps.data() + group * in;
  for (const Phase &phase : weights.phases)
    if (!phase.depth) {  // positions that no tap reaches
      for (i64 s = 0; s < samples; s++)
        for (i64 k = 0; k < (p.channels_last ? area : in); k++) {
          if (p.channels_last) for (i64 c = 0; c < in; c++) out[(s * area + k) * p.c + c] = 0.0f * column_steps[c] * steps[s];
          else std::fill_n(out + (s * p.c + k) * area, area, 0.0f * column_steps[k] * steps[s]);
        }
      break;
    }
  for (i64 f = 0; f < phases; f++) {
    const Phase &phase = weights.phases[f];
    if (!phase.depth || !phase.rows || !phase.columns) continue;
    const i64 flat = phase.rows * padded.width, each = (flat + 15) / 16, line = samples * each * 16;
    // Rows without gaps need no copy.
    const bool direct = phases == 1 && padded.width == p.x_axis.in && !p.channels_last;
    const u8 *right = codes + (padded.above * padded.width + padded.before) * 4;
    const u8 *left = weights.codes.data() + group * weights.of_group + 4 * phase.first;
    const auto column = [&](i64 k) { return right + k / each * apart + k % each * 64; };
    // Sums of some channels, `ld` apart, and vectors.
    const auto finish = [&](i64 c, i64 rows, i64 first, int vectors, const i32 *sums, i64 ld) {
      for (int v = 0; v < vectors; v++) {
        const i64 s = (first + v) / each, at = (first + v) % each * 16, room = flat - at;
        float *to = direct ? out + (s * p.c + c) * area + at : plane + c * line + (first + v) * 16;
        for (i64 m = 0; m < rows; m++, to += direct ? area : line) {
          const v16 sum = load<v16>(sums + m * ld + 16 * v) - 128 * weights.sums[(group * phases + f) * in + c + m];
          const f16 value = __builtin_convertvector(sum, f16) * column_steps[c + m] * steps[s];
          if (!direct || room >= 16) store(to, value);
          else std::memcpy(to, &value, room * sizeof(float));
        }
      }
    };
    for (i64 begin = 0; begin < samples * each; begin += VECTORS) {
      const i64 end = std::min(samples * each, begin + VECTORS);
#if WITH_TILES
      for (i64 c = 0; weights.tiles && c < in; c += 32) {
        alignas(64) i32 sums[32 * 32];
        const i64 rows = std::min<i64>(32, in - c), ld = 4 * phase.depth;
        for (i64 first = begin; first < end; first += 2) {
          const int vectors = first + 1 < end ? 2 : 1;
          const Rows a{left + c * ld, ld, BYTES, TILE * ld};
          const Columns b{column(first), padded.plane, vectors > 1 ? column(first + 1) - column(first) : 0};
          for (i64 next = first + 2; direct && next < std::min(first + 4, end); next++)
            for (i64 m = 0; m < rows; m++) fetch<true>(out + (next / each * p.c + c + m) * area + next % each * 16);
          with_registers(rows, 16 * vectors, [&](auto m, auto v) {
            sum_tiles_at<m.value, v.value>(a, b, phase.offsets.data(), (i64)phase.offsets.size(), sums);
          });
          finish(c, rows, first, vectors, sums, 32);
        }
      }
#endif
      for (i64 c = 0; !weights.tiles && c < in; c += ROWS) {
        const int rows = (int)std::min<i64>(ROWS, in - c);
        const u8 *row[ROWS];
        for (int m = 0; m < rows; m++) row[m] = left + (c + m) * phase.depth * 4;
        for (i64 first = begin; first < end; first += 4) {
          const int vectors = (int)std::min<i64>(4, end - first);
          const u8 *columns[4];
          for (int v = 0; v < vectors; v++) columns[v] = column(first + v);
          i32 sums[ROWS * WIDE];
          dots<false>(rows, vectors, row, columns, phase.offsets.data(), 0, phase.depth, sums);
          finish(c, rows, first, vectors, sums, WIDE);
        }
      }
    }
    if (direct) continue;
    for (i64 s = 0; s < samples && p.channels_last; s++)
      for (i64 r = 0; r < phase.rows; r++)
        transpose(plane + s * each * 16 + r * padded.width, line, in, phase.columns,
                  out + (s * area + (r * p.y.stride + phase.y) * p.x_axis.in + phase.x) * p.c, p.x_axis.stride * p.c);
    for (i64 s = 0; s < samples && !p.channels_last; s++)
      for (i64 c = 0; c < in; c++)
        for (i64 r = 0; r < phase.rows; r++) {
          const float *from = plane + c * line + s * each * 16 + r * padded.width;
          float *to = out + (s * p.c + c) * area + (r * p.y.stride + phase.y) * p.x_axis.in + phase.x;
          if (p.x_axis.stride == 1) {
            std::memcpy(to, from, phase.columns * sizeof(float));
          } else {
            for (i64 k = 0; k < phase.columns; k++) to[k * p.x_axis.stride] = from[k];
          }
        }
  }
}

// Every other byte, or pair of bytes, from two vectors: their first and their second halves.
inline b16 zip_bytes(b16 a, b16 b, bool second) {
  return second ? __builtin_shuffle(a, b, b16{8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31})
                : __builtin_shuffle(a, b, b16{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23});
}

inline b16 zip_pairs(b16 a, b16 b, bool second) {
  return second ? __builtin_shuffle(a, b, b16{8, 9, 24, 25, 10, 11, 26, 27, 12, 13, 28, 29, 14, 15, 30, 31})
                : __builtin_shuffle(a, b, b16{0, 1, 16, 17, 2, 3, 18, 19, 4, 5, 20, 21, 6, 7, 22, 23});
}

// Four channels of codes, interleaved, into the middle of a padded plane of zeros.
void interleave(const u8 *codes, i64 ld, i64 count, const Axis &y, const Axis &x, const Padded &padded, u8 *to) {
  if (!padded.is_bare) std::memset(to, 128, padded.plane);
  for (i64 r = 0; r < y.out; r++) {
    u8 *line = to + ((r + padded.above) * padded.width + padded.before) * 4;
    for (i64 k = 0; k < x.out; k += 16) {
      b16 bytes[4], words[4];
      for (i64 m = 0; m < 4; m++) bytes[m] = m < count ? load<b16>(codes + m * ld + r * x.out + k) : b16{} + 128;
      for (int h = 0; h < 2; h++) {
        const b16 low = zip_bytes(bytes[0], bytes[1], h), high = zip_bytes(bytes[2], bytes[3], h);
        words[2 * h] = zip_pairs(low, high, false), words[2 * h + 1] = zip_pairs(low, high, true);
      }
      std::memcpy(line + 4 * k, words, x.out - k >= 16 ? 64 : (x.out - k) * 4);
    }
  }
}

// Four channels of codes as columns of the right operand of grad_weight: signed, four positions of a line at a time.
void as_columns(const u8 *codes, i64 ld, i64 count, i64 lines, i64 length, u8 *to, i64 step) {
  typedef u32 w4 __attribute__((vector_size(16)));
  for (i64 r = 0; r < lines; r++)
    for (i64 k = 0; k < length; k += 16) {
      w4 a[4], b[4];
      for (i64 m = 0; m < 4; m++) {
        b16 bytes = load<b16>(codes + std::min(m, count - 1) * ld + r * length + k) ^ 0x80;
        if (length - k < 16)
          for (int l = 0; l < 16; l++) bytes[l] = l < length - k ? bytes[l] : 0;
        std::memcpy(a + m, &bytes, 16);
      }
      for (int h = 0; h < 2; h++) {
        b[2 * h] = __builtin_shuffle(a[2 * h], a[2 * h + 1], w4{0, 4, 1, 5});
        b[2 * h + 1] = __builtin_shuffle(a[2 * h], a[2 * h + 1], w4{2, 6, 3, 7});
      }
      const w4 words[4] = {__builtin_shuffle(b[0], b[2], w4{0, 1, 4, 5}), __builtin_shuffle(b[0], b[2], w4{2, 3, 6, 7}),
                           __builtin_shuffle(b[1], b[3], w4{0, 1, 4, 5}), __builtin_shuffle(b[1], b[3], w4{2, 3, 6, 7})};
      for (i64 w = 0; w < 4 && k + 4 * w < length; w++, to += step) store(to, words[w]);
    }
}

// How far the lines of channels lie apart, of images with the channels first: of a copy no multiple of a page, of which caches hold few lines.
inline i64 line_apart(const Convolution &p, i64 positions) { return p.channels_last ? up(positions, 16) + 16 : positions; }

inline i64 width_of(i64 columns, i64 first) { return std::min(WIDE, up(columns - first, 16)); }

// False where there is no memory.
template <class T>
bool convolve(const Convolution &p) {
  const T *g = (const T *)p.g, *x = (const T *)p.x;
  const bool below = p.w != nullptr, at_weight = x != nullptr || p.codes != nullptr;
  const i64 in = p.c / p.groups, out = p.o / p.groups, area = p.y.kernel * p.x_axis.kernel;
  const i64 positions = p.y.out * p.x_axis.out, size = p.y.in * p.x_axis.in, together = p.samples_of_block(), wide = up(out, 16);
  const Padded padded(p.y, p.x_axis);
  const Image image(p.y, p.x_axis);
  Weights weights;
  // The contraction of grad_weight runs over the lines of the cotangent; with tiles, over one line that holds them all, with zeros
  // where the image has more columns: so it lies side by side for each tap, and for all samples if they have no gaps.
  const bool tiles = at_weight && with_tiles() && in >= 8 && out >= 16;
  const i64 lines_of = tiles ? 1 : p.y.out, length = tiles ? (p.y.out - 1) * image.width + p.x_axis.out : p.x_axis.out;
  const bool gaps = tiles && length != positions;
  [[maybe_unused]] const bool joined = tiles && image.bytes == length && length % 4 == 0;
  if (below) round_weight<T>(p, padded, weights);

  const i64 steps = lines_of * up(length, 4) / 4, of_right = together * steps * 4 * wide;  // the latter: for a block and group
  const i64 of_channel = together * image.bytes, of_images = p.c * of_channel;             // samples of a channel side by side
  const i64 of_block = of_images + p.groups * of_right;
  const i64 all = (p.n + together - 1) / together;
  const i64 chunk = std::min(all, std::max<i64>(p.threads, (2 << 20) / of_block));
  const i64 of_sum = area * in * wide;
  if (at_weight && !scratch.reserve(chunk * (of_block + (p.groups * wide + p.c + p.groups * wide) * 4) + p.groups * of_sum * 4 + 32 * of_channel + 8192))
    return false;
  u8 *images = nullptr, *rights = nullptr;
  float *g_steps = nullptr, *x_steps = nullptr, *total = nullptr;
  i32 *g_sums = nullptr;
  std::vector<i32> offsets;  // of the steps of a block, in its images
  if (at_weight) {
    images = scratch.take<u8>(chunk * of_images + 32 * of_channel + 64);  // registers read whole rows
    rights = scratch.take<u8>(chunk * p.groups * of_right);
    g_steps = scratch.take<float>(chunk * p.groups * wide), x_steps = scratch.take<float>(chunk * p.c);
    g_sums = scratch.take<i32>(chunk * p.groups * wide);
    std::fill_n(g_sums, chunk * p.groups * wide, 0);  // of the columns that fill up a vector, too
    total = scratch.take<float>(p.groups * of_sum);
    for (i64 s = 0; s < together; s++)
      for (i64 r = 0; r < p.y.out; r++)
        for (i64 k = 0; k < p.x_axis.out; k += 4) offsets.push_back((i32)(s * image.bytes + r * image.width + k));
  }
  bool enough = true;

#pragma omp parallel num_threads(p.threads)
  {
    static thread_local Scratch own;
    const Tiles registers(tiles || (below && weights.tiles));
    const i64 ld = up(std::max(positions, length), 16) + 32, fours = up(out, 4) / 4;
    i64 plane = 0;
    for (const Phase &phase : weights.phases) plane = std::max(plane, in * together * up(phase.rows * padded.width, 16));
    const i64 apart = fours * padded.plane;  // between the cotangents of two samples
    // Of channels last, the samples of a block with the channels first.
    const i64 g_ld = line_apart(p, positions), x_ld = line_apart(p, size);
    const i64 moved = p.channels_last ? together : 0, g_moved = moved * p.o * g_ld, x_moved = moved * p.c * x_ld;
    const i64 of_moved = (g_moved + (x ? x_moved : 0)) * (i64)sizeof(T) + 128;
    const bool mine = own.reserve(of_moved + 12 * ld + up(size, 16) + 64 + together * apart + TILE * padded.plane + plane * 4 + together * (p.o + p.c + 1) * 4 + 4096);
    if (!mine) {
#pragma omp atomic write
      enough = false;
    }
#pragma omp barrier
    if (enough) {
      u8 *lines = own.take<u8>(8 * ld), *gapped = own.take<u8>(4 * ld), *line = own.take<u8>(up(size, 16) + 64);
      u8 *codes = own.take<u8>(together * apart + TILE * padded.plane);  // registers read whole rows
      std::memset(gapped, 128, 4 * ld);
      float *result = own.take<float>(plane);
      i32 *g_most = own.take<i32>(together * p.o), *x_most = own.take<i32>(p.c);
      float *steps_of = own.take<float>(together);
      T *g_first = own.take<T>(g_moved), *x_first = own.take<T>(x ? x_moved : 0);
      for (i64 start = 0; start < all; start += chunk) {
        const i64 blocks = std::min(chunk, all - start);
#pragma omp for schedule(dynamic, 1)
        for (i64 b = 0; b < blocks; b++) {
          const i64 first = (start + b) * together, samples = std::min(together, p.n - first);
          const T *gs = g + first * p.o * positions, *xs = x ? x + first * p.c * size : nullptr;
          for (i64 s = 0; s < moved && s < samples; s++) {
            transpose(gs + s * p.o * positions, p.o, positions, p.o, g_first + s * p.o * g_ld, g_ld);
            if (x) transpose(xs + s * p.c * size, p.c, size, p.c, x_first + s * p.c * x_ld, x_ld);
          }
          if (moved) gs = g_first, xs = x_first;
          for (i64 k = 0; k < samples * p.o; k++) g_most[k] = largest_of(gs + k * g_ld, positions);
          for (i64 s = 0; s < samples && at_weight; s++)
            for (i64 c = 0; c < p.c; c++) {
              const i64 row = (first + s) * p.c + c;
              if (p.codes) {
                fill_image(p.codes + row * size, image, images + b * of_images + c * of_channel + s * image.bytes);
                x_steps[b * p.c + c] = p.steps[(start + b) * p.c + c];
              } else {
                const i32 most = largest_of(xs + (s * p.c + c) * x_ld, size);
                x_most[c] = s == 0 ? most : std::max(x_most[c], most);
              }
            }
          for (i64 c = 0; c < p.c && x; c++) {
            float rate;
            scale_of(x_most[c], x_steps[b * p.c + c], rate);
            for (i64 s = 0; s < samples; s++) {
              const i64 row = (first + s) * p.c + c;
              round_line<false>(xs + (s * p.c + c) * x_ld, size, row, p.keys[2], &rate, line);
              fill_image(line, image, images + b * of_images + c * of_channel + s * image.bytes);
            }
          }
          for (i64 group = 0; group < p.groups; group++) {
            float rates[4];
            for (i64 s = 0; s < samples; s++) {
              i32 largest = 0;
              for (i64 o = 0; o < out; o++) largest = std::max(largest, g_most[s * p.o + group * out + o]);
              float rate;
              scale_of(largest, steps_of[s], rate);
              for (i64 four = 0; four < fours; four++) {
                const i64 many = std::min<i64>(4, out - 4 * four), o = group * out + 4 * four, number = b * p.groups + group;
                const i64 panel = 4 * four / WIDE * WIDE, width = width_of(out, panel), row = (first + s) * p.o + o;
                for (i64 m = 0; m < many; m++) {
                  const T *read = gs + (s * p.o + o + m) * g_ld;
                  if (below) round_line<false>(read, positions, row + m, p.keys[0], &rate, lines + m * ld);
                  if (!at_weight) continue;
                  i32 most = 0;
                  for (i64 t = 0; t < samples; t++) most = std::max(most, g_most[t * p.o + o + m]);
                  scale_of(most, g_steps[number * wide + 4 * four + m], rates[m]);
                  const i32 sum = round_line<false>(read, positions, row + m, p.keys[3], rates + m, lines + (4 + m) * ld);
                  i32 &sums = g_sums[number * wide + 4 * four + m];
                  sums = s == 0 ? sum : sums + sum;
                }
                for (i64 m = 0; gaps && m < many; m++)
                  for (i64 r = 0; r < p.y.out; r++)
                    std::memcpy(gapped + m * ld + r * image.width, lines + (4 + m) * ld + r * p.x_axis.out, p.x_axis.out);
                if (at_weight)
                  as_columns(gaps ? gapped : lines + 4 * ld, ld, many, lines_of, length,
                             rights + number * of_right + panel * together * steps * 4 + s * steps * 4 * width + (4 * four - panel) * 4,
                             4 * width);
                if (below) interleave(lines, ld, many, p.y, p.x_axis, padded, codes + s * apart + four * padded.plane);
              }
            }
            if (below)
              input_of(p, padded, weights, group, samples, codes, apart, steps_of, p.grad_input + first * p.c * size, result);
          }
        }
#if WITH_TILES
        if (tiles) {
          const i64 pieces = (in + 31) / 32;
#pragma omp for schedule(static)
          for (i64 t = 0; t < p.groups * area * pieces; t++) {
            const i64 group = t / (area * pieces), tap = t / pieces % area, c = t % pieces * 32, rows = std::min<i64>(32, in - c);
            const i64 place = image.tap(p.y, p.x_axis, tap / p.x_axis.kernel, tap % p.x_axis.kernel);
            alignas(64) i32 sums[32 * 32];
            for (i64 panel = 0; panel < out; panel += WIDE)
              for (i64 j = 0, width = width_of(out, panel); j < width; j += 32)
                for (i64 b = 0; b < blocks; b++) {
                  const i64 samples = std::min(together, p.n - (start + b) * together), number = b * p.groups + group;
                  const u8 *row = images + b * of_images + (group * in + c) * of_channel + place;
                  const u8 *right = rights + number * of_right + panel * together * steps * 4 + 4 * j;
                  const i64 times = joined ? 1 : samples, depth = 4 * steps * (joined ? samples : 1);
                  for (i64 s = 0; s < times; s++)
                    with_registers(rows, width - j, [&](auto m, auto v) {
                      sum_tiles<m.value, v.value>(Rows{row + s * image.bytes, of_channel, BYTES, TILE * of_channel},
                                                  Columns{right + s * depth * width, 4 * width, 64}, depth, sums, s > 0);
                    });
                  const i64 at = number * wide + panel + j;
                  for (i64 m = 0; m < rows; m++) {
                    const float step = x_steps[b * p.c + group * in + c + m];
                    float *to = total + group * of_sum + ((c + m) * area + tap) * wide + panel + j;
                    for (i64 v = 0; v < std::min<i64>(32, width - j); v += 16) {
                      const v16 sum = load<v16>(sums + 32 * m + v) - 128 * load<v16>(g_sums + at + v);
                      const f16 value = __builtin_convertvector(sum, f16) * load<f16>(g_steps + at + v) * step;
                      store(to + v, start + b > 0 ? load<f16>(to + v) + value : value);
                    }
                  }
                }
          }
        }
#endif
        if (at_weight && !tiles) {
          const i64 pieces = (area * in + ROWS - 1) / ROWS;
#pragma omp for schedule(static)
          for (i64 t = 0; t < p.groups * pieces; t++) {
            const i64 group = t / pieces, r = t % pieces * ROWS;
            const int rows = (int)std::min<i64>(ROWS, area * in - r);
            i32 sums[ROWS * WIDE];
            for (i64 panel = 0; panel < out; panel += WIDE) {
              const i64 width = width_of(out, panel);
              for (i64 b = 0; b < blocks; b++) {
                const i64 samples = std::min(together, p.n - (start + b) * together), number = b * p.groups + group;
                const u8 *row[ROWS];
                for (int m = 0; m < rows; m++) {
                  const i64 c = (r + m) / area, tap = (r + m) % area, i = tap / p.x_axis.kernel, j = tap % p.x_axis.kernel;
                  row[m] = images + b * of_images + (group * in + c) * of_channel + image.tap(p.y, p.x_axis, i, j);
                }
                const u8 *column[4], *right = rights + number * of_right + panel * together * steps * 4;
                for (int v = 0; v < 4; v++) column[v] = right + 64 * v;
                dots<true>(rows, (int)(width / 16), row, column, offsets.data(), 4 * width, samples * steps, sums);
                const float *columns = g_steps + number * wide + panel;
                const i32 *zeros = g_sums + number * wide + panel;
                for (int m = 0; m < rows; m++) {
                  const float step = x_steps[b * p.c + group * in + (r + m) / area];
                  float *to = total + group * of_sum + (r + m) * wide + panel;
                  for (i64 k = 0; k < width; k++) {
                    const float value = (float)(sums[m * WIDE + k] - 128 * zeros[k]) * columns[k] * step;
                    to[k] = start + b > 0 ? to[k] + value : value;
                  }
                }
              }
            }
          }
        }
      }
      if (at_weight) {
#pragma omp for schedule(static)
        for (i64 tile = 0; tile < p.groups * (wide / 16); tile++) {
          const i64 group = tile / (wide / 16), first = tile % (wide / 16) * 16;
          for (i64 k = 0; k < area * in; k += 16)  // in squares, since one of the two is read across its lines
            for (i64 o = first; o < std::min(out, first + 16); o++)
              for (i64 j = k; j < std::min(area * in, k + 16); j++)
                p.grad_weight[(group * out + o) * area * in + j] = total[group * of_sum + j * wide + o];
        }
      }
    }
    own.trim(16 << 20);
  }
  scratch.trim(64 << 20);
  return enough;
}

// Codes + 128 of x as convolve reads them, and the steps of its blocks and channels.
template <class T>
void pack_images(const Convolution &p, u8 *codes, float *steps) {
  const i64 size = p.y.in * p.x_axis.in, together = p.samples_of_block(), ld = line_apart(p, size);
#pragma omp parallel num_threads(p.threads)
  {
    std::vector<u8> line(up(size, 16) + 16);
    std::vector<T> moved(p.channels_last ? together * p.c * ld : 0);
#pragma omp for schedule(static)
    for (i64 block = 0; block < (p.n + together - 1) / together; block++) {
      const i64 first = block * together, samples = std::min(together, p.n - first);
      const T *x = (const T *)p.x + first * p.c * size;
      for (i64 s = 0; s < samples && p.channels_last; s++) transpose(x + s * p.c * size, p.c, size, p.c, moved.data() + s * p.c * ld, ld);
      if (p.channels_last) x = moved.data();
      for (i64 c = 0; c < p.c; c++) {
        i32 most = 0;
        for (i64 s = 0; s < samples; s++) most = std::max(most, largest_of(x + (s * p.c + c) * ld, size));
        float rate;
        scale_of(most, steps[block * p.c + c], rate);
        for (i64 s = 0; s < samples; s++) {
          const i64 row = (first + s) * p.c + c;
          round_line<false>(x + (s * p.c + c) * ld, size, row, p.keys[2], &rate, line.data());
          std::memcpy(codes + row * size, line.data(), size);
        }
      }
    }
  }
}

}  // namespace
