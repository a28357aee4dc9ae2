// Products of bytes in the processor's matrix registers (AMX), where it has them and the system allows their use.
//
// A register holds 16 rows of 64 bytes. One instruction adds to 16 x 16 sums the products of 16 x 64 unsigned bytes of
// a left operand and 64 x 16 signed bytes of a right one: 1,024 in a cycle, eight times what vectors do.

#pragma once

#include "codes.h"
#if WITH_VNNI && defined(__AMX_INT8__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#define WITH_TILES 1
#else
#define WITH_TILES 0
#endif

namespace {

constexpr i64 TILE = 16;           // rows and columns of the sums in a register
constexpr i64 BYTES = 64;          // terms of a sum that one instruction adds
constexpr i64 SQUARE = TILE * 64;  // bytes of a register
constexpr i64 GROUP = 256;         // rows of a product that are multiplied together

#if WITH_TILES

// The system saves the registers of a process that asks for them.
inline bool tiles_are_granted() {
  constexpr int request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, request, tile_data) == 0;
  return granted;
}

inline std::atomic<bool> &tiles_are_wanted() {
  static std::atomic<bool> wanted{true};
  return wanted;
}

inline bool with_tiles() { return tiles_are_wanted().load(std::memory_order_relaxed) && tiles_are_granted(); }

// The registers of this thread, laid out for whole tiles. Other libraries find their own layout again.
class Tiles {
 public:
  explicit Tiles(bool used) : used_(used) {
    if (!used_) return;
    alignas(64) u8 layout[64] = {1};  // palette 1
    for (int t = 0; t < 8; t++) layout[16 + 2 * t] = 64, layout[48 + t] = TILE;
    _tile_storeconfig(before_);
    asm volatile("" ::: "memory");
    _tile_loadconfig(layout);
  }
  ~Tiles() {
    if (!used_) return;
    if (before_[0]) _tile_loadconfig(before_);
    else _tile_release();
  }
  Tiles(const Tiles &) = delete;
  Tiles &operator=(const Tiles &) = delete;

 private:
  alignas(64) u8 before_[64];
  const bool used_;
};

// Rows of bytes that registers are loaded from: `stride` bytes apart, the next terms `step` and the next 16 rows `next` bytes on.
struct Rows {
  const u8 *at;
  i64 stride, step, next;
};

// Columns of bytes that registers are loaded from, four terms interleaved: `stride` bytes to the next four, `next` to the next 16 columns.
struct Columns {
  const u8 *at;
  i64 stride, next;
};

// Adds the products of 64 terms to M x V registers of sums. SIGNED: which operand has signed bytes, the left one or the right one.
enum class Signed { LEFT, RIGHT };

#define ADD_TILE(c, a, b)                                  \
  do {                                                     \
    if (SIGNED == Signed::LEFT) _tile_dpbsud(c, a, b);     \
    else _tile_dpbusd(c, a, b);                            \
  } while (0)

template <int M, int V, Signed SIGNED>
__attribute__((always_inline)) inline void add_tiles(const Rows &a, const Columns &b) {
  static_assert(M <= 2 && V <= 2, "eight registers");
  _tile_loadd(4, a.at, a.stride);
  _tile_loadd(6, b.at, b.stride);
  ADD_TILE(0, 4, 6);
  if (V > 1) {
    _tile_loadd(7, b.at + b.next, b.stride);
    ADD_TILE(1, 4, 7);
  }
  if (M > 1) {
    _tile_loadd(5, a.at + a.next, a.stride);
    ADD_TILE(2, 5, 6);
    if (V > 1) ADD_TILE(3, 5, 7);
  }
}

// The sums of M x V registers, in lines of 32: from zero, or from what is there.
template <int M, int V>
__attribute__((always_inline)) inline void begin_sums(const i32 *sums, bool more) {
  asm volatile("" ::: "memory");  // loads of registers do not tell the compiler that they read
  if (more) {
    _tile_loadd(0, sums, 128);
    if (V > 1) _tile_loadd(1, sums + 16, 128);
    if (M > 1) _tile_loadd(2, sums + 512, 128);
    if (M > 1 && V > 1) _tile_loadd(3, sums + 528, 128);
  } else {
    _tile_zero(0);
    if (V > 1) _tile_zero(1);
    if (M > 1) _tile_zero(2);
    if (M > 1 && V > 1) _tile_zero(3);
  }
}

