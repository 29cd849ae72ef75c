// The operators' CUDA implementations. USE_CUDA stays undefined, so this compiles and loads beside
// a torch without CUDA: the few functions needed of its CUDA libraries are weak symbols.
//
// The tests also compile this file for the emulated kernels, as operators on CPU tensors.
#include <torch/csrc/stable/accelerator.h>

#include "csrc/binding/passes.h"
#include "csrc/cuda/device.h"
#include "csrc/cuda/persistent.h"
#include "csrc/cuda/probe.h"
#include "csrc/cuda/stepwise.h"

namespace rnn_fused {
namespace {

#ifndef RNN_FUSED_EMULATION

// Makes the device of a tensor the current one, and knows its stream.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& t) : guard_(t.get_device_index()) {
    RNN_FUSED_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                    "CUDA tensors need a PyTorch with CUDA support, got one without");
    void* stream = nullptr;
    check_torch(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
    this->stream = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream;

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

#else

struct OnDevice {
  explicit OnDevice(const Tensor&) {}
  cudaStream_t stream = nullptr;
};

#endif

ScalarType scalar_type(DType dtype) {
  switch (dtype) {
    case DType::f32: return ScalarType::Float;
    case DType::f64: return ScalarType::Double;
    case DType::bf16: return ScalarType::BFloat16;
    case DType::f16: break;
  }
  return ScalarType::Half;
}

// The product of a step, by torch's library.
struct TorchProduct {
  const Tensor& like;  // of the device

  Tensor tensor(const DeviceMatrix& m) const {
    const int64_t sizes[] = {m.rows, m.columns}, strides[] = {m.row_stride, m.column_stride};
    return torch::stable::from_blob(const_cast<void*>(m.data), {sizes, 2}, {strides, 2},
                                    like.device(), scalar_type(m.dtype));
  }

  static void multiply(void* context, const DeviceMatrix& a, const DeviceMatrix& b,
                       const DeviceMatrix& out) {
    const auto& self = *static_cast<TorchProduct*>(context);
    matmul_accumulated(self.tensor(a), self.tensor(b), self.tensor(out));
  }

  DeviceProduct product() { return {multiply, this}; }
};

Tensor workspace(const Layer& layer, int64_t bytes) {
  return allocate(layer.input, {bytes}, ScalarType::Byte);
}

// The plan for a layer, as far as `kernels` leaves a choice.
CudaPlan choose(const Layer& layer, const std::string& kernels, Precision precision,
                bool backward) {
  RNN_FUSED_CHECK(kernels == "auto" || family_named(kernels), "[", layer.name,
                  "] kernels must be auto, stepwise, persistent, handoff, split or cluster, got '",
                  kernels, "'");
  RNN_FUSED_CHECK(!layer.padded, "[", layer.name,
                  "] lengths of a padded batch are for tensors on the CPU; pack it instead");
  const std::optional<Family> forced = family_named(kernels);
  const CudaPlan plan = plan_cuda(layer.shape, precision, current_gpu(), backward, forced);
  RNN_FUSED_CHECK(!forced || plan.family == forced, "[", layer.name, "] the ", kernels,
                  " kernels cannot run this layer: ", plan.why);
  return plan;
}

// batch_sizes and row_start in device memory.
class DeviceRows {
 public:
  DeviceRows(const Layer& layer, cudaStream_t stream) : T_(layer.shape.T) {
    if (!layer.batch_sizes || layer.shape.sizes_on_device) return;
    rows_ = allocate(layer.input, {2, T_}, ScalarType::Long);
    int64_t* rows = rows_->mutable_data_ptr<int64_t>();
    upload(layer.shape.batch_sizes, T_, rows, stream);
    upload(layer.shape.row_start, T_, rows + T_, stream);
  }

  template <class Params>
  Params with(Params params) const {
    if (!rows_) return params;
    params.batch_sizes = rows_->const_data_ptr<int64_t>();
    params.row_start = params.batch_sizes + T_;
    return params;
  }

 private:
  int64_t T_;
  OptionalTensor rows_;
};

// t: [matrices, N, columns].
void zero_tail(const Layer& layer, const Tensor& t, int64_t matrices, int64_t columns,
               cudaStream_t stream) {
  if (!layer.shape.sizes_on_device) return zero_known_tail(layer, t, matrices, columns);
  for (int64_t m = 0; m < matrices && layer.N > 0; ++m)
    rnn_fused::zero_tail(layer.shape, layer.N, columns * t.element_size(),
                         at(t, m * layer.N * columns), stream);
}

void run_loop(const Layer& layer, const CudaPlan& plan, Precision precision,
              const ForwardParams& params, cudaStream_t stream) {
  if (plan.family != Family::stepwise) {
    const DeviceRows rows(layer, stream);
    const Tensor scratch = workspace(layer, persistent_workspace(plan, layer.shape, false));
    persistent_forward(plan, precision, rows.with(params), scratch.mutable_data_ptr(), stream);
  } else {
    const Tensor scratch = workspace(layer, stepwise_forward_workspace(layer.shape));
    TorchProduct torch{layer.input};
    stepwise_forward(params, scratch.mutable_data_ptr(), torch.product(), stream);
  }
}

// The backward loop, a window a call.
class BackwardLoop {
 public:
  BackwardLoop(const Layer& layer, const CudaPlan& plan, Precision precision, cudaStream_t stream)
      : layer_(layer),
        plan_(plan),
        precision_(precision),
        stream_(stream),
        workspace_(workspace(layer, one_launch() ? persistent_workspace(plan, layer.shape, true)
                                                 : stepwise_backward_workspace(layer.shape))) {
    if (one_launch()) rows_.emplace(layer, stream);
  }

  void run(const BackwardParams& window) const {
    void* const memory = workspace_.mutable_data_ptr();
    if (one_launch()) {
      persistent_backward(plan_, precision_, rows_->with(window), memory, stream_);
    } else {
      TorchProduct torch{layer_.input};
      stepwise_backward(window, memory, torch.product(), stream_);
    }
  }

 private:
  bool one_launch() const { return plan_.family != Family::stepwise; }

  const Layer& layer_;
  const CudaPlan& plan_;
  const Precision precision_;
  const cudaStream_t stream_;
  const Tensor workspace_;
  std::optional<DeviceRows> rows_;
};

void run_forward(const Layer& layer, const ForwardPass& pass, const CudaPlan& plan,
                 Precision precision, cudaStream_t stream) {
  if (layer.shape.B > 0) {
    pass.multiply_input();
    if (layer.has_idle_sequences()) pass.begin_final_states();
    run_loop(layer, plan, precision, pass.params, stream);
  }
  pass.zero_tails([&](const Tensor& t, int64_t matrices, int64_t columns) {
    zero_tail(layer, t, matrices, columns, stream);
  });
}

// A layer of a stack whose layers run side by side, a chunk of timesteps a launch.
class StackedLayer {
 public:
  StackedLayer(std::unique_ptr<const Layer> layer, const FinalStates& final, int64_t chunk)
      : layer_(std::move(layer)),
        chunk_(chunk),
        pass_(*layer_, false, false, true, final, first_row(std::min(chunk, layer_->shape.T))),
        carried_c_(layer_->allocate_if(layer_->lstm(), {layer_->shape.B, layer_->shape.H},
                                       layer_->cell_dtype())) {
    if (layer_->has_idle_sequences()) pass_.begin_final_states();
    pass_.zero_tails([&](const Tensor& t, int64_t matrices, int64_t columns) {
      zero_known_tail(*layer_, t, matrices, columns);
    });
  }

  const Tensor& output() const { return pass_.output; }
  const ForwardParams& params() const { return pass_.params; }

  // Multiplies the input of chunk c, and returns what the loop has to know of it. No chunk has more
  // rows than the first.
  ForwardDirection begin(int64_t c) const {
    const int64_t T = layer_->shape.T;
    const Range steps = {c * chunk_, std::min((c + 1) * chunk_, T)};
    ForwardDirection own = pass_.params.direction[0];
    own.first_row = layer_->rnn() ? 0 : first_row(steps.begin);
    pass_.multiply_input({first_row(steps.begin), first_row(steps.end)}, own.first_row);
    own.steps_before = steps.begin;
    own.steps_after = T - steps.end;
    if (c > 0) own.h0 = own.h_n;
    if (layer_->lstm()) own.carried_c = at(carried_c_, 0);
    return own;
  }

 private:
  // Of a timestep, or behind the last.
  int64_t first_row(int64_t t) const {
    return t < layer_->shape.T ? layer_->shape.row(t) : layer_->rows;
  }

  const std::unique_ptr<const Layer> layer_;
  const int64_t chunk_;
  const ForwardPass pass_;
  const Tensor carried_c_;
};

// Returns the output of the last of so many layers. first: the stack's first.
Tensor run_side_by_side(const Stack& stack, int64_t layers, std::unique_ptr<const Layer> first,
                        const StackPlan& how, const FinalStates& final, Precision precision,
                        cudaStream_t stream) {
  const int64_t T = first->shape.T, together = how.together;
  const DeviceRows rows(*first, stream);
  LayerShape all = first->shape;
  all.directions = how.together;
  const Tensor scratch = workspace(*first, persistent_workspace(how.plan, all, false));
  std::vector<std::unique_ptr<StackedLayer>> places(together);
  for (int64_t launch = 0; launch < how.launches(T, layers); ++launch) {
    std::vector<ForwardDirection> running;
    ForwardParams params{};
    for (int64_t place = 0; place < together; ++place) {
      const auto part = how.part(launch, place, T, layers);
      if (!part) continue;
      const auto [l, chunk] = *part;
      if (chunk == 0) {
        auto layer =
            l == 0 ? std::move(first) : stack.layer(l, places[(l - 1) % together]->output());
        const FinalStates own = final.of(*layer, l);
        places[place] = std::make_unique<StackedLayer>(std::move(layer), own, how.chunk);
      }
      running.push_back(places[place]->begin(chunk));
      params = places[place]->params();
    }
    params.stacked = true;
    params.directions = static_cast<int>(running.size());
    std::copy(running.begin(), running.end(), params.direction);
    CudaPlan plan = how.plan;  // of fewer layers where the first or the last ones run
    plan.blocks = plan.blocks / together * params.directions;
    persistent_forward(plan, precision, rows.with(params), scratch.mutable_data_ptr(), stream);
  }
  return places[(layers - 1) % together]->output();
}

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
                           double gate_slope, std::optional<double> cell_clip, std::string kernels,
                           bool allow_tf32, int64_t layers) {
  const Stack stack(input, hx, cx, reset_hx, reset_cx, weight_ih, weight_hh, bias_ih, bias_hh,
                    weight_hr, sizes, resets, cell, gate_slope, cell_clip, layers);
  const OnDevice device(input);
  const Precision precision = allow_tf32 ? Precision::tf32 : Precision::exact;
  Tensor output = input;
  std::optional<FinalStates> final;
  for (int64_t l = 0; l < layers; ++l) {
    std::unique_ptr<const Layer> layer = stack.layer(l, output);
    const CudaPlan plan = choose(*layer, kernels, precision, false);
    if (l == 0) {
      final.emplace(*layer, layers);
      const StackPlan how =
          plan_cuda_stack(layer->shape, layers, precision, current_gpu(), family_named(kernels));
      if (how.together > 1) {
        output = run_side_by_side(stack, layers, std::move(layer), how, *final, precision,
                                  device.stream);
        break;
      }
    }
    const ForwardPass pass(*layer, false, false, true, final->of(*layer, l), layer->N);
    run_forward(*layer, pass, plan, precision, device.stream);
    output = pass.output;
  }
  return {output, final->h_n, final->c_n};
}

// h before the step of each row of the window, [M, P].
Tensor previous_h(const Layer& layer, const Window& window, int d, cudaStream_t stream) {
  const Tensor h = allocate(layer.input, {window.count(d), window.P});
  if (window.sizes_on_device) zero_tail(layer, h, 1, window.P, stream);
  gather_previous_h(window, d, h.mutable_data_ptr(), stream);
  return h;
}

// Some rows at a time, since the sums are as large as the gates.
void rebuild_gates(const Layer& layer, const BackwardPass& pass, const Window& window,
                   cudaStream_t stream) {
  constexpr int64_t kSums = 1 << 22;  // values
  const int64_t P = window.P, GH = layer.G() * window.H, SH = layer.S() * window.H;
  for (int d = 0; d < window.directions; ++d) {
    const int64_t N = window.count(d), origin = pass.origin(d, SH);
    if (N == 0) continue;
    const int64_t chunk = std::clamp<int64_t>(kSums / GH, 1, N);
    const Tensor sums = allocate(layer.input, {chunk, GH}, layer.cell_dtype());
    multiply_input(layer, d, window.rows[d], pass.grad_gates, SH, origin);
    const Tensor h = previous_h(layer, window, d, stream);
    const Tensor weights = matrix(layer.weight_hh[d], P, GH, 1, P);
    for (int64_t n = 0; n < N; n += chunk) {
      const int64_t rows = std::min(chunk, N - n);
      matmul_accumulated(matrix(h, rows, P, P, 1, n * P), weights, matrix(sums, rows, GH, GH));
      activate_gates(window, window.direction[d], rows, sums.const_data_ptr(),
                     at(pass.grad_gates, origin + n * SH), stream);
    }
  }
}

// Everything behind the loop is large products of torch's.
void input_gradient(const Layer& layer, const BackwardPass& pass, const Window& window,
                    const Tensor& grad_input) {
  const int64_t I = layer.I, GH = layer.G() * window.H, SH = layer.S() * window.H;
  for (int d = 0; d < window.directions; ++d) {
    const int64_t N = window.count(d);
    if (N == 0) continue;
    const bool accumulate = d > 0 || pass.adds_to_input();
    matmul(matrix(pass.grad_gates, N, GH, SH, 1, pass.origin(d, SH)), layer.weight_ih[d],
           matrix(grad_input, N, I, I, 1, window.rows[d].begin * I), accumulate);
  }
}

// Those of a window: the results, or, of several windows, added to them.
void weight_gradients(const Layer& layer, const BackwardPass& pass, const Window& window,
                      const Gradients& grads, cudaStream_t stream) {
  const int64_t I = layer.I, H = window.H, P = window.P, GH = layer.G() * H, SH = layer.S() * H;
  // Calls make(out) for `count` elements of a gradient from `first` on.
  const auto put = [&](const Tensor& grad, int64_t first, int64_t count, const auto& make) {
    if (!pass.several()) return make(grad, first);
    const Tensor more = allocate(layer.input, {count}, layer.cell_dtype());
    make(more, 0);
    add_to_sums(window.dtype, count, more.const_data_ptr(), at(grad, first), stream);
  };
  const auto product = [&](const Tensor& left, const Tensor& right, const Tensor& grad,
                           int64_t row) {
    const int64_t rows = left.size(0), columns = right.size(1);
    put(grad, row * columns, rows * columns, [&](const Tensor& out, int64_t first) {
      matmul_accumulated(left, right, matrix(out, rows, columns, columns, 1, first));
    });
  };
  for (int d = 0; d < window.directions; ++d) {
    const int64_t N = window.count(d);
    if (N == 0) continue;
    const Tensor x = matrix(layer.input, N, I, I, 1, window.rows[d].begin * I);
    const Tensor h = previous_h(layer, window, d, stream);
    // `count` gates from `first` on, as [count, N].
    const auto gates = [&](int64_t first, int64_t count) {
      return matrix(pass.grad_gates, count, N, 1, SH, pass.origin(d, SH) + first);
    };
    const auto sum = [&](int64_t first, int64_t count, const Tensors& grad, int64_t row) {
      if (grad.empty()) return;
      put(grad[d], row, count, [&](const Tensor& out, int64_t begin) {
        const int64_t dim = 1;
        Tensor total = vector(out, count, begin);
        torch::stable::sum_out(total, gates(first, count), {{&dim, 1}});
      });
    };
    product(gates(0, GH), x, grads.ih[d], 0);
    sum(0, GH, grads.bias_ih, 0);
    // hn of the GRU stands behind n.
    const int64_t joint = window.cell == Cell::gru ? 2 * H : GH;
    product(gates(0, joint), h, grads.hh[d], 0);
    sum(0, joint, grads.bias_hh, 0);
    if (joint < GH) {
      product(gates(3 * H, H), h, grads.hh[d], joint);
      sum(3 * H, H, grads.bias_hh, joint);
    }
    if (window.projected())
      product(matrix(pass.grad_projected, P, N, 1, P, pass.origin(d, P)),
              matrix(pass.hidden, N, H, H, 1, pass.origin(d, H)), grads.hr[d], 0);
  }
}

// kOverwriteGates: of the saved gates nothing is left but their memory.
template <bool kOverwriteGates>
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
  // Each window is a launch more, which is not known to pay where the gates are there.
  const BackwardPass pass(layer, grad_output, grad_h_n, grad_c_n, grad_cells, output, gates, cells,
                          kOverwriteGates, false);
  const Gradients grads(layer, pass, need_input, need_weights);
  const BackwardLoop loop(layer, plan, precision, device.stream);
  for (int64_t k = 0; k < pass.windows(); ++k) {
    const Window window = pass.window(k);
    if (pass.rebuild_gates) rebuild_gates(layer, pass, window, device.stream);
    if (layer.shape.B > 0) loop.run(window);
    if (layer.shape.sizes_on_device) {  // the large products cover the tail
      const int64_t D = layer.D(), H = layer.shape.H;
      zero_tail(layer, pass.grad_gates, D, layer.S() * H, device.stream);
      if (layer.shape.projected()) {
        zero_tail(layer, pass.grad_projected, D, layer.shape.P, device.stream);
        zero_tail(layer, pass.hidden, D, H, device.stream);
      }
    }
    if (need_input) input_gradient(layer, pass, window, grads.input);
    if (need_weights) weight_gradients(layer, pass, window, grads, device.stream);
  }
  if (need_input && layer.rows < layer.N) zero_known_tail(layer, grads.input, 1, layer.I);
  return grads.results(layer, pass, need_state && hx.has_value(),
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
  m.impl("layer_backward", TORCH_BOX(&layer_backward<false>));
  m.impl("layer_backward_", TORCH_BOX(&layer_backward<true>));
  m.impl("cuda_probe", TORCH_BOX(&cuda_probe));
}
#else
STABLE_TORCH_LIBRARY_IMPL(rnn_fused_emulated, CPU, m) {
  m.impl("layer_forward", TORCH_BOX(&layer_forward));
  m.impl("stack_forward", TORCH_BOX(&stack_forward));
  m.impl("layer_backward", TORCH_BOX(&layer_backward<false>));
  m.impl("layer_backward_", TORCH_BOX(&layer_backward<true>));
}
#endif

}  // namespace rnn_fused
