// Rows of 16- or 32-bit entries become columns.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

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

template <class V>
inline void zip_lines(const V *a, V *b) {
#pragma GCC unroll 8
  for (int k = 0; k < 8; k++) b[2 * k] = zip(a[k], a[k + 8], false), b[2 * k + 1] = zip(a[k], a[k + 8], true);
}

// `ld` and `ld_to` entries lie between lines. In squares of 16, whose lines are written whole: interleaving the lines k and k + 8 of a
// square four times over transposes it.
template <class T>
void transpose(const T *from, int64_t ld, int64_t rows, int64_t columns, T *to, int64_t ld_to) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 2, "16 or 32 bits");
  typedef std::conditional_t<sizeof(T) == 4, t32, t16> V;
  for (int64_t r = 0; r < rows; r += 16)
    for (int64_t c = 0; c < columns; c += 16) {
      const int64_t high = std::min<int64_t>(16, rows - r), wide = std::min<int64_t>(16, columns - c);
      V a[16], b[16];
      for (int64_t m = 0; m < 16; m++) {
        const T *line = from + (r + m) * ld + c;
        if (m >= high) a[m] = V{};
        else if (wide == 16) std::memcpy(a + m, line, sizeof(V));
        else a[m] = V{}, std::memcpy(a + m, line, wide * sizeof(T));
      }
      zip_lines(a, b), zip_lines(b, a), zip_lines(a, b), zip_lines(b, a);
      for (int64_t m = 0; m < wide; m++) {
        T *line = to + (c + m) * ld_to + r;
        if (high == 16) std::memcpy(line, a + m, sizeof(V));
        else std::memcpy(line, a + m, high * sizeof(T));
      }
    }
}

}  // namespace
