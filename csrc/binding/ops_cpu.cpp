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

// Of a padded batch, what no loop writes.
void zero_padding(const Sequences& batch, const Tensor& t, int64_t columns) {
  const int64_t bytes = columns * t.element_size(), B = batch.shape.B;
  for (int64_t step = 0; step < batch.input.size(0); ++step)
    for (int64_t b = batch.active[step]; b < B; ++b)
      std::memset(at(t, (step * B + batch.order[b]) * columns), 0, bytes);
}

// Without the weights themselves, for a layer of so many inputs.
PackParams pack_params(const Sequences& like, int64_t input_size) {
  const LayerShape& s = like.shape;
  return {s.cell, s.dtype, input_size, s.H, s.P, {}, {}, {}, {}, {}};
}

// What stands behind the packed weights of a direction: whom they are for, since sizes alone do not
// tell.
struct PackedTag {
  int32_t isa, input_size;
  bool operator==(const PackedTag&) const = default;
};

PackedTag tag_of(const PackParams& params) {
  return {static_cast<int32_t>(selected_isa()), static_cast<int32_t>(params.I)};
}

// How many values a direction has with its tag, in whole cache lines: the next one is aligned.
int64_t packed_size(const PackParams& params, int64_t element_size) {
  constexpr int64_t kLine = 64;
  const int64_t bytes = cpu_pack_weights(selected_isa(), params, nullptr) * element_size +
                        static_cast<int64_t>(sizeof(PackedTag));
  return (bytes + kLine - 1) / kLine * kLine / element_size;
}

// Of direction d.
char* place_of_tag(const Tensor& packed, int64_t d) {
  return static_cast<char*>(at(packed, (d + 1) * packed.size(1))) - sizeof(PackedTag);
}

void run_forward(const Layer& layer, const ForwardPass& pass) {
  if (layer.shape.B > 0) cpu_forward(selected_isa(), pass.params, torch_threads());
  pass.zero_tails([&](const Tensor& t, int64_t matrices, int64_t columns) {
    zero_known_tail(layer, t, matrices, columns);
  });
  if (layer.padded) zero_padding(layer, pass.output, pass.params.output_stride);
}

ForwardTensors layer_forward(Tensor input, OptionalTensor hx, OptionalTensor cx,
                             OptionalTensor reset_hx, OptionalTensor reset_cx, Tensors weight_ih,
                             Tensors weight_hh, Tensors bias_ih, Tensors bias_hh, Tensors weight_hr,
                             OptionalTensor sizes, OptionalTensor resets, std::string cell,
                             double gate_slope, std::optional<double> cell_clip,
                             std::optional<double> grad_clip, std::string, bool allow_tf32,
                             bool save_gates, bool save_cells) {
  Layer layer(input, hx, cx, reset_hx, reset_cx, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr,
              sizes, resets, cell, gate_slope, cell_clip, grad_clip);
  layer.shape.split = allow_tf32 && can_split(layer.shape);
  const ForwardPass pass(layer, save_gates, save_cells, false);
  run_forward(layer, pass);
  return pass.results();
}

StackTensors stack_forward(Tensor input, OptionalTensor hx, OptionalTensor cx,
                           OptionalTensor reset_hx, OptionalTensor reset_cx, Tensors weight_ih,
                           Tensors weight_hh, Tensors bias_ih, Tensors bias_hh, Tensors weight_hr,
                           OptionalTensor sizes, OptionalTensor resets, std::string cell,
                           double gate_slope, std::optional<double> cell_clip,
                           std::optional<double> grad_clip, std::string, bool allow_tf32,
                           int64_t layers, Tensors masks, bool save_gates, bool save_cells) {
  const Stack stack(input, hx, cx, reset_hx, reset_cx, weight_ih, weight_hh, bias_ih, bias_hh,
                    weight_hr, sizes, resets, cell, gate_slope, cell_clip, grad_clip, layers,
                    masks);
  StackResults results = {save_gates || save_cells, input};
  std::optional<FinalStates> final;
  for (int64_t l = 0; l < layers; ++l) {
    const std::unique_ptr<Layer> layer =
        stack.layer(l, l == 0 ? input : stack.above(l - 1, results.output));
    layer->shape.split = allow_tf32 && can_split(layer->shape);
    if (!final) final.emplace(*layer, layers);
    const ForwardPass pass(*layer, save_gates, save_cells, false, final->of(*layer, l), layer->N);
    run_forward(*layer, pass);
    results.add(pass);
  }
  return results.tensors(*final);
}

