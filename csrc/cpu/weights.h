// A matrix of recurrent weights and its product with rows of h or of gate gradients, panel by
// panel, packed or as it lies in memory.
#pragma once

#include "csrc/core/params.h"
#include "csrc/cpu/pack.h"
#include "csrc/cpu/plan.h"
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
  static constexpr int kTile = kTileRows<T, kVectors>;
  // Rows that no call packs weights for.
  static constexpr int kMostInPlace = std::min(kTile, static_cast<int>(kRowsToRepayPacking) - 1);
  static constexpr int64_t kPanelWidth = kLanes<Acc<T>> * kVectors;
  // Output columns (or, for gates, hidden units) of a panel.
  static constexpr int64_t kColumns = kLayout == Layout::gates ? kLanes<Acc<T>> : kPanelWidth;

  Weights() = default;
  // With Layout::gates the registers of a panel hold the gates from `first_gate` on and around.
  // panels: the same weights, packed before; pack() then does nothing.
  Weights(const void* weight, int64_t columns, int64_t K, bool packed, int first_gate = 0,
          const T* panels = nullptr)
      : weight_(static_cast<const T*>(weight)),
        columns_(columns),
        K_(K),
        first_gate_(first_gate),
        panels_(panels) {
    if (panels || !packed) return;
    own_ = Buffer<T>(size(columns, K));
    panels_ = own_.get();
  }

  int64_t panel_count() const { return panel_count(columns_); }
  static int64_t panel_count(int64_t columns) { return (columns + kColumns - 1) / kColumns; }
  // Of all panels.
  static int64_t size(int64_t columns, int64_t K) {
    return panel_count(columns) * kPanelWidth * padded_depth<T>(K);
  }
  const T* panels() const { return panels_; }
  int64_t bytes() const { return size(columns_, K_) * static_cast<int64_t>(sizeof(T)); }

  void pack(int64_t first_panel, int64_t last_panel) {
    if (!own_.get()) return;
    for (int64_t p = first_panel; p < last_panel; ++p) {
      T* panel = own_ + p * panel_size();
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
    if (const int64_t whole = rows / kTile * kTile; kTiled<T> && 0 < whole && whole < rows) {
      // Half a tile takes as long as a whole one, and another height other sizes of registers.
      multiply(a, lda, row, row + whole, first_panel, last_panel, from, to, done);
      return multiply(a, lda, row + whole, row_end, first_panel, last_panel, from, to, done);
    }
    const int64_t tiles = (rows + kTile - 1) / kTile;
    for (int64_t p = first_panel; p < last_panel; ++p)
      for (int64_t tile = 0; tile < tiles; ++tile) {  // of equal height: two of 4 beat 6 and 2
        const int64_t r = row + rows * tile / tiles;
        const int height = static_cast<int>(row + rows * (tile + 1) / tiles - r);
        const Operand<T>* operand = a + r * lda;
        if (panels_)
          rnn_fused::RNN_FUSED_ISA::multiply<T, kVectors>(
              height, kLayout == Layout::gates ? kPanelWidth : columns_ - p * kPanelWidth,
              {operand, lda, 1, panels_ + p * panel_size(), kPanelWidth, padded_depth<T>(K_),
               from.at(r, p), from.row_stride, to.at(r, p), to.row_stride});
        else if constexpr (!std::is_same_v<T, split32>)  // whose weights are always packed
          multiply_in_place(height, operand, lda, r, p, from, to);
        done(r, height, p);
      }
  }

  void multiply(const Operand<T>* a, int64_t lda, int64_t row, int64_t row_end, int64_t first_panel,
                int64_t last_panel, From from, To to) const {
    multiply(a, lda, row, row_end, first_panel, last_panel, from, to, [](int64_t, int, int64_t) {});
  }

 private:
  int64_t panel_size() const { return kPanelWidth * padded_depth<T>(K_); }

  void multiply_in_place(int height, const Operand<T>* a, int64_t lda, int64_t row, int64_t p,
                         From from, To to) const {
    const int64_t column = p * kColumns;
    if constexpr (kLayout == Layout::rows) {
      constexpr int kMost = kTileRows<Acc<T>, 4>;  // whose sums fit in the registers
      for (int i = 0; i < height; i += kMost)
        multiply_few_rows<T, kVectors, kMost>(std::min(height - i, kMost), a + i * lda, lda,
                                              weight_ + column, columns_, columns_ - column, K_,
                                              from.at(row + i, p), from.row_stride,
                                              to.at(row + i, p), to.row_stride);
    } else {
      constexpr int kWidth = kLanes<Acc<T>>;
      for (int v = 0; v < kVectors; ++v) {
        const bool gates = kLayout == Layout::gates;
        const int64_t first = gates ? column : column + v * kWidth;
        const int64_t gate = gates ? (v + first_gate_) % kVectors : 0;
        Vec<Acc<T>> products[kMostInPlace][kWidth];  // of a column in each
        for (int c = 0; c < kWidth; ++c) {
          const T* const weights = weight_ + (gate * columns_ + first + c) * K_;
          if (first + c < columns_)
            dots<T, kMostInPlace>(height, a, lda, weights, K_, products[0] + c, kWidth);
          else
            for (int i = 0; i < height; ++i) products[i][c] = Vec<Acc<T>>{};
        }
        for (int i = 0; i < height; ++i)
          store(to.at(row + i, p) + v * kWidth,
                load(from.at(row + i, p) + v * kWidth) + sums_of_lanes<Acc<T>>(products[i]));
      }
    }
  }

  const T* weight_ = nullptr;
  int64_t columns_ = 0, K_ = 0;
  int first_gate_ = 0;
  const T* panels_ = nullptr;  // null: multiplied as they lie in memory
  Buffer<T> own_;
};

// The product that yields every gate of a hidden unit. An RNN has one a unit, and fills the
// registers of a panel with neighbouring units.
template <class T, Cell kCell>
using GateWeights =
    Weights<T, kCell == Cell::gru ? 3 : 4,
            kCell == Cell::lstm || kCell == Cell::gru ? Layout::gates : Layout::transposed>;

// The packed weights of one direction, one after the other, and its biases as they are.
template <class T, Cell kCell>
struct PackedWeights {
  using Gate = GateWeights<T, kCell>;
  using Projection = Weights<T, 4, Layout::transposed>;

  const T *ih = nullptr, *hh = nullptr, *hr = nullptr, *bias_ih = nullptr, *bias_hh = nullptr;
  int64_t size = 0;

  PackedWeights(const void* first, int64_t I, int64_t H, int64_t P) {
    const T* const packed = static_cast<const T*>(first);
    const int64_t ih_size = Gate::size(H, I), hh_size = Gate::size(H, P);
    const int64_t hr_size = P != H ? Projection::size(P, H) : 0, biases = gate_count(kCell) * H;
    size = ih_size + hh_size + hr_size + 2 * biases;
    if (!packed) return;
    ih = packed;
    hh = ih + ih_size;
    if (P != H) hr = hh + hh_size;
    bias_ih = hh + hh_size + hr_size;
    bias_hh = bias_ih + biases;
  }
};

// A panel's worth of zeros, for sums that start from nothing.
template <class A>
alignas(64) inline constexpr A kZeros[4 * kLanes<A>] = {};

}  // namespace rnn_fused::RNN_FUSED_ISA
