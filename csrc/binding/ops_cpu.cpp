// The operators on the CPU: allocate, multiply the inputs, run the loop; and, backward, the large
// products that turn the gradients of the pre-activations into those of weights and inputs.
#include <thread>

#include "csrc/binding/passes.h"
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

// The large products around the loop are our own: they keep the pre-activations in the cache and in
// float, and give the same bits for any number of threads. But only torch's library uses AMX, by
// far the fastest for bfloat16.
bool by_library(const Layer& layer, int64_t rows, int64_t columns) {
  constexpr double kLargeProduct = 4e6;  // multiply-adds
  return layer.shape.dtype == DType::bf16 &&
         static_cast<double>(layer.rows) * rows * columns >= kLargeProduct && has_amx_bf16();
}

ForwardTensors layer_forward(Tensor input, Tensor hx, OptionalTensor cx, OptionalTensor reset_hx,
                             OptionalTensor reset_cx, Tensors weight_ih, Tensors weight_hh,
                             Tensors bias_ih, Tensors bias_hh, Tensors weight_hr,
                             OptionalTensor batch_sizes, OptionalTensor resets, std::string cell,
                             double gate_slope, std::optional<double> cell_clip,
                             std::optional<double> grad_clip, std::string, bool, bool save_gates,
                             bool save_cells) {
  const Layer layer(input, hx, cx, reset_hx, reset_cx, weight_ih, weight_hh, bias_ih, bias_hh,
                    weight_hr, batch_sizes, resets, cell, gate_slope, cell_clip, grad_clip);
  const bool input_by_library = by_library(layer, layer.G() * layer.shape.H, layer.I);
  const ForwardPass pass(layer, save_gates, save_cells, input_by_library);
  if (layer.shape.B > 0) {
    if (input_by_library) pass.multiply_input();
    cpu_forward(selected_isa(), pass.params, torch_threads());
  }
  pass.zero_tails([&](const Tensor& t, int64_t matrices, int64_t columns) {
    zero_known_tail(layer, t, matrices, columns);
  });
  return pass.results();
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
  const char* reset = static_cast<const char*>(layer.direction(d).reset_h);
  Rows pointers(layer.rows);
  for (int64_t t = 0; t < s.T; ++t) {
    const int64_t before = d == 0 ? t - 1 : t + 1;
    const int64_t known = before < 0 || before >= s.T ? 0 : std::min(s.active(t), s.active(before));
    for (int64_t b = 0; b < s.active(t); ++b)
      pointers[s.row(t) + b] = s.enters_reset(d, t, b) ? reset + b * bytes
                               : b < known ? outputs + (s.row(before) + b) * layer.D() * bytes
                                           : initial + b * bytes;
  }
  return pointers;
}

void rebuild_gates(const Layer& layer, const BackwardPass& pass) {
  const LayerShape& s = layer.shape;
  for (int d = 0; d < s.directions; ++d) {
    const Rows h = previous_h(layer, pass.output, d);
    const DirectionWeights w = layer.direction(d);
    cpu_gates(selected_isa(),
              {s.cell, s.dtype, s.options, layer.rows, layer.I, s.H, s.P,
               layer.input.const_data_ptr(), h.data(), layer.weight_ih[d].const_data_ptr(),
               w.weight_hh, w.bias_ih, w.bias_hh, at(pass.gates, d * layer.N * layer.S() * s.H)},
              torch_threads());
  }
}

