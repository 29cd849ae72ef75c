// The forward timestep loop.
#pragma once

#include "csrc/core/cells.h"
#include "csrc/cpu/input_product.h"
#include "csrc/cpu/math.h"
#include "csrc/cpu/team.h"

namespace rnn_fused::RNN_FUSED_ISA {

template <class T, Cell kCell>
class Forward {
  using A = Acc<T>;
  using V = Vec<A>;
  using Gate = GateWeights<T, kCell>;
  using Input = InputProduct<T, kCell>;
  static constexpr bool kLstm = kCell == Cell::lstm;
  static constexpr bool kGru = kCell == Cell::gru;
  static constexpr int kWidth = kLanes<A>;
  // The GRU's h goes on to the next step by itself too, and not by way of an operand that is not
  // quite h.
  static constexpr bool kKeepsH = kGru && std::is_same_v<T, split32>;

  // What the loop of one direction reads and writes besides the caller's tensors.
  struct Direction : ForwardDirection {
    Input input;
    Gate weights;
    Weights<T, 4, Layout::transposed> projection;
    Buffer<Operand<T>> h[2];    // [B, Pp] read at even and at odd steps
    Buffer<Operand<T>> hidden;  // [B, Hp] o * tanh(c) before the projection
    Buffer<A> projected;        // [B, Pp] h before it is rounded; with a projection
    Buffer<A> c;                // [B, Hp] with kKeepsH that is h
  };

 public:
  Forward(const ForwardParams& params, const Schedule& schedule, const Host& host)
      : p_(params),
        options_(params.options.of<A>()),
        schedule_(schedule),
        host_(host),
        Hp_(round_up(params.H, Gate::kPanelWidth)),
        Pp_(round_up(params.P, 4 * kWidth)) {
    for (int d = 0; d < p_.directions; ++d) prepare(d);
  }

  void run() {
    run_team(p_, {0, p_.T}, schedule_, host_, panel_count(), *this);
    write_final_states();
  }

  int64_t panel_count() const { return dir_[0].weights.panel_count(); }

  void pack(int d, Range panels) {
    dir_[d].input.pack(panels);
    dir_[d].weights.pack(panels.begin, panels.end);
  }

  // One timestep of one direction: `rows` of its sequences, `panels` of its hidden units.
  template <class Sync>
  void step(int d, int64_t s, Range rows, Range panels, const Sync& sync) {
    Direction& dir = dir_[d];
    const int64_t t = d == 0 ? s : p_.T - 1 - s;
    const int64_t chunk = dir.input.chunk();
    if (s == 0 || t % chunk == (d == 0 ? 0 : chunk - 1)) dir.input.compute(t, rows, panels);
    rows.end = std::min(rows.end, p_.active(t));
    const Operand<T>* h = dir.h[s % 2].get();
    Operand<T>* h_next = dir.h[(s + 1) % 2].get();
    // The sums are completed where they lie. The GRU's first register, n, has no recurrent product.
    A* slots = dir.input.at(0, t);
    const int64_t panel_stride = dir.input.panel_stride();
    A* sums = slots + (kGru ? kWidth : 0);
    dir.weights.multiply(
        h, Pp_, rows.begin, rows.end, panels.begin, panels.end, {sums, Input::kSlot, panel_stride},
        {sums, Input::kSlot, panel_stride}, [&](int64_t b, int height, int64_t panel) {
          const A* slot = slots + panel * panel_stride + b * Input::kSlot;
          for (int r = 0; r < height; ++r, ++b, slot += Input::kSlot)
            activate(dir, row_of(d, t, b), panel * Gate::kColumns, slot, h, h_next);
        });
    if constexpr (kLstm)
      if (p_.projected())
        dir.projection.multiply(
            dir.hidden.get(), Hp_, rows.begin, rows.end, 0, dir.projection.panel_count(),
            {kZeros<A>, 0, 0}, {dir.projected.get(), Pp_, 4 * kWidth},
            [&](int64_t b, int height, int64_t panel) {
              const int64_t column = panel * 4 * kWidth;
              for (int r = 0; r < height; ++r, ++b)
                emit_panel(dir, row_of(d, t, b), column, dir.projected + b * Pp_ + column, h_next);
            });
    sync();
  }