Tensor pack_weights(Tensors weight_ih, Tensors weight_hh, Tensors bias_ih, Tensors bias_hh,
                    Tensors weight_hr, std::string cell) {
  const int64_t D = static_cast<int64_t>(weight_ih.size());
  RNN_FUSED_CHECK(D >= 1 && weight_ih[0].dim() == 2, "[", cell,
                  "] weight_ih must hold a matrix per direction");
  // A layer over nothing checks the rest.
  const Tensor& like = weight_ih[0];
  const Tensor input = allocate(like, {1, 0, like.size(1)});
  const Layer layer(input, {}, {}, {}, {}, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, {},
                    {}, cell, 1, {}, {});
  Tensor packed;
  for (int d = 0; d < layer.shape.directions; ++d) {
    const DirectionWeights w = layer.direction(d);
    PackParams params = pack_params(layer, layer.I);
    params.weight_ih = layer.weight_ih[d].const_data_ptr();
    params.weight_hh = w.weight_hh;
    params.weight_hr = w.weight_hr;
    params.bias_ih = w.bias_ih;
    params.bias_hh = w.bias_hh;
    if (d == 0) packed = allocate_zeros(like, {D, packed_size(params, like.element_size())});
    cpu_pack_weights(selected_isa(), params, at(packed, d * packed.size(1)));
    const PackedTag tag = tag_of(params);
    std::memcpy(place_of_tag(packed, d), &tag, sizeof tag);
  }
  return packed;
}

// The layers of a stack, their weights packed.
struct PackedLayers : Sequences {
  Tensors packed;

  PackedLayers(const Tensor& input_, const OptionalTensor& hx_, const OptionalTensor& cx_,
               const OptionalTensor& reset_hx_, const OptionalTensor& reset_cx_,
               const Tensors& packed_, const OptionalTensor& sizes, const OptionalTensor& resets_,
               const std::string& cell, int64_t hidden_size, int64_t output_size, double gate_slope,
               std::optional<double> cell_clip)
      : Sequences(input_, hx_, sizes, cell, directions_of(packed_, cell), gate_slope, cell_clip,
                  std::nullopt) {
    const bool projected = lstm() && output_size < hidden_size;
    RNN_FUSED_CHECK(output_size >= 1 && (output_size == hidden_size || projected), "[", name,
                    "] output_size must be hidden_size = ", hidden_size,
                    ", or of an LSTM from 1 to less, got ", output_size);
    shape.H = hidden_size;
    shape.P = output_size;
    read_states(input_, hx_, cx_, static_cast<int64_t>(packed_.size()) * D());
    for (size_t l = 0; l < packed_.size(); ++l) {
      const PackParams params = pack_params(*this, input_size(l));
      packed.push_back(checked(packed_[l], "packed",
                               {D(), packed_size(params, input.element_size())},
                               "[D, packed values]"));
      for (int64_t d = 0; d < D(); ++d) {
        PackedTag tag;
        std::memcpy(&tag, place_of_tag(packed[l], d), sizeof tag);
        RNN_FUSED_CHECK(tag == tag_of(params), "[", name,
                        "] packed must be what pack_weights makes here, for ",
                        isa_name(selected_isa()), " and an input of ", params.I,
                        ", got weights packed for another instruction set or input");
      }
    }
    read_resets(resets_, reset_hx_, reset_cx_);
  }

  int64_t input_size(size_t layer) const { return layer == 0 ? I : D() * shape.P; }

 private:
  static int64_t directions_of(const Tensors& packed, const std::string& cell) {
    RNN_FUSED_CHECK(!packed.empty() && packed[0].dim() == 2, "[", cell,
                    "] packed must hold a tensor [D, packed values] per layer");
    return packed[0].size(0);
  }
};

