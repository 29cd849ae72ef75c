// The tensors of each pass and the params that point into them: what the devices share.
#pragma once

#include "csrc/binding/layer.h"

namespace rnn_fused {

// Element `offset` of t, or null where there is no tensor.
inline void* at(const Tensor& t, int64_t offset) {
  return static_cast<char*>(t.mutable_data_ptr()) + offset * t.element_size();
}
inline const void* at(const OptionalTensor& t, int64_t offset) {
  return t ? static_cast<const char*>(t->const_data_ptr()) + offset * t->element_size() : nullptr;
}

// W_ih x of direction d and some rows by torch's library, into rows `stride` apart from element
// `origin` on.
inline void multiply_input(const Layer& layer, int d, Range rows, const Tensor& out, int64_t stride,
                           int64_t origin) {
  const int64_t N = rows.end - rows.begin, I = layer.I, GH = layer.G() * layer.shape.H;
  if (N == 0) return;
  matmul(matrix(layer.input, N, I, I, 1, rows.begin * I), matrix(layer.weight_ih[d], I, GH, 1, I),
         matrix(out, N, GH, stride, 1, origin));
}

// Zeroes the rows behind those of the timesteps, where the host knows them. t: [matrices, N,
// columns].
inline void zero_known_tail(const Sequences& batch, const Tensor& t, int64_t matrices,
                            int64_t columns) {
  for (int64_t m = 0; m < matrices; ++m) {
    Tensor tail = vector(t, (batch.N - batch.rows) * columns, (m * batch.N + batch.rows) * columns);
    torch::stable::zero_(tail);
  }
}

using ForwardTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// That a layer has the sizes of the others of its stack, for which there is room.
inline void check_alike(const Layer& layer, int64_t l, const Tensor& h, const Tensor& c) {
  const LayerShape& s = layer.shape;
  RNN_FUSED_CHECK(s.P == h.size(2) && (!layer.lstm() || s.H == c.size(2)), "[", layer.name,
                  "] the layers of a stack must have the same sizes, got H = ", s.H, ", P = ", s.P,
                  " in layer ", l, " and P = ", h.size(2), " in another");
}

// The final states of a layer, [D, B, ...], or of a stack of so many like it.
struct FinalStates {
  Tensor h_n, c_n;

  explicit FinalStates(const Layer& layer, int64_t layers = 1)
      : h_n(allocate(layer.input, {layers * layer.D(), layer.shape.B, layer.shape.P})),
        c_n(layer.allocate_if(layer.lstm(), {layers * layer.D(), layer.shape.B, layer.shape.H})) {}

  // Of layer l of the stack.
  FinalStates of(const Layer& layer, int64_t l) const {
    check_alike(layer, l, h_n, c_n);
    FinalStates own = *this;
    own.h_n = part(h_n, l * layer.D(), layer.D());
    if (layer.lstm()) own.c_n = part(c_n, l * layer.D(), layer.D());
    return own;
  }
};

struct ForwardPass {
  Tensor h_n, c_n, output, gates, cells;
  ForwardParams params;

  ForwardPass(const Layer& layer, bool save_gates, bool save_cells, bool input_in_gates)
      : ForwardPass(layer, save_gates, save_cells, input_in_gates, FinalStates(layer), layer.N) {}

