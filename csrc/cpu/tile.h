// The product of a step: rows of h (or of gate gradients) times a panel of recurrent weights.
//
// A panel holds the weights of kVectors registers of output columns. Forward, the columns are
// kLanes hidden units of each gate, so that one tile yields every gate of its units; where there is
// one product a unit (backward, RNN, projection) they are kVectors * kLanes neighbouring columns.
#pragma once

#include <utility>

#include "csrc/cpu/amx.h"
#include "csrc/cpu/split32.h"

namespace rnn_fused::RNN_FUSED_ISA {

// How one instruction multiplies: the type of the left operand, kDepth values of k at a time. Of
// the left operand it takes kRun neighbouring ones.
template <class T>
struct Product {
  using Operand = Acc<T>;
  using Value = Vec<Acc<T>>;
  static constexpr int kDepth = 1, kRun = 1;
  static Value value(const Operand* a) { return broadcast(*a); }  // in every lane
  static Value values(const Operand* a) { return load(a); }       // neighbouring ones
  static Value weight(const T* w) { return load(w); }
  static void accumulate(Vec<Acc<T>>& sum, Value a, Value w) { sum += a * w; }
};

#if defined(__AVX512BF16__)
// vdpbf16ps adds the products of two neighbouring k to each float lane.
template <>
struct Product<bf16> {
  using Operand = bf16;
  using Value = __m512bh;
  static constexpr int kDepth = 2;
#if defined(RNN_FUSED_AMX)
  static constexpr int kRun = 32;
#else
  static constexpr int kRun = 2;
#endif
  static Value value(const Operand* a) { return (__m512bh)_mm512_set1_epi32(load_as<int32_t>(a)); }
  static Value values(const Operand* a) { return (__m512bh)load_as<__m512i>(a); }
  static Value weight(const bf16* w) { return values(w); }
  static void accumulate(Vec<float>& sum, Value a, Value w) {
    sum = (Vec<float>)_mm512_dpbf16_ps((__m512)sum, a, w);
  }
};
#endif

template <>
struct Product<split32> {  // in tile registers only
  using Operand = SplitTerms;
  static constexpr int kDepth = 1, kRun = 16;
};

template <class T>
using Operand = typename Product<T>::Operand;

// Whether the product is that of tile registers. Then a run is a row of a left tile, or of two.
template <class T>
constexpr bool kTiled = Product<T>::kRun > Product<T>::kDepth;

// A panel is [K / kDepth, kVectors * kLanes, kDepth], K padded with zeros to whole runs.
template <class T>
constexpr int64_t padded_depth(int64_t K) {
  constexpr int64_t run = Product<T>::kRun;
  return (K + run - 1) / run * run;
}

// Largest number of rows whose accumulators, with one weight and the broadcast values, fit in the
// vector registers: 32 of them with AVX-512, else 16. Of tile registers four hold sums.
template <class T, int kVectors>
constexpr int kTileRows = kTiled<T>                      ? 32
                          : RNN_FUSED_VECTOR_BYTES == 64 ? (kVectors == 4 ? 6 : 8)
                                                         : 3;

// out[r * ldo + c] = init[r * ldi + c] + sum_k a[r * lda + k * step] * panel(k, c). Every sum runs
// over k in the same order whatever the height of the tile, so that a sequence's result does not
// depend on the rest of the batch or on the number of threads. (Calls too small to repay packing
// sum in another order: `dot_rows`.)
template <class T>
struct Tile {
  const Operand<T>* a;
  int64_t lda, step;  // step is 1 where kRun is not, or runs lie apart
  const T* panel;
  int64_t ldp;  // columns of the panel: at least those of the tile
  int64_t K;    // a multiple of kRun
  const Acc<T>* init;
  int64_t ldi;
  Acc<T>* out;  // may be init
  int64_t ldo;
};

template <class T, int kVectors, int kRows>
__attribute__((noinline)) void multiply_tile(const Tile<T>& t) {
  using A = Acc<T>;
  using M = Product<T>;
  const Operand<T>* a = t.a;
  const T* w = t.panel;
  const int64_t lda = t.lda, step = t.step * M::kDepth, width = t.ldp * M::kDepth;
  Vec<A> sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[r][v] = load(t.init + r * t.ldi + v * kLanes<A>);
  for (int64_t k = 0; k < t.K; k += M::kDepth, a += step, w += width) {
    typename M::Value value[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) value[r] = M::value(a + r * lda);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const typename M::Value weight = M::weight(w + v * kLanes<A> * M::kDepth);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) M::accumulate(sum[r][v], value[r], weight);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(t.out + r * t.ldo + v * kLanes<A>, sum[r][v]);
}

template <class T, int kVectors, int... kMinusOne>
void multiply_rows_of(int rows, const Tile<T>& tile, std::integer_sequence<int, kMinusOne...>) {
  static constexpr void (*table[])(const Tile<T>&) = {multiply_tile<T, kVectors, kMinusOne + 1>...};
  table[rows - 1](tile);
}

#if defined(RNN_FUSED_AMX)

// kHalves * 16 rows and kColumns * 16 columns. With four tiles of sums each multiplication finds
// its sums ready: they take about as long as three others. (The GRU's third gate, by itself, and
// narrow panels have two.)
template <int kHalves, int kColumns, class T>
inline void multiply_four_tiles(const Tile<T>& t, int64_t column) {
  constexpr int kLeft = 4, kRight = 6, kRights = std::min(kColumns, 2);
  constexpr int64_t kRun = Product<T>::kRun, kDepth = Product<T>::kDepth;
  constexpr int kTerms = kRun * sizeof(Operand<T>) / 64;
  const auto sum = [](auto half, auto c) { return half * (4 / kHalves) + c; };
  const auto each_sum = [](const auto& body) {
    unroll<kHalves>([&](auto half) { unroll<kColumns>([&](auto c) { body(half, c); }); });
  };
  const auto place = [&](int half, int c, int64_t ld) { return half * 16 * ld + column + c * 16; };
  each_sum([&](auto half, auto c) {
    load_tile<sum(half, c)>(t.init + place(half, c, t.ldi), t.ldi * sizeof(float));
  });
  const Operand<T>* a = t.a;
  const T* w = t.panel + column * kDepth;
  for (int64_t k = 0; k < t.K; k += kRun, a += kRun * t.step, w += kRun * t.ldp)
    unroll<(kColumns + kRights - 1) / kRights>([&](auto group) {
      constexpr int kFirst = group * kRights, kCount = std::min(kRights, kColumns - kFirst);
      unroll<kCount>([&](auto c) {
        load_tile<kRight + c>(w + (kFirst + c) * 16 * kDepth, t.ldp * kDepth * sizeof(T));
      });
      unroll<kTerms>([&](auto term) {
        unroll<kHalves>([&](auto half) {
          load_tile<kLeft + half>(a + half * 16 * t.lda + term * kRun / kTerms,
                                  t.lda * sizeof(Operand<T>));
        });
        unroll<kCount>([&](auto c) {
          unroll<kHalves>([&](auto half) {
            multiply_tiles<sum(half, std::integral_constant<int, kFirst + c>()), kLeft + half,
                           kRight + c>();
          });
        });
      });
    });
  each_sum([&](auto half, auto c) {
    store_tile<sum(half, c)>(t.out + place(half, c, t.ldo), t.ldo * sizeof(float));
  });
}

template <int kVectors, class T>
__attribute__((noinline)) void multiply_with_tiles(int rows, const Tile<T>& t) {
  TileScope::fit(rows);
  if (rows <= 16) return multiply_four_tiles<1, kVectors>(t, 0);
  multiply_four_tiles<2, 2>(t, 0);
  if constexpr (kVectors > 2) multiply_four_tiles<2, kVectors - 2>(t, 32);
}

#endif

// For 1 to kTileRows<T, kVectors> rows, of which `columns` columns are wanted: a narrow tile where
// half of the registers suffice.
template <class T, int kVectors>
void multiply(int rows, int64_t columns, const Tile<T>& tile) {
  constexpr int kNarrow = kVectors == 4 ? 2 : kVectors;
  const bool narrow = kVectors == 4 && columns <= 2 * kLanes<Acc<T>>;
#if defined(RNN_FUSED_AMX)
  if constexpr (kTiled<T>)
    return narrow ? multiply_with_tiles<kNarrow>(rows, tile)
                  : multiply_with_tiles<kVectors>(rows, tile);
#endif
  if constexpr (!kTiled<T>) {
    constexpr std::make_integer_sequence<int, kTileRows<T, kVectors>> heights;
    if (narrow)
      multiply_rows_of<T, kNarrow>(rows, tile, heights);
    else
      multiply_rows_of<T, kVectors>(rows, tile, heights);
  }
}

// The same products from weights as they lie in memory, for those that are computed too rarely to
// repay the packing. Where `weight` has a row per output column: the dot products of one with some
// rows of `a`, each summed in the same order whatever the other rows; their lanes are left to be
// added up, `stride` apart. (Several columns at once would read weights from several places, which
// takes longer than what their loads of `a` cost.)
template <class T, int kRows>
void dot_rows(const Operand<T>* a, int64_t lda, const T* w, int64_t K, Vec<Acc<T>>* out,
              int64_t stride) {
  using A = Acc<T>;
  using M = Product<T>;
  constexpr int64_t kWidth = kLanes<A> * M::kDepth;
  Vec<A> sum[2][kRows] = {};
  int64_t k = 0;
  for (; k + 2 * kWidth <= K; k += 2 * kWidth)
#pragma GCC unroll 2
    for (int s = 0; s < 2; ++s) {
      const typename M::Value weight = M::weight(w + k + s * kWidth);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
        M::accumulate(sum[s][r], M::values(a + r * lda + k + s * kWidth), weight);
    }
  for (; k < K; k += kLanes<A>) {
    const int n = lanes_left<T>(K - k);
    for (int r = 0; r < kRows; ++r) sum[0][r] += load(a + r * lda + k, n) * load(w + k, n);
  }
  for (int r = 0; r < kRows; ++r) out[r * stride] = sum[0][r] + sum[1][r];
}

// For 1 to kMost rows.
template <class T, int kMost>
inline __attribute__((always_inline)) void dots(int rows, const Operand<T>* a, int64_t lda,
                                                const T* w, int64_t K, Vec<Acc<T>>* out,
                                                int64_t stride) {
  if constexpr (kMost > 1)
    if (rows < kMost) return dots<T, kMost - 1>(rows, a, lda, w, K, out, stride);
  dot_rows<T, kMost>(a, lda, w, K, out, stride);
}

// Where `w` has a row per k, `stride` apart: out[r * ldo + c] = init[r * ldi + c] + sum_k a[r * lda
// + k] * w[k * stride + c], c < columns. Every weight is read once for all rows.
template <class T, int kVectors, int kRows>
__attribute__((noinline)) void multiply_rows(const Operand<T>* a, int64_t lda, const T* w,
                                             int64_t stride, int64_t columns, int64_t K,
                                             const Acc<T>* init, int64_t ldi, Acc<T>* out,
                                             int64_t ldo) {
  using A = Acc<T>;
  Vec<A> sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[r][v] = load(init + r * ldi + v * kLanes<A>);
  for (int64_t k = 0; k < K; ++k, w += stride) {
    Vec<A> value[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) value[r] = broadcast(to_accumulation(a[r * lda + k]));
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const int64_t rest = columns - v * kLanes<A>;
      if (rest <= 0) break;
      const Vec<A> weight = load(w + v * kLanes<A>, lanes_left<T>(rest));
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sum[r][v] += value[r] * weight;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(out + r * ldo + v * kLanes<A>, sum[r][v]);
}

// For 1 to kMost rows.
template <class T, int kVectors, int kMost, class... Args>
inline __attribute__((always_inline)) void multiply_few_rows(int rows, Args... args) {
  if constexpr (kMost > 1)
    if (rows < kMost) return multiply_few_rows<T, kVectors, kMost - 1>(rows, args...);
  multiply_rows<T, kVectors, kMost>(args...);
}

}  // namespace rnn_fused::RNN_FUSED_ISA
