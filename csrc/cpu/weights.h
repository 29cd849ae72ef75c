// A matrix of recurrent weights and its product with rows of h or of gate gradients, panel by panel,
// packed or as it lies in memory.
#pragma once

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

  // For every panel of [first_panel, last_panel) and every tile of the rows [row, row_end) of `a`:
  // epilogue(r, rows, column, out) gets out[rows][kPanelWidth] for columns from `column` on.
  template <class Epilogue>
  void multiply(const Operand<T>* a, int64_t lda, int64_t row, int64_t row_end, int64_t first_panel,
                int64_t last_panel, const Epilogue& epilogue) const {
    alignas(64) Acc<T> out[kTile * kPanelWidth];
    const int64_t rows = row_end - row;
    const int64_t tiles = (rows + kTile - 1) / kTile;
    for (int64_t p = first_panel; p < last_panel; ++p)
      for (int64_t tile = 0; tile < tiles; ++tile) {  // of equal height: two of 4 beat 6 and 2
        const int64_t r = row + rows * tile / tiles;
        const int height = static_cast<int>(row + rows * (tile + 1) / tiles - r);
        if (packed_)
          tile_for_rows<T, kVectors>(height)(a + r * lda, lda, panels_ + p * panel_size(),
                                             padded_depth<T>(K_), out);
        else
          multiply_in_place(a + r * lda, lda, height, p * kColumns, out);
        epilogue(r, height, p * kColumns, out);
      }
  }

 private:
  int64_t panel_size() const { return kPanelWidth * padded_depth<T>(K_); }

  void multiply_in_place(const Operand<T>* a, int64_t lda, int height, int64_t column, Acc<T>* out) const {
    for (int r = 0; r < height; ++r, a += lda, out += kPanelWidth) {
      if constexpr (kLayout == Layout::rows) {
        multiply_rows<T, kVectors>(a, weight_ + column, columns_, columns_ - column, K_, out);
      } else {
        for (int64_t c = 0; c < kPanelWidth; ++c) {
          const int64_t j = column + c % kColumns;
          out[c] = j < columns_ ? dot<T>(a, weight_ + (c / kColumns * columns_ + j) * K_, K_) : 0;
        }
      }
    }
  }

  const T* weight_ = nullptr;
  int64_t columns_ = 0, K_ = 0;
  bool packed_ = false;
  Buffer<T> panels_;
};

}  // namespace rnn_fused::RNN_FUSED_ISA