std::tuple<Tensor, Tensor, Tensor> stack_infer(Tensor input, OptionalTensor hx, OptionalTensor cx,
                                               OptionalTensor reset_hx, OptionalTensor reset_cx,
                                               Tensors packed, OptionalTensor sizes,
                                               OptionalTensor resets, std::string cell,
                                               int64_t hidden_size, int64_t output_size,
                                               double gate_slope, std::optional<double> cell_clip) {
  const PackedLayers stack(input, hx, cx, reset_hx, reset_cx, packed, sizes, resets, cell,
                           hidden_size, output_size, gate_slope, cell_clip);
  const LayerShape& s = stack.shape;
  const size_t layers = stack.packed.size();
  const int64_t D = stack.D(), width = D * s.P;
  const Tensor output = allocate(stack.input, stack.rows_shape(width));
  const Tensor h_n = allocate(stack.input, {stack.states, s.B, s.P});
  const Tensor c_n = stack.allocate_if(stack.lstm(), {stack.states, s.B, s.H});
  // The layers' outputs go to two places in turn, the last one's to `output`.
  const Tensor between = stack.allocate_if(layers > 1, stack.rows_shape(width));
  std::vector<ForwardParams> params;
  for (size_t l = 0; l < layers; ++l) {
    const Tensor& out = (layers - 1 - l) % 2 == 0 ? output : between;
    const void* const in =
        l == 0 ? stack.input.const_data_ptr() : params[l - 1].direction[0].output;
    params.push_back({s, {}, in, stack.input_size(l), false, 0, width, false});
    for (int d = 0; d < s.directions; ++d) {
      const int64_t m = static_cast<int64_t>(l) * D + d;
      ForwardDirection& dir = params[l].direction[d];
      stack.point_to_states(dir, m);
      dir.output = at(out, d * s.P);
      dir.h_n = at(h_n, m * s.B * s.P);
      if (stack.lstm()) dir.c_n = at(c_n, m * s.B * s.H);
      dir.packed = at(stack.packed[l], d * stack.packed[l].size(1));
    }
  }
  if (s.B > 0)
    cpu_forward_stack(selected_isa(), params.data(), static_cast<int64_t>(layers), torch_threads());
  if (stack.has_tail()) zero_known_tail(stack, output, 1, width);
  if (stack.padded) zero_padding(stack, output, width);
  return {output, h_n, c_n};
}

using Rows = std::vector<const void*>;  // anywhere in memory

// What the weights of one direction were multiplied with in the rows of a window.
struct Operands {
  std::vector<int64_t> place;  // the rows of the caller's tensors
  Rows x, h;                   // for W_ih; h before the row's step, for W_hh

  Operands(const Layer& layer, const Window& window, int d)
      : place(window.count(d)), x(window.count(d)), h(window.count(d)) {
    const BackwardDirection& dir = window.direction[d];
    const int64_t size = layer.input.element_size(), I = layer.I, P = window.P;
    const auto row = [size](const void* first, int64_t element) {
      return static_cast<const char*>(first) + element * size;
    };
    const void* const input = layer.input.const_data_ptr();
    const auto [begin, end] = window.timesteps(d);
    int64_t n = 0;
    for (int64_t t = begin; t < end; ++t) {
      const int64_t before = d == 0 ? t - 1 : t + 1, active = window.active(t);
      const int64_t known =
          before < 0 || before >= window.T ? 0 : std::min(active, window.active(before));
      for (int64_t b = 0; b < active; ++b, ++n) {
        place[n] = window.place(t, b);
        x[n] = row(input, place[n] * I);
        h[n] = window.enters_reset(d, t, b) ? row(dir.reset_h, window.sequence(b) * P)
               : b < known ? row(dir.output, window.place(before, b) * layer.D() * P)
                           : row(dir.h0, window.sequence(b) * P);
      }
    }
  }
};

void rebuild_gates(const Layer& layer, const Window& window, int d, const Operands& operands) {
  const BackwardDirection& dir = window.direction[d];
  cpu_gates(
      selected_isa(),
      {window.cell, window.dtype, window.options, window.count(d), layer.I, window.H, window.P,
       operands.x.data(), operands.h.data(), layer.weight_ih[d].const_data_ptr(), dir.weight_hh,
       dir.bias_ih, dir.bias_hh, dir.grad_gates, repays_packing(window), window.split},
      torch_threads());
}

