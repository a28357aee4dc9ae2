// The functions that native.py calls: products of stochastically rounded 8-bit operands on the host.

#include "convolution.h"
#include "matrix.h"

namespace {

Convolution convolution(const i64 *s, int threads) {
  Convolution p{};
  p.n = s[0], p.c = s[1], p.o = s[2], p.groups = s[3], p.threads = threads;
  p.y = {s[4], s[5], s[6], s[7], s[8], s[9]};
  p.x_axis = {s[10], s[11], s[12], s[13], s[14], s[15]};
  return p;
}

}  // namespace

extern "C" {

int backsketch_int8_is_fast() { return WITH_VNNI; }

// Allow or forbid matrix registers; whether they are used from now on.
int backsketch_int8_tiles([[maybe_unused]] int wanted) {
#if WITH_TILES
  tiles_are_wanted() = wanted != 0;
#endif
  return with_tiles();
}

// See products/native.py. `keys`: eight words. `is_bfloat`: g, x and w are bfloat16, else float32. 0: no memory.
int backsketch_int8_vjps(const void *g, const void *x, const void *w, const u8 *codes, const float *stats, i64 n, i64 o, i64 j,
                          const u32 *keys, int is_bfloat, float *grad_input, float *grad_weight, float *grad_bias,
                          int threads) {
  Problem p{g, x, w, codes, stats, n, o, j, {}, grad_input, grad_weight, grad_bias, threads};
  for (int i = 0; i < 4; i++) p.keys[i] = {keys[2 * i], keys[2 * i + 1]};
  return is_bfloat ? run<Bfloat>(p) : run<float>(p);
}

// Codes and (step, sum of the codes) of each block and column of x, for a later call with `codes`.
void backsketch_int8_pack(const void *x, i64 n, i64 j, u32 first, u32 second, int is_bfloat, u8 *codes, float *stats, int threads) {
  const Key key{first, second};
  is_bfloat ? pack((const Bfloat *)x, n, j, key, codes, stats, threads) : pack((const float *)x, n, j, key, codes, stats, threads);
}

// `sizes`: samples, channels in and out, groups, then in, out, kernel, stride, padding, dilation of both axes. `codes` and
// `steps`: of a rounded x. `channels_last`: g, x and grad_input are; the codes never. 0: no memory.
int backsketch_int8_convolution(const void *g, const void *x, const void *w, const u8 *codes, const float *steps, const i64 *sizes,
                                const u32 *keys, int is_bfloat, int channels_last, float *grad_input, float *grad_weight,
                                int threads) {
  Convolution p = convolution(sizes, threads);
  p.channels_last = channels_last != 0;
  p.g = g, p.x = x, p.w = w, p.codes = codes, p.steps = steps, p.grad_input = grad_input, p.grad_weight = grad_weight;
  for (int i = 0; i < 4; i++) p.keys[i] = {keys[2 * i], keys[2 * i + 1]};
  return is_bfloat ? convolve<Bfloat>(p) : convolve<float>(p);
}

// Codes of x, and the step of each block of samples and channel, for a later call with `codes`.
void backsketch_int8_pack_images(const void *x, const i64 *sizes, u32 first, u32 second, int is_bfloat, int channels_last,
                                 u8 *codes, float *steps, int threads) {
  Convolution p = convolution(sizes, threads);
  p.channels_last = channels_last != 0;
  p.x = x, p.keys[2] = {first, second};
  is_bfloat ? pack_images<Bfloat>(p, codes, steps) : pack_images<float>(p, codes, steps);
}

}  // extern "C"
