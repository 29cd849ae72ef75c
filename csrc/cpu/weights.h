// A matrix of recurrent weights and its product with rows of h or of gate gradients, panel by
// panel, packed or as it lies in memory.
#pragma once

#include "csrc/core/params.h"
#include "csrc/cpu/pack.h"
#include "csrc/cpu/workspace.h"

namespace rnn_fused::RNN_FUSED_ISA {

enum class Layout {
  gates,       // [kVectors * columns, K]: column j of a panel's register v is row v * columns + j
  transposed,  // [columns, K]: a @ weight.T
  rows,        // [K, columns]: a @ weight
};

template <class T, int kVectors, Layout kLayout>
class Weights {
 public:
  static constexpr int kTile = kTileRows<kVectors>;
  static constexpr int64_t kPanelWidth = kLanes<Acc<T>> * kVectors;
  // Output columns (or, for gates, hidden units) of a panel.
  static constexpr int64_t kColumns = kLayout == Layout::gates ? kLanes<Acc<T>> : kPanelWidth;

  Weights() = default;
  // With Layout::gates the registers of a panel hold the gates from `first_gate` on and around.
  Weights(const void* weight, int64_t columns, int64_t K, bool packed, int first_gate = 0)
      : weight_(static_cast<const T*>(weight)),
        columns_(columns),
        K_(K),
        packed_(packed),
        first_gate_(first_gate) {
    if (packed) panels_ = Buffer<T>(panel_count() * panel_size());
  }

  int64_t panel_count() const { return panel_count(columns_); }
  static int64_t panel_count(int64_t columns) { return (columns + kColumns - 1) / kColumns; }

  void pack(int64_t first_panel, int64_t last_panel) {
    if (!packed_) return;
    for (int64_t p = first_panel; p < last_panel; ++p) {
      T* panel = panels_ + p * panel_size();
      if constexpr (kLayout == Layout::gates)
        pack_gates<T, kVectors>(weight_, columns_, K_, p * kColumns, first_gate_, panel);
      else if constexpr (kLayout == Layout::transposed)
        pack_transposed<T, kVectors>(weight_, columns_, K_, p * kColumns, panel);
      else
        pack_rows<T, kVectors>(weight_, columns_, K_, p * kColumns, panel);
    }
  }

  // A matrix in the accumulation type: row r and panel p begin at
  // first + r * row_stride + p * panel_stride.
  template <class A>
  struct Place {
    A* first;
    int64_t row_stride, panel_stride;

    A* at(int64_t row, int64_t panel) const {
      return first + row * row_stride + panel * panel_stride;
    }
  };
  using From = Place<const Acc<T>>;
  using To = Place<Acc<T>>;

  // to = from + a @ weights for the rows [row, row_end) of `a` and the panels [first_panel,
  // last_panel), tile by tile; done(r, height, p) is called behind each.
  template <class Done>
  void multiply(const Operand<T>* a, int64_t lda, int64_t row, int64_t row_end, int64_t first_panel,
                int64_t last_panel, From from, To to, const Done& done) const {
    const int64_t rows = row_end - row;
    const int64_t tiles = (rows + kTile - 1) / kTile;
    for (int64_t p = first_panel; p < last_panel; ++p)
      for (int64_t tile = 0; tile < tiles; ++tile) {  // of equal height: two of 4 beat 6 and 2
        const int64_t r = row + rows * tile / tiles;
        const int height = static_cast<int>(row + rows * (tile + 1) / tiles - r);
        const Operand<T>* operand = a + r * lda;
        if (packed_)
          rnn_fused::RNN_FUSED_ISA::multiply<T, kVectors>(
              height, kLayout == Layout::gates ? kPanelWidth : columns_ - p * kPanelWidth,
              {operand, lda, 1, panels_ + p * panel_size(), kPanelWidth, padded_depth<T>(K_),
               from.at(r, p), from.row_stride, to.at(r, p), to.row_stride});
        else
          for (int i = 0; i < height; ++i)
            multiply_in_place(operand + i * lda, p * kColumns, from.at(r + i, p), to.at(r + i, p));
        done(r, height, p);
      }
  }

  void multiply(const Operand<T>* a, int64_t lda, int64_t row, int64_t row_end, int64_t first_panel,
                int64_t last_panel, From from, To to) const {
    multiply(a, lda, row, row_end, first_panel, last_panel, from, to, [](int64_t, int, int64_t) {});
  }

 private:
  int64_t panel_size() const { return kPanelWidth * padded_depth<T>(K_); }

  void multiply_in_place(const Operand<T>* a, int64_t column, const Acc<T>* init,
                         Acc<T>* out) const {
    if constexpr (kLayout == Layout::rows) {
      multiply_rows<T, kVectors>(a, weight_ + column, columns_, columns_ - column, K_, init, out);
    } else {
      for (int64_t c = 0; c < kPanelWidth; ++c) {
        const int64_t j = column + c % kColumns;
        const int64_t gate = kLayout == Layout::gates ? (c / kColumns + first_gate_) % kVectors : 0;
        out[c] = init[c];
        if (j < columns_) out[c] += dot<T>(a, weight_ + (gate * columns_ + j) * K_, K_);
      }
    }
  }

  const T* weight_ = nullptr;
  int64_t columns_ = 0, K_ = 0;
  bool packed_ = false;
  int first_gate_ = 0;
  Buffer<T> panels_;
};

// The product that yields every gate of a hidden unit. An RNN has one a unit, and fills the
// registers of a panel with neighbouring units.
template <class T, Cell kCell>
using GateWeights =
    Weights<T, kCell == Cell::gru ? 3 : 4,
            kCell == Cell::lstm || kCell == Cell::gru ? Layout::gates : Layout::transposed>;

// A panel's worth of zeros, for sums that start from nothing.
template <class A>
alignas(64) inline constexpr A kZeros[4 * kLanes<A>] = {};

}  // namespace rnn_fused::RNN_FUSED_ISA