// Those of direction d and a window: the results, or, of several windows, added to them.
void weight_gradients(const Layer& layer, const BackwardPass& pass, const Window& window, int d,
                      const Operands& operands, const Gradients& grads) {
  const int64_t I = layer.I, H = window.H, P = window.P, GH = layer.G() * H, SH = layer.S() * H;
  const int64_t N = window.count(d);
  // From one row of the weights on.
  const auto ih = [&](int64_t row) -> OuterProductParams::Right {
    return {operands.x.data(), I, at(grads.ih[d], row * I)};
  };
  const auto hh = [&](int64_t row) -> OuterProductParams::Right {
    return {operands.h.data(), P, at(grads.hh[d], row * P)};
  };
  const auto sums = [&](const Tensors& list, int64_t row) {
    return list.empty() ? nullptr : at(list[d], row);
  };
  // left: so many columns of matrix [M, stride], from `column` on.
  const auto product = [&](const Tensor& matrix, int64_t stride, int64_t column, int64_t columns,
                           std::array<OuterProductParams::Right, 2> right,
                           std::array<void*, 2> sums) {
    cpu_outer_product(selected_isa(),
                      {window.dtype,
                       N,
                       columns,
                       at(matrix, pass.origin(d, stride) + column),
                       stride,
                       {right[0], right[1]},
                       {sums[0], sums[1]},
                       pass.several(),
                       window.split},
                      torch_threads());
  };
  // n and hn of the GRU: one belongs to W_ih, the other to W_hh.
  const int64_t joint = window.cell == Cell::gru ? 2 * H : GH;
  product(pass.grad_gates, SH, 0, joint, {ih(0), hh(0)},
          {sums(grads.bias_ih, 0), sums(grads.bias_hh, 0)});
  if (joint < GH) {
    product(pass.grad_gates, SH, joint, H, {ih(joint)}, {sums(grads.bias_ih, joint)});
    product(pass.grad_gates, SH, joint + H, H, {hh(joint)}, {sums(grads.bias_hh, joint)});
  }
  if (window.projected()) {
    Rows hidden(N);
    for (int64_t n = 0; n < N; ++n)
      hidden[n] =
          static_cast<const char*>(window.direction[d].hidden) + n * H * layer.input.element_size();
    product(pass.grad_projected, P, 0, P, {{{hidden.data(), H, at(grads.hr[d], 0)}}}, {});
  }
}

// Of directions [d, d + together), which come to the same rows.
void input_gradient(const Layer& layer, const BackwardPass& pass, const Window& window, int d,
                    int together, const Operands& operands, const Tensor& grad_input) {
  const int64_t N = window.count(d), I = layer.I;
  const int64_t GH = layer.G() * window.H, SH = layer.S() * window.H;
  InputGradientParams params{window.dtype,
                             together,
                             N,
                             GH,
                             I,
                             SH,
                             {},
                             {},
                             at(grad_input, 0),
                             operands.place.data(),
                             pass.adds_to_input(),
                             window.split};
  for (int i = 0; i < together; ++i) {
    params.grad_gates[i] = window.direction[d + i].grad_gates;
    params.weight_ih[i] = layer.weight_ih[d + i].const_data_ptr();
  }
  cpu_input_gradient(selected_isa(), params, torch_threads());
}

Gradients run_backward(const Layer& layer, const BackwardPass& pass, bool need_input,
                       bool need_weights) {
  Gradients grads(layer, pass, need_weights);
  for (int64_t k = 0; k < pass.windows(); ++k) {
    const Window window = pass.window(k);
    std::vector<Operands> operands;
    const bool needed = pass.rebuild_gates || need_input || need_weights;
    for (int d = 0; needed && d < window.directions; ++d) {
      operands.emplace_back(layer, window, d);
      if (pass.rebuild_gates && window.count(d) > 0) rebuild_gates(layer, window, d, operands[d]);
    }
    if (layer.shape.B > 0) cpu_backward(selected_isa(), window, torch_threads());
    if (k + 1 == pass.windows()) pass.spend_cells();
    if (k == 0) grads.make_input(layer, pass, need_input);
    // Directions that come to the same rows in the same window are one product.
    const int together = pass.adds_to_input() ? 1 : window.directions;
    for (int d = 0; d < window.directions; ++d) {
      if (!needed || window.count(d) == 0) continue;
      if (need_input && d % together == 0)
        input_gradient(layer, pass, window, d, together, operands[d], grads.input);
      if (need_weights) weight_gradients(layer, pass, window, d, operands[d], grads);
    }
  }
  if (need_input && layer.has_tail()) zero_known_tail(layer, grads.input, 1, layer.I);
  if (need_input && layer.padded) zero_padding(layer, grads.input, layer.I);
  pass.spend_gates();
  grads.round_sums();
  return grads;
}