// right[i].out = left[:, :rows].T @ right[i], with left `offset` elements into `grads`; where asked
// for, also the sums of left's rows.
void outer_product(const Layer& layer, const Tensor& grads, int64_t offset, int64_t stride,
                   int64_t rows, std::array<OuterProductParams::Right, 2> right,
                   std::array<void*, 2> sums = {}) {
  if (!by_library(layer, rows, right[0].columns + right[1].columns)) {
    cpu_outer_product(selected_isa(),
                      {layer.shape.dtype,
                       layer.rows,
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
    Tensor gathered = allocate(layer.input, {layer.rows, columns});
    for (int64_t n = 0; n < layer.rows; ++n) std::memcpy(at(gathered, n * columns), row[n], bytes);
    Tensor result = allocate(layer.input, {rows, columns});
    matmul(matrix(grads, rows, layer.rows, 1, stride, offset), gathered, result);
    std::memcpy(out, at(result, 0), rows * bytes);
  }
  if (!sums[0]) return;
  Tensor total = allocate(layer.input, {rows});
  const int64_t dim = 0;
  torch::stable::sum_out(total, matrix(grads, layer.rows, rows, stride, 1, offset), {{&dim, 1}});
  for (void* out : sums)
    if (out) std::memcpy(out, at(total, 0), rows * grads.element_size());
}

WeightGradients weight_gradients(const Layer& layer, const BackwardPass& pass) {
  const LayerShape& s = layer.shape;
  const int64_t N = layer.N, I = layer.I, H = s.H, P = s.P, GH = layer.G() * H, SH = layer.S() * H;
  const int64_t size = layer.input.element_size();
  WeightGradients grads(layer);
  if (layer.rows == 0) {
    for (const Tensor& t : grads.all()) std::memset(at(t, 0), 0, t.numel() * t.element_size());
    return grads;
  }
  const Rows x = rows_of(layer.input.const_data_ptr(), layer.rows, I * size);
  for (int d = 0; d < s.directions; ++d) {
    const Rows h = previous_h(layer, pass.output, d);
    // From one row of the weights on.
    const auto ih = [&](int64_t row) -> OuterProductParams::Right {
      return {x.data(), I, at(grads.ih[d], row * I)};
    };
    const auto hh = [&](int64_t row) -> OuterProductParams::Right {
      return {h.data(), P, at(grads.hh[d], row * P)};
    };
    const auto sums = [&](const Tensors& list, int64_t row) {
      return list.empty() ? nullptr : at(list[d], row);
    };
    const int64_t origin = d * N * SH;
    // n and hn of the GRU: one belongs to W_ih, the other to W_hh.
    const int64_t joint = s.cell == Cell::gru ? 2 * H : GH;
    outer_product(layer, pass.grad_gates, origin, SH, joint, {ih(0), hh(0)},
                  {sums(grads.bias_ih, 0), sums(grads.bias_hh, 0)});
    if (joint < GH) {
      outer_product(layer, pass.grad_gates, origin + joint, SH, H, {ih(joint)},
                    {sums(grads.bias_ih, joint)});
      outer_product(layer, pass.grad_gates, origin + joint + H, SH, H, {hh(joint)},
                    {sums(grads.bias_hh, joint)});
    }
    if (s.projected()) {
      const Rows rows = rows_of(at(pass.hidden, d * N * H), layer.rows, H * size);
      outer_product(layer, pass.grad_projected, d * N * P, P, P,
                    {{{rows.data(), H, at(grads.hr[d], 0)}}});
    }
  }
  return grads;
}

void input_gradient(const Layer& layer, const Tensor& grad_gates, const Tensor& grad_input) {
  const int64_t N = layer.N, GH = layer.G() * layer.shape.H, SH = layer.S() * layer.shape.H;
  if (by_library(layer, GH, layer.I)) {
    for (int d = 0; d < layer.shape.directions; ++d)
      matmul(matrix(grad_gates, layer.rows, GH, SH, 1, d * N * SH), layer.weight_ih[d],
             matrix(grad_input, layer.rows, layer.I, layer.I), d > 0);
    return;
  }
  InputGradientParams params{
      layer.shape.dtype, layer.shape.directions, layer.rows, GH, layer.I, SH, {}, {},
      at(grad_input, 0)};
  for (int d = 0; d < layer.shape.directions; ++d) {
    params.grad_gates[d] = at(grad_gates, d * N * SH);
    params.weight_ih[d] = layer.weight_ih[d].const_data_ptr();
  }
  cpu_input_gradient(selected_isa(), params, torch_threads());
}

// kOverwriteGates: of the saved gates nothing is left but their memory.
template <bool kOverwriteGates>
BackwardTensors layer_backward(OptionalTensor grad_output, OptionalTensor grad_h_n,
                               OptionalTensor grad_c_n, OptionalTensor grad_cells, Tensor input,
                               Tensor hx, OptionalTensor cx, OptionalTensor reset_hx,
                               OptionalTensor reset_cx, Tensors weight_ih, Tensors weight_hh,
                               Tensors bias_ih, Tensors bias_hh, Tensors weight_hr,
                               OptionalTensor batch_sizes, OptionalTensor resets, std::string cell,
                               double gate_slope, std::optional<double> cell_clip,
                               std::optional<double> grad_clip, std::string, bool, Tensor output,
                               Tensor gates, Tensor cells, bool need_input, bool need_state,
                               bool need_weights) {
  const Layer layer(input, hx, cx, reset_hx, reset_cx, weight_ih, weight_hh, bias_ih, bias_hh,
                    weight_hr, batch_sizes, resets, cell, gate_slope, cell_clip, grad_clip);
  const BackwardPass pass(layer, grad_output, grad_h_n, grad_c_n, grad_cells, output, gates, cells,
                          kOverwriteGates);
  if (pass.rebuild_gates) rebuild_gates(layer, pass);
  if (layer.shape.B > 0) cpu_backward(selected_isa(), pass.params, torch_threads());

  Tensor grad_input = layer.allocate_if(need_input, layer.rows_shape(layer.I));
  if (need_input && layer.rows > 0) input_gradient(layer, pass.grad_gates, grad_input);
  if (need_input && layer.has_tail()) zero_known_tail(layer, grad_input, 1, layer.I);
  return pass.results(layer, grad_input, need_state, reset_hx.has_value(),
                      need_weights ? weight_gradients(layer, pass).all() : Tensors());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rnn_fused, CPU, m) {
  m.impl("layer_forward", TORCH_BOX(&layer_forward));
  m.impl("layer_backward", TORCH_BOX(&layer_backward<false>));
  m.impl("layer_backward_", TORCH_BOX(&layer_backward<true>));
}

}  // namespace rnn_fused
