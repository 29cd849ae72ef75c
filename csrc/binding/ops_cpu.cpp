// The operators on the CPU: allocate, multiply the inputs, run the loop; and, backward, the large
// products that turn the gradients of the pre-activations into those of weights and inputs.
#include <thread>

#include "csrc/binding/layer.h"
#include "csrc/cpu/cpu.h"

namespace rnn_fused {
namespace {

Host torch_threads() {
  // Threads that spin at a barrier must not be more than the cores. Asking reads a file.
  static const unsigned cores = std::max(1u, std::thread::hardware_concurrency());
  return {[](int64_t n, void (*body)(void*, int64_t, int64_t), void* context) {
            torch::stable::parallel_for(
                0, n, 1, [&](int64_t begin, int64_t end) { body(context, begin, end); });
          },
          static_cast<int>(std::min(torch::stable::get_num_threads(), cores))};
}

// Element `offset` of t, or null where there is no tensor.
void* at(const Tensor& t, int64_t offset) {
  return static_cast<char*>(t.mutable_data_ptr()) + offset * t.element_size();
}
const void* at(const OptionalTensor& t, int64_t offset) {
  return t ? static_cast<const char*>(t->const_data_ptr()) + offset * t->element_size() : nullptr;
}

// The large products around the loop are our own: they keep the pre-activations in the cache and in
// float, and give the same bits for any number of threads. But only torch's library uses AMX, by
// far the fastest for bfloat16.
bool by_library(const Layer& layer, int64_t rows, int64_t columns) {
  constexpr double kLargeProduct = 4e6;  // multiply-adds
  return layer.shape.dtype == DType::bf16 &&
         static_cast<double>(layer.N) * rows * columns >= kLargeProduct && has_amx_bf16();
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> layer_forward(
    Tensor input, Tensor hx, OptionalTensor cx, Tensors weight_ih, Tensors weight_hh,
    Tensors bias_ih, Tensors bias_hh, Tensors weight_hr, OptionalTensor batch_sizes,
    std::string cell, bool save) {
  const Layer layer(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, batch_sizes,
                    cell);
  const LayerShape& s = layer.shape;
  const int64_t D = layer.D(), N = layer.N, GH = layer.G() * s.H;

  Tensor output = allocate(layer.input, layer.rows_shape(D * s.P));
  const std::vector<int64_t> none = {0};
  Tensor h_n = allocate(layer.input, {D, s.B, s.P});
  Tensor c_n = allocate(layer.input, layer.lstm() ? std::vector<int64_t>{D, s.B, s.H} : none);
  const bool input_by_library = by_library(layer, GH, layer.I);
  // The GRU's hn needs room only where it is saved; an RNN saves nothing but its output, and its
  // pre-activations can lie where that will.
  const int64_t gates_stride = layer.rnn() ? D * s.P : save ? layer.S() * s.H : GH;
  const bool has_gates = !layer.rnn() && (save || input_by_library);
  Tensor gates =
      allocate(layer.input, has_gates ? std::vector<int64_t>{D, N, gates_stride / s.H, s.H} : none);
  Tensor cells =
      allocate(layer.input, save && layer.lstm() ? std::vector<int64_t>{D, N, s.H} : none,
               layer.cell_dtype());
  if (s.B > 0) {
    ForwardParams params{
        s,       {},  layer.input.const_data_ptr(), layer.I, input_by_library, gates_stride,
        D * s.P, save};
    for (int d = 0; d < s.directions; ++d) {
      const Tensor& place = layer.rnn() ? output : gates;
      const int64_t offset = layer.rnn() ? d * s.P : d * N * gates_stride;
      if (input_by_library)
        matmul(matrix(layer.input, N, layer.I, layer.I),
               matrix(layer.weight_ih[d], layer.I, GH, 1, layer.I),
               matrix(place, N, GH, gates_stride, 1, offset));
      params.direction[d] = {layer.direction(d),
                             layer.weight_ih[d].const_data_ptr(),
                             has_gates || layer.rnn() ? at(place, offset) : nullptr,
                             cells.numel() ? at(cells, d * N * s.H) : nullptr,
                             at(output, d * s.P),
                             at(h_n, d * s.B * s.P),
                             layer.lstm() ? at(c_n, d * s.B * s.H) : nullptr};
    }
    cpu_forward(selected_isa(), params, torch_threads());
  }
  if (!save) gates = allocate(layer.input, none);
  return {output, h_n, c_n, gates, cells};
}

// What a weight was multiplied with: N rows, anywhere in memory.
using Rows = std::vector<const void*>;

Rows rows_of(const void* first, int64_t rows, int64_t bytes) {
  Rows pointers(rows);
  for (int64_t n = 0; n < rows; ++n) pointers[n] = static_cast<const char*>(first) + n * bytes;
  return pointers;
}

// h before each row's step, what W_hh was multiplied with.
Rows previous_h(const Layer& layer, const Tensor& output, int d) {
  const LayerShape& s = layer.shape;
  const int64_t bytes = s.P * output.element_size();
  const char* initial = static_cast<const char*>(layer.hx.const_data_ptr()) + d * s.B * bytes;
  const char* outputs = static_cast<const char*>(output.const_data_ptr()) + d * bytes;
  Rows pointers(layer.N);
  for (int64_t t = 0; t < s.T; ++t) {
    const int64_t before = d == 0 ? t - 1 : t + 1;
    const int64_t known = before < 0 || before >= s.T ? 0 : std::min(s.active(t), s.active(before));
    for (int64_t b = 0; b < s.active(t); ++b)
      pointers[s.row(t) + b] =
          b < known ? outputs + (s.row(before) + b) * layer.D() * bytes : initial + b * bytes;
  }
  return pointers;
}

// right[i].out = left[:, :rows].T @ right[i], with left `offset` elements into `grads`; where asked
// for, also the sums of left's rows.
void outer_product(const Layer& layer, const Tensor& grads, int64_t offset, int64_t stride,
                   int64_t rows, std::array<OuterProductParams::Right, 2> right,
                   std::array<void*, 2> sums = {}) {
  if (!by_library(layer, rows, right[0].columns + right[1].columns)) {
    cpu_outer_product(selected_isa(),
                      {layer.shape.dtype,
                       layer.N,
                       rows,
                       at(grads, offset),
                       stride,
                       {right[0], right[1]},
                       {sums[0], sums[1]}},
                      torch_threads());
    return;
  }
  for (const auto& [row, columns, out] : right) {
    if (columns == 0) continue;
    const int64_t bytes = columns * grads.element_size();
    Tensor gathered = allocate(layer.input, {layer.N, columns});
    for (int64_t n = 0; n < layer.N; ++n) std::memcpy(at(gathered, n * columns), row[n], bytes);
    Tensor result = allocate(layer.input, {rows, columns});
    matmul(matrix(grads, rows, layer.N, 1, stride, offset), gathered, result);
    std::memcpy(out, at(result, 0), rows * bytes);
  }
  if (!sums[0]) return;
  Tensor total = allocate(layer.input, {rows});
  const int64_t dim = 0;
  torch::stable::sum_out(total, matrix(grads, layer.N, rows, stride, 1, offset), {{&dim, 1}});
  for (void* out : sums)
    if (out) std::memcpy(out, at(total, 0), rows * grads.element_size());
}

// The gradients of weights and biases, in the order of the operator's arguments.
Tensors weight_gradients(const Layer& layer, const Tensor& output, const Tensor& grad_gates,
                         const Tensor& grad_projected, const Tensor& hidden) {
  const LayerShape& s = layer.shape;
  const int64_t N = layer.N, I = layer.I, H = s.H, P = s.P, GH = layer.G() * H, SH = layer.S() * H;
  const int64_t size = layer.input.element_size();
  const bool bias = !layer.bias_ih.empty();
  Tensors grad_ih, grad_hh, grad_bias_ih, grad_bias_hh, grad_hr;
  const Rows x = rows_of(layer.input.const_data_ptr(), N, I * size);
  for (int d = 0; d < s.directions; ++d) {
    grad_ih.push_back(allocate(layer.input, {GH, I}));
    grad_hh.push_back(allocate(layer.input, {GH, P}));
    if (bias) {
      grad_bias_ih.push_back(allocate(layer.input, {GH}));
      grad_bias_hh.push_back(allocate(layer.input, {GH}));
    }
    if (N > 0) {
      const Rows h = previous_h(layer, output, d);
      // From one row of the weights on.
      const auto ih = [&](int64_t row) -> OuterProductParams::Right {
        return {x.data(), I, at(grad_ih.back(), row * I)};
      };
      const auto hh = [&](int64_t row) -> OuterProductParams::Right {
        return {h.data(), P, at(grad_hh.back(), row * P)};
      };
      const auto sums = [&](const Tensors& list, int64_t row) {
        return bias ? at(list.back(), row) : nullptr;
      };
      const int64_t origin = d * N * SH;
      // n and hn of the GRU: one belongs to W_ih, the other to W_hh.
      const int64_t joint = s.cell == Cell::gru ? 2 * H : GH;
      outer_product(layer, grad_gates, origin, SH, joint, {ih(0), hh(0)},
                    {sums(grad_bias_ih, 0), sums(grad_bias_hh, 0)});
      if (joint < GH) {
        outer_product(layer, grad_gates, origin + joint, SH, H, {ih(joint)},
                      {sums(grad_bias_ih, joint)});
        outer_product(layer, grad_gates, origin + joint + H, SH, H, {hh(joint)},
                      {sums(grad_bias_hh, joint)});
      }
    }
    if (s.projected()) {
      grad_hr.push_back(allocate(layer.input, {P, H}));
      const Rows rows = rows_of(at(hidden, d * N * H), N, H * size);
      if (N > 0)
        outer_product(layer, grad_projected, d * N * P, P, P,
                      {{{rows.data(), H, at(grad_hr.back(), 0)}}});
    }
  }
  Tensors all;
  for (const Tensors* list : {&grad_ih, &grad_hh, &grad_bias_ih, &grad_bias_hh, &grad_hr})
    all.insert(all.end(), list->begin(), list->end());
  return all;
}

void input_gradient(const Layer& layer, const Tensor& grad_gates, const Tensor& grad_input) {
  const int64_t N = layer.N, GH = layer.G() * layer.shape.H, SH = layer.S() * layer.shape.H;
  if (by_library(layer, GH, layer.I)) {
    for (int d = 0; d < layer.shape.directions; ++d)
      matmul(matrix(grad_gates, N, GH, SH, 1, d * N * SH), layer.weight_ih[d],
             matrix(grad_input, N, layer.I, layer.I), d > 0);
    return;
  }
  InputGradientParams params{layer.shape.dtype, layer.shape.directions, N, GH, layer.I, SH, {}, {},
                             at(grad_input, 0)};
  for (int d = 0; d < layer.shape.directions; ++d) {
    params.grad_gates[d] = at(grad_gates, d * N * SH);
    params.weight_ih[d] = layer.weight_ih[d].const_data_ptr();
  }
  cpu_input_gradient(selected_isa(), params, torch_threads());
}

void fill_zero(Tensor t) { std::memset(t.mutable_data_ptr(), 0, t.numel() * t.element_size()); }

std::tuple<Tensor, Tensor, Tensor, Tensors> layer_backward(
    OptionalTensor grad_output, OptionalTensor grad_h_n, OptionalTensor grad_c_n, Tensor input,
    Tensor hx, OptionalTensor cx, Tensors weight_ih, Tensors weight_hh, Tensors bias_ih,
    Tensors bias_hh, Tensors weight_hr, OptionalTensor batch_sizes, std::string cell, Tensor output,
    Tensor gates, Tensor cells, bool need_input, bool need_state, bool need_weights) {
  const Layer layer(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, batch_sizes,
                    cell);
  const LayerShape& s = layer.shape;
  const int64_t D = layer.D(), N = layer.N, H = s.H, SH = layer.S() * H;
  output = layer.checked(output, "output", layer.rows_shape(D * s.P), "[..., D*P]");
  if (!layer.rnn())
    gates = layer.checked(gates, "gates", {D, N, layer.S(), H},
                          "[D, N, 4, H] (saved by the forward pass)");
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
  Tensor grad_projected =
      allocate(layer.input, s.projected() ? std::vector<int64_t>{D, N, s.P} : none);
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
  if (need_input && N > 0) input_gradient(layer, grad_gates, grad_input);
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
