// One call of a layer with random tensors: what the kernels read and what they write.
#pragma once

#include <doctest/doctest.h>

#include <ostream>
#include <span>

#include "csrc/cpu/cpu.h"
#include "tests/cpp/names.h"
#include "tests/cpp/storage.h"

namespace rnn_fused {

constexpr Cell kCells[] = {Cell::lstm, Cell::gru, Cell::rnn_tanh, Cell::rnn_relu};
constexpr DType kDTypes[] = {DType::f32, DType::f64, DType::bf16, DType::f16};

struct Sizes {
  Cell cell;
  DType dtype;
  int64_t T = 1, B = 1, I = 1, H = 1;
  int64_t P = 0;  // 0: no projection
  int directions = 1;
  bool ragged = false;
  bool bias = true;
  int64_t gap = 3;  // elements between the rows of the output, which must stay as they are
  bool resets = false;
  bool options = false;  // a slope and bounds that matter; gradients of c; grad_gates over gates
  bool split = false;
};

// What its sizes leave open of a layer.
inline void draw_kind(Sizes& s, Random& random) {
  s.P = s.cell == Cell::lstm && random.coin() ? random.integer(1, s.H) : 0;
  s.directions = static_cast<int>(random.integer(1, 2));
  s.ragged = random.coin();
  s.bias = random.coin();
  s.resets = random.coin();
  s.options = s.ragged != s.resets;
}

inline std::ostream& operator<<(std::ostream& out, const Sizes& s) {
  return out << toString(s.cell) << " " << toString(s.dtype) << " T=" << s.T << " B=" << s.B
             << " I=" << s.I << " H=" << s.H << " P=" << s.P << " D=" << s.directions
             << (s.ragged ? " ragged" : " dense") << (s.bias ? " bias" : "")
             << (s.resets ? " resets" : "") << (s.options ? " options" : "")
             << (s.split ? " split" : "");
}

struct Layer : Sizes {
  struct Direction {
    Array weight_ih, weight_hh, weight_hr, bias_ih, bias_hh, h0, c0, reset_h, reset_c;
  };

  int64_t N;                               // rows
  std::vector<int64_t> lengths;            // [B] non-increasing
  std::vector<int64_t> active, starts;     // [T] batch_sizes and row_start
  std::vector<unsigned char> reset_flags;  // [N], or empty
  Array input;                             // [N, I]
  Direction direction[2];

  Layer(const Sizes& sizes, uint64_t seed) : Sizes(sizes) {
    Random random(seed);
    if (!P) P = H;
    lengths.assign(B, T);
    if (ragged)
      for (int64_t b = 1; b < B; ++b) lengths[b] = random.integer(1, T);
    std::sort(lengths.rbegin(), lengths.rend());
    N = 0;
    for (int64_t t = 0; t < T; ++t) {
      active.push_back(
          std::count_if(lengths.begin(), lengths.end(), [&](auto n) { return n > t; }));
      starts.push_back(N);
      N += active[t];
    }
    const int64_t GH = gate_count(cell) * H;
    const double bound = 1 / std::sqrt(static_cast<double>(H));
    input = random.array(dtype, N * I, 1);
    for (int d = 0; d < directions; ++d) {
      direction[d] = {random.array(dtype, GH * I, bound),
                      random.array(dtype, GH * P, bound),
                      random.array(dtype, projected() ? P * H : 0, bound),
                      random.array(dtype, bias ? GH : 0, bound),
                      random.array(dtype, bias ? GH : 0, bound),
                      random.array(dtype, B * P, 1),
                      random.array(dtype, lstm() ? B * H : 0, 1),
                      {},
                      {}};
      if (!resets) continue;
      direction[d].reset_h = random.array(dtype, B * P, 1);
      direction[d].reset_c = random.array(dtype, lstm() ? B * H : 0, 1);
    }
    for (int64_t n = 0; resets && n < N; ++n) reset_flags.push_back(random.integer(0, 2) == 0);
  }