  // The state of each sequence after its own last step.
  void write_final_states() const {
    for (int d = 0; d < p_.directions; ++d) write_final_state(d);
  }

 private:
  struct Row {
    int64_t row, place;  // the packed one, and the caller's
    int64_t b;
    bool reset;  // the sequence's next step begins with the reset state
  };

  Row row_of(int d, int64_t t, int64_t b) const {
    return {p_.row(t) + b, p_.place(t, b), b, p_.leaves_reset(d, t, b)};
  }

  void prepare(int d) {
    Direction& dir = dir_[d];
    static_cast<ForwardDirection&>(dir) = p_.direction[d];
    const PackedWeights<T, kCell> packed(dir.packed, p_.I, p_.H, p_.P);
    if (dir.packed) {
      dir.bias_ih = packed.bias_ih;
      dir.bias_hh = packed.bias_hh;
    }
    dir.input = Input(p_, dir, schedule_, packed.ih);
    dir.weights = Gate(dir.weight_hh, p_.H, p_.P, schedule_.pack, 0, packed.hh);
    for (auto& h : dir.h) {
      h = Buffer<Operand<T>>::zeros(p_.B * Pp_);
      copy_matrix<T>(dir.h0, p_.B, p_.P, h.get(), Pp_, p_.order);
    }
    if constexpr (kLstm) {
      dir.c = Buffer<A>::zeros(p_.B * Hp_);
      copy_matrix<T>(dir.c0, p_.B, p_.H, dir.c.get(), Hp_, p_.order);
      if (p_.projected()) {
        dir.projection = {dir.weight_hr, p_.P, p_.H, schedule_.pack, 0, packed.hr};
        dir.projection.pack(0, dir.projection.panel_count());
        dir.hidden = Buffer<Operand<T>>::zeros(p_.B * Hp_);
        dir.projected = Buffer<A>(p_.B * Pp_);
      }
    }
    if constexpr (kKeepsH) {
      dir.c = Buffer<A>::zeros(p_.B * Hp_);
      copy_matrix<T>(dir.h0, p_.B, p_.H, dir.c.get(), Hp_, p_.order);
    }
    for (int64_t b = 0; d == 0 && p_.resets && b < p_.B; ++b) {
      if (!p_.resets_at(0, b)) continue;
      const int64_t sequence = p_.sequence(b);
      if constexpr (kKeepsH) copy_matrix<T>(dir.reset_h, 1, p_.H, dir.c + b * Hp_, Hp_, &sequence);
      copy_matrix<T>(dir.reset_h, 1, p_.P, dir.h[0] + b * Pp_, Pp_, &sequence);
      if constexpr (kLstm) copy_matrix<T>(dir.reset_c, 1, p_.H, dir.c + b * Hp_, Hp_, &sequence);
    }
  }

