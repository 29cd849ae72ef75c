// The pre-activations W_ih x + b of a few timesteps at a time, in the order and the precision in
// which the loop wants them, so that they stay in the cache between the two products.
#pragma once

#include "csrc/cpu/cpu.h"
#include "csrc/cpu/weights.h"

namespace rnn_fused::RNN_FUSED_ISA {

// The biases that the registers of a panel begin with, zero-padded.
template <class T, Cell kCell>
class GateBias {
  using A = Acc<T>;
  using Gate = GateWeights<T, kCell>;
  static constexpr bool kGru = kCell == Cell::gru;
  static constexpr int kWidth = kLanes<A>;

 public:
  static constexpr int kFirstGate = kGru ? 2 : 0;
  static constexpr int kRegisters = static_cast<int>(Gate::kPanelWidth / kWidth);

  GateBias() = default;
  GateBias(int64_t H, const void* bias_ih, const void* bias_hh)
      : sums_(Buffer<A>::zeros(Gate::panel_count(H) * Gate::kPanelWidth)),
        hn_(Buffer<A>::zeros(Gate::panel_count(H) * kWidth)) {
    const auto add = [](A* sum, const void* bias, Range lanes) {
      if (!bias || lanes.end == 0) return;
      const T* from = static_cast<const T*>(bias) + lanes.begin;
      store(sum, load(sum) + load(from, static_cast<int>(lanes.end)));
    };
    for (int64_t p = 0; p < Gate::panel_count(H); ++p)
      for (int v = 0; v < kRegisters; ++v) {
        A* sum = sums_ + p * Gate::kPanelWidth + v * kWidth;
        add(sum, bias_ih, lanes(H, p, v));
        add(kGru && v == 0 ? hn_ + p * kWidth : sum, bias_hh, lanes(H, p, v));
      }
  }

  const A* sums(int64_t panel) const { return sums_ + panel * Gate::kPanelWidth; }
  const A* hn(int64_t panel) const { return hn_ + panel * kWidth; }  // b_hn of a GRU

  // Where register v of a panel lies in a row of gates, and how many of its lanes exist.
  static Range lanes(int64_t H, int64_t panel, int v) {
    const bool neighbours = Gate::kColumns == Gate::kPanelWidth;
    const int64_t unit = panel * Gate::kColumns + (neighbours ? v * kWidth : 0);
    const int gate = neighbours ? 0 : (v + kFirstGate) % kRegisters;
    return {unit + gate * H, std::clamp<int64_t>(H - unit, 0, kWidth)};
  }

 private:
  Buffer<A> sums_;  // [panels, kPanelWidth]
  Buffer<A> hn_;    // [panels, kLanes]
};

template <class T, Cell kCell>
class InputProduct {
  using A = Acc<T>;
  using V = Vec<A>;
  using Gate = GateWeights<T, kCell>;
  using Bias = GateBias<T, kCell>;
  static constexpr bool kGru = kCell == Cell::gru;
  static constexpr int kWidth = kLanes<A>;

 public:
  // Values of one row and panel: the sums from which the recurrent product starts. The GRU's are n,
  // which that product does not touch, r, z and hn, whose only input is b_hn.
  static constexpr int64_t kSlot = 4 * kWidth;

  InputProduct() = default;
  // packed: W_ih, or null.
  InputProduct(const ForwardParams& params, const ForwardDirection& dir, const Schedule& schedule,
               const T* packed)
      : p_(&params),
        source_(static_cast<const T*>(dir.gates)),
        panels_(Gate::panel_count(params.H)),
        parts_(schedule.unit_parts),
        direct_(std::is_same_v<Operand<T>, T> && params.I % Product<T>::kRun == 0 && !params.order),
        ldx_(padded_depth<T>(params.I)),
        bias_(params.H, dir.bias_ih, dir.bias_hh) {
    const int64_t rows = std::max<int64_t>(params.B / schedule.row_parts, 1);
    const int64_t window = std::min(params.T, schedule.window);
    chunk_ = std::clamp<int64_t>(rows_per_chunk() / rows, 1, window);
    while (window < params.T && window % chunk_ != 0) --chunk_;  // each ends where a window does
    sums_ = Buffer<A>(panels_ * panel_stride());
    if (params.input_in_gates) return;
    weights_ = Gate(dir.weight_ih, params.H, params.I, schedule.pack, Bias::kFirstGate, packed);
    if (!direct_) converted_ = Buffer<Operand<T>>::zeros(parts_ * chunk_ * params.B * ldx_);
  }

  void pack(Range panels) { weights_.pack(panels.begin, panels.end); }

  // Timesteps are computed in windows of so many.
  int64_t chunk() const { return chunk_; }

  A* at(int64_t panel, int64_t t) const {
    return sums_ + panel * panel_stride() + t % chunk_ * p_->B * kSlot;
  }
  int64_t panel_stride() const { return chunk_ * p_->B * kSlot; }

