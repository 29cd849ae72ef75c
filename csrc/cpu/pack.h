// Recurrent weights rearranged into panels (tile.h), zero-padded to whole registers.
#pragma once

#include <algorithm>
#include <cstdint>

#include "csrc/cpu/tile.h"

namespace rnn_fused::RNN_FUSED_ISA {

// Fills kLanes columns of a panel of kColumns, from column `first`, with the first `lanes` of
// `rows`: one row of K elements per column, `row_stride` apart.
template <class T, int kColumns>
void pack_lanes(const T* rows, int64_t row_stride, int lanes, int64_t K, int first, T* panel) {
  constexpr int kDepth = Product<T>::kDepth;
  constexpr int kBlock = 16;  // of k, so that the lines written stay in the first-level cache
  const auto at = [&](int64_t k, int l) -> T& {
    return panel[(k / kDepth * kColumns + first + l) * kDepth + k % kDepth];
  };
  const int64_t depth = padded_depth<T>(K);
  for (int64_t k0 = 0; k0 < depth; k0 += kBlock) {
    const int64_t end = std::min(k0 + kBlock, depth);
    const int64_t present = std::min(end, K);
    for (int l = 0; l < kLanes<Acc<T>>; ++l) {
      int64_t k = k0;
      if (l < lanes)
        for (; k < present; ++k) at(k, l) = rows[l * row_stride + k];
      for (; k < end; ++k) at(k, l) = T{};
    }
  }
}

inline __attribute__((always_inline)) int64_t round_up(int64_t n, int64_t multiple) {
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
  constexpr int kColumns = kVectors * kLanes<Acc<T>>;
  const int64_t present = std::min<int64_t>(kColumns, columns - column);
  for (int64_t k0 = 0; k0 < K; k0 += kDepth)
    for (int64_t c = 0; c < kColumns; ++c)
      for (int i = 0; i < kDepth; ++i)
        panel[(k0 / kDepth * kColumns + c) * kDepth + i] =
            c < present && k0 + i < K ? weight[(k0 + i) * columns + column + c] : T{};
}

}  // namespace rnn_fused::RNN_FUSED_ISA