  bool lstm() const { return cell == Cell::lstm; }
  bool rnn() const { return saved_count(cell) == 1; }
  bool projected() const { return P != H; }
  int64_t G() const { return gate_count(cell); }
  int64_t S() const { return saved_count(cell); }
  int64_t output_stride() const { return directions * P + gap; }
  int64_t row(int64_t t, int64_t b) const { return starts[t] + b; }
  // Whether direction d comes to timestep t of sequence b with the reset state.
  bool enters_reset(int d, int64_t t, int64_t b) const {
    const int64_t border = t + d;
    return resets && border < lengths[b] && reset_flags[row(border, b)];
  }

  // Values that no type rounds.
  double gate_slope() const { return options && !rnn() ? 1.5 : 1; }
  double cell_clip() const { return options && lstm() ? 0.375 : kNone; }
  double grad_clip() const { return options ? 0.0625 : kNone; }

  LayerShape shape() const {
    LayerShape shape{cell,
                     dtype,
                     T,
                     B,
                     H,
                     P,
                     directions,
                     ragged ? active.data() : nullptr,
                     ragged ? starts.data() : nullptr,
                     resets ? reinterpret_cast<const bool*>(reset_flags.data()) : nullptr,
                     {{static_cast<float>(gate_slope()), static_cast<float>(cell_clip()),
                       static_cast<float>(grad_clip())},
                      {gate_slope(), cell_clip(), grad_clip()}}};
    shape.split = split && can_split(shape);
    return shape;
  }

  DirectionWeights weights(int d) const {
    const Direction& w = direction[d];
    return {w.weight_hh.at(0), w.weight_hr.at(0), w.bias_ih.at(0), w.bias_hh.at(0),
            w.h0.at(0),        w.c0.at(0),        w.reset_h.at(0), w.reset_c.at(0)};
  }

 private:
  static constexpr double kNone = std::numeric_limits<double>::quiet_NaN();
};

// What a forward pass leaves, in the kernel's types or, from the reference, in double.
struct Forward {
  struct Direction {
    Array gates, cells;  // [N, S*H] unless an RNN, [N, H] of an LSTM; both with save only
    Array h_n, c_n;      // [B, P], [B, H]
    bool operator==(const Direction&) const = default;
  };
  Array output;  // [N, output_stride]
  Direction direction[2];

