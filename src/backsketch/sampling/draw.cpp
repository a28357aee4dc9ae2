// Water-filling and systematic sampling (Madow 1949) of k of n rows, in a few passes over the scores.
//
// The twin of design.py, `inclusion_probabilities` and `few`: the same probabilities up to the rounding of
// sums, and the same rows for the same uniform number.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

using i64 = int64_t;

// The level lambda with sum_i min(1, s_i / lambda) = k: raise the number of sure rows until it is stable.
// The level only falls, so the sure rows only grow, and there are fewer than k of them. More than k scores
// are positive.
template <typename T>
double water_level(const T *__restrict s, i64 n, i64 k, double sum) {
  i64 sure = 0;
  double level = sum / k;
  for (;;) {
    i64 over = 0;
    double rest = 0;
#pragma omp simd reduction(+ : over, rest)
    for (i64 i = 0; i < n; i++) {
      const bool is_over = s[i] > level;
      over += is_over;
      rest += is_over ? 0.0 : (double)s[i];
    }
    // k rows above the level: k equal scores, whose mean was rounded down.
    if (over <= sure || over >= k) return level;
    sure = over;
    level = rest / (k - sure);
  }
}

template <typename T>
void draw(const T *s, i64 n, i64 k, double u, double floor, i64 *indices, T *weights) {
  double sum = 0;
  i64 positive = 0;
#pragma omp simd reduction(+ : sum, positive)
  for (i64 i = 0; i < n; i++) {
    sum += s[i];
    positive += s[i] > 0;
  }
  std::vector<T> surely;
  if (!std::isfinite(sum)) {  // NaN and Inf must reach the gradients
    surely.resize(n);
    sum = positive = 0;
    for (i64 i = 0; i < n; i++) {
      surely[i] = std::isfinite(s[i]) ? 0 : 1;
      positive += surely[i] > 0;
    }
    if (positive == 0) {  // finite scores whose sum is not
      std::transform(s, s + n, surely.begin(), [n](T x) { return x / n; });
      positive = n;
    }
    for (T x : surely) sum += x;
    s = surely.data();
  }
  const double level = positive > k ? water_level(s, n, k, sum) : 0;
  const double others = positive < n ? std::max(0.0, (double)(k - positive) / (n - positive)) : 0;
  const double even = floor * k / n;
  const auto chance = [&](i64 i) {
    const double optimal = level > 0 ? std::min(s[i] / level, 1.0) : s[i] > 0 ? 1.0 : others;
    return (1 - floor) * optimal + even;
  };
  double total = 0;
  for (i64 i = 0; i < n; i++) total += chance(i);
  const double scale = k / total;
  double edge = 0;
  i64 count = 0, last = n - 1;
  for (i64 i = 0; i < n && count < k; i++) {
    const double pi = chance(i);
    edge += pi * scale;
    if (pi > 0) last = i;
    for (; count < k && count + u < edge; count++) {
      indices[count] = i;
      weights[count] = (T)(1 / pi);
    }
  }
  for (; count < k; count++) {  // rounding at the very end
    indices[count] = last;
    weights[count] = (T)(chance(last) > 0 ? 1 / chance(last) : 0);
  }
}

// The same with the rows in another order; those drawn come in their own.
template <typename T>
void draw_in(const i64 *order, const T *s, i64 n, i64 k, double u, double floor, i64 *indices, T *weights) {
  if (!order) return draw(s, n, k, u, floor, indices, weights);
  std::vector<T> scores(n), weight_of(n);
  for (i64 i = 0; i < n; i++) scores[i] = s[order[i]];
  draw(scores.data(), n, k, u, floor, indices, weights);
  std::vector<i64> times(n, 0);
  for (i64 j = 0; j < k; j++) {
    const i64 row = order[indices[j]];
    times[row]++, weight_of[row] = weights[j];
  }
  for (i64 row = 0, j = 0; row < n; row++)
    for (i64 t = 0; t < times[row]; t++, j++) indices[j] = row, weights[j] = weight_of[row];
}

}  // namespace

extern "C" {

// `order`: a permutation of the rows, or null for their own order.
void backsketch_draw_f32(const i64 *order, const float *s, i64 n, i64 k, double u, double floor, i64 *indices, float *weights) {
  draw_in(order, s, n, k, u, floor, indices, weights);
}

void backsketch_draw_f64(const i64 *order, const double *s, i64 n, i64 k, double u, double floor, i64 *indices, double *weights) {
  draw_in(order, s, n, k, u, floor, indices, weights);
}
}
