// Stochastic rounding on the host, fused: one pass over memory to pack, one to unpack.
//
// The same arithmetic, operation by operation, as eager.py: results agree bit for bit, so contraction
// into fused multiply-adds must be off. Groups of G entries; in a group, byte j of a code of B bits holds
// the entries j, j + W, j + 2W, ... with W = G * B / 8, so that no step crosses the lanes of a vector.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

namespace {

using i64 = int64_t;
using u32 = uint32_t;
using u8 = uint8_t;

enum What { ONCE, TWICE, GELU, SILU };

constexpr i64 BLOCK = 512;  // entries of a mask that are packed together

struct Key {
  u32 first, second;
};

// Counter to 32 bits: the lowbias32 mixer (Wellons 2018) with a second key in its middle.
inline u32 mix(u32 i, Key key) {
  u32 x = i + key.first;
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= key.second;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

// `rate` is in units of 2^-16 of a step: entries are rounded in whole numbers, against 16 random bits.
struct Scale {
  float low, step, rate;
  bool bad;
};

inline Scale scale_of(const float *__restrict x, i64 size, float intervals) {
  float low = x[0], high = x[0];
  int bad = 0;
#pragma omp simd reduction(min : low) reduction(max : high) reduction(| : bad)
  for (i64 j = 0; j < size; j++) {
    low = x[j] < low ? x[j] : low;
    high = x[j] > high ? x[j] : high;
    bad |= x[j] != x[j];
  }
  const float range = high - low;
  if (bad || !(range - range == 0)) {  // NaN or Inf in the group: all of it comes back as NaN
    float nan = std::numeric_limits<float>::quiet_NaN();
    return {nan, nan, 0, true};
  }
  return {low, range / intervals, range > 1e-30f ? intervals * 65536 / range : 0, false};
}

// The distance from the lowest entry, to the nearest unit. At 8 bits a rounding error of float32 is a whole unit, and
// would lead beyond the last level.
template <int INTERVALS>
inline int units(float x, Scale s) {
  const int t = (int)((x - s.low) * s.rate + 0.5f);
  return INTERVALS < 128 ? t : std::min(t, INTERVALS << 16);
}

// Codes of B bits, one byte each, into bytes.
template <int B>
inline void squeeze(const u8 *__restrict codes, i64 size, u8 *__restrict out) {
  constexpr int parts = 8 / B;
  const i64 width = size / parts;
  for (i64 j = 0; j < width; j++) {
    u8 byte = codes[j];
    for (int p = 1; p < parts; p++) byte |= codes[j + p * width] << (p * B);
    out[j] = byte;
  }
}

template <int B, int FIXED>
struct Once {
  static i64 bytes(i64 size) { return size * B / 8; }

  static void pack(const float *__restrict x, i64 group, i64 given, Key key, u8 *__restrict codes,
                   u8 *__restrict out, float *__restrict scales) {
    const i64 size = FIXED ? FIXED : given, half = size / 2;
    constexpr int top = (1 << B) - 1;
    const Scale s = scale_of(x, size, top);
    scales[0] = s.low, scales[1] = s.step;
    if (s.bad) return (void)std::fill(out, out + bytes(size), 0);
    const u32 base = (u32)(group * half);
#pragma omp simd
    for (i64 j = 0; j < half; j++) {
      const u32 bits = mix(base + (u32)j, key);
      codes[j] = (u8)((units<top>(x[j], s) + (int)(bits & 0xffff)) >> 16);
      codes[j + half] = (u8)((units<top>(x[j + half], s) + (int)(bits >> 16)) >> 16);
    }
    squeeze<B>(codes, size, out);
  }
};

// Two independent roundings that share their floor: B bits for it, then two bits, one for each rounding.
template <int B, int FIXED>
struct Twice {
  static i64 bytes(i64 size) { return size * (B + 2) / 8; }

  static void pack(const float *__restrict x, i64 group, i64 given, Key key, u8 *__restrict codes,
                   u8 *__restrict out, float *__restrict scales) {
    const i64 size = FIXED ? FIXED : given;
    const Scale s = scale_of(x, size, 1 << B);
    scales[0] = s.low, scales[1] = s.step;
    if (s.bad) return (void)std::fill(out, out + bytes(size), 0);
    const u32 base = (u32)(group * size);
    u8 *ups = codes + size;
#pragma omp simd
    for (i64 j = 0; j < size; j++) {
      const u32 bits = mix(base + (u32)j, key);
      const int t = units<1 << B>(x[j], s), whole = std::min(t >> 16, (1 << B) - 1), rest = t - (whole << 16);
      codes[j] = (u8)whole;
      ups[j] = (u8)((rest + (int)(bits & 0xffff)) >> 16 | (rest + (int)(bits >> 16)) >> 16 << 1);
    }
    squeeze<B>(codes, size, out);
    squeeze<2>(ups, size, out + size * B / 8);
  }
};

// 2^t for t <= 0, to a relative 1e-7: the fraction by a polynomial, the rest in the exponent's bits.
inline float power_of_two(float t) {
  t = t > -126.0f ? t : -126.0f;
  const float whole = std::floor(t), f = t - whole;
  float p = 1.5353362e-4f;
  p = p * f + 1.3398874e-3f;
  p = p * f + 9.6184373e-3f;
  p = p * f + 5.5503324e-2f;
  p = p * f + 2.4022648e-1f;
  p = p * f + 6.9314720e-1f;
  p = p * f + 1.0f;
  union {
    int bits;
    float value;
  } scale = {((int)whole + 127) << 23};
  return p * scale.value;
}

// The slope of a function from its argument and its value, which spares the error function.
struct Gelu {
  static float slope(float x, float y) {
    const float share = x != 0 ? y / x : 0.5f;
    return share + x * 0.3989422804f * power_of_two(x * x * -0.7213475204f);
  }
};

struct Silu {
  static float slope(float x, float y) {
    const float share = x != 0 ? y / x : 0.5f;
    return share + y * (1.0f - share);
  }
};

struct Itself {
  static float slope(float x, float) { return x; }
};

template <class P, class F>
void pack(const float *x, const float *y, i64 n, i64 size, Key key, u8 *out, float *scales, int threads) {
  constexpr bool plain = std::is_same<F, Itself>::value;
  const i64 groups = (n + size - 1) / size, bytes = P::bytes(size);
#pragma omp parallel num_threads(threads)
  {
    std::vector<u8> codes(3 * size);
    std::vector<float> buffer(size);
#pragma omp for schedule(static)
    for (i64 g = 0; g < groups; g++) {
      const i64 start = g * size, count = std::min(size, n - start);
      const float *from = x + start;
      if (!plain || count < size) {
        float *__restrict to = buffer.data();
        const float *__restrict value = plain ? from : y + start;
#pragma omp simd
        for (i64 j = 0; j < count; j++) to[j] = F::slope(from[j], value[j]);
        for (i64 j = count; j < size; j++) to[j] = to[count - 1];
        from = to;
      }
      P::pack(from, g, size, key, codes.data(), out + g * bytes, scales + 2 * g);
    }
  }
}

// One group back to floats; `which` is 0 or 1 for the roundings of Twice, -1 for Once.
template <int B>
inline void unpack_group(const u8 *__restrict in, i64 size, int which, const float *scales,
                         float *__restrict out) {
  constexpr int parts = 8 / B, mask = (1 << B) - 1;
  const i64 width = size / parts;
  const float low = scales[0], step = scales[1];
  for (int p = 0; p < parts; p++)
#pragma omp simd
    for (i64 j = 0; j < width; j++) out[p * width + j] = (float)((in[j] >> (p * B)) & mask);
  if (which >= 0) {
    const i64 quarter = size / 4;
    const u8 *ups = in + size * B / 8;
    for (int p = 0; p < 4; p++)
#pragma omp simd
      for (i64 j = 0; j < quarter; j++)
        out[p * quarter + j] += (float)((ups[j] >> (2 * p + which)) & 1);
  }
#pragma omp simd
  for (i64 j = 0; j < size; j++) out[j] = out[j] * step + low;
}

template <int B, int FIXED>
void unpack(const u8 *in, const float *scales, i64 n, i64 given, int which, const float *factor,
            float *out, int threads) {
  const i64 size = FIXED ? FIXED : given;
  const i64 groups = (n + size - 1) / size, bytes = size * (which < 0 ? B : B + 2) / 8;
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> buffer(size);
#pragma omp for schedule(static)
    for (i64 g = 0; g < groups; g++) {
      const i64 start = g * size, count = std::min(size, n - start);
      const bool direct = count == size && !factor;
      float *to = direct ? out + start : buffer.data();
      unpack_group<B>(in + g * bytes, size, which, scales + 2 * g, to);
      if (direct) continue;
      if (!factor) {
        std::copy(to, to + count, out + start);
        continue;
      }
#pragma omp simd
      for (i64 j = 0; j < count; j++) out[start + j] = factor[start + j] * to[j];
    }
  }
}

template <int B, class F>
void pack_once(const float *x, const float *y, i64 n, i64 size, Key key, u8 *out, float *scales,
               int threads) {
  if (size == 64) return pack<Once<B, 64>, F>(x, y, n, size, key, out, scales, threads);
  return pack<Once<B, 0>, F>(x, y, n, size, key, out, scales, threads);
}

template <int B>
void pack_any(const float *x, const float *y, int what, i64 n, i64 size, Key key, u8 *out, float *scales,
              int threads) {
  if (what == TWICE && size == 64)
    return pack<Twice<B, 64>, Itself>(x, y, n, size, key, out, scales, threads);
  if (what == TWICE) return pack<Twice<B, 0>, Itself>(x, y, n, size, key, out, scales, threads);
  if (what == GELU) return pack_once<B, Gelu>(x, y, n, size, key, out, scales, threads);
  if (what == SILU) return pack_once<B, Silu>(x, y, n, size, key, out, scales, threads);
  pack_once<B, Itself>(x, y, n, size, key, out, scales, threads);
}

// Both roundings of one group: their common floor is taken apart once.
template <int B>
inline void unpack_both(const u8 *__restrict in, i64 size, const float *scales, float *__restrict first,
                        float *__restrict second) {
  constexpr int parts = 8 / B, mask = (1 << B) - 1;
  const i64 width = size / parts, quarter = size / 4;
  const float low = scales[0], step = scales[1];
  const u8 *ups = in + size * B / 8;
  for (int p = 0; p < parts; p++)
#pragma omp simd
    for (i64 j = 0; j < width; j++) first[p * width + j] = (float)((in[j] >> (p * B)) & mask);
  for (int p = 0; p < 4; p++)
#pragma omp simd
    for (i64 j = 0; j < quarter; j++) {
      const float whole = first[p * quarter + j];
      first[p * quarter + j] = (whole + (float)((ups[j] >> (2 * p)) & 1)) * step + low;
      second[p * quarter + j] = (whole + (float)((ups[j] >> (2 * p + 1)) & 1)) * step + low;
    }
}

// Entries start .. start + count of what was packed twice; the second rounding only where it is wanted.
template <int B, int FIXED>
inline void unpack_range(const u8 *in, const float *scales, i64 given, i64 start, i64 count, float *spare,
                         float *__restrict first, float *__restrict second) {
  const i64 size = FIXED ? FIXED : given;
  const i64 bytes = size * (B + 2) / 8;
  for (i64 done = 0; done < count;) {
    const i64 g = (start + done) / size, skip = start + done - g * size;
    const i64 take = std::min(size - skip, count - done);
    const bool whole = take == size;
    float *a = whole ? first + done : spare, *b = whole ? second + done : spare + size;
    if (second)
      unpack_both<B>(in + g * bytes, size, scales + 2 * g, a, b);
    else
      unpack_group<B>(in + g * bytes, size, 0, scales + 2 * g, a);
    if (!whole) {
      std::copy(a + skip, a + skip + take, first + done);
      if (second) std::copy(b + skip, b + skip + take, second + done);
    }
    done += take;
  }
}

// Layer norm (RMS norm without means): rows of `width` entries, everything while a row is in the cache.
template <int B, int FIXED>
void layer_norm(const float *g, const float *weight, const float *mean, const float *rstd, const u8 *in,
                const float *scales, i64 rows, i64 width, i64 size, float *out, float *by_column,
                int threads) {
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> memory(2 * (width + size)), sums(2 * width, 0.0f);
    float *first = memory.data(), *second = first + width, *spare = second + width;
    float *of_weight = sums.data(), *of_bias = of_weight + width;
#pragma omp for schedule(static)
    for (i64 r = 0; r < rows; r++) {
      unpack_range<B, FIXED>(in, scales, size, r * width, width, spare, first, second);
      const float center = mean ? mean[r] : 0, scale = rstd[r], *row = g + r * width;
      float *__restrict to = out + r * width;
      float total = 0, slope = 0;
#pragma omp simd reduction(+ : total, slope)
      for (i64 j = 0; j < width; j++) {
        const float a = (first[j] - center) * scale, b = (second[j] - center) * scale;
        const float gw = weight ? row[j] * weight[j] : row[j];
        total += gw;
        slope += gw * b;
        of_weight[j] += row[j] * 0.5f * (a + b);
        of_bias[j] += row[j];
        first[j] = a;
        to[j] = gw;
      }
      total = mean ? total / width : 0;
      slope /= width;
#pragma omp simd
      for (i64 j = 0; j < width; j++) to[j] = scale * (to[j] - total - first[j] * slope);
    }
#pragma omp critical
    for (i64 j = 0; j < 2 * width; j++) by_column[j] += sums[j];
  }
}

