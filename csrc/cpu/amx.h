// The tile registers of AMX: eight of up to 16 rows of 64 bytes. Each wrapper is one instruction,
// and with RNN_FUSED_EMULATED_AMX its meaning in C++, so that every machine with AVX512-BF16 can
// test what is built on them.
//
// The instructions are written as assembly because the compiler's intrinsics take no template
// parameters, and need compilers that know AMX.
#pragma once

#include <algorithm>
#include <array>
#include <utility>

#include "csrc/cpu/simd.h"

namespace rnn_fused::RNN_FUSED_ISA {

#if defined(RNN_FUSED_AMX)

// As ldtilecfg reads it. A tile that is used has both of its sizes.
struct alignas(64) TileSizes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

#if defined(RNN_FUSED_EMULATED_AMX)

struct Tiles {
  TileSizes sizes;
  alignas(64) unsigned char data[8][16][64];
};
inline thread_local Tiles emulated_tiles;

// The sizes of a tile; a fault without them, as on the processor.
template <int kTile>
inline int rows_of() {
  if (emulated_tiles.sizes.rows[kTile] == 0) __builtin_trap();
  return emulated_tiles.sizes.rows[kTile];
}

inline void configure_tiles(const TileSizes& sizes) {
  std::memset(static_cast<void*>(&emulated_tiles), 0, sizeof(Tiles));
  emulated_tiles.sizes = sizes;
}
inline void release_tiles() { configure_tiles({}); }

template <int kTile>
inline void load_tile(const void* first, int64_t stride) {
  for (int r = 0; r < rows_of<kTile>(); ++r)
    std::memcpy(emulated_tiles.data[kTile][r], static_cast<const char*>(first) + r * stride,
                emulated_tiles.sizes.row_bytes[kTile]);
}

template <int kTile>
inline void store_tile(void* first, int64_t stride) {
  for (int r = 0; r < rows_of<kTile>(); ++r)
    std::memcpy(static_cast<char*>(first) + r * stride, emulated_tiles.data[kTile][r],
                emulated_tiles.sizes.row_bytes[kTile]);
}

// Sums even and odd k apart, and adds both to the tile at the end. (The processor also takes
// subnormal numbers as zero.)
template <int kSum, int kLeft, int kRight>
inline void multiply_tiles() {
  Tiles& tiles = emulated_tiles;
  const int pairs = tiles.sizes.row_bytes[kLeft] / 4;
  if (pairs != rows_of<kRight>() || rows_of<kSum>() != rows_of<kLeft>()) __builtin_trap();
  for (int m = 0; m < rows_of<kSum>(); ++m) {
    Vec<float> even{}, odd{};
    for (int k = 0; k < pairs; ++k) {
      const U32 right = load_as<U32>(tiles.data[kRight][k]);
      const uint32_t left = load_as<uint32_t>(tiles.data[kLeft][m] + 4 * k);
      even += bit_cast<float>(left << 16) * bit_cast<Vec<float>>(right << 16);
      odd += bit_cast<float>(left & 0xffff0000) * bit_cast<Vec<float>>(right & 0xffff0000);
    }
    float* const sum = reinterpret_cast<float*>(tiles.data[kSum][m]);
    store(sum, load(sum) + (even + odd));
  }
}

#else

inline void configure_tiles(const TileSizes& sizes) { asm volatile("ldtilecfg %0" : : "m"(sizes)); }
inline void release_tiles() { asm volatile("tilerelease"); }

// Rows are `stride` bytes apart. (That it reads memory from `first` on is an operand: as a clobber
// of all memory it would keep the loop's variables on the stack.)
template <int kTile>
inline void load_tile(const void* first, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2"
               :
               : "r"(first), "r"(stride), "i"(kTile), "m"(*static_cast<const char (*)[]>(first)));
}

template <int kTile>
inline void store_tile(void* first, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(first), "r"(stride), "i"(kTile) : "memory");
}

// sum[m][n] += left[m][k] * right[k / 2][n][k % 2] over all k, of bfloat16 and in float.
template <int kSum, int kLeft, int kRight>
inline void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c0, %%tmm%c1, %%tmm%c2" : : "i"(kRight), "i"(kLeft), "i"(kSum));
}

#endif

// For products of so many rows: tiles 0 to 3 hold sums, of up to 16 rows all four, of more two for
// each half; 4 and 5 hold the left operand of the halves, 6 and 7 the right one.
constexpr TileSizes sizes_for(int rows) {
  TileSizes sizes;
  const int halves = rows > 16 ? 2 : 1;
  for (int tile = 0; tile < 8; ++tile) {
    const int half = tile < 4 ? tile * halves / 4 : tile - 4;
    sizes.row_bytes[tile] = 64;
    sizes.rows[tile] = static_cast<uint8_t>(half >= halves ? 16
                                            : half == 0    ? std::min(rows, 16)
                                                           : rows - 16);
  }
  return sizes;
}

template <int... kRowsMinusOne>
constexpr auto tables_of_sizes(std::integer_sequence<int, kRowsMinusOne...>) {
  return std::array{sizes_for(kRowsMinusOne + 1)...};
}

// Around all products of a thread's share of the work: the sizes of the tiles do not outlive it.
class TileScope {
 public:
  TileScope() = default;
  ~TileScope() {
    if (rows_ != 0) release_tiles();
    rows_ = 0;
  }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;

  // Before a product of so many rows, up to 32.
  static void fit(int rows) {
    static constexpr auto kSizes = tables_of_sizes(std::make_integer_sequence<int, 32>());
    if (rows == rows_) return;
    rows_ = rows;
    configure_tiles(kSizes[rows - 1]);
  }

 private:
  static thread_local int rows_;  // that the tiles fit, or 0
};
inline thread_local int TileScope::rows_ = 0;

// f(0), f(1), ... f(n - 1), where f may ask for its argument at compile time.
template <int n, class F>
inline __attribute__((always_inline)) void unroll(const F& f) {
  [&]<int... i>(std::integer_sequence<int, i...>) {
    (f(std::integral_constant<int, i>()), ...);
  }(std::make_integer_sequence<int, n>());
}

#else

struct TileScope {
  ~TileScope() {}  // so that nobody takes it for unused
};

#endif

}  // namespace rnn_fused::RNN_FUSED_ISA
