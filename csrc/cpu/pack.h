// Recurrent weights rearranged into panels (tile.h), zero-padded to whole registers.
#pragma once

#include <algorithm>
#include <cstdint>

#include "csrc/cpu/tile.h"

namespace rnn_fused::RNN_FUSED_ISA {

// What one lane of a panel holds: kDepth neighbouring values of k.
template <class T>
using Word =
    std::conditional_t<sizeof(T) * Product<T>::kDepth == 8, uint64_t,
                       std::conditional_t<sizeof(T) * Product<T>::kDepth == 4, uint32_t, uint16_t>>;

// Exchanges the blocks off the diagonal of every square of 2 * kDistance registers.
template <int kDistance, class V, int... kLane>
inline void transpose_step(V* v, std::integer_sequence<int, kLane...>) {
  constexpr int kSize = sizeof...(kLane);
  for (int i = 0; i < kSize; ++i) {
    if (i & kDistance) continue;
    const V low = v[i], high = v[i + kDistance];
    v[i] = __builtin_shufflevector(low, high,
                                   (kLane & kDistance ? kSize + kLane - kDistance : kLane)...);
    v[i + kDistance] = __builtin_shufflevector(
        low, high, (kLane & kDistance ? kSize + kLane : kLane + kDistance)...);
  }
  if constexpr (kDistance > 1)
    transpose_step<kDistance / 2>(v, std::integer_sequence<int, kLane...>());
}

// What a panel holds of a register of weights.
template <class T, class V>
inline V panel_words(V words) {
  if constexpr (std::is_same_v<T, split32>)
    return right_words(bit_cast<Vec<float>>(words));
  else
    return words;
}

// Fills kLanes columns of a panel of kColumns, from column `first`, with the first `lanes` of
// `rows`: one row of K elements per column, `row_stride` apart.
template <class T, int kColumns>
void pack_lanes(const T* rows, int64_t row_stride, int lanes, int64_t K, int first, T* panel) {
  constexpr int kDepth = Product<T>::kDepth;
  constexpr int kSize = kLanes<Acc<T>>;
  constexpr int64_t kBlock = kSize * kDepth;  // of k: a square of words
  using V = VecLike<Acc<T>, Word<T>>;
  const auto place = [&](int64_t k, int l) {
    return panel + (k / kDepth * kColumns + first + l) * kDepth;
  };
  const int64_t depth = padded_depth<T>(K);
  int64_t k = 0;
  for (; lanes == kSize && k + kBlock <= K; k += kBlock) {
    V square[kSize];
    for (int l = 0; l < kSize; ++l) square[l] = load_as<V>(rows + l * row_stride + k);
    transpose_step<kSize / 2>(square, std::make_integer_sequence<int, kSize>());
    for (int i = 0; i < kSize; ++i) store_as(place(k + i * kDepth, 0), panel_words<T>(square[i]));
  }
  for (; k < depth; k += kDepth) {
    alignas(V) T words[kSize * kDepth];
    for (int l = 0; l < kSize; ++l)
      for (int i = 0; i < kDepth; ++i)
        words[l * kDepth + i] = l < lanes && k + i < K ? rows[l * row_stride + k + i] : T{};
    store_as(place(k, 0), panel_words<T>(load_as<V>(words)));
  }
}

// A register of columns, from column `c` on, of kDepth neighbouring rows (null: zeros), in the
// order of a panel: out[lane * kDepth + i] = rows[i][c + lane].
template <class E, class T>
inline void interleave(const T* const* rows, int64_t c, int lanes, E* out) {
  using V = Vec<Acc<T>>;
  const auto at = [&](int i) { return rows[i] ? load(rows[i] + c, lanes) : V{}; };
  if constexpr (std::is_same_v<E, split32>) {
    store_as(out, right_words(at(0)));
  } else if constexpr (Product<E>::kDepth == 1) {
    store(out, at(0));
  } else {  // a bf16 loads into the upper half of a float
    static_assert(Product<E>::kDepth == 2 && std::is_same_v<E, bf16>);
    store_as(out, (bit_cast<U32>(at(0)) >> 16) | bit_cast<U32>(at(1)));
  }
}

// A run of a row as a left operand, from words in the order of a panel.
template <class E, class V>
inline void store_left(E* out, V words) {
  store_as(out, words);
}

inline __attribute__((always_inline)) constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Panel for units [unit, unit + kLanes) of kVectors gates, from gate `first` on and around: weight
// [kVectors * H, K].
template <class T, int kVectors>
void pack_gates(const T* weight, int64_t H, int64_t K, int64_t unit, int first, T* panel) {
  constexpr int kWidth = kLanes<Acc<T>>;
  const int lanes = static_cast<int>(std::min<int64_t>(kWidth, H - unit));
  for (int v = 0; v < kVectors; ++v) {
    const T* rows = weight + ((v + first) % kVectors * H + unit) * K;
    pack_lanes<T, kVectors * kWidth>(rows, K, lanes, K, v * kWidth, panel);
  }
}

// Panel for output columns [column, column + kVectors * kLanes) of a @ weight.T: weight [columns,
// K].
template <class T, int kVectors>
void pack_transposed(const T* weight, int64_t columns, int64_t K, int64_t column, T* panel) {
  constexpr int kWidth = kLanes<Acc<T>>;
  for (int v = 0; v < kVectors; ++v) {
    const int64_t first = column + v * kWidth;
    const int lanes = static_cast<int>(std::clamp<int64_t>(columns - first, 0, kWidth));
    pack_lanes<T, kVectors * kWidth>(lanes ? weight + first * K : weight, K, lanes, K, v * kWidth,
                                     panel);
  }
}

// Panel for output columns [column, column + kVectors * kLanes) of a @ weight: weight [K, columns].
template <class T, int kVectors>
void pack_rows(const T* weight, int64_t columns, int64_t K, int64_t column, T* panel) {
  constexpr int kDepth = Product<T>::kDepth;
  constexpr int kWidth = kLanes<Acc<T>>;
  for (int64_t k = 0; k < padded_depth<T>(K); k += kDepth) {
    const T* rows[kDepth];
    for (int i = 0; i < kDepth; ++i)
      rows[i] = k + i < K ? weight + (k + i) * columns + column : nullptr;
    for (int v = 0; v < kVectors; ++v, panel += kWidth * kDepth) {
      const int64_t rest = std::max<int64_t>(columns - column - v * kWidth, 0);
      interleave<T>(rows, v * kWidth, lanes_left<T>(rest), panel);
    }
  }
}

}  // namespace rnn_fused::RNN_FUSED_ISA