  // With input_in_gates the caller calls multiply_input before the loop. room: rows of the gates.
  ForwardPass(const Layer& layer, bool save_gates, bool save_cells, bool input_in_gates,
              const FinalStates& final, int64_t room)
      : h_n(final.h_n), c_n(final.c_n), layer_(layer), room_(room) {
    const LayerShape& s = layer.shape;
    const int64_t D = layer.D(), N = layer.N;
    output = allocate(layer.input, layer.rows_shape(D * s.P));
    // The GRU's hn needs room only where it is saved; an RNN saves nothing but its output, and its
    // pre-activations can lie where that will.
    const int64_t stride = layer.rnn() ? D * s.P : (save_gates ? layer.S() : layer.G()) * s.H;
    const bool has_gates = !layer.rnn() && (save_gates || input_in_gates);
    gates = layer.allocate_if(has_gates, {D, room, stride / s.H, s.H});
    cells = layer.allocate_if(save_cells && layer.lstm(), {D, N, s.H}, layer.cell_dtype());
    params = {s,       {},        layer.input.const_data_ptr(), layer.I, input_in_gates, stride,
              D * s.P, save_gates};
    for (int d = 0; d < s.directions; ++d)
      params.direction[d] = {layer.direction(d),
                             layer.weight_ih[d].const_data_ptr(),
                             has_gates || layer.rnn() ? at(place(), origin(d)) : nullptr,
                             cells.numel() ? at(cells, d * N * s.H) : nullptr,
                             at(output, d * s.P),
                             at(h_n, d * s.B * s.P),
                             layer.lstm() ? at(c_n, d * s.B * s.H) : nullptr};
  }

  // Of all rows, or of some for which the gates have room.
  void multiply_input() const { multiply_input({0, layer_.rows}, 0); }
  void multiply_input(Range rows, int64_t first_row) const {
    for (int d = 0; d < layer_.shape.directions; ++d)
      rnn_fused::multiply_input(layer_, d, rows, place(), params.gates_stride,
                                origin(d) + (rows.begin - first_row) * params.gates_stride);
  }

  // Of a sequence without timesteps, no loop on a device writes the final states.
  void begin_final_states() const {
    Tensor h = h_n, c = c_n;
    torch::stable::copy_(h, layer_.hx);
    if (layer_.lstm()) torch::stable::copy_(c, *layer_.cx);
  }

  // Calls zero(tensor, matrices, columns) for the results [matrices, N, columns].
  template <class Zero>
  void zero_tails(const Zero& zero) const {
    if (!layer_.has_tail()) return;
    const int64_t D = layer_.D(), H = layer_.shape.H;
    zero(output, 1, params.output_stride);
    if (params.save_gates && !layer_.rnn()) zero(gates, D, params.gates_stride);
    if (cells.numel() > 0) zero(cells, D, H);
  }

  ForwardTensors results() const {
    return {output, h_n, c_n, params.save_gates ? gates : layer_.allocate_if(false, {}), cells};
  }

 private:
  const Tensor& place() const { return layer_.rnn() ? output : gates; }
  int64_t origin(int d) const {
    return layer_.rnn() ? d * layer_.shape.P : d * room_ * params.gates_stride;
  }

  const Layer& layer_;
  int64_t room_;
};

// Of a stack: what its passes return, and what they save of each layer: the outputs of all but the
// last, gates and cells, or nothing.
using StackTensors = std::tuple<Tensor, Tensor, Tensor, Tensors, Tensors, Tensors>;

struct StackResults {
  bool saves;
  Tensor output;  // of the layer that was added last
  Tensors below = {}, gates = {}, cells = {};

  void add(const ForwardPass& pass) {
    if (saves) {
      if (!gates.empty()) below.push_back(output);
      const ForwardTensors results = pass.results();
      gates.push_back(std::get<3>(results));
      cells.push_back(std::get<4>(results));
    }
    output = pass.output;
  }

  StackTensors tensors(const FinalStates& final) const {
    return {output, final.h_n, final.c_n, below, gates, cells};
  }
};

using BackwardTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensors>;

// A window of the loop, and the rows of each direction that it computes.
struct Window : BackwardParams {
  Range rows[2];

  int64_t count(int d) const { return rows[d].end - rows[d].begin; }
  // Where they begin in the window's own memory.
  int64_t own_row(int d) const { return rows[d].begin - direction[d].first_row; }
};

// What the forward pass of a layer left, and the gradients of its results.
struct Saved {
  Tensor output, gates, cells;
};
struct Upstream {
  OptionalTensor output, h_n, c_n, cells;
};

// What becomes of saved gates and cells: they stay; their gradients take the place of the gates; or
// nothing is left of either, since their memory is given back as soon as nothing reads it.
enum class Reuse { none, gates, all };

// The gradients of the initial states of a layer, [D, B, ...], or of a stack of so many like it.
struct StateGradients {
  Tensor hx, cx;
  OptionalTensor reset_hx, reset_cx;  // in the accumulation type