template <int M, int V>
__attribute__((always_inline)) inline void end_sums(i32 *sums) {
  _tile_stored(0, sums, 128);
  if (V > 1) _tile_stored(1, sums + 16, 128);
  if (M > 1) _tile_stored(2, sums + 512, 128);
  if (M > 1 && V > 1) _tile_stored(3, sums + 528, 128);
}

// Sums over `depth` terms, unsigned by signed. `more`: added to the sums there are. Terms behind the last are read on the left, whatever
// they are, and are zero on the right.
template <int M, int V>
__attribute__((noinline)) void sum_tiles(Rows a, Columns b, i64 depth, i32 *sums, bool more) {
  begin_sums<M, V>(sums, more);
  i64 k = 0;
  for (; k + BYTES <= depth; k += BYTES, a.at += a.step, b.at += TILE * b.stride) add_tiles<M, V, Signed::RIGHT>(a, b);
  if (k < depth) {
    alignas(64) u8 rest[V * SQUARE];
    std::memset(rest, 0, sizeof rest);
    for (i64 line = 0; 4 * line < depth - k; line++)
      for (int v = 0; v < V; v++) std::memcpy(rest + v * SQUARE + 64 * line, b.at + line * b.stride + v * b.next, 64);
    asm volatile("" ::: "memory");
    add_tiles<M, V, Signed::RIGHT>(a, Columns{rest, 64, SQUARE});
  }
  end_sums<M, V>(sums);
}

// Sums over `count` times 64 terms, signed by unsigned; each 64 have a place of their own on the right.
template <int M, int V>
__attribute__((noinline)) void sum_tiles_at(Rows a, Columns b, const i32 *offsets, i64 count, i32 *sums) {
  begin_sums<M, V>(sums, false);
  for (i64 k = 0; k < count; k++, a.at += a.step) add_tiles<M, V, Signed::LEFT>(a, Columns{b.at + offsets[k], b.stride, b.next});
  end_sums<M, V>(sums);
}

// Calls `f` with the numbers of registers for so many rows and columns, at most 32 each.
template <class F>
inline void with_registers(i64 rows, i64 columns, F f) {
  constexpr std::integral_constant<int, 1> one;
  constexpr std::integral_constant<int, 2> two;
  if (rows > TILE) columns > TILE ? f(two, two) : f(two, one);
  else columns > TILE ? f(one, two) : f(one, one);
}

// 16 lines of 16 words, transposed in place.
inline void transpose(u8 *square) {
  __m512i a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(square + 64 * i);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
      a[i + 2 * h] = _mm512_unpacklo_epi64(b[i + h], b[i + 2 + h]);
      a[i + 2 * h + 1] = _mm512_unpackhi_epi64(b[i + h], b[i + 2 + h]);
    }
  // a[4 q + c]: column c + 4 l of lines 4 q to 4 q + 3 in its quarter l.
#pragma GCC unroll 4
  for (int c = 0; c < 4; c++) {
    const __m512i even = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x88), odd = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xdd);
    const __m512i even2 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x88), odd2 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xdd);
    _mm512_storeu_si512(square + 64 * c, _mm512_shuffle_i32x4(even, even2, 0x88));
    _mm512_storeu_si512(square + 64 * (c + 4), _mm512_shuffle_i32x4(odd, odd2, 0x88));
    _mm512_storeu_si512(square + 64 * (c + 8), _mm512_shuffle_i32x4(even, even2, 0xdd));
    _mm512_storeu_si512(square + 64 * (c + 12), _mm512_shuffle_i32x4(odd, odd2, 0xdd));
  }
}

#else

inline bool with_tiles() { return false; }

struct Tiles {
  explicit Tiles(bool) {}
};

#endif

}  // namespace
