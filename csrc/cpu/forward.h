// The forward timestep loop.
#pragma once

#include "csrc/core/cells.h"
#include "csrc/cpu/cpu.h"
#include "csrc/cpu/math.h"
#include "csrc/cpu/team.h"
#include "csrc/cpu/weights.h"

namespace rnn_fused::RNN_FUSED_ISA {

template <class T, Cell kCell>
class Forward {
  using A = Acc<T>;
  using V = Vec<A>;
  // The RNN has one product a unit and fills the registers of a panel with neighbouring units.
  using Gate = Weights<T, kCell == Cell::gru ? 3 : 4,
                       kCell == Cell::lstm || kCell == Cell::gru ? Layout::gates : Layout::transposed>;
  static constexpr bool kLstm = kCell == Cell::lstm;
  static constexpr bool kGru = kCell == Cell::gru;
  static constexpr int kWidth = kLanes<A>;

  // What the loop of one direction reads and writes besides the caller's tensors.
  struct Direction : ForwardDirection {
    Gate weights;
    Weights<T, 4, Layout::transposed> projection;
    Buffer<A> bias;          // [saved_count, Hp]; the GRU's n and hn keep their own
    Buffer<Operand<T>> h[2];  // [B, Pp] read at even and at odd steps
    Buffer<Operand<T>> hidden;  // [B, Hp] o * tanh(c) before the projection
    Buffer<A> c;             // [B, Hp]
  };

 public:
  Forward(const ForwardParams& params, const Schedule& schedule, const Host& host)
      : p_(params),
        schedule_(schedule),
        host_(host),
        Hp_(round_up(params.H, Gate::kPanelWidth)),
        Pp_(round_up(params.P, 4 * kWidth)) {
    for (int d = 0; d < p_.directions; ++d) prepare(d);
  }

  void run() {
    run_team(p_, schedule_, host_, dir_[0].weights.panel_count(), *this);
    for (int d = 0; d < p_.directions; ++d) write_final_state(d);
  }

  void pack(int d, Range panels) { dir_[d].weights.pack(panels.begin, panels.end); }

  // One timestep of one direction: `rows` of its sequences, `panels` of its hidden units.
  template <class Sync>
  void step(int d, int64_t s, Range rows, Range panels, const Sync& sync) {
    Direction& dir = dir_[d];
    const int64_t t = d == 0 ? s : p_.T - 1 - s;
    rows.end = std::min(rows.end, p_.active(t));
    const int64_t first = p_.row(t);
    const Operand<T>* h = dir.h[s % 2].get();
    Operand<T>* h_next = dir.h[(s + 1) % 2].get();
    dir.weights.multiply(h, Pp_, rows.begin, rows.end, panels.begin, panels.end,
                         [&](int64_t b, int height, int64_t unit, const A* product) {
                           for (int r = 0; r < height; ++r, ++b, product += Gate::kPanelWidth)
                             activate(dir, first + b, b, unit, product, h, h_next);
                         });
    if constexpr (kLstm)
      if (p_.projected())
        dir.projection.multiply(
            dir.hidden.get(), Hp_, rows.begin, rows.end, 0, dir.projection.panel_count(),
            [&](int64_t b, int height, int64_t column, const A* product) {
              for (int r = 0; r < height; ++r, ++b, product += 4 * kWidth)
                for (int64_t j = column; j < std::min(column + 4 * kWidth, p_.P); j += kWidth)
                  emit(dir, first + b, b, j, load(product + (j - column)), h_next);
            });
    sync();
  }

 private:
  void prepare(int d) {
    Direction& dir = dir_[d];
    static_cast<ForwardDirection&>(dir) = p_.direction[d];
    dir.weights = Gate(dir.weight_hh, p_.H, p_.P, schedule_.pack);
    dir.bias = Buffer<A>::zeros(saved_count(kCell) * Hp_);
    add_bias(dir.bias.get(), dir.bias_ih, gate_count(kCell));
    add_bias(dir.bias.get(), dir.bias_hh, kGru ? 2 : gate_count(kCell));
    if (kGru && dir.bias_hh) add_bias(dir.bias + 3 * Hp_, static_cast<const T*>(dir.bias_hh) + 2 * p_.H, 1);
    for (auto& h : dir.h) {
      h = Buffer<Operand<T>>::zeros(p_.B * Pp_);
      copy_matrix<T>(dir.h0, p_.B, p_.P, h.get(), Pp_);
    }
    if constexpr (kLstm) {
      dir.c = Buffer<A>::zeros(p_.B * Hp_);
      copy_matrix<T>(dir.c0, p_.B, p_.H, dir.c.get(), Hp_);
      if (p_.projected()) {
        dir.projection = {dir.weight_hr, p_.P, p_.H, schedule_.pack};
        dir.projection.pack(0, dir.projection.panel_count());
        dir.hidden = Buffer<Operand<T>>::zeros(p_.B * Hp_);
      }
    }
  }

