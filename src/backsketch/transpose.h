// Rows of 16- or 32-bit entries become columns.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>
#define WITH_MASKS 1
#else
#define WITH_MASKS 0
#endif

namespace {

typedef int32_t t32 __attribute__((vector_size(64)));
typedef uint16_t t16 __attribute__((vector_size(32)));

// The first or the second halves of two vectors, entry by entry.
inline t32 zip(t32 a, t32 b, bool second) {
  return second ? __builtin_shuffle(a, b, t32{8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31})
                : __builtin_shuffle(a, b, t32{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23});
}

inline t16 zip(t16 a, t16 b, bool second) {
  return second ? __builtin_shuffle(a, b, t16{8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31})
                : __builtin_shuffle(a, b, t16{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23});
}

// The first `count` of 16 entries; what follows them is neither read nor written.
#if WITH_MASKS

inline __mmask16 first_of(int64_t count) { return (__mmask16)((1u << count) - 1); }

inline t32 some(const t32 *from, int64_t count) { return (t32)_mm512_maskz_loadu_epi32(first_of(count), from); }
inline t16 some(const t16 *from, int64_t count) { return (t16)_mm256_maskz_loadu_epi16(first_of(count), from); }
inline void put_some(t32 *to, t32 value, int64_t count) { _mm512_mask_storeu_epi32(to, first_of(count), (__m512i)value); }
inline void put_some(t16 *to, t16 value, int64_t count) { _mm256_mask_storeu_epi16(to, first_of(count), (__m256i)value); }

#else

template <class V>
inline V some(const V *from, int64_t count) {
  V value{};
  std::memcpy(&value, from, count * sizeof(value[0]));
  return value;
}

template <class V>
inline void put_some(V *to, V value, int64_t count) {
  std::memcpy(to, &value, count * sizeof(value[0]));
}

#endif

// A square of 16 lines, or the first `high` lines and `wide` columns of one. Interleaving the lines k and k + 8 four times over
// transposes it. Every loop is unrolled, so that the lines live in registers.
template <class V, bool WHOLE, class T>
inline void transpose_square(const T *from, int64_t ld, int64_t high, int64_t wide, T *to, int64_t ld_to) {
  V a[16], b[16];
#pragma GCC unroll 16
  for (int m = 0; m < 16; m++) {
    if (WHOLE) std::memcpy(a + m, from + m * ld, sizeof(V));
    else a[m] = m < high ? some((const V *)(from + m * ld), wide) : V{};
  }
#pragma GCC unroll 4
  for (int round = 0; round < 4; round++) {
#pragma GCC unroll 8
    for (int k = 0; k < 8; k++) b[2 * k] = zip(a[k], a[k + 8], false), b[2 * k + 1] = zip(a[k], a[k + 8], true);
#pragma GCC unroll 16
    for (int m = 0; m < 16; m++) a[m] = b[m];
  }
#pragma GCC unroll 16
  for (int m = 0; m < 16; m++) {
    if (WHOLE) std::memcpy(to + m * ld_to, a + m, sizeof(V));
    else if (m < wide) put_some((V *)(to + m * ld_to), a[m], high);
  }
}

// `ld` and `ld_to` entries lie between lines.
template <class T>
void transpose(const T *from, int64_t ld, int64_t rows, int64_t columns, T *to, int64_t ld_to) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 2, "16 or 32 bits");
  typedef std::conditional_t<sizeof(T) == 4, t32, t16> V;
  for (int64_t r = 0; r < rows; r += 16)
    for (int64_t c = 0; c < columns; c += 16) {
      const int64_t high = std::min<int64_t>(16, rows - r), wide = std::min<int64_t>(16, columns - c);
      const T *square = from + r * ld + c;
      T *place = to + c * ld_to + r;
      if (high == 16 && wide == 16) transpose_square<V, true>(square, ld, high, wide, place, ld_to);
      else transpose_square<V, false>(square, ld, high, wide, place, ld_to);
    }
}

}  // namespace
