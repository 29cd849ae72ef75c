// The operators' CUDA implementations. USE_CUDA stays undefined, so this compiles and loads beside
// a torch without CUDA: the few functions needed of its CUDA libraries are weak symbols.
//
// The tests also compile this file for the emulated kernels, as operators on CPU tensors.
#include "csrc/binding/cuda_stack.h"
#include "csrc/cuda/probe.h"

namespace rnn_fused {
namespace {

ForwardTensors layer_forward(Tensor input, OptionalTensor hx, OptionalTensor cx,
                             OptionalTensor reset_hx, OptionalTensor reset_cx, Tensors weight_ih,
                             Tensors weight_hh, Tensors bias_ih, Tensors bias_hh, Tensors weight_hr,
                             OptionalTensor sizes, OptionalTensor resets, std::string cell,
                             double gate_slope, std::optional<double> cell_clip,
                             std::optional<double> grad_clip, std::string kernels, bool allow_tf32,
                             bool save_gates, bool save_cells) {
  const Layer layer(input, hx, cx, reset_hx, reset_cx, weight_ih, weight_hh, bias_ih, bias_hh,
                    weight_hr, sizes, resets, cell, gate_slope, cell_clip, grad_clip);
  const OnDevice device(layer.input);
  const Precision precision = allow_tf32 ? Precision::tf32 : Precision::exact;
  const CudaPlan plan = choose(layer, kernels, precision, false);
  if (save_gates || save_cells)
    choose(layer, kernels, precision, true);  // refuse now what the backward pass would
  const ForwardPass pass(layer, save_gates, save_cells, true);
  run_forward(layer, pass, plan, precision, device.stream);
  return pass.results();
}

StackTensors stack_forward(Tensor input, OptionalTensor hx, OptionalTensor cx,
                           OptionalTensor reset_hx, OptionalTensor reset_cx, Tensors weight_ih,
                           Tensors weight_hh, Tensors bias_ih, Tensors bias_hh, Tensors weight_hr,
                           OptionalTensor sizes, OptionalTensor resets, std::string cell,
                           double gate_slope, std::optional<double> cell_clip,
                           std::optional<double> grad_clip, std::string kernels, bool allow_tf32,
                           int64_t layers, Tensors masks, bool save_gates, bool save_cells) {
  const Stack stack(input, hx, cx, reset_hx, reset_cx, weight_ih, weight_hh, bias_ih, bias_hh,
                    weight_hr, sizes, resets, cell, gate_slope, cell_clip, grad_clip, layers,
                    masks);
  const OnDevice device(input);
  const Precision precision = allow_tf32 ? Precision::tf32 : Precision::exact;
  const bool saves = save_gates || save_cells;
  StackResults results = {saves, input};
  std::optional<FinalStates> final;
  for (int64_t l = 0; l < layers; ++l) {
    std::unique_ptr<const Layer> layer =
        stack.layer(l, l == 0 ? input : stack.above(l - 1, results.output));
    const CudaPlan plan = choose(*layer, kernels, precision, false);
    if (saves) choose(*layer, kernels, precision, true);  // as layer_forward does
    if (l == 0) {
      final.emplace(*layer, layers);
      const StackPlan how = plan_cuda_stack(layer->shape, layers, precision, current_gpu(), false,
                                            family_named(kernels));
      if (how.together > 1) {
        results = run_side_by_side(stack, std::move(layer), how, *final, precision, save_gates,
                                   save_cells, device.stream);
        break;
      }
    }
    const ForwardPass pass(*layer, save_gates, save_cells, true, final->of(*layer, l), layer->N);
    run_forward(*layer, pass, plan, precision, device.stream);
    results.add(pass);
  }
  return results.tensors(*final);
}

template <Reuse kReuse>
BackwardTensors layer_backward(OptionalTensor grad_output, OptionalTensor grad_h_n,
                               OptionalTensor grad_c_n, OptionalTensor grad_cells, Tensor input,
                               OptionalTensor hx, OptionalTensor cx, OptionalTensor reset_hx,
                               OptionalTensor reset_cx, Tensors weight_ih, Tensors weight_hh,
                               Tensors bias_ih, Tensors bias_hh, Tensors weight_hr,
                               OptionalTensor sizes, OptionalTensor resets, std::string cell,
                               double gate_slope, std::optional<double> cell_clip,
                               std::optional<double> grad_clip, std::string kernels,
                               bool allow_tf32, Tensor output, Tensor gates, Tensor cells,
                               bool need_input, bool need_state, bool need_weights) {
  const Layer layer(input, hx, cx, reset_hx, reset_cx, weight_ih, weight_hh, bias_ih, bias_hh,
                    weight_hr, sizes, resets, cell, gate_slope, cell_clip, grad_clip);
  const OnDevice device(layer.input);
  const Precision precision = allow_tf32 ? Precision::tf32 : Precision::exact;
  const CudaPlan plan = choose(layer, kernels, precision, true);
  const StateGradients states(layer);
  // Each window is a launch more, which is not known to pay where the gates are there.
  const BackwardPass pass(layer, states, {grad_output, grad_h_n, grad_c_n, grad_cells},
                          {output, gates, cells}, kReuse, false);
  return backward_results(
      {run_backward(layer, pass, plan, precision, need_input, need_weights, device.stream)}, states,
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
                               std::string kernels, bool allow_tf32, int64_t layers, Tensors masks,
                               Tensor output, Tensors below, Tensors gates, Tensors cells,
                               bool need_input, bool need_state, bool need_weights) {
  const Stack stack(input, hx, cx, reset_hx, reset_cx, weight_ih, weight_hh, bias_ih, bias_hh,
                    weight_hr, sizes, resets, cell, gate_slope, cell_clip, grad_clip, layers,
                    masks);
  const StackBackward backward(stack, input, {grad_output, grad_h_n, grad_c_n, {}}, output, below,
                               gates, cells);
  const OnDevice device(input);
  const Precision precision = allow_tf32 ? Precision::tf32 : Precision::exact;
  std::unique_ptr<const Layer> layer = backward.layer(layers - 1);
  const StateGradients states(*layer, layers);
  std::vector<Gradients> grads;
  for (int64_t l = layers - 1; l >= 0; --l) {
    const CudaPlan plan = choose(*layer, kernels, precision, true);
    const bool rebuilds = !layer->rnn() && backward.saved(l).gates.dim() == 1;
    if (grads.empty() && !rebuilds) {
      const StackPlan how = plan_cuda_stack(layer->shape, layers, precision, current_gpu(), true,
                                            family_named(kernels));
      if (how.together > 1) {
        grads = run_side_by_side(backward, std::move(layer), how, states, grad_output, precision,
                                 kReuse, need_input, need_weights, device.stream);
        break;
      }
    }
    const BackwardPass pass(*layer, states.of(*layer, l), backward.upstream(l, grad_output),
                            backward.saved(l), kReuse, false);
    grads.insert(grads.begin(), run_backward(*layer, pass, plan, precision, l > 0 || need_input,
                                             need_weights, device.stream));
    if (l == 0) break;
    grad_output = backward.below(l, std::move(grads[0].input));
    layer = backward.layer(l - 1);
  }
  return backward_results(grads, states, need_state && hx.has_value(),
                          need_state && reset_hx.has_value());
}

#ifndef RNN_FUSED_EMULATION

int64_t cuda_probe(Tensor device_of) {
  const OnDevice device(device_of);
  const Tensor scratch = allocate(device_of, {1}, ScalarType::Int);
  return probe_cuda_arch(scratch.mutable_data_ptr<int32_t>(), device.stream);
}

#endif

}  // namespace

#ifndef RNN_FUSED_EMULATION
STABLE_TORCH_LIBRARY_IMPL(rnn_fused, CUDA, m) {
  m.impl("layer_forward", TORCH_BOX(&layer_forward));
  m.impl("stack_forward", TORCH_BOX(&stack_forward));
  m.impl("layer_backward", TORCH_BOX(&layer_backward<Reuse::none>));
  m.impl("layer_backward_", TORCH_BOX(&layer_backward<Reuse::gates>));
  m.impl("stack_backward", TORCH_BOX(&stack_backward<Reuse::none>));
  m.impl("stack_backward_", TORCH_BOX(&stack_backward<Reuse::all>));
  m.impl("cuda_probe", TORCH_BOX(&cuda_probe));
}
#else
STABLE_TORCH_LIBRARY_IMPL(rnn_fused_emulated, CPU, m) {
  m.impl("layer_forward", TORCH_BOX(&layer_forward));
  m.impl("stack_forward", TORCH_BOX(&stack_forward));
  m.impl("layer_backward", TORCH_BOX(&layer_backward<Reuse::none>));
  m.impl("layer_backward_", TORCH_BOX(&layer_backward<Reuse::gates>));
  m.impl("stack_backward", TORCH_BOX(&stack_backward<Reuse::none>));
  m.impl("stack_backward_", TORCH_BOX(&stack_backward<Reuse::all>));
}
#endif

}  // namespace rnn_fused