  void add_bias(A* sum, const void* bias, int gates) const {
    if (!bias) return;
    const T* from = static_cast<const T*>(bias);
    for (int gate = 0; gate < gates; ++gate)
      for (int64_t j = 0; j < p_.H; ++j) sum[gate * Hp_ + j] += to_accumulation(from[gate * p_.H + j]);
  }

  // The gates of one row, for the units of one panel from `unit` on.
  void activate(Direction& dir, int64_t row, int64_t b, int64_t unit, const A* product, const Operand<T>* h,
                Operand<T>* h_next) const {
    const int64_t H = p_.H;
    T* gates = static_cast<T*>(dir.gates) + row * p_.gates_stride + unit;
    const A* bias = dir.bias + unit;
    if constexpr (kLstm) {
      const int n = lanes_left<T>(H - unit);
      const auto gate = [&](int g) { return load(product + g * kWidth) + load(gates + g * H, n) + load(bias + g * Hp_); };
      LstmGates<V> a = {gate(0), gate(1), gate(2), gate(3)};
      A* c = dir.c + b * Hp_ + unit;
      const LstmState<V> state = lstm_forward<Math<A>>(a, load(c));
      store(c, state.c);
      if (p_.save) {
        store(gates, a.i, n);
        store(gates + H, a.f, n);
        store(gates + 2 * H, a.g, n);
        store(gates + 3 * H, a.o, n);
        store(static_cast<A*>(dir.cells) + row * H + unit, state.c, n);
      }
      if (p_.projected())
        store(dir.hidden + b * Hp_ + unit, state.h, n);
      else
        emit(dir, row, b, unit, state.h, h_next);
    } else if constexpr (kGru) {
      const int n = lanes_left<T>(H - unit);
      const auto input = [&](int g) { return load(gates + g * H, n) + load(bias + g * Hp_); };
      GruGates<V> a = {input(0) + load(product), input(1) + load(product + kWidth), input(2),
                       load(product + 2 * kWidth) + load(bias + 3 * Hp_)};
      const V new_h = gru_forward<Math<A>>(a, load(h + b * Pp_ + unit));
      if (p_.save) {
        store(gates, a.r, n);
        store(gates + H, a.z, n);
        store(gates + 2 * H, a.n, n);
        store(gates + 3 * H, a.hn, n);
      }
      emit(dir, row, b, unit, new_h, h_next);
    } else {
      for (int v = 0; v < 4 && unit + v * kWidth < H; ++v) {
        const int64_t j = v * kWidth;
        const V a = load(product + j) + load(gates + j, lanes_left<T>(H - unit - j)) + load(bias + j);
        emit(dir, row, b, unit + j, kCell == Cell::rnn_tanh ? Math<A>::tanh(a) : Math<A>::relu(a), h_next);
      }
    }
  }

  // h of one register of units, rounded to T: the next step sees what the caller sees.
  void emit(Direction& dir, int64_t row, int64_t b, int64_t column, V h, Operand<T>* h_next) const {
    const int n = lanes_left<T>(p_.P - column);
    T* output = static_cast<T*>(dir.output) + row * p_.output_stride + column;
    store(output, h, n);
    store(h_next + b * Pp_ + column, load(output, n), n);
  }

  // The state of each sequence after its own last step.
  void write_final_state(int d) const {
    const Direction& dir = dir_[d];
    const T* output = static_cast<const T*>(dir.output);
    int64_t t = d == 0 ? p_.T - 1 : 0;
    for (int64_t b = 0; b < p_.B; ++b) {
      if (d == 0)
        while (p_.active(t) <= b) --t;
      std::copy_n(output + (p_.row(t) + b) * p_.output_stride, p_.P, static_cast<T*>(dir.h_n) + b * p_.P);
    }
    if constexpr (kLstm) copy_back<T>(dir.c.get(), Hp_, p_.B, p_.H, dir.c_n);
  }

  const ForwardParams& p_;
  const Schedule& schedule_;
  const Host& host_;
  const int64_t Hp_, Pp_;  // H and P padded to whole panels
  Direction dir_[2];
};

}  // namespace rnn_fused::RNN_FUSED_ISA
