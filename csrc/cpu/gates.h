// The activated gates of many rows at once, rebuilt for the backward pass. Every h is known by
// then, so that no row waits for another: two large products, from the tiles of the loop, which
// therefore give the very bits of the forward pass.
#pragma once

#include "csrc/core/cells.h"
#include "csrc/cpu/input_product.h"
#include "csrc/cpu/math.h"
#include "csrc/cpu/team.h"

namespace rnn_fused::RNN_FUSED_ISA {

template <class T, Cell kCell>
class Gates {
  using A = Acc<T>;
  using V = Vec<A>;
  using Gate = GateWeights<T, kCell>;
  using Bias = GateBias<T, kCell>;
  static constexpr bool kGru = kCell == Cell::gru;
  static constexpr int kWidth = kLanes<A>;
  static constexpr int64_t kSlot = InputProduct<T, kCell>::kSlot;
  // Rows that stay in the cache for every panel.
  static constexpr int64_t kBlock = round_up(48, Gate::kTile);

 public:
  Gates(const GatesParams& params, const Host& host)
      : p_(params),
        options_(params.options.of<A>()),
        host_(host),
        parts_(
            parts_of(host, static_cast<double>(p_.N) * gate_count(kCell) * p_.H * (p_.I + p_.P))),
        ldx_(padded_depth<T>(p_.I)),
        ldh_(padded_depth<T>(p_.P)),
        bias_(p_.H, p_.bias_ih, p_.bias_hh),
        input_(p_.weight_ih, p_.H, p_.I, p_.pack, Bias::kFirstGate),
        recurrent_(p_.weight_hh, p_.H, p_.P, p_.pack),
        x_(Buffer<Operand<T>>::zeros(parts_ * kBlock * ldx_)),
        h_(Buffer<Operand<T>>::zeros(parts_ * kBlock * ldh_)),
        sums_(parts_ * kBlock * input_.panel_count() * kSlot) {}

  void run() {
    const int64_t panels = input_.panel_count();
    parallel_for(
        host_, panels,
        [&](int64_t begin, int64_t end) {
          input_.pack(begin, end);
          recurrent_.pack(begin, end);
        },
        parts_ > 1);
    parallel_for(host_, parts_, [&](int64_t begin, int64_t end) {
      for (int64_t n = p_.N * begin / parts_; n < p_.N * end / parts_; n += kBlock)
        compute(begin, n, std::min(kBlock, p_.N * end / parts_ - n));
    });
  }

 private:
  void compute(int64_t part, int64_t first, int64_t rows) const {
    Operand<T>* const x = x_ + part * kBlock * ldx_;
    Operand<T>* const h = h_ + part * kBlock * ldh_;
    for (int64_t r = 0; r < rows; ++r) {
      copy_matrix<T>(p_.input[first + r], 1, p_.I, x + r * ldx_, ldx_);
      copy_matrix<T>(p_.h_prev[first + r], 1, p_.P, h + r * ldh_, ldh_);
    }
    // Slots as in the forward loop (input_product.h).
    const int64_t panels = input_.panel_count(), panel_stride = kBlock * kSlot;
    A* const slots = sums_ + part * panels * panel_stride;
    for (int64_t p = 0; kGru && p < panels; ++p)
      for (int64_t r = 0; r < rows; ++r)
        store(slots + p * panel_stride + r * kSlot + 3 * kWidth, load(bias_.hn(p)));
    input_.multiply(x, ldx_, 0, rows, 0, panels, {bias_.sums(0), 0, Gate::kPanelWidth},
                    {slots, kSlot, panel_stride});
    A* const sums = slots + (kGru ? kWidth : 0);
    recurrent_.multiply(h, ldh_, 0, rows, 0, panels, {sums, kSlot, panel_stride},
                        {sums, kSlot, panel_stride}, [&](int64_t r, int height, int64_t panel) {
                          const A* slot = slots + panel * panel_stride + r * kSlot;
                          for (int i = 0; i < height; ++i, slot += kSlot)
                            activate(first + r + i, panel * Gate::kColumns, slot);
                        });
  }

  void activate(int64_t row, int64_t unit, const A* slot) const {
    const int n = lanes_left<T>(p_.H - unit);
    T* const gates = static_cast<T*>(p_.gates) + row * 4 * p_.H + unit;
    const auto save = [&](V g0, V g1, V g2, V g3) {
      store(gates, g0, n);
      store(gates + p_.H, g1, n);
      store(gates + 2 * p_.H, g2, n);
      store(gates + 3 * p_.H, g3, n);
    };
    if constexpr (kGru) {
      GruGates<V> a = {load(slot + kWidth), load(slot + 2 * kWidth), load(slot),
                       load(slot + 3 * kWidth)};
      gru_activate<Math<A>>(a, options_);
      save(a.r, a.z, a.n, a.hn);
    } else {
      LstmGates<V> a = {load(slot), load(slot + kWidth), load(slot + 2 * kWidth),
                        load(slot + 3 * kWidth)};
      lstm_activate<Math<A>>(a, options_);
      save(a.i, a.f, a.g, a.o);
    }
  }

  const GatesParams& p_;
  const CellOptions<A> options_;
  const Host& host_;
  const int64_t parts_, ldx_, ldh_;
  const Bias bias_;
  Gate input_, recurrent_;
  const Buffer<Operand<T>> x_, h_;  // [parts, kBlock, ldx], [parts, kBlock, ldh]
  const Buffer<A> sums_;            // [parts, panels, kBlock, kSlot]
};

}  // namespace rnn_fused::RNN_FUSED_ISA