  Forward(const Layer& l, DType dtype, DType cell_dtype, bool save)
      : output(dtype, l.N * l.output_stride()) {
    for (int d = 0; d < l.directions; ++d)
      direction[d] = {Array(dtype, save && !l.rnn() ? l.N * l.S() * l.H : 0),
                      Array(cell_dtype, save && l.lstm() ? l.N * l.H : 0), Array(dtype, l.B * l.P),
                      Array(dtype, l.lstm() ? l.B * l.H : 0)};
  }
  bool operator==(const Forward&) const = default;
};

// `products`: W_ih x of each direction, [N, G*H] in the layer's type, or null for the kernel to
// multiply. `run` is given ForwardParams.
template <class Run>
Forward run_forward(const Layer& l, bool save, const Array* products, const Run& run) {
  Forward result(l, l.dtype, accumulation(l.dtype), save);
  const int64_t GH = l.G() * l.H;
  const int64_t gates_stride = l.rnn() ? l.output_stride() : save ? l.S() * l.H : GH;
  ForwardParams params{l.shape(),           {},           l.input.at(0),     l.I,
                       products != nullptr, gates_stride, l.output_stride(), save};
  Array scratch[2];  // the pre-activations where nothing is saved
  for (int d = 0; d < l.directions; ++d) {
    Forward::Direction& out = result.direction[d];
    void* const output = result.output.at(d * l.P);
    void* gates = out.gates.at(0);
    if (products) {
      if (l.rnn())
        gates = output;
      else if (!save)
        gates = (scratch[d] = Array(l.dtype, l.N * GH)).at(0);
      for (int64_t n = 0; n < l.N; ++n)
        std::memcpy(static_cast<char*>(gates) + n * gates_stride * size_of(l.dtype),
                    products[d].at(n * GH), GH * size_of(l.dtype));
    }
    params.direction[d] = {
        l.weights(d), l.direction[d].weight_ih.at(0), gates, out.cells.at(0), output, out.h_n.at(0),
        out.c_n.at(0)};
  }
  run(params);
  return result;
}

inline Forward run_forward(Isa isa, const Layer& l, const Host& host, bool save,
                           const Array* products = nullptr) {
  return run_forward(l, save, products,
                     [&](const ForwardParams& params) { cpu_forward(isa, params, host); });
}

// The same params with weights that were packed before, into `packed`.
inline ForwardParams pack(Isa isa, ForwardParams params, Array (&packed)[2]) {
  params.split = false;  // panels never are
  for (int d = 0; d < params.directions; ++d) {
    ForwardDirection& w = params.direction[d];
    const PackParams weights{params.cell, params.dtype, params.I,    params.H,  params.P,
                             w.weight_ih, w.weight_hh,  w.weight_hr, w.bias_ih, w.bias_hh};
    packed[d] = Array(params.dtype, cpu_pack_weights(isa, weights, nullptr));
    CHECK(cpu_pack_weights(isa, weights, packed[d].at(0)) == packed[d].size());
    w.packed = packed[d].at(0);
    // Nothing else of them is read.
    w.weight_ih = w.weight_hh = w.weight_hr = w.bias_ih = w.bias_hh = nullptr;
  }
  return params;
}

// With packed weights, and nothing saved.
inline Forward run_packed(Isa isa, const Layer& l, const Host& host) {
  Array packed[2];
  return run_forward(l, false, nullptr, [&](const ForwardParams& params) {
    cpu_forward(isa, pack(isa, params, packed), host);
  });
}

// The results of every layer of a stack, from the last to the first. `below`: of the layers before.
inline std::vector<Forward> run_stack(Isa isa, std::span<const Layer> layers, const Host& host,
                                      std::vector<ForwardParams> below = {}) {
  if (layers.empty()) {
    cpu_forward_stack(isa, below.data(), static_cast<int64_t>(below.size()), host);
    return {};
  }
  std::vector<Forward> results;
  Array packed[2];
  Forward first = run_forward(layers[0], false, nullptr, [&](ForwardParams params) {
    if (!below.empty()) params.input = below.back().direction[0].output;
    below.push_back(pack(isa, params, packed));
    results = run_stack(isa, layers.subspan(1), host, below);
  });
  results.push_back(std::move(first));
  return results;
}

// Of an LSTM or GRU: the gates of every row, from its h's.
inline Array rebuild_gates(Isa isa, const Layer& l, const Host& host, const Forward& forward,
                           int d) {
  std::vector<const void*> before(l.N), input(l.N);
  for (int64_t n = 0; n < l.N; ++n) input[n] = l.input.at(n * l.I);
  for (int64_t b = 0; b < l.B; ++b)
    for (int64_t t = 0; t < l.lengths[b]; ++t) {
      const int64_t previous = d == 0 ? t - 1 : t + 1;
      const bool first = previous < 0 || previous >= l.lengths[b];
      before[l.row(t, b)] =
          l.enters_reset(d, t, b) ? l.direction[d].reset_h.at(b * l.P)
          : first ? l.direction[d].h0.at(b * l.P)
                  : forward.output.at(l.row(previous, b) * l.output_stride() + d * l.P);
    }
  Array gates(l.dtype, l.N * l.S() * l.H);
  const DirectionWeights w = l.weights(d);
  cpu_gates(isa,
            {l.cell, l.dtype, l.shape().options, l.N, l.I, l.H, l.P, input.data(), before.data(),
             l.direction[d].weight_ih.at(0), w.weight_hh, w.bias_ih, w.bias_hh, gates.at(0),
             repays_packing(l.shape()), l.shape().split},
            host);
  return gates;
}

// The gradients that come from outside; absent ones are zero.
struct Upstream {
  Array output;          // [N, output_stride]
  Array h_n[2], c_n[2];  // [B, P], [B, H]
  Array cells[2];        // [N, H] in the accumulation type

  Upstream(const Layer& l, uint64_t seed, bool absent_output = false, bool absent_state = false) {
    Random random(seed);
    if (!absent_output) output = random.array(l.dtype, l.N * l.output_stride(), 1);
    for (int d = 0; d < l.directions && !absent_state; ++d) {
      h_n[d] = random.array(l.dtype, l.B * l.P, 1);
      c_n[d] = random.array(l.dtype, l.lstm() ? l.B * l.H : 0, 1);
    }
    for (int d = 0; d < l.directions && l.options; ++d)
      cells[d] = random.array(accumulation(l.dtype), l.lstm() ? l.N * l.H : 0, 1);
  }
};

struct Backward {
  struct Direction {
    Array gates;              // [N, S*H] of the pre-activations
    Array projected, hidden;  // [N, P], [N, H] with a projection
    Array h0, c0;             // [B, P], [B, H]
    Array reset_h, reset_c;   // the same, in the accumulation type; with resets
    bool operator==(const Direction&) const = default;
  };
  Direction direction[2];

