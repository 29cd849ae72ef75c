// The pre-activations W_ih x + b of a few timesteps at a time, in the order and the precision in
// which the loop wants them, so that they stay in the cache between the two products.
#pragma once

#include "csrc/cpu/weights.h"

namespace rnn_fused::RNN_FUSED_ISA {

template <class T, Cell kCell>
class InputProduct {
  using A = Acc<T>;
  using V = Vec<A>;
  using Gate = GateWeights<T, kCell>;
  static constexpr bool kGru = kCell == Cell::gru;
  static constexpr int kWidth = kLanes<A>;

 public:
  // Values of one row and panel: the sums from which the recurrent product starts. The GRU's are
  // r, z, hn (whose only input is b_hn), and after them n, which that product does not touch.
  static constexpr int64_t kSlot = 4 * kWidth;

  InputProduct() = default;
  InputProduct(const ForwardParams& params, const ForwardDirection& dir, int64_t rows_per_part,
               bool pack)
      : p_(&params), source_(static_cast<const T*>(dir.gates)) {
    const int64_t panels = Gate::panel_count(params.H);
    chunk_ = std::clamp<int64_t>(rows_per_chunk(panels) / std::max<int64_t>(rows_per_part, 1), 1,
                                 params.T);
    sums_ = Buffer<A>(panels * panel_stride());
    prepare_bias(dir, panels);
    if (params.input_in_gates) return;
    weights_ = Gate(dir.weight_ih, params.H, params.I, pack);
    if constexpr (!kDirect) {
      ldx_ = padded_depth<T>(params.I);
      converted_ = Buffer<Operand<T>>::zeros(chunk_ * params.B * ldx_);
    } else {
      ldx_ = params.I;
    }
  }

  void pack(Range panels) { weights_.pack(panels.begin, panels.end); }

  // Timesteps are computed in windows of so many.
  int64_t chunk() const { return chunk_; }

  const A* at(int64_t panel, int64_t t) const {
    return sums_ + panel * panel_stride() + t % chunk_ * p_->B * kSlot;
  }
  int64_t panel_stride() const { return chunk_ * p_->B * kSlot; }

  // The window that holds t, for some sequences and panels of hidden units.
  void compute(int64_t t, Range rows, Range panels) {
    const Range window = {t / chunk_ * chunk_, std::min(t / chunk_ * chunk_ + chunk_, p_->T)};
    if (p_->input_in_gates) return take_from_gates(window, rows, panels);
    for (int64_t i = window.begin; !kDirect && i < window.end; ++i)
      copy_matrix<T>(input(i, rows.begin), active(i, rows) - rows.begin, p_->I,
                     operand(i, rows.begin), ldx_);
    for (int64_t p = panels.begin; p < panels.end; ++p) {  // outside: a panel stays in the cache
      const int64_t count = rows.end - rows.begin;
      if (!p_->batch_sizes && count == p_->B) {
        multiply(window.begin, 0, p_->B * (window.end - window.begin), 1, p);
      } else if (!p_->batch_sizes && count < Gate::kTile / 2) {
        // Too few sequences for a tile: take it along the timesteps.
        for (int64_t b = rows.begin; b < rows.end; ++b)
          multiply(window.begin, b, window.end - window.begin, p_->B, p);
      } else {
        for (int64_t i = window.begin; i < window.end; ++i)
          multiply(i, rows.begin, active(i, rows) - rows.begin, 1, p);
      }
    }
  }

 private:
  // The input can be the operand as it lies in memory.
  static constexpr bool kDirect = std::is_same_v<Operand<T>, T> && Product<T>::kDepth == 1;

  static int64_t rows_per_chunk(int64_t panels) {
    constexpr int64_t kBudget = 384 * 1024;  // bytes: a share of the second-level cache
    constexpr int64_t kFewest = 64;          // rows that repay reading the weights once
    return std::max(kFewest, kBudget / static_cast<int64_t>(panels * kSlot * sizeof(A)));
  }

  int64_t active(int64_t t, Range rows) const {
    return std::max(rows.begin, std::min(rows.end, p_->active(t)));
  }
  const T* input(int64_t t, int64_t b) const {
    return static_cast<const T*>(p_->input) + (p_->row(t) + b) * p_->I;
  }
  Operand<T>* operand(int64_t t, int64_t b) const {
    return converted_ + (t % chunk_ * p_->B + b) * ldx_;
  }