  // The window that holds t, for some sequences and panels of hidden units.
  void compute(int64_t t, Range rows, Range panels) {
    if (panels.begin >= panels.end) return;
    const int64_t begin = t / chunk_ * chunk_;
    const Range window = {begin, std::min(begin + chunk_, p_->T)};
    if (kGru) put_bias_hn(window, rows, panels);
    if (p_->input_in_gates) return take_from_gates(window, rows, panels);
    // Parts that share the sequences convert them each for itself.
    const int64_t part = (panels.begin * parts_ + panels_ - 1) / panels_;
    Operand<T>* converted = converted_ + part * chunk_ * p_->B * ldx_;
    for (int64_t i = window.begin; !direct_ && i < window.end; ++i)
      copy_matrix<T>(p_->order ? input(i * p_->B) : input(p_->row(i) + rows.begin),
                     active(i, rows) - rows.begin, p_->I,
                     converted + (i % chunk_ * p_->B + rows.begin) * ldx_, ldx_,
                     p_->order ? p_->order + rows.begin : nullptr);
    for (int64_t p = panels.begin; p < panels.end; ++p) {  // outside: a panel stays in the cache
      // `count` rows from (t, b) on, each `stride` rows after the one before.
      const auto multiply = [&](int64_t t, int64_t b, int64_t count, int64_t stride) {
        const Operand<T>* x = direct_ ? reinterpret_cast<const Operand<T>*>(input(p_->row(t) + b))
                                      : converted + (t % chunk_ * p_->B + b) * ldx_;
        weights_.multiply(x, (direct_ ? p_->I : ldx_) * stride, 0, count, p, p + 1,
                          {bias_.sums(0), 0, Gate::kPanelWidth},
                          {at(0, t) + b * kSlot, stride * kSlot, panel_stride()});
      };
      const int64_t count = rows.end - rows.begin, depth = window.end - window.begin;
      if (!p_->batch_sizes && count == p_->B) {
        multiply(window.begin, 0, p_->B * depth, 1);
      } else if (!p_->batch_sizes && count < Gate::kTile / 2) {
        // Too few sequences for a tile: take it along the timesteps.
        for (int64_t b = rows.begin; b < rows.end; ++b) multiply(window.begin, b, depth, p_->B);
      } else {
        for (int64_t i = window.begin; i < window.end; ++i)
          multiply(i, rows.begin, active(i, rows) - rows.begin, 1);
      }
    }
  }

 private:
  int64_t rows_per_chunk() const {
    constexpr int64_t kBudget = 384 * 1024;  // bytes: a share of the second-level cache
    constexpr int64_t kFewest = 64;          // rows that repay reading the weights once
    return std::max(kFewest, kBudget / static_cast<int64_t>(panels_ * kSlot * sizeof(A)));
  }

  int64_t active(int64_t t, Range rows) const {
    return std::max(rows.begin, std::min(rows.end, p_->active(t)));
  }
  const T* input(int64_t row) const { return static_cast<const T*>(p_->input) + row * p_->I; }

  void put_bias_hn(Range window, Range rows, Range panels) {
    for (int64_t p = panels.begin; p < panels.end; ++p)
      for (int64_t t = window.begin; t < window.end; ++t)
        for (int64_t b = rows.begin; b < active(t, rows); ++b)
          store(at(p, t) + b * kSlot + 3 * kWidth, load(bias_.hn(p)));
  }

  void take_from_gates(Range window, Range rows, Range panels) {
    for (int64_t t = window.begin; t < window.end; ++t)
      for (int64_t b = rows.begin; b < active(t, rows); ++b)
        for (int64_t p = panels.begin; p < panels.end; ++p) {
          const T* row = source_ + (p_->row(t) + b) * p_->gates_stride;
          A* slot = at(p, t) + b * kSlot;
          for (int v = 0; v < Bias::kRegisters; ++v) {
            const Range lanes = Bias::lanes(p_->H, p, v);
            const V bias = load(bias_.sums(p) + v * kWidth);
            const int n = static_cast<int>(lanes.end);
            store(slot + v * kWidth, n > 0 ? load(row + lanes.begin, n) + bias : bias);
          }
        }
  }

  const ForwardParams* p_ = nullptr;
  const T* source_ = nullptr;
  int64_t panels_ = 0, parts_ = 1;
  bool direct_ = false;  // the input is the left operand as it lies in memory
  int64_t ldx_ = 0, chunk_ = 1;
  Bias bias_;
  Gate weights_;
  Buffer<A> sums_;                // [panels, chunk, B, kSlot]
  Buffer<Operand<T>> converted_;  // [parts, chunk, B, ldx] where the input is not direct
};

}  // namespace rnn_fused::RNN_FUSED_ISA