  explicit StateGradients(const Layer& layer, int64_t layers = 1) {
    const std::vector<int64_t> h = {layers * layer.D(), layer.shape.B, layer.shape.P};
    const std::vector<int64_t> c = {layers * layer.D(), layer.shape.B, layer.shape.H};
    hx = allocate(layer.input, h);
    cx = layer.allocate_if(layer.lstm(), c);
    const ScalarType sums = layer.cell_dtype();
    if (layer.resets) reset_hx = allocate_zeros(layer.input, h, sums);
    if (layer.reset_cx) reset_cx = allocate_zeros(layer.input, c, sums);
  }

  // Of layer l of the stack.
  StateGradients of(const Layer& layer, int64_t l) const {
    check_alike(layer, l, hx, cx);
    const auto own = [&](const Tensor& t) { return part(t, l * layer.D(), layer.D()); };
    StateGradients states = *this;
    states.hx = own(hx);
    if (layer.lstm()) states.cx = own(cx);
    if (reset_hx) states.reset_hx = own(*reset_hx);
    if (reset_cx) states.reset_cx = own(*reset_cx);
    return states;
  }
};

struct BackwardPass {
  Tensor output, gates, cells;  // of the forward pass
  bool rebuild_gates = false;   // which are not there: in the place of their gradients
  OptionalTensor grad_output, grad_h_n, grad_c_n, grad_cells;
  // [D, M, ...], of one window after the other.
  Tensor grad_gates, grad_projected, hidden;
  StateGradients states;
  OptionalTensor carried_dh, carried_dc;  // between windows

  // windowed: the loop is divided wherever that takes less memory, not only where gates are
  // rebuilt.
  BackwardPass(const Layer& layer, const StateGradients& states_, const Upstream& upstream,
               const Saved& saved, Reuse reuse, bool windowed)
      : states(states_), layer_(layer), saved_(saved), reuse_(reuse) {
    const LayerShape& s = layer.shape;
    const int64_t D = layer.D(), N = layer.N, H = s.H;
    const auto& [output_, gates_, cells_] = saved_;
    output = layer.checked(output_, "output", layer.rows_shape(D * s.P), "[..., D*P]");
    const bool has_gates = gates_.dim() != 1;
    if (!layer.rnn() && has_gates)
      gates = layer.checked(gates_, "gates", {D, N, layer.S(), H},
                            "[D, N, 4, H] (saved by the forward pass)");
    rebuild_gates = !layer.rnn() && !has_gates && layer.rows > 0;
    // Every loop reads the gates of a row and unit where it then writes their gradients.
    const bool in_place = reuse != Reuse::none && gates.defined();
    gates_are_grads_ = in_place || rebuild_gates;
    divide(in_place || !(windowed || rebuild_gates) || s.sizes_on_device);
    if (in_place) room_ = N;
    grad_gates = in_place ? gates : allocate(layer.input, {D, room_, layer.S() * H});
    if (layer.lstm()) {
      RNN_FUSED_CHECK(cells_.numel() == D * N * H && cells_.scalar_type() == layer.cell_dtype() &&
                          layer.same_device(cells_),
                      "[lstm] cells must be what the forward pass saved, [D, N, H] = ", D * N * H,
                      " values, got ", shape_string(cells_.sizes()));
      cells = as_contiguous(cells_);
    }
    if (const OptionalTensor& given = upstream.cells) {
      RNN_FUSED_CHECK(layer.lstm() && given->sizes() == cells_.sizes() &&
                          given->scalar_type() == layer.cell_dtype() && layer.same_device(*given),
                      "[", layer.name, "] grad_cells must be like the cells of an LSTM, got shape ",
                      shape_string(given->sizes()));
      grad_cells = as_contiguous(*given);
    }
    const auto gradient = [&](const OptionalTensor& t, const char* what,
                              std::vector<int64_t> sizes) {
      return t ? layer.checked(*t, what, sizes, "") : OptionalTensor();
    };
    grad_output = gradient(upstream.output, "grad_output", layer.rows_shape(D * s.P));
    grad_h_n = gradient(upstream.h_n, "grad_h_n", {D, s.B, s.P});
    if (layer.lstm()) grad_c_n = gradient(upstream.c_n, "grad_c_n", {D, s.B, H});

    grad_projected = layer.allocate_if(s.projected(), {D, room_, s.P});
    hidden = layer.allocate_if(s.projected(), {D, room_, H});
    if (several()) carry();
  }

