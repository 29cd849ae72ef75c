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

// W_ih x of direction d by torch's library, into rows `stride` apart from element `origin` on.
inline void multiply_input(const Layer& layer, int d, const Tensor& out, int64_t stride,
                           int64_t origin) {
  const int64_t N = layer.rows, I = layer.I, GH = layer.G() * layer.shape.H;
  if (N == 0) return;
  matmul(matrix(layer.input, N, I, I), matrix(layer.weight_ih[d], I, GH, 1, I),
         matrix(out, N, GH, stride, 1, origin));
}

// Zeroes the rows behind those of the timesteps, where the host knows them. t: [matrices, N,
// columns].
inline void zero_known_tail(const Layer& layer, const Tensor& t, int64_t matrices,
                            int64_t columns) {
  for (int64_t m = 0; m < matrices; ++m) {
    Tensor tail = vector(t, (layer.N - layer.rows) * columns, (m * layer.N + layer.rows) * columns);
    torch::stable::zero_(tail);
  }
}

using ForwardTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

struct ForwardPass {
  Tensor output, h_n, c_n, gates, cells;
  ForwardParams params;

  // With input_in_gates the caller puts W_ih x into products() before the loop.
  ForwardPass(const Layer& layer, bool save_gates, bool save_cells, bool input_in_gates)
      : layer_(layer) {
    const LayerShape& s = layer.shape;
    const int64_t D = layer.D(), N = layer.N;
    output = allocate(layer.input, layer.rows_shape(D * s.P));
    h_n = allocate(layer.input, {D, s.B, s.P});
    c_n = layer.allocate_if(layer.lstm(), {D, s.B, s.H});
    // The GRU's hn needs room only where it is saved; an RNN saves nothing but its output, and its
    // pre-activations can lie where that will.
    const int64_t stride = layer.rnn() ? D * s.P : (save_gates ? layer.S() : layer.G()) * s.H;
    const bool has_gates = !layer.rnn() && (save_gates || input_in_gates);
    gates = layer.allocate_if(has_gates, {D, N, stride / s.H, s.H});
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

  void multiply_input() const {
    for (int d = 0; d < layer_.shape.directions; ++d)
      rnn_fused::multiply_input(layer_, d, place(), params.gates_stride, origin(d));
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
    return layer_.rnn() ? d * layer_.shape.P : d * layer_.N * params.gates_stride;
  }

  const Layer& layer_;
};

using BackwardTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensors>;

struct BackwardPass {
  Tensor output, gates, cells;  // of the forward pass
  bool rebuild_gates = false;   // which are not there: in grad_gates, whose place they have
  OptionalTensor grad_output, grad_h_n, grad_c_n, grad_cells;
  Tensor grad_gates, grad_projected, hidden, grad_hx, grad_cx;
  OptionalTensor grad_reset_hx, grad_reset_cx;  // in the accumulation type
  BackwardParams params;