// Sums over rows of `width` entries of g, g times the first and g times the second rounding, which are
// normalised by the row's (mean, rstd).
template <int B, int FIXED>
void row_sums(const float *g, const float *stats, const u8 *in, const float *scales, i64 rows, i64 width, i64 size, float *out,
              int threads) {
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> memory(2 * (width + size));
    float *first = memory.data(), *second = first + width, *spare = second + width;
#pragma omp for schedule(static)
    for (i64 r = 0; r < rows; r++) {
      unpack_range<B, FIXED>(in, scales, size, r * width, width, spare, first, second);
      const float center = stats[2 * r], scale = stats[2 * r + 1], *row = g + r * width;
      float a = 0, b = 0, c = 0;
#pragma omp simd reduction(+ : a, b, c)
      for (i64 j = 0; j < width; j++) {
        a += row[j];
        b += row[j] * ((first[j] - center) * scale);
        c += row[j] * ((second[j] - center) * scale);
      }
      out[3 * r] = a, out[3 * r + 1] = b, out[3 * r + 2] = c;
    }
  }
}

// a * g + b * (first rounding, normalised) + c, with (a, b, c) for each row of `width` entries.
template <int B, int FIXED>
void row_affine(const float *g, const float *stats, const float *abc, const u8 *in, const float *scales, i64 rows, i64 width,
                i64 size, float *out, int threads) {
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> memory(width + size);
    float *first = memory.data(), *spare = first + width;
#pragma omp for schedule(static)
    for (i64 r = 0; r < rows; r++) {
      unpack_range<B, FIXED>(in, scales, size, r * width, width, spare, first, nullptr);
      const float center = stats[2 * r], scale = stats[2 * r + 1];
      const float a = abc[3 * r], b = abc[3 * r + 1], c = abc[3 * r + 2], *row = g + r * width;
      float *__restrict to = out + r * width;
#pragma omp simd
      for (i64 j = 0; j < width; j++) to[j] = a * row[j] + b * ((first[j] - center) * scale) + c;
    }
  }
}

}  // namespace

