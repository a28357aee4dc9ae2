// Stochastic rounding on the host, fused: one pass over memory to pack, one to unpack.
//
// The same arithmetic, operation by operation, as eager.py: results agree bit for bit, so contraction
// into fused multiply-adds must be off. Groups of G entries; in a group, byte j of a code of B bits holds
// the entries j, j + W, j + 2W, ... with W = G * B / 8, so that no step crosses the lanes of a vector.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace {

using i64 = int64_t;
using u32 = uint32_t;
using u8 = uint8_t;

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

// The middles of 65536 equal parts of [0, 1).
inline float uniform(u32 sixteen_bits) {
  return ((float)(int)sixteen_bits + 0.5f) * (1.0f / 65536);
}

struct Scale {
  float low, step, inverse;
};

inline Scale scale_of(const float *__restrict x, i64 size, float intervals) {
  float low = x[0], high = x[0], bad = 0;
#pragma omp simd reduction(min : low) reduction(max : high) reduction(+ : bad)
  for (i64 j = 0; j < size; j++) {
    low = x[j] < low ? x[j] : low;
    high = x[j] > high ? x[j] : high;
    bad += x[j] * 0.0f;
  }
  float range = high - low + bad;
  if (!(range - range == 0)) {  // NaN or Inf in the group: all of it comes back as NaN
    float nan = std::numeric_limits<float>::quiet_NaN();
    return {nan, nan, 0};
  }
  return {low, range / intervals, range > 1e-30f ? intervals / range : 0};
}

inline float clamped(float t, float top) {
  t = t > 0 ? t : 0;
  return t < top ? t : top;
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
    constexpr float top = (1 << B) - 1;
    const Scale s = scale_of(x, size, top);
    scales[0] = s.low, scales[1] = s.step;
    const u32 base = (u32)(group * half);
#pragma omp simd
    for (i64 j = 0; j < half; j++) {
      u32 bits = mix(base + (u32)j, key);
      float a = (x[j] - s.low) * s.inverse + uniform(bits & 0xffff);
      float b = (x[j + half] - s.low) * s.inverse + uniform(bits >> 16);
      codes[j] = (u8)(int)clamped(a, top);
      codes[j + half] = (u8)(int)clamped(b, top);
    }
    squeeze<B>(codes, size, out);
  }
};

// Two independent roundings that share their floor: B bits for it and one bit for each rounding.
template <int B, int FIXED>
struct Twice {
  static i64 bytes(i64 size) { return size * (B + 2) / 8; }

  static void pack(const float *__restrict x, i64 group, i64 given, Key key, u8 *__restrict codes,
                   u8 *__restrict out, float *__restrict scales) {
    const i64 size = FIXED ? FIXED : given;
    constexpr float intervals = 1 << B;
    const Scale s = scale_of(x, size, intervals);
    scales[0] = s.low, scales[1] = s.step;
    const u32 base = (u32)(group * size);
    u8 *first = codes + size, *second = first + size;
#pragma omp simd
    for (i64 j = 0; j < size; j++) {
      u32 bits = mix(base + (u32)j, key);
      float t = (x[j] - s.low) * s.inverse;
      float whole = (float)(int)clamped(t, intervals - 1);
      float rest = t - whole;
      codes[j] = (u8)(int)whole;
      first[j] = rest + uniform(bits & 0xffff) >= 1.0f;
      second[j] = rest + uniform(bits >> 16) >= 1.0f;
    }
    squeeze<B>(codes, size, out);
    squeeze<1>(first, size, out + size * B / 8);
    squeeze<1>(second, size, out + size * B / 8 + size / 8);
  }
};

template <class P>
void pack(const float *x, i64 n, i64 size, Key key, u8 *out, float *scales, int threads) {
  const i64 groups = (n + size - 1) / size, bytes = P::bytes(size);
#pragma omp parallel num_threads(threads)
  {
    std::vector<u8> codes(3 * size);
    std::vector<float> last(size);
#pragma omp for schedule(static)
    for (i64 g = 0; g < groups; g++) {
      const float *from = x + g * size;
      if (g * size + size > n) {
        std::fill(last.begin(), last.end(), x[n - 1]);
        std::copy(from, x + n, last.begin());
        from = last.data();
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
    const i64 eighth = size / 8;
    const u8 *bits = in + size * B / 8 + which * eighth;
    for (int p = 0; p < 8; p++)
#pragma omp simd
      for (i64 j = 0; j < eighth; j++) out[p * eighth + j] += (float)((bits[j] >> p) & 1);
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

template <int B>
void pack_any(const float *x, i64 n, i64 size, int twice, Key key, u8 *out, float *scales, int threads) {
  if (twice && size == 64) return pack<Twice<B, 64>>(x, n, size, key, out, scales, threads);
  if (twice) return pack<Twice<B, 0>>(x, n, size, key, out, scales, threads);
  if (size == 64) return pack<Once<B, 64>>(x, n, size, key, out, scales, threads);
  return pack<Once<B, 0>>(x, n, size, key, out, scales, threads);
}

template <int B>
void unpack_any(const u8 *in, const float *scales, i64 n, i64 size, int which, const float *factor,
                float *out, int threads) {
  if (size == 64) return unpack<B, 64>(in, scales, n, size, which, factor, out, threads);
  return unpack<B, 0>(in, scales, n, size, which, factor, out, threads);
}

}  // namespace

extern "C" {

void backsketch_pack(const float *x, i64 n, i64 size, int bits, int twice, u32 first, u32 second,
                     u8 *out, float *scales, int threads) {
  const Key key{first, second};
  auto run = bits == 1   ? pack_any<1>
             : bits == 2 ? pack_any<2>
             : bits == 4 ? pack_any<4>
                         : pack_any<8>;
  run(x, n, size, twice, key, out, scales, threads);
}

void backsketch_unpack(const u8 *in, const float *scales, i64 n, i64 size, int bits, int which,
                       const float *factor, float *out, int threads) {
  auto run = bits == 1   ? unpack_any<1>
             : bits == 2 ? unpack_any<2>
             : bits == 4 ? unpack_any<4>
                         : unpack_any<8>;
  run(in, scales, n, size, which, factor, out, threads);
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