  BackwardPass(const Layer& layer, const OptionalTensor& grad_output_,
               const OptionalTensor& grad_h_n_, const OptionalTensor& grad_c_n_,
               const OptionalTensor& grad_cells_, const Tensor& output_, const Tensor& gates_,
               const Tensor& cells_, bool overwrite_gates) {
    const LayerShape& s = layer.shape;
    const int64_t D = layer.D(), N = layer.N, H = s.H, SH = layer.S() * H;
    output = layer.checked(output_, "output", layer.rows_shape(D * s.P), "[..., D*P]");
    const bool saved = gates_.dim() != 1;
    if (!layer.rnn() && saved)
      gates = layer.checked(gates_, "gates", {D, N, layer.S(), H},
                            "[D, N, 4, H] (saved by the forward pass)");
    // Every loop reads the gates of a row and unit where it then writes their gradients.
    grad_gates = overwrite_gates && gates.defined() ? gates : allocate(layer.input, {D, N, SH});
    rebuild_gates = !layer.rnn() && !saved && layer.rows > 0;
    if (!layer.rnn() && !saved) gates = grad_gates;
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

    grad_projected = layer.allocate_if(s.projected(), {D, N, s.P});
    hidden = layer.allocate_if(s.projected(), {D, N, H});
    grad_hx = allocate(layer.input, {D, s.B, s.P});
    grad_cx = layer.allocate_if(layer.lstm(), {D, s.B, H});
    const ScalarType sums = layer.cell_dtype();
    if (layer.resets) grad_reset_hx = allocate_zeros(layer.input, {D, s.B, s.P}, sums);
    if (layer.reset_cx) grad_reset_cx = allocate_zeros(layer.input, {D, s.B, H}, sums);
    params = {s, {}, D * s.P};
    for (int d = 0; d < s.directions; ++d) {
      const OptionalTensor saved_gates = layer.rnn() ? OptionalTensor() : gates;
      const OptionalTensor saved_cells = layer.lstm() ? OptionalTensor(cells) : OptionalTensor();
      params.direction[d] = {layer.direction(d),
                             at(saved_gates, d * N * SH),
                             at(saved_cells, d * N * H),
                             at(output, d * s.P),
                             at(grad_output, d * s.P),
                             at(grad_h_n, d * s.B * s.P),
                             layer.lstm() ? at(grad_c_n, d * s.B * H) : nullptr,
                             at(grad_cells, d * N * H),
                             at(grad_gates, d * N * SH),
                             s.projected() ? at(grad_projected, d * N * s.P) : nullptr,
                             s.projected() ? at(hidden, d * N * H) : nullptr,
                             at(grad_hx, d * s.B * s.P),
                             layer.lstm() ? at(grad_cx, d * s.B * H) : nullptr,
                             grad_reset_hx ? at(*grad_reset_hx, d * s.B * s.P) : nullptr,
                             grad_reset_cx ? at(*grad_reset_cx, d * s.B * H) : nullptr};
    }
  }

  // The operator's results, of which the caller wants some; reset_state: it gave the reset state.
  // No two of them share memory.
  BackwardTensors results(const Layer& layer, const Tensor& grad_input, bool need_state,
                          bool reset_state, const Tensors& grad_weights) const {
    const auto given = [&](bool needed, const Tensor& grad) {
      return needed ? grad : layer.allocate_if(false, {});
    };
    const auto rounded = [&](const OptionalTensor& sums) {
      return sums && need_state && reset_state ? torch::stable::to(*sums, layer.dtype())
                                               : layer.allocate_if(false, {});
    };
    return {grad_input,
            given(need_state, grad_hx),
            given(need_state, grad_cx),
            rounded(grad_reset_hx),
            rounded(grad_reset_cx),
            grad_weights};
  }
};

// The gradient of one direction's weights, allocated.
struct WeightGradients {
  Tensors ih, hh, bias_ih, bias_hh, hr;

  explicit WeightGradients(const Layer& layer) {
    const LayerShape& s = layer.shape;
    const int64_t GH = layer.G() * s.H;
    for (int64_t d = 0; d < layer.D(); ++d) {
      ih.push_back(allocate(layer.input, {GH, layer.I}));
      hh.push_back(allocate(layer.input, {GH, s.P}));
      if (!layer.bias_ih.empty()) {
        bias_ih.push_back(allocate(layer.input, {GH}));
        bias_hh.push_back(allocate(layer.input, {GH}));
      }
      if (s.projected()) hr.push_back(allocate(layer.input, {s.P, s.H}));
    }
  }

  // In the order of the operator's arguments.
  Tensors all() const {
    Tensors tensors;
    for (const Tensors* list : {&ih, &hh, &bias_ih, &bias_hh, &hr})
      tensors.insert(tensors.end(), list->begin(), list->end());
    return tensors;
  }
};

}  // namespace rnn_fused
