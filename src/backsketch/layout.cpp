// The function that layout.py calls.

#include "transpose.h"

namespace {

constexpr int64_t LINES = 256;  // of a matrix that a thread takes at a time

template <class T>
void all(const T *from, int64_t n, int64_t rows, int64_t columns, T *to, int threads) {
  const int64_t pieces = (rows + LINES - 1) / LINES;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t t = 0; t < n * pieces; t++) {
    const int64_t at = t / pieces * rows * columns, first = t % pieces * LINES;
    transpose(from + at + first * columns, columns, std::min(LINES, rows - first), columns, to + at + first, rows);
  }
}

}  // namespace

extern "C" {

// Each of `n` matrices of `rows` lines of `columns` entries of `bytes` bytes, 2 or 4, transposed.
void backsketch_transpose(const void *from, int64_t n, int64_t rows, int64_t columns, int bytes, void *to, int threads) {
  if (bytes == 4) all((const uint32_t *)from, n, rows, columns, (uint32_t *)to, threads);
  else all((const uint16_t *)from, n, rows, columns, (uint16_t *)to, threads);
}

}  // extern "C"
