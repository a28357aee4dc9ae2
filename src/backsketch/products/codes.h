// Rounding to 8 bits: what the kernels of matrices and of convolutions share.
//
// The arithmetic is that of eager.py, operation by operation, so that results agree bit for bit: contraction into
// fused multiply-adds must be off.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>
#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>
#define WITH_VNNI 1
#else
#define WITH_VNNI 0
#endif

namespace {

using i64 = int64_t;
using i32 = int32_t;
using u32 = uint32_t;
using u8 = uint8_t;
using i8 = int8_t;

typedef float f16 __attribute__((vector_size(64)));
typedef i32 v16 __attribute__((vector_size(64)));
typedef u32 w16 __attribute__((vector_size(64)));
typedef u8 b16 __attribute__((vector_size(16)));
typedef uint16_t h16 __attribute__((vector_size(32)));

constexpr i64 BLOCK = 256;    // rows that share the scale of a column in grad_weight
constexpr i64 DEPTH = 2048;   // terms that grad_input sums in integers
constexpr i64 CHUNK = 1024;   // rows that are rounded and multiplied together
constexpr i64 LEFT = 16;      // rows of a panel of a transposed left operand
constexpr i64 RIGHT = 64;     // columns of a panel of a right operand
constexpr int ROWS = 6;       // of a tile
constexpr float HALF = 8388608.0f;    // 128 steps, in units of 2^-16 of a step
constexpr float TOP = 16711680.0f;    // 255 steps
constexpr float LEVELS = 8323072.0f;  // 127 steps
constexpr float TINY = 2.5e-32f;      // below it LEVELS / x would overflow

inline i64 up(i64 n, i64 to) { return (n + to - 1) / to * to; }

template <class T>
inline T load(const void *from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <class T>
inline void store(void *to, T value) {
  std::memcpy(to, &value, sizeof value);
}

// Bring a line into the cache that is read, or written, soon. It may lie behind the end.
template <bool WRITTEN = false>
inline void fetch(const void *at) {
  __builtin_prefetch(at, WRITTEN);
}

struct Key {
  u32 first, second;
};

// Counter to 32 bits: the lowbias32 mixer (Wellons 2018) with a second key in its middle.
inline w16 mix(w16 i, Key key) {
  w16 x = i + key.first;
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= key.second;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

struct Bfloat {
  uint16_t bits;
};

inline f16 floats(const float *x) { return load<f16>(x); }

inline f16 floats(const Bfloat *x) {
  const w16 wide = __builtin_convertvector(load<h16>(x), w16) << 16;
  f16 value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

// The first `count` of 16 entries, zeros after them.
#if WITH_VNNI

inline __mmask16 mask_of(i64 count) { return count >= 16 ? 0xffff : count > 0 ? (1u << count) - 1 : 0; }

inline f16 some_floats(const float *x, i64 count) { return (f16)_mm512_maskz_loadu_ps(mask_of(count), x); }

inline f16 some_floats(const Bfloat *x, i64 count) {
  return (f16)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask_of(count), x)), 16);
}

#else

template <class T>
inline f16 some_floats(const T *x, i64 count) {
  if (count >= 16) return floats(x);
  T part[16] = {};
  if (count > 0) std::memcpy(part, x, count * sizeof(T));
  return floats(part);
}

#endif

inline i32 magnitude_of(float x) { return load<i32>(&x) & 0x7fffffff; }

inline i32 magnitude_of(Bfloat x) { return (i32)x.bits << 16 & 0x7fffffff; }

// The magnitude's bits: as integers they are ordered, and Inf and NaN come last.
inline v16 magnitude(f16 x) {
  v16 bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits & 0x7fffffff;
}

inline v16 larger(v16 a, v16 b) { return a > b ? a : b; }

// The largest and the sum of 16 integers: by halves, since compilers add up lane by lane.
template <class F>
inline i32 fold(v16 x, F both) {
  typedef i32 v8 __attribute__((vector_size(32)));
  typedef i32 v4 __attribute__((vector_size(16)));
  v8 half[2];
  v4 quarter[2];
  std::memcpy(half, &x, sizeof x);
  const v8 eight = both(half[0], half[1]);
  std::memcpy(quarter, &eight, sizeof eight);
  const v4 four = both(quarter[0], quarter[1]), two = both(four, __builtin_shuffle(four, v4{2, 3, 0, 1}));
  return both(two, __builtin_shuffle(two, v4{1, 0, 3, 2}))[0];
}

inline i32 largest_of(v16 x) {
  return fold(x, [](auto a, auto b) { return a > b ? a : b; });
}

inline i32 sum_of(v16 x) {
  return fold(x, [](auto a, auto b) { return a + b; });
}

inline float as_float(i32 bits) { return load<float>(&bits); }

// Codes + 128 of 16 entries, from 16 random bits for each. NaN gets the highest one: its group has a step of NaN.
inline v16 rounded(f16 x, f16 rate, v16 dither) {
  f16 t = x * rate + HALF;
  t = t < TOP ? t : f16{} + TOP;
  return (__builtin_convertvector(t, v16) + dither) >> 16;
}

// Step and rate of a group whose largest magnitude has the given bits; NaN and 0 if it is not finite.
inline void scale_of(i32 bits, float &step, float &rate) {
  const float largest = as_float(bits);
  if (bits >= 0x7f800000) {
    step = std::numeric_limits<float>::quiet_NaN(), rate = 0;
  } else if (bits == 0) {
    step = 0, rate = 0;
  } else {
    const float bounded = largest > TINY ? largest : TINY;
    step = bounded / 127.0f, rate = LEVELS / bounded;
  }
}

// A loop over the rows or vectors of a step is unrolled, so that they live in registers.
#define EACH_OF(name, count) _Pragma("GCC unroll 4") for (int name = 0; name < (count); name++)

inline v16 iota() { return v16{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }

#if WITH_VNNI

// Four products of an unsigned and a signed byte, added to each lane. Written out, because compilers copy the
// accumulators when they are handed the intrinsic in a loop.
inline void add_products(__m512i &sum, __m512i left, __m512i right) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(left), "v"(right));
}

// The loops over a tile are unrolled from the outside in, so that its sums live in registers.
#define EACH_ROW _Pragma("GCC unroll 6") for (int m = 0; m < M; m++)
#define EACH_VECTOR EACH_OF(v, V)

#endif

// Memory of the calling thread that is used again and again: fresh pages cost more than the rounding does.
class Scratch {
 public:
  ~Scratch() { std::free(memory_); }

  bool reserve(i64 bytes) {
    if (bytes > size_) {
      std::free(memory_);
      memory_ = (u8 *)std::aligned_alloc(4096, up(bytes, 4096));
      size_ = memory_ ? bytes : 0;
    }
    next_ = memory_;
    return memory_ != nullptr;
  }
  template <class T>
  T *take(i64 count) {
    T *taken = (T *)next_;
    next_ += up(count * sizeof(T), 64);
    return taken;
  }
  void trim(i64 most) {
    if (size_ > most) std::free(memory_), memory_ = nullptr, size_ = 0;
  }

 private:
  u8 *memory_ = nullptr, *next_ = nullptr;
  i64 size_ = 0;
};

thread_local Scratch scratch;

}  // namespace