template <Reuse kReuse>
BackwardTensors layer_backward(OptionalTensor grad_output, OptionalTensor grad_h_n,
                               OptionalTensor grad_c_n, OptionalTensor grad_cells, Tensor input,
                               OptionalTensor hx, OptionalTensor cx, OptionalTensor reset_hx,
                               OptionalTensor reset_cx, Tensors weight_ih, Tensors weight_hh,
                               Tensors bias_ih, Tensors bias_hh, Tensors weight_hr,
                               OptionalTensor sizes, OptionalTensor resets, std::string cell,
                               double gate_slope, std::optional<double> cell_clip,
                               std::optional<double> grad_clip, std::string, bool allow_tf32,
                               Tensor output, Tensor gates, Tensor cells, bool need_input,
                               bool need_state, bool need_weights) {
  Layer layer(input, hx, cx, reset_hx, reset_cx, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr,
              sizes, resets, cell, gate_slope, cell_clip, grad_clip);
  layer.shape.split = allow_tf32 && can_split(layer.shape);
  const StateGradients states(layer);
  const BackwardPass pass(layer, states, {grad_output, grad_h_n, grad_c_n, grad_cells},
                          {output, gates, cells}, kReuse, true);
  return backward_results({run_backward(layer, pass, need_input, need_weights)}, states,
                          need_state && hx.has_value(), need_state && reset_hx.has_value());
}

template <Reuse kReuse>
BackwardTensors stack_backward(OptionalTensor grad_output, OptionalTensor grad_h_n,
                               OptionalTensor grad_c_n, Tensor input, OptionalTensor hx,
                               OptionalTensor cx, OptionalTensor reset_hx, OptionalTensor reset_cx,
                               Tensors weight_ih, Tensors weight_hh, Tensors bias_ih,
                               Tensors bias_hh, Tensors weight_hr, OptionalTensor sizes,
                               OptionalTensor resets, std::string cell, double gate_slope,
                               std::optional<double> cell_clip, std::optional<double> grad_clip,
                               std::string, bool allow_tf32, int64_t layers, Tensors masks,
                               Tensor output, Tensors below, Tensors gates, Tensors cells,
                               bool need_input, bool need_state, bool need_weights) {
  const Stack stack(input, hx, cx, reset_hx, reset_cx, weight_ih, weight_hh, bias_ih, bias_hh,
                    weight_hr, sizes, resets, cell, gate_slope, cell_clip, grad_clip, layers,
                    masks);
  const StackBackward backward(stack, input, {grad_output, grad_h_n, grad_c_n, {}}, output, below,
                               gates, cells);
  std::unique_ptr<Layer> layer;
  std::optional<StateGradients> states;
  std::vector<Gradients> grads;
  for (int64_t l = layers - 1; l >= 0; --l) {
    layer = backward.layer(l);
    layer->shape.split = allow_tf32 && can_split(layer->shape);
    if (!states) states.emplace(*layer, layers);
    const BackwardPass pass(*layer, states->of(*layer, l), backward.upstream(l, grad_output),
                            backward.saved(l), kReuse, true);
    grads.insert(grads.begin(), run_backward(*layer, pass, l > 0 || need_input, need_weights));
    if (l > 0) grad_output = backward.below(l, std::move(grads[0].input));
  }
  return backward_results(grads, *states, need_state && hx.has_value(),
                          need_state && reset_hx.has_value());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rnn_fused, CPU, m) {
  m.impl("pack_weights", TORCH_BOX(&pack_weights));
  m.impl("stack_infer", TORCH_BOX(&stack_infer));
  m.impl("layer_forward", TORCH_BOX(&layer_forward));
  m.impl("stack_forward", TORCH_BOX(&stack_forward));
  m.impl("layer_backward", TORCH_BOX(&layer_backward<Reuse::none>));
  m.impl("layer_backward_", TORCH_BOX(&layer_backward<Reuse::gates>));
  m.impl("stack_backward", TORCH_BOX(&stack_backward<Reuse::none>));
  m.impl("stack_backward_", TORCH_BOX(&stack_backward<Reuse::all>));
}

}  // namespace rnn_fused