// An instance for each number of bits, and one more for the usual group size.
#define CHOOSE(f, bits, size)                                                          \
  ((size) == 64 ? ((bits) == 1   ? f<1, 64>                                            \
                   : (bits) == 2 ? f<2, 64>                                            \
                   : (bits) == 4 ? f<4, 64>                                            \
                                 : f<8, 64>)                                           \
                : ((bits) == 1 ? f<1, 0> : (bits) == 2 ? f<2, 0> : (bits) == 4 ? f<4, 0> : f<8, 0>))

extern "C" {

// What is packed: x once, x twice, or the slope of a function of x whose values are y.
void backsketch_pack(const float *x, const float *y, int what, i64 n, i64 size, int bits, u32 first,
                     u32 second, u8 *out, float *scales, int threads) {
  const Key key{first, second};
  auto run = bits == 1   ? pack_any<1>
             : bits == 2 ? pack_any<2>
             : bits == 4 ? pack_any<4>
                         : pack_any<8>;
  run(x, y, what, n, size, key, out, scales, threads);
}

void backsketch_unpack(const u8 *in, const float *scales, i64 n, i64 size, int bits, int which,
                       const float *factor, float *out, int threads) {
  auto run = CHOOSE(unpack, bits, size);
  run(in, scales, n, size, which, factor, out, threads);
}

void backsketch_layer_norm(const float *g, const float *weight, const float *mean, const float *rstd,
                           const u8 *in, const float *scales, i64 rows, i64 width, i64 size, int bits,
                           float *out, float *by_column, int threads) {
  auto run = CHOOSE(layer_norm, bits, size);
  run(g, weight, mean, rstd, in, scales, rows, width, size, out, by_column, threads);
}

void backsketch_row_sums(const float *g, const float *stats, const u8 *in, const float *scales, i64 rows, i64 width, i64 size,
                         int bits, float *out, int threads) {
  auto run = CHOOSE(row_sums, bits, size);
  run(g, stats, in, scales, rows, width, size, out, threads);
}

void backsketch_row_affine(const float *g, const float *stats, const float *abc, const u8 *in, const float *scales, i64 rows,
                           i64 width, i64 size, int bits, float *out, int threads) {
  auto run = CHOOSE(row_affine, bits, size);
  run(g, stats, abc, in, scales, rows, width, size, out, threads);
}

// Bits of low < x < high (NaN counts as inside, so that it passes its cotangent on), in blocks of 512.
void backsketch_mask(const float *x, i64 n, float low, float high, u8 *out, int threads) {
  const i64 blocks = (n + BLOCK - 1) / BLOCK;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (i64 b = 0; b < blocks; b++) {
    const i64 start = b * BLOCK, count = std::min(BLOCK, n - start);
    u8 inside[BLOCK] = {};
#pragma omp simd
    for (i64 j = 0; j < count; j++) {
      const float v = x[start + j];
      inside[j] = (u8)(!(v <= low) & !(v >= high));
    }
    squeeze<1>(inside, BLOCK, out + b * (BLOCK / 8));
  }
}

void backsketch_masked(const float *x, const u8 *bits, i64 n, float outside, float *out, int threads) {
  const i64 blocks = (n + BLOCK - 1) / BLOCK;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (i64 b = 0; b < blocks; b++) {
    const i64 start = b * BLOCK, count = std::min(BLOCK, n - start);
    u8 inside[BLOCK];
    for (int p = 0; p < 8; p++)
#pragma omp simd
      for (i64 j = 0; j < BLOCK / 8; j++)
        inside[p * (BLOCK / 8) + j] = (bits[b * (BLOCK / 8) + j] >> p) & 1;
    const float *from = x + start;
    float *to = out + start;
#pragma omp simd
    for (i64 j = 0; j < count; j++) {
      const float scaled = outside == 0 ? 0.0f : from[j] * outside;
      to[j] = inside[j] ? from[j] : scaled;
    }
  }
}

}  // extern "C"