  Backward(const Layer& l, DType dtype) {
    for (int d = 0; d < l.directions; ++d)
      direction[d] = {Array(dtype, l.N * l.S() * l.H),
                      Array(dtype, l.projected() ? l.N * l.P : 0),
                      Array(dtype, l.projected() ? l.N * l.H : 0),
                      Array(dtype, l.B * l.P),
                      Array(dtype, l.lstm() ? l.B * l.H : 0),
                      Array::zeros(accumulation(dtype), l.resets ? l.B * l.P : 0),
                      Array::zeros(accumulation(dtype), l.resets && l.lstm() ? l.B * l.H : 0)};
  }
  bool operator==(const Backward&) const = default;
};

// `run` is given BackwardParams: of everything, or of windows of so many steps one after the other.
template <class Run>
Backward run_backward(const Layer& l, const Forward& forward, const Upstream& upstream,
                      const Run& run, int64_t steps = 0) {
  if (steps == 0) steps = l.T;
  Backward result(l, l.dtype);
  Array carried_dh[2], carried_dc[2];
  const int64_t SH = l.S() * l.H;
  for (int64_t begin = 0; begin < l.T; begin += steps) {
    BackwardParams params{l.shape(), {}, l.output_stride()};
    const int64_t steps_after = std::max<int64_t>(l.T - begin - steps, 0);
    Array gates[2], grad_gates[2], projected[2], hidden[2];
    Range rows[2];
    for (int d = 0; d < l.directions; ++d) {
      const Forward::Direction& saved = forward.direction[d];
      Backward::Direction& out = result.direction[d];
      params.direction[d].steps_before = begin;
      params.direction[d].steps_after = steps_after;
      const auto [first, end] = params.timesteps(d);
      rows[d] = {l.starts[first], end < l.T ? l.starts[end] : l.N};
      const int64_t M = rows[d].end - rows[d].begin;
      gates[d] = saved.gates.part(rows[d].begin * SH, M * SH);
      grad_gates[d] = out.gates.part(0, M * SH);
      projected[d] = out.projected.part(0, M * l.P);
      hidden[d] = out.hidden.part(0, M * l.H);
      if (begin == 0) {
        carried_dh[d] = Array(accumulation(l.dtype), l.B * l.P);
        carried_dc[d] = Array(accumulation(l.dtype), l.lstm() ? l.B * l.H : 0);
      }
      params.direction[d] = {l.weights(d),
                             l.options && !l.rnn() ? grad_gates[d].at(0) : gates[d].at(0),
                             saved.cells.at(0),
                             forward.output.at(d * l.P),
                             upstream.output.at(d * l.P),
                             upstream.h_n[d].at(0),
                             upstream.c_n[d].at(0),
                             upstream.cells[d].at(0),
                             grad_gates[d].at(0),
                             projected[d].at(0),
                             hidden[d].at(0),
                             out.h0.at(0),
                             out.c0.at(0),
                             out.reset_h.at(0),
                             out.reset_c.at(0),
                             rows[d].begin,
                             begin,
                             steps_after,
                             carried_dh[d].at(0),
                             carried_dc[d].at(0)};
      if (l.options && !l.rnn()) grad_gates[d].put(0, gates[d]);
    }
    run(params);
    for (int d = 0; d < l.directions; ++d) {
      result.direction[d].gates.put(rows[d].begin * SH, grad_gates[d]);
      result.direction[d].projected.put(rows[d].begin * l.P, projected[d]);
      result.direction[d].hidden.put(rows[d].begin * l.H, hidden[d]);
    }
  }
  return result;
}

inline Backward run_backward(Isa isa, const Layer& l, const Host& host, const Forward& forward,
                             const Upstream& upstream, int64_t steps = 0) {
  const auto run = [&](const BackwardParams& params) { cpu_backward(isa, params, host); };
  return run_backward(l, forward, upstream, run, steps);
}

}  // namespace rnn_fused
