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

// The final states of a layer, [D, B, ...], or of a stack of so many like it.
struct FinalStates {
  Tensor h_n, c_n;

  explicit FinalStates(const Layer& layer, int64_t layers = 1)
      : h_n(allocate(layer.input, {layers * layer.D(), layer.shape.B, layer.shape.P})),
        c_n(layer.allocate_if(layer.lstm(), {layers * layer.D(), layer.shape.B, layer.shape.H})) {}

  // Of layer l of the stack.
  FinalStates of(const Layer& layer, int64_t l) const {
    const LayerShape& s = layer.shape;
    RNN_FUSED_CHECK(s.P == h_n.size(2) && (!layer.lstm() || s.H == c_n.size(2)), "[", layer.name,
                    "] the layers of a stack must have the same sizes, got H = ", s.H,
                    ", P = ", s.P, " in layer ", l, " and P = ", h_n.size(2), " in the first");
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

using StackTensors = std::tuple<Tensor, Tensor, Tensor>;

using BackwardTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensors>;

// A window of the loop, and the rows of each direction that it computes.
struct Window : BackwardParams {
  Range rows[2];

  int64_t count(int d) const { return rows[d].end - rows[d].begin; }
};

struct BackwardPass {
  Tensor output, gates, cells;  // of the forward pass
  bool rebuild_gates = false;   // which are not there: in the place of their gradients
  OptionalTensor grad_output, grad_h_n, grad_c_n, grad_cells;
  // [D, M, ...], of one window after the other.
  Tensor grad_gates, grad_projected, hidden;
  Tensor grad_hx, grad_cx;
  OptionalTensor grad_reset_hx, grad_reset_cx;  // in the accumulation type
  Tensor carried_dh, carried_dc;                // between windows

  // overwrite_gates: of the saved gates nothing is left but their memory. windowed: the loop is
  // divided wherever that takes less memory, not only where gates are rebuilt.
  BackwardPass(const Layer& layer, const OptionalTensor& grad_output_,
               const OptionalTensor& grad_h_n_, const OptionalTensor& grad_c_n_,
               const OptionalTensor& grad_cells_, const Tensor& output_, const Tensor& gates_,
               const Tensor& cells_, bool overwrite_gates, bool windowed)
      : layer_(layer) {
    const LayerShape& s = layer.shape;
    const int64_t D = layer.D(), N = layer.N, H = s.H;
    output = layer.checked(output_, "output", layer.rows_shape(D * s.P), "[..., D*P]");
    const bool saved = gates_.dim() != 1;
    if (!layer.rnn() && saved)
      gates = layer.checked(gates_, "gates", {D, N, layer.S(), H},
                            "[D, N, 4, H] (saved by the forward pass)");
    rebuild_gates = !layer.rnn() && !saved && layer.rows > 0;
    // Every loop reads the gates of a row and unit where it then writes their gradients.
    const bool in_place = overwrite_gates && gates.defined();
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
    if (grad_cells_) {
      RNN_FUSED_CHECK(layer.lstm() && grad_cells_->sizes() == cells_.sizes() &&
                          grad_cells_->scalar_type() == layer.cell_dtype() &&
                          layer.same_device(*grad_cells_),
                      "[", layer.name, "] grad_cells must be like the cells of an LSTM, got shape ",
                      shape_string(grad_cells_->sizes()));
      grad_cells = as_contiguous(*grad_cells_);
    }
    const auto gradient = [&](const OptionalTensor& t, const char* what,
                              std::vector<int64_t> sizes) {
      return t ? layer.checked(*t, what, sizes, "") : OptionalTensor();
    };
    grad_output = gradient(grad_output_, "grad_output", layer.rows_shape(D * s.P));
    grad_h_n = gradient(grad_h_n_, "grad_h_n", {D, s.B, s.P});
    if (layer.lstm()) grad_c_n = gradient(grad_c_n_, "grad_c_n", {D, s.B, H});

    grad_projected = layer.allocate_if(s.projected(), {D, room_, s.P});
    hidden = layer.allocate_if(s.projected(), {D, room_, H});
    grad_hx = allocate(layer.input, {D, s.B, s.P});
    grad_cx = layer.allocate_if(layer.lstm(), {D, s.B, H});
    const ScalarType sums = layer.cell_dtype();
    if (layer.resets) grad_reset_hx = allocate_zeros(layer.input, {D, s.B, s.P}, sums);
    if (layer.reset_cx) grad_reset_cx = allocate_zeros(layer.input, {D, s.B, H}, sums);
    if (several()) {
      carried_dh = allocate(layer.input, {D, s.B, s.P}, sums);
      carried_dc = layer.allocate_if(layer.lstm(), {D, s.B, H}, sums);
    }
  }

  int64_t windows() const { return static_cast<int64_t>(borders_.size()) - 1; }
  bool several() const { return windows() > 1; }
  // Whether two directions come to the same rows of the input's gradient in different windows.
  bool adds_to_input() const { return several() && layer_.D() == 2; }

  // In the order in which the loop comes to them.
  Window window(int64_t k) const {
    const LayerShape& s = layer_.shape;
    const int64_t N = layer_.N, H = s.H, SH = layer_.S() * H;
    Window w{{s, {}, layer_.D() * s.P, borders_[k], s.T - borders_[k + 1]}, {}};
    const auto given = [](bool there, const Tensor& t) {
      return there ? OptionalTensor(t) : OptionalTensor();
    };
    const OptionalTensor saved_gates = given(gates.defined(), gates);
    const OptionalTensor saved_cells = given(layer_.lstm(), cells);
    const OptionalTensor saved_output = output;
    for (int d = 0; d < s.directions; ++d) {
      w.rows[d] = rows_of(w.timesteps(d));
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
                        at(grad_hx, d * s.B * s.P),
                        layer_.lstm() ? at(grad_cx, d * s.B * H) : nullptr,
                        grad_reset_hx ? at(*grad_reset_hx, d * s.B * s.P) : nullptr,
                        grad_reset_cx ? at(*grad_reset_cx, d * s.B * H) : nullptr,
                        w.rows[d].begin,
                        several() ? at(carried_dh, d * s.B * s.P) : nullptr,
                        several() && layer_.lstm() ? at(carried_dc, d * s.B * H) : nullptr};
    }
    return w;
  }

  // Where direction d begins in matrices [D, M, columns].
  int64_t origin(int d, int64_t columns) const { return d * room_ * columns; }

 private:
  Range rows_of(Range timesteps) const {
    if (!several()) return {0, layer_.rows};
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

  Gradients(const Layer& layer, const BackwardPass& pass, bool need_input, bool need_weights)
      : dtype_(layer.dtype()) {
    const LayerShape& s = layer.shape;
    const int64_t D = layer.D(), GH = layer.G() * s.H;
    input = layer.allocate_if(need_input, layer.rows_shape(layer.I));
    if (pass.adds_to_input()) torch::stable::zero_(input);
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

  // The operator's results, of which the caller wants some. No two of them share memory.
  BackwardTensors results(const Layer& layer, const BackwardPass& pass, bool need_state,
                          bool need_reset_state) const {
    const auto given = [&](bool needed, const Tensor& grad) {
      return needed ? grad : layer.allocate_if(false, {});
    };
    const auto rounded = [&](const OptionalTensor& sums) {
      return sums && need_reset_state ? torch::stable::to(*sums, dtype_)
                                      : layer.allocate_if(false, {});
    };
    return {input,
            given(need_state, pass.grad_hx),
            given(need_state, pass.grad_cx),
            rounded(pass.grad_reset_hx),
            rounded(pass.grad_reset_cx),
            weights()};
  }

 private:
  // In the order of the operator's arguments.
  Tensors weights() const {
    Tensors tensors;
    for (const Tensors* list : {&ih, &hh, &bias_ih, &bias_hh, &hr})
      for (const Tensor& t : *list)
        tensors.push_back(t.scalar_type() == dtype_ ? t : torch::stable::to(t, dtype_));
    return tensors;
  }

  ScalarType dtype_;
};

}  // namespace rnn_fused
