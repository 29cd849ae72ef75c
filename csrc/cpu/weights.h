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
  Weights(const void* weight, int64_t columns, int64_t K, bool packed)
      : weight_(static_cast<const T*>(weight)), columns_(columns), K_(K), packed_(packed) {
    if (packed) panels_ = Buffer<T>(panel_count() * panel_size());
  }

  int64_t panel_count() const { return panel_count(columns_); }
  static int64_t panel_count(int64_t columns) { return (columns + kColumns - 1) / kColumns; }

  void pack(int64_t first_panel, int64_t last_panel) {
    if (!packed_) return;
    for (int64_t p = first_panel; p < last_panel; ++p) {
      T* panel = panels_ + p * panel_size();
      if constexpr (kLayout == Layout::gates)
        pack_gates<T, kVectors>(weight_, columns_, K_, p * kColumns, panel);
      else if constexpr (kLayout == Layout::transposed)
        pack_transposed<T, kVectors>(weight_, columns_, K_, p * kColumns, panel);
      else
        pack_rows<T, kVectors>(weight_, columns_, K_, p * kColumns, panel);
    }
  }

  // Sums to start from: those of row r and panel p begin at first + r * row_stride + p *
  // panel_stride.
  struct Init {
    const Acc<T>* first;
    int64_t row_stride, panel_stride;
  };

  // For every panel of [first_panel, last_panel) and every tile of the rows [row, row_end) of `a`:
  // epilogue(r, rows, p, out) gets out[rows][kPanelWidth] for the columns of panel p.
  template <class Epilogue>
  void multiply(const Operand<T>* a, int64_t lda, int64_t row, int64_t row_end, int64_t first_panel,
                int64_t last_panel, Init init, const Epilogue& epilogue) const {
    alignas(64) Acc<T> out[kTile * kPanelWidth];
    const int64_t rows = row_end - row;
    const int64_t tiles = (rows + kTile - 1) / kTile;
    for (int64_t p = first_panel; p < last_panel; ++p)
      for (int64_t tile = 0; tile < tiles; ++tile) {  // of equal height: two of 4 beat 6 and 2
        const int64_t r = row + rows * tile / tiles;
        const int height = static_cast<int>(row + rows * (tile + 1) / tiles - r);
        const Acc<T>* start = init.first + r * init.row_stride + p * init.panel_stride;
        if (packed_)
          tile_for_rows<T, kVectors>(height)(a + r * lda, lda, 1, panels_ + p * panel_size(),
                                             padded_depth<T>(K_), start, init.row_stride, out);
        else
          multiply_in_place(a + r * lda, lda, height, p * kColumns, start, init.row_stride, out);
        epilogue(r, height, p, out);
      }
  }

 private:
  int64_t panel_size() const { return kPanelWidth * padded_depth<T>(K_); }

  void multiply_in_place(const Operand<T>* a, int64_t lda, int height, int64_t column,
                         const Acc<T>* init, int64_t ldi, Acc<T>* out) const {
    for (int r = 0; r < height; ++r, a += lda, init += ldi, out += kPanelWidth) {
      if constexpr (kLayout == Layout::rows) {
        multiply_rows<T, kVectors>(a, weight_ + column, columns_, columns_ - column, K_, init, out);
      } else {
        for (int64_t c = 0; c < kPanelWidth; ++c) {
          const int64_t j = column + c % kColumns;
          out[c] = init[c];
          if (j < columns_) out[c] += dot<T>(a, weight_ + (c / kColumns * columns_ + j) * K_, K_);
        }
      }
    }
  }

  const T* weight_ = nullptr;
  int64_t columns_ = 0, K_ = 0;
  bool packed_ = false;
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