  // `count` rows from (t, b) on, each `stride` rows after the one before.
  void multiply(int64_t t, int64_t b, int64_t count, int64_t stride, int64_t panel) {
    A* sums = sums_ + panel * panel_stride() + (t % chunk_ * p_->B + b) * kSlot;
    const Operand<T>* x;
    if constexpr (kDirect)
      x = input(t, b);
    else
      x = operand(t, b);
    weights_.multiply(
        x, ldx_ * stride, 0, count, panel, panel + 1, {bias_.get(), 0, Gate::kPanelWidth},
        [&](int64_t r, int height, int64_t, const A* out) {
          for (int i = 0; i < height; ++i, ++r, out += Gate::kPanelWidth)
            put(sums + r * stride * kSlot, panel, [&](int v) { return load(out + v * kWidth); });
        });
  }

  // Spreads the values of the gates over a row's slot.
  template <class Values>
  void put(A* slot, int64_t panel, const Values& value) const {
    if constexpr (kGru) {
      store(slot, value(0));
      store(slot + kWidth, value(1));
      store(slot + 2 * kWidth, load(bias_hn_ + panel * kWidth));
      store(slot + 3 * kWidth, value(2));
    } else {
      for (int v = 0; v < 4; ++v) store(slot + v * kWidth, value(v));
    }
  }

  void take_from_gates(Range window, Range rows, Range panels) {
    for (int64_t t = window.begin; t < window.end; ++t)
      for (int64_t b = rows.begin; b < active(t, rows); ++b)
        for (int64_t p = panels.begin; p < panels.end; ++p) {
          const T* row = source_ + (p_->row(t) + b) * p_->gates_stride;
          put(sums_ + p * panel_stride() + (t % chunk_ * p_->B + b) * kSlot, p, [&](int v) {
            const Range lanes = gate_lanes(p, v);
            const V bias = load(bias_ + p * Gate::kPanelWidth + v * kWidth);
            return lanes.end > 0 ? load(row + lanes.begin, static_cast<int>(lanes.end)) + bias
                                 : bias;
          });
        }
  }

  // Where register v of a panel lies in a row of gates, and how many of its lanes exist.
  Range gate_lanes(int64_t panel, int v) const {
    const bool neighbours = Gate::kColumns == Gate::kPanelWidth;
    const int64_t unit = panel * Gate::kColumns + (neighbours ? v * kWidth : 0);
    return {unit + (neighbours ? 0 : v * p_->H), std::clamp<int64_t>(p_->H - unit, 0, kWidth)};
  }

  void prepare_bias(const ForwardDirection& dir, int64_t panels) {
    bias_ = Buffer<A>::zeros(panels * Gate::kPanelWidth);
    bias_hn_ = Buffer<A>::zeros(panels * kWidth);
    const auto add = [&](A* target, const void* bias, int64_t at, int64_t count) {
      if (!bias || count <= 0) return;
      const T* from = static_cast<const T*>(bias) + at;
      store(target, load(target) + load(from, static_cast<int>(count)));
    };
    for (int64_t p = 0; p < panels; ++p)
      for (int v = 0; v < Gate::kPanelWidth / kWidth; ++v) {
        const Range lanes = gate_lanes(p, v);
        A* target = bias_ + p * Gate::kPanelWidth + v * kWidth;
        add(target, dir.bias_ih, lanes.begin, lanes.end);
        add(kGru && v == 2 ? bias_hn_ + p * kWidth : target, dir.bias_hh, lanes.begin, lanes.end);
      }
  }

  const ForwardParams* p_ = nullptr;
  const T* source_ = nullptr;
  Gate weights_;
  int64_t chunk_ = 1, ldx_ = 0;
  Buffer<A> sums_;                // [panels, chunk, B, kSlot]
  Buffer<A> bias_;                // [panels, kPanelWidth]
  Buffer<A> bias_hn_;             // [panels, kLanes]; GRU
  Buffer<Operand<T>> converted_;  // [chunk, B, ldx] where the input cannot be the operand itself
};

}  // namespace rnn_fused::RNN_FUSED_ISA