  // Behind the whole loop, and behind all that follows.
  void spend_cells() const {
    if (reuse_ == Reuse::all && layer_.lstm()) empty(saved_.cells);
  }
  void spend_gates() const {
    if (reuse_ == Reuse::all && gates.defined()) empty(saved_.gates);
  }

  // For a loop in windows, or in chunks.
  void carry() {
    const LayerShape& s = layer_.shape;
    const ScalarType sums = layer_.cell_dtype();
    carried_dh = allocate(layer_.input, {layer_.D(), s.B, s.P}, sums);
    if (layer_.lstm()) carried_dc = allocate(layer_.input, {layer_.D(), s.B, s.H}, sums);
  }

  int64_t windows() const { return static_cast<int64_t>(borders_.size()) - 1; }
  bool several() const { return windows() > 1; }
  // Whether two directions come to the same rows of the input's gradient in different windows.
  bool adds_to_input() const { return several() && layer_.D() == 2; }

  // In the order in which the loop comes to them.
  Window window(int64_t k) const {
    const LayerShape& s = layer_.shape;
    const int64_t N = layer_.N, H = s.H, SH = layer_.S() * H;
    Window w{{s, {}, layer_.D() * s.P}, {}};
    const auto given = [](bool there, const Tensor& t) {
      return there ? OptionalTensor(t) : OptionalTensor();
    };
    const OptionalTensor saved_gates = given(gates.defined(), gates);
    const OptionalTensor saved_cells = given(layer_.lstm(), cells);
    const OptionalTensor saved_output = output;
    for (int d = 0; d < s.directions; ++d) {
      w.direction[d].steps_before = borders_[k];
      w.direction[d].steps_after = s.T - borders_[k + 1];
      w.rows[d] = several() ? rows_of(w.timesteps(d)) : Range{0, layer_.rows};
      w.direction[d] = {layer_.direction(d),
                        gates_are_grads_ ? at(grad_gates, d * room_ * SH)
                                         : at(saved_gates, (d * N + w.rows[d].begin) * SH),
                        at(saved_cells, d * N * H),
                        at(saved_output, d * s.P),
                        at(grad_output, d * s.P),
                        at(grad_h_n, d * s.B * s.P),
                        layer_.lstm() ? at(grad_c_n, d * s.B * H) : nullptr,
                        at(grad_cells, d * N * H),
                        at(grad_gates, d * room_ * SH),
                        s.projected() ? at(grad_projected, d * room_ * s.P) : nullptr,
                        s.projected() ? at(hidden, d * room_ * H) : nullptr,
                        at(states.hx, d * s.B * s.P),
                        layer_.lstm() ? at(states.cx, d * s.B * H) : nullptr,
                        states.reset_hx ? at(*states.reset_hx, d * s.B * s.P) : nullptr,
                        states.reset_cx ? at(*states.reset_cx, d * s.B * H) : nullptr,
                        w.rows[d].begin,
                        borders_[k],
                        s.T - borders_[k + 1],
                        carried_dh ? at(*carried_dh, d * s.B * s.P) : nullptr,
                        carried_dc ? at(*carried_dc, d * s.B * H) : nullptr};
    }
    return w;
  }

