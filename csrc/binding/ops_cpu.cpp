// The operators on the CPU: allocate, multiply the inputs, run the loop; and, backward, the large
// products that turn the gradients of the pre-activations into those of weights and inputs.
#include "csrc/binding/layer.h"
#include "csrc/cpu/cpu.h"

namespace rnn_fused {
namespace {

Host torch_threads() {
  return {[](int64_t n, void (*body)(void*, int64_t, int64_t), void* context) {
            torch::stable::parallel_for(0, n, 1,
                                        [&](int64_t begin, int64_t end) { body(context, begin, end); });
          },
          static_cast<int>(torch::stable::get_num_threads())};
}

// Element `offset` of t, or null where there is no tensor.
void* at(const Tensor& t, int64_t offset) {
  return static_cast<char*>(t.mutable_data_ptr()) + offset * t.element_size();
}
const void* at(const OptionalTensor& t, int64_t offset) {
  return t ? static_cast<const char*>(t->const_data_ptr()) + offset * t->element_size() : nullptr;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> layer_forward(
    Tensor input, Tensor hx, OptionalTensor cx, Tensors weight_ih, Tensors weight_hh, Tensors bias_ih,
    Tensors bias_hh, Tensors weight_hr, OptionalTensor batch_sizes, std::string cell, bool save) {
  const Layer layer(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, batch_sizes, cell);
  const LayerShape& s = layer.shape;
  const int64_t D = layer.D(), N = layer.N, GH = layer.G() * s.H;

  Tensor output = allocate(layer.input, layer.rows_shape(D * s.P));
  Tensor h_n = allocate(layer.input, {D, s.B, s.P});
  Tensor c_n = allocate(layer.input, layer.lstm() ? std::vector<int64_t>{D, s.B, s.H} : std::vector<int64_t>{0});
  const std::vector<int64_t> none = {0};
  const bool keep_gates = save && !layer.rnn();
  // Without saving, the GRU needs no room for hn.
  const int64_t gates_stride = layer.rnn() ? D * s.P : save ? layer.S() * s.H : GH;
  Tensor gates = allocate(layer.input, layer.rnn() ? none : std::vector<int64_t>{D, N, gates_stride / s.H, s.H});
  Tensor cells = allocate(layer.input, save && layer.lstm() ? std::vector<int64_t>{D, N, s.H} : none,
                           layer.cell_dtype());
  if (s.B > 0) {
    ForwardParams params{s, {}, gates_stride, D * s.P, save};
    const Tensor x = matrix(layer.input, N, layer.I, layer.I);
    for (int d = 0; d < s.directions; ++d) {
      // An RNN's pre-activations lie where its output will.
      const Tensor& place = layer.rnn() ? output : gates;
      const int64_t offset = layer.rnn() ? d * s.P : d * N * gates_stride;
      matmul(x, matrix(layer.weight_ih[d], layer.I, GH, 1, layer.I), matrix(place, N, GH, gates_stride, 1, offset));
      params.direction[d] = {layer.direction(d),
                             at(place, offset),
                             cells.numel() ? at(cells, d * N * s.H) : nullptr,
                             at(output, d * s.P),
                             at(h_n, d * s.B * s.P),
                             layer.lstm() ? at(c_n, d * s.B * s.H) : nullptr};
    }
    cpu_forward(selected_isa(), params, torch_threads());
  }
  if (!keep_gates) gates = allocate(layer.input, none);
  return {output, h_n, c_n, gates, cells};
}

// Rows of h before each row's step, [N, P]: what W_hh was multiplied with. Ragged only; dense rows
// are the output shifted by one timestep.
Tensor gather_previous(const Layer& layer, const Tensor& output, int d) {
  const LayerShape& s = layer.shape;
  Tensor previous = allocate(layer.input, {layer.N, s.P});
  const int64_t bytes = s.P * layer.input.element_size();
  for (int64_t t = 0; t < s.T; ++t) {
    const int64_t before = d == 0 ? t - 1 : t + 1;
    const int64_t known = before < 0 || before >= s.T ? 0 : std::min(s.active(t), s.active(before));
    for (int64_t b = 0; b < s.active(t); ++b) {
      const void* from = b < known ? at(output, (s.row(before) + b) * layer.D() * s.P + d * s.P)
                                   : at(OptionalTensor(layer.hx), (d * s.B + b) * s.P);
      std::memcpy(at(previous, (s.row(t) + b) * s.P), from, bytes);
    }
  }
  return previous;
}

// grad = grad_gates[:, column : column + columns].T @ h before each step
void recurrent_gradient(const Layer& layer, const Tensor& output, const Tensor& previous, int d,
                        const Tensor& grad_gates, int64_t column, int64_t columns, const Tensor& grad) {
  const LayerShape& s = layer.shape;
  const int64_t N = layer.N, SH = layer.S() * s.H, origin = d * N * SH + column;
  const auto grads_of = [&](int64_t row, int64_t rows) {
    return matrix(grad_gates, columns, rows, 1, SH, origin + row * SH);
  };
  if (layer.ragged()) return matmul(grads_of(0, N), previous, grad);
  const int64_t later = d == 0 ? s.B : 0, earlier = d == 0 ? 0 : s.B, first = d == 0 ? 0 : N - s.B;
  matmul(grads_of(first, s.B), matrix(layer.hx, s.B, s.P, s.P, 1, d * s.B * s.P), grad);
  if (s.T > 1)
    matmul(grads_of(later, N - s.B),
           matrix(output, N - s.B, s.P, layer.D() * s.P, 1, earlier * layer.D() * s.P + d * s.P), grad, true);
}

// The gradients of weights and biases, in the order of the operator's arguments.
Tensors weight_gradients(const Layer& layer, const Tensor& output, const Tensor& grad_gates,
                         const Tensor& grad_projected, const Tensor& hidden) {
  const LayerShape& s = layer.shape;
  const int64_t N = layer.N, H = s.H, GH = layer.G() * H, SH = layer.S() * H;
  const bool gru = s.cell == Cell::gru;
  Tensors grad_ih, grad_hh, grad_bias_ih, grad_bias_hh, grad_hr;
  for (int d = 0; d < s.directions; ++d) {
    const int64_t origin = d * N * SH;
    grad_ih.push_back(allocate(layer.input, {GH, layer.I}));
    matmul(matrix(grad_gates, GH, N, 1, SH, origin), matrix(layer.input, N, layer.I, layer.I), grad_ih.back());

    grad_hh.push_back(allocate(layer.input, {GH, s.P}));
    const Tensor previous = layer.ragged() ? gather_previous(layer, output, d) : Tensor();
    // The GRU's hn lies behind n: two products instead of one.
    const int64_t joint = gru ? 2 * H : GH;
    recurrent_gradient(layer, output, previous, d, grad_gates, 0, joint, matrix(grad_hh.back(), joint, s.P, s.P));
    if (gru)
      recurrent_gradient(layer, output, previous, d, grad_gates, 3 * H, H,
                         matrix(grad_hh.back(), H, s.P, s.P, 1, 2 * H * s.P));

    if (!layer.bias_ih.empty()) {
      Tensor sums = allocate(layer.input, {SH});
      const int64_t rows = 0;
      torch::stable::sum_out(sums, matrix(grad_gates, N, SH, SH, 1, origin), {{&rows, 1}});
      const auto take = [&](int64_t last_gate) {
        Tensor grad = allocate(layer.input, {GH});
        const size_t gate = H * grad.element_size();
        std::memcpy(at(grad, 0), at(sums, 0), (layer.G() - 1) * gate);
        std::memcpy(at(grad, GH - H), at(sums, last_gate * H), gate);
        return grad;
      };
      grad_bias_ih.push_back(take(layer.G() - 1));
      grad_bias_hh.push_back(take(layer.S() - 1));
    }
    if (s.projected()) {
      grad_hr.push_back(allocate(layer.input, {s.P, H}));
      matmul(matrix(grad_projected, s.P, N, 1, s.P, d * N * s.P), matrix(hidden, N, H, H, 1, d * N * H),
             grad_hr.back());
    }
  }
  Tensors all;
  for (const Tensors* list : {&grad_ih, &grad_hh, &grad_bias_ih, &grad_bias_hh, &grad_hr})
    all.insert(all.end(), list->begin(), list->end());
  return all;
}

void fill_zero(Tensor t) { std::memset(t.mutable_data_ptr(), 0, t.numel() * t.element_size()); }

std::tuple<Tensor, Tensor, Tensor, Tensors> layer_backward(
    OptionalTensor grad_output, OptionalTensor grad_h_n, OptionalTensor grad_c_n, Tensor input, Tensor hx,
    OptionalTensor cx, Tensors weight_ih, Tensors weight_hh, Tensors bias_ih, Tensors bias_hh, Tensors weight_hr,
    OptionalTensor batch_sizes, std::string cell, Tensor output, Tensor gates, Tensor cells, bool need_input,
    bool need_state, bool need_weights) {
  const Layer layer(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, batch_sizes, cell);
  const LayerShape& s = layer.shape;
  const int64_t D = layer.D(), N = layer.N, H = s.H, SH = layer.S() * H;
  output = layer.checked(output, "output", layer.rows_shape(D * s.P), "[..., D*P]");
  if (!layer.rnn()) gates = layer.checked(gates, "gates", {D, N, layer.S(), H}, "[D, N, 4, H] (saved by the forward pass)");
  if (layer.lstm()) {
    RNN_FUSED_CHECK(cells.numel() == D * N * H && cells.scalar_type() == layer.cell_dtype(),
                    "[lstm] cells must be what the forward pass saved, [D, N, H] = ", D * N * H,
                    " values, got ", shape_string(cells.sizes()));
    cells = as_contiguous(cells);
  }
  const auto gradient = [&](OptionalTensor& t, const char* what, std::vector<int64_t> sizes) {
    if (t) t = layer.checked(*t, what, sizes, "");
  };
  gradient(grad_output, "grad_output", layer.rows_shape(D * s.P));
  gradient(grad_h_n, "grad_h_n", {D, s.B, s.P});
  if (layer.lstm()) gradient(grad_c_n, "grad_c_n", {D, s.B, H});

  const std::vector<int64_t> none = {0};
  Tensor grad_gates = allocate(layer.input, {D, N, SH});
  Tensor grad_projected = allocate(layer.input, s.projected() ? std::vector<int64_t>{D, N, s.P} : none);
  Tensor hidden = allocate(layer.input, s.projected() ? std::vector<int64_t>{D, N, H} : none);
  Tensor grad_hx = allocate(layer.input, {D, s.B, s.P});
  Tensor grad_cx = allocate(layer.input, layer.lstm() ? std::vector<int64_t>{D, s.B, H} : none);
  if (s.B > 0) {
    BackwardParams params{s, {}, D * s.P};
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
                             at(grad_gates, d * N * SH),
                             s.projected() ? at(grad_projected, d * N * s.P) : nullptr,
                             s.projected() ? at(hidden, d * N * H) : nullptr,
                             at(grad_hx, d * s.B * s.P),
                             layer.lstm() ? at(grad_cx, d * s.B * H) : nullptr};
    }
    cpu_backward(selected_isa(), params, torch_threads());
  }

  Tensor grad_input = allocate(layer.input, need_input ? layer.rows_shape(layer.I) : none);
  if (need_input && N > 0)
    for (int d = 0; d < s.directions; ++d)
      matmul(matrix(grad_gates, N, layer.G() * H, SH, 1, d * N * SH), layer.weight_ih[d],
             matrix(grad_input, N, layer.I, layer.I), d > 0);
  Tensors grad_weights;
  if (need_weights) {
    grad_weights = weight_gradients(layer, output, grad_gates, grad_projected, hidden);
    if (N == 0)
      for (Tensor& t : grad_weights) fill_zero(t);
  }
  if (!need_state) {
    grad_hx = allocate(layer.input, none);
    grad_cx = allocate(layer.input, none);
  }
  return {grad_input, grad_hx, grad_cx, grad_weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rnn_fused, CPU, m) {
  m.impl("layer_forward", TORCH_BOX(&layer_forward));
  m.impl("layer_backward", TORCH_BOX(&layer_backward));
}

}  // namespace rnn_fused
