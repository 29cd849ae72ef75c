// The backward timestep loop: the chain of dh (and dc) through time. It leaves the gradient of
// every pre-activation in grad_gates; the weight, bias and input gradients are large products of
// those.
#pragma once

#include "csrc/core/cells.h"
#include "csrc/cpu/math.h"
#include "csrc/cpu/team.h"
#include "csrc/cpu/weights.h"

namespace rnn_fused::RNN_FUSED_ISA {

template <class T, Cell kCell>
class Backward {
  using A = Acc<T>;
  using V = Vec<A>;
  using Recurrent = Weights<T, 4, Layout::rows>;
  static constexpr bool kLstm = kCell == Cell::lstm;
  static constexpr bool kGru = kCell == Cell::gru;
  static constexpr int kWidth = kLanes<A>;
  static constexpr int64_t kPanel = Recurrent::kPanelWidth;

  struct Direction : BackwardDirection {
    Recurrent weights;     // [G*H, P]
    Recurrent projection;  // [P, H]
    // Gradients of the pre-activations that reach W_hh, written at even and at odd steps.
    Buffer<Operand<T>> gate_operand[2];  // [B, Kp]
    Buffer<Operand<T>> dh_operand;       // [B, Pp] with a projection only: the operand of W_hr
    Buffer<A> dh;                        // [B, Pp] from later timesteps
    Buffer<A> dhidden;                   // [B, Hp] with a projection only: of o * tanh(c)
    Buffer<A> dc;                        // [B, Hp]
  };

 public:
  Backward(const BackwardParams& params, const Schedule& schedule, const Host& host)
      : p_(params),
        options_(params.options.of<A>()),
        schedule_(schedule),
        host_(host),
        Hp_(round_up(params.H, kPanel)),
        Pp_(round_up(params.P, kPanel)),
        K_(gate_count(kCell) * params.H),
        Kp_(round_up(K_, kPanel)) {
    for (int d = 0; d < p_.directions; ++d) prepare(d);
  }

  void run() {
    run_team(p_, p_.steps(0), schedule_, host_, dir_[0].weights.panel_count(), *this);
    for (int d = 0; d < p_.directions; ++d) {
      const Direction& dir = dir_[d];
      put(dir, dir.dh, Pp_, p_.P, dir.grad_h0, dir.carried_dh);
      if constexpr (kLstm) put(dir, dir.dc, Hp_, p_.H, dir.grad_c0, dir.carried_dc);
    }
  }

  void pack(int d, Range panels) { dir_[d].weights.pack(panels.begin, panels.end); }

  // Step s undoes the forward pass's last step but s.
  template <class Sync>
  void step(int d, int64_t s, Range rows, Range panels, const Sync& sync) {
    Direction& dir = dir_[d];
    const int64_t t = d == 0 ? p_.T - 1 - s : s;
    rows.end = std::min(rows.end, p_.active(t));
    Operand<T>* operand = dir.gate_operand[s % 2].get();
    const Range columns = {panels.begin * kPanel, std::min(panels.end * kPanel, p_.P)};
    if (p_.projected()) unproject(dir, t, rows);
    for (int64_t b = rows.begin; b < rows.end; ++b) gate_gradients(d, t, b, columns, operand);
    sync();
    // The GRU's direct path h -> z * h waits in dh.
    const typename Recurrent::To dh = {dir.dh.get(), Pp_, kPanel};
    const typename Recurrent::From from = kGru ? typename Recurrent::From{dh.first, Pp_, kPanel}
                                               : typename Recurrent::From{kZeros<A>, 0, 0};
    dir.weights.multiply(operand, Kp_, rows.begin, rows.end, panels.begin, panels.end, from, dh);
    const bool clips = options_.grad_clip > 0;
    if (!clips && !p_.resets) return;
    for (int64_t b = rows.begin; b < rows.end; ++b) {
      const bool reset = p_.enters_reset(d, t, b);
      for (int64_t j = columns.begin; j < columns.end && (clips || reset); j += kWidth) {
        A* gradient = dir.dh + b * Pp_ + j;
        store(gradient, clip(load(gradient), options_.grad_clip));
        if (reset) end_at_reset(dir.grad_reset_h, p_.sequence(b) * p_.P + j, gradient, p_.P - j);
      }
    }
  }