  // Some steps of the only direction and window, whose memory has all rows.
  Window chunk(Range steps) const {
    Window w = window(0);
    w.direction[0].steps_before = steps.begin;
    w.direction[0].steps_after = w.T - steps.end;
    w.rows[0] = rows_of(w.timesteps(0));
    return w;
  }

  // Where direction d begins in matrices [D, M, columns].
  int64_t origin(int d, int64_t columns) const { return d * room_ * columns; }

 private:
  Range rows_of(Range timesteps) const {
    const auto start = [&](int64_t t) {
      return t < layer_.shape.T ? layer_.shape.row(t) : layer_.rows;
    };
    return {start(timesteps.begin), start(timesteps.end)};
  }

  // Into windows with a sixteenth of the rows, which bounds the memory of a window, and no fewer
  // than repay what one costs: a pass over the sums of weights' gradients, and over all sequences.
  void divide(bool whole) {
    constexpr int64_t kWindows = 16, kRows = 2048;
    const LayerShape& s = layer_.shape;
    borders_ = {0};
    room_ = 0;
    const int64_t most = whole ? 1 : layer_.rows / std::max(kRows, s.B);
    const int64_t wanted = std::clamp<int64_t>(most, 1, kWindows);
    const int64_t enough = (layer_.rows + wanted - 1) / wanted;
    for (int64_t step = 0, up = 0, down = 0; wanted > 1 && step < s.T; ++step) {
      up += s.active(step);  // of the reverse direction, which begins with the first timestep
      down += s.active(s.T - 1 - step);
      const int64_t rows = s.directions == 2 ? std::max(up, down) : down;
      room_ = std::max(room_, rows);
      if (rows < enough || step == s.T - 1) continue;
      borders_.push_back(step + 1);
      up = down = 0;
    }
    borders_.push_back(s.T);
    if (!several()) room_ = layer_.rows;
  }

  const Layer& layer_;
  const Saved saved_;
  const Reuse reuse_;
  std::vector<int64_t> borders_;  // steps at which a window begins, and T
  int64_t room_ = 0;              // M: the rows of the largest window
  bool gates_are_grads_ = false;  // whose memory they share
};

// What the large products behind the loop make: the gradients of the input and of all directions'
// weights. Of several windows they are sums: of the input's, only where two directions come to the
// same rows; those of weights in the accumulation type.
struct Gradients {
  Tensor input;
  Tensors ih, hh, bias_ih, bias_hh, hr;

  Gradients(const Layer& layer, const BackwardPass& pass, bool need_weights)
      : dtype_(layer.dtype()) {
    const LayerShape& s = layer.shape;
    const int64_t D = layer.D(), GH = layer.G() * s.H;
    if (!need_weights) return;
    const auto gradient = [&](const std::vector<int64_t>& sizes) {
      if (pass.several()) return allocate_zeros(layer.input, sizes, layer.cell_dtype());
      return layer.rows > 0 ? allocate(layer.input, sizes) : allocate_zeros(layer.input, sizes);
    };
    for (int64_t d = 0; d < D; ++d) {
      ih.push_back(gradient({GH, layer.I}));
      hh.push_back(gradient({GH, s.P}));
      if (!layer.bias_ih.empty()) {
        bias_ih.push_back(gradient({GH}));
        bias_hh.push_back(gradient({GH}));
      }
      if (s.projected()) hr.push_back(gradient({s.P, s.H}));
    }
  }

  // Best behind the loop, when cells have given their memory back.
  void make_input(const Layer& layer, const BackwardPass& pass, bool needed) {
    input = layer.allocate_if(needed, layer.rows_shape(layer.I));
    if (pass.adds_to_input()) torch::stable::zero_(input);
  }

  // What several windows added up, in the type of the weights.
  void round_sums() {
    for (const auto list : kFields)
      for (Tensor& t : this->*list)
        if (t.scalar_type() != dtype_) t = torch::stable::to(t, dtype_);
  }