  // The gates of one row, for the units of one panel from `unit` on; the slot holds the
  // pre-activations.
  void activate(Direction& dir, const Row& at, int64_t unit, const A* slot, const Operand<T>* h,
                Operand<T>* h_next) const {
    const int64_t row = at.row, b = at.b;
    const int n = lanes_left<T>(p_.H - unit);
    const auto save = [&](int gate, V value) {
      store(static_cast<T*>(dir.gates) + row * p_.gates_stride + gate * p_.H + unit, value, n);
    };
    if constexpr (kLstm) {
      LstmGates<V> a = {load(slot), load(slot + kWidth), load(slot + 2 * kWidth),
                        load(slot + 3 * kWidth)};
      A* c = dir.c + b * Hp_ + unit;
      lstm_activate<Math<A>>(a, options_);
      const LstmState<V> state = lstm_forward<Math<A>>(a, load(c), options_);
      store(c, at.reset ? load(static_cast<const T*>(dir.reset_c) + p_.sequence(b) * p_.H + unit, n)
                        : state.c);
      if (p_.save_gates) {
        save(0, a.i);
        save(1, a.f);
        save(2, a.g);
        save(3, a.o);
      }
      if (dir.cells) store(static_cast<A*>(dir.cells) + row * p_.H + unit, state.c, n);
      if (p_.projected())
        store(dir.hidden + b * Hp_ + unit, state.h, n);
      else
        emit(dir, at, unit, state.h, h_next);
    } else if constexpr (kGru) {
      GruGates<V> a = {load(slot + kWidth), load(slot + 2 * kWidth), load(slot),
                       load(slot + 3 * kWidth)};
      gru_activate<Math<A>>(a, options_);
      V h_prev;
      if constexpr (kKeepsH)
        h_prev = load(dir.c + b * Hp_ + unit);
      else
        h_prev = load(h + b * Pp_ + unit);
      const V new_h = gru_forward(a, h_prev);
      if (p_.save_gates) {
        save(0, a.r);
        save(1, a.z);
        save(2, a.n);
        save(3, a.hn);
      }
      emit(dir, at, unit, new_h, h_next);
    } else {
      alignas(64) A activated[Gate::kPanelWidth];
      for (int64_t j = 0; j < Gate::kPanelWidth; j += kWidth) {
        const V a = load(slot + j);
        store(activated + j, kCell == Cell::rnn_tanh ? Math<A>::tanh(a) : Math<A>::relu(a));
      }
      emit_panel(dir, at, unit, activated, h_next);
    }
  }

  // h of one register of units, rounded to T: the next step sees what the caller sees.
  void emit(Direction& dir, const Row& at, int64_t column, V h, Operand<T>* h_next) const {
    const int n = lanes_left<T>(p_.P - column);
    store(static_cast<T*>(dir.output) + at.place * p_.output_stride + column, h, n);
    if (at.reset)
      h = load(static_cast<const T*>(dir.reset_h) + p_.sequence(at.b) * p_.P + column, n);
    if constexpr (kKeepsH) store(dir.c + at.b * Hp_ + column, h);
    // Where the operand is T itself, the store rounds.
    store(h_next + at.b * Pp_ + column, std::is_same_v<Operand<T>, T> ? h : round_to<T>(h), n);
  }

  void emit_panel(Direction& dir, const Row& at, int64_t column, const A* h,
                  Operand<T>* h_next) const {
    for (int64_t j = 0; j < 4 * kWidth && column + j < p_.P; j += kWidth)
      emit(dir, at, column + j, load(h + j), h_next);
  }

  void write_final_state(int d) const {
    const Direction& dir = dir_[d];
    const T* output = static_cast<const T*>(dir.output);
    int64_t t = d == 0 ? p_.T - 1 : 0;
    for (int64_t b = 0; b < p_.B; ++b) {
      if (d == 0)
        while (t >= 0 && p_.active(t) <= b) --t;
      const bool ran = t >= 0 && b < p_.active(t);
      const int64_t state = p_.sequence(b) * p_.P;
      std::copy_n(
          ran ? output + p_.place(t, b) * p_.output_stride : static_cast<const T*>(dir.h0) + state,
          p_.P, static_cast<T*>(dir.h_n) + state);
    }
    if constexpr (kLstm) copy_back<T>(dir.c.get(), Hp_, p_.B, p_.H, dir.c_n, p_.order);
  }

  const ForwardParams& p_;
  const CellOptions<A> options_;
  const Schedule& schedule_;
  const Host& host_;
  const int64_t Hp_, Pp_;  // H and P padded to whole panels
  Direction dir_[2];
};

}  // namespace rnn_fused::RNN_FUSED_ISA