 private:
  void prepare(int d) {
    Direction& dir = dir_[d];
    static_cast<BackwardDirection&>(dir) = p_.direction[d];
    dir.weights = {dir.weight_hh, p_.P, K_, schedule_.pack};
    for (auto& operand : dir.gate_operand) operand = Buffer<Operand<T>>::zeros(p_.B * Kp_);
    dir.dh = take(dir, Pp_, p_.P, dir.grad_h_n, dir.carried_dh);
    if constexpr (kLstm) {
      dir.dc = take(dir, Hp_, p_.H, dir.grad_c_n, dir.carried_dc);
      if (p_.projected()) {
        dir.projection = {dir.weight_hr, p_.H, p_.P, schedule_.pack};
        dir.projection.pack(0, dir.projection.panel_count());
        dir.dh_operand = Buffer<Operand<T>>::zeros(p_.B * Pp_);
        dir.dhidden = Buffer<A>::zeros(p_.B * Hp_);
      }
    }
  }

  // dh or dc before the window's first step: the caller's, or what the window before left.
  Buffer<A> take(const BackwardDirection& dir, int64_t ld, int64_t columns, const void* grad_n,
                 const void* carried) const {
    Buffer<A> gradient = Buffer<A>::zeros(p_.B * ld);
    if (dir.steps_before > 0)
      copy_matrix<A>(carried, p_.B, columns, gradient.get(), ld);
    else
      copy_matrix<T>(grad_n, p_.B, columns, gradient.get(), ld, p_.order);
    return gradient;
  }

  // And after its last one.
  void put(const BackwardDirection& dir, const Buffer<A>& gradient, int64_t ld, int64_t columns,
           void* grad_0, void* carried) const {
    if (dir.steps_after > 0)
      copy_back<A>(gradient.get(), ld, p_.B, columns, carried);
    else
      copy_back<T>(gradient.get(), ld, p_.B, columns, grad_0, p_.order);
  }

  // Hands a register of what reaches the state before a step over to the reset state.
  static void end_at_reset(void* sums, int64_t i, A* gradient, int64_t columns_left) {
    const int n = lanes_left<A>(columns_left);
    A* sum = static_cast<A*>(sums) + i;
    store(sum, load(sum, n) + load(gradient), n);
    store(gradient, V{});
  }

  // dh of one register of columns: what the caller passes at this place and what later steps left.
  V total_dh(const Direction& dir, int64_t place, int64_t b, int64_t column) const {
    const V dh = load(dir.dh + b * Pp_ + column);
    if (!dir.grad_output) return dh;
    const T* grad = static_cast<const T*>(dir.grad_output) + place * p_.output_stride + column;
    return dh + load(grad, lanes_left<T>(p_.P - column));
  }

  // Through h = W_hr (o * tanh(c)): dhidden = dh W_hr.
  void unproject(Direction& dir, int64_t t, Range rows) const {
    for (int64_t b = rows.begin; b < rows.end; ++b)
      for (int64_t j = 0; j < p_.P; j += kWidth) {
        const int n = lanes_left<T>(p_.P - j);
        const V dh = total_dh(dir, p_.place(t, b), b, j);
        store(static_cast<T*>(dir.grad_projected) + (p_.row(t) + b - dir.first_row) * p_.P + j, dh,
              n);
        store(dir.dh_operand + b * Pp_ + j, dh, n);
      }
    dir.projection.multiply(dir.dh_operand.get(), Pp_, rows.begin, rows.end, 0,
                            dir.projection.panel_count(), {kZeros<A>, 0, 0},
                            {dir.dhidden.get(), Hp_, kPanel});
  }