  // Those of weights, in the order of the operator's arguments.
  static constexpr Tensors Gradients::* kFields[] = {
      &Gradients::ih, &Gradients::hh, &Gradients::bias_ih, &Gradients::bias_hh, &Gradients::hr};

 private:
  ScalarType dtype_;
};

// The operators' results, of which the caller wants some. No two of them share memory. layers: the
// gradients of each.
inline BackwardTensors backward_results(const std::vector<Gradients>& layers,
                                        const StateGradients& states, bool need_state,
                                        bool need_reset_state) {
  const auto given = [&](bool needed, const Tensor& grad) {
    return needed ? grad : allocate(states.hx, {0});
  };
  const auto rounded = [&](const OptionalTensor& sums) {
    return sums && need_reset_state ? torch::stable::to(*sums, states.hx.scalar_type())
                                    : allocate(states.hx, {0});
  };
  Tensors weights;
  for (const auto list : Gradients::kFields)
    for (const Gradients& gradients : layers)
      weights.insert(weights.end(), (gradients.*list).begin(), (gradients.*list).end());
  return {layers[0].input,          given(need_state, states.hx), given(need_state, states.cx),
          rounded(states.reset_hx), rounded(states.reset_cx),     weights};
}

// The backward passes of a stack's layers, from the last to the first.
class StackBackward {
 public:
  // upstream: of the last output and of the states of all layers.
  StackBackward(const Stack& stack, const Tensor& input, const Upstream& upstream,
                const Tensor& output, const Tensors& below, const Tensors& gates,
                const Tensors& cells)
      : stack_(stack),
        input_(input),
        grad_h_n_(stack.state(upstream.h_n, "grad_h_n")),
        grad_c_n_(stack.state(upstream.c_n, "grad_c_n")),
        output_(output),
        below_(checked(below, "below", stack.layers() - 1)),
        gates_(checked(gates, "gates", stack.layers())),
        cells_(checked(cells, "cells", stack.layers())) {
    for (const Tensor& t : gates)
      RNN_FUSED_CHECK((t.dim() == 1) == (gates[0].dim() == 1), "[", stack.cell(),
                      "] gates must be saved of all layers or of none, got shapes ",
                      shape_string(gates[0].sizes()), " and ", shape_string(t.sizes()));
  }

  int64_t layers() const { return stack_.layers(); }
  std::unique_ptr<Layer> layer(int64_t l) const {
    return stack_.layer(l, l == 0 ? input_ : stack_.above(l - 1, below_[l - 1]));
  }
  // The gradient of the output below layer l, in the place of that of the layer's input.
  Tensor below(int64_t l, Tensor grad_input) const {
    if (const OptionalTensor mask = this->mask(l))
      multiply(grad_input, *mask, 0, grad_input.numel(), grad_input);
    return grad_input;
  }
  // What lies between.
  OptionalTensor mask(int64_t l) const {
    return l == 0 ? OptionalTensor() : stack_.mask(l - 1, below_[l - 1]);
  }
  Saved saved(int64_t l) const {
    return {l + 1 == layers() ? output_ : below_[l], gates_[l], cells_[l]};
  }
  Upstream upstream(int64_t l, const OptionalTensor& grad_output) const {
    return {grad_output, stack_.of(grad_h_n_, l), stack_.of(grad_c_n_, l), {}};
  }

 private:
  const Tensors& checked(const Tensors& list, const char* what, int64_t count) const {
    RNN_FUSED_CHECK(static_cast<int64_t>(list.size()) == count, "[", stack_.cell(), "] ", what,
                    " must hold ", count, " tensors for the layers of the stack, got ",
                    list.size());
    return list;
  }

  const Stack& stack_;
  const Tensor& input_;
  const OptionalTensor grad_h_n_, grad_c_n_;
  const Tensor& output_;
  const Tensors &below_, &gates_, &cells_;
};

}  // namespace rnn_fused