  // The gates of one row, for the hidden units of `columns`. With a projection those are all of
  // them.
  void gate_gradients(int d, int64_t t, int64_t b, Range columns, Operand<T>* operand) {
    Direction& dir = dir_[d];
    const int64_t H = p_.H, row = p_.row(t) + b, place = p_.place(t, b), sequence = p_.sequence(b);
    const int64_t end = p_.projected() ? H : columns.end;
    // Where this row's state came from: the step before it, a reset, or the initial state.
    const int64_t before = d == 0 ? t - 1 : t + 1;
    const bool reset = p_.enters_reset(d, t, b);
    const bool first = reset || before < 0 || before >= p_.T || p_.active(before) <= b;
    const T* const h_first = static_cast<const T*>(reset ? dir.reset_h : dir.h0);
    const T* const c_first = static_cast<const T*>(reset ? dir.reset_c : dir.c0);
    const int64_t row_before = first ? 0 : p_.row(before) + b;
    const int64_t place_before = first ? 0 : p_.place(before, b);
    const int64_t row_of_window = row - dir.first_row;
    const T* gates = static_cast<const T*>(dir.gates) + row_of_window * saved_count(kCell) * H;
    T* grads = static_cast<T*>(dir.grad_gates) + row_of_window * saved_count(kCell) * H;
    operand += b * Kp_;

    for (int64_t j = p_.projected() ? 0 : columns.begin; j < end; j += kWidth) {
      const int n = lanes_left<T>(H - j);
      const auto put = [&](int saved, V grad, int gate) {
        store(grads + saved * H + j, grad, n);
        if (gate >= 0) store(operand + gate * H + j, grad, n);
      };
      if constexpr (kLstm) {
        const A* cells = static_cast<const A*>(dir.cells);
        const LstmGates<V> a = {load(gates + j, n), load(gates + H + j, n),
                                load(gates + 2 * H + j, n), load(gates + 3 * H + j, n)};
        const V c_prev =
            first ? load(c_first + sequence * H + j, n) : load(cells + row_before * H + j, n);
        const V dh = p_.projected() ? load(dir.dhidden + b * Hp_ + j) : total_dh(dir, place, b, j);
        A* dc = dir.dc + b * Hp_ + j;
        V dc_total = load(dc);
        if (dir.grad_cells)
          dc_total += load(static_cast<const A*>(dir.grad_cells) + row * H + j, n);
        const LstmGrads<V> g =
            lstm_backward<Math<A>>(a, load(cells + row * H + j, n), c_prev, dh, dc_total, options_);
        put(0, g.gates.i, 0);
        put(1, g.gates.f, 1);
        put(2, g.gates.g, 2);
        put(3, g.gates.o, 3);
        store(dc, g.c_prev);
        if (reset) end_at_reset(dir.grad_reset_c, sequence * H + j, dc, H - j);
        if (p_.projected()) store(static_cast<T*>(dir.hidden) + row_of_window * H + j, g.hidden, n);
      } else {
        const T* output = static_cast<const T*>(dir.output);
        const V dh = total_dh(dir, place, b, j);
        if constexpr (kGru) {
          const GruGates<V> a = {load(gates + j, n), load(gates + H + j, n),
                                 load(gates + 2 * H + j, n), load(gates + 3 * H + j, n)};
          const V h_prev = first ? load(h_first + sequence * H + j, n)
                                 : load(output + place_before * p_.output_stride + j, n);
          const GruGrads<V> g = gru_backward(a, h_prev, dh, options_);
          put(0, g.gates.r, 0);
          put(1, g.gates.z, 1);
          put(2, g.gates.n, -1);
          put(3, g.gates.hn, 2);
          store(dir.dh + b * Pp_ + j, g.h_prev);
        } else {
          const V h = load(output + place * p_.output_stride + j, n);
          put(0, kCell == Cell::rnn_tanh ? dh * (1 - h * h) : Math<A>::relu_grad(h, dh), 0);
        }
      }
    }
  }

  const BackwardParams& p_;
  const CellOptions<A> options_;
  const Schedule& schedule_;
  const Host& host_;
  const int64_t Hp_, Pp_;  // H and P padded to whole panels
  const int64_t K_, Kp_;   // G*H, and padded
  Direction dir_[2];
};

}  // namespace rnn_fused::RNN_FUSED_ISA
