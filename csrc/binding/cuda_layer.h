// How a layer's passes run on a CUDA device, or where the tests emulate one.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "csrc/binding/passes.h"
#include "csrc/cuda/device.h"
#include "csrc/cuda/persistent.h"
#include "csrc/cuda/stepwise.h"

namespace rnn_fused {

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

inline ScalarType scalar_type(DType dtype) {
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

inline Tensor workspace(const Layer& layer, int64_t bytes) {
  return allocate(layer.input, {bytes}, ScalarType::Byte);
}

// The plan for a layer, as far as `kernels` leaves a choice.
inline CudaPlan choose(const Layer& layer, const std::string& kernels, Precision precision,
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
inline void zero_tail(const Layer& layer, const Tensor& t, int64_t matrices, int64_t columns,
                      cudaStream_t stream) {
  if (!layer.shape.sizes_on_device) return zero_known_tail(layer, t, matrices, columns);
  for (int64_t m = 0; m < matrices && layer.N > 0; ++m)
    rnn_fused::zero_tail(layer.shape, layer.N, columns * t.element_size(),
                         at(t, m * layer.N * columns), stream);
}

inline void run_loop(const Layer& layer, const CudaPlan& plan, Precision precision,
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

inline void run_forward(const Layer& layer, const ForwardPass& pass, const CudaPlan& plan,
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

// h before the step of each row of the window, [M, P].
inline Tensor previous_h(const Layer& layer, const Window& window, int d, cudaStream_t stream) {
  const Tensor h = allocate(layer.input, {window.count(d), window.P});
  if (window.sizes_on_device) zero_tail(layer, h, 1, window.P, stream);
  gather_previous_h(window, d, h.mutable_data_ptr(), stream);
  return h;
}

// Some rows at a time, since the sums are as large as the gates.
inline void rebuild_gates(const Layer& layer, const BackwardPass& pass, const Window& window,
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
inline void input_gradient(const Layer& layer, const BackwardPass& pass, const Window& window,
                           const Tensor& grad_input) {
  const int64_t I = layer.I, GH = layer.G() * window.H, SH = layer.S() * window.H;
  for (int d = 0; d < window.directions; ++d) {
    const int64_t N = window.count(d);
    if (N == 0) continue;
    const bool accumulate = d > 0 || pass.adds_to_input();
    const int64_t first = pass.origin(d, SH) + window.own_row(d) * SH;
    matmul(matrix(pass.grad_gates, N, GH, SH, 1, first), layer.weight_ih[d],
           matrix(grad_input, N, I, I, 1, window.rows[d].begin * I), accumulate);
  }
}

// Those of a window: the results, or, of several windows, added to them.
inline void weight_gradients(const Layer& layer, const BackwardPass& pass, const Window& window,
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

inline Gradients run_backward(const Layer& layer, const BackwardPass& pass, const CudaPlan& plan,
                              Precision precision, bool need_input, bool need_weights,
                              cudaStream_t stream) {
  Gradients grads(layer, pass, need_weights);
  const BackwardLoop loop(layer, plan, precision, stream);
  for (int64_t k = 0; k < pass.windows(); ++k) {
    const Window window = pass.window(k);
    if (pass.rebuild_gates) rebuild_gates(layer, pass, window, stream);
    if (layer.shape.B > 0) loop.run(window);
    if (k + 1 == pass.windows()) pass.spend_cells();
    if (k == 0) grads.make_input(layer, pass, need_input);
    if (layer.shape.sizes_on_device) {  // the large products cover the tail
      const int64_t D = layer.D(), H = layer.shape.H;
      zero_tail(layer, pass.grad_gates, D, layer.S() * H, stream);
      if (layer.shape.projected()) {
        zero_tail(layer, pass.grad_projected, D, layer.shape.P, stream);
        zero_tail(layer, pass.hidden, D, H, stream);
      }
    }
    if (need_input) input_gradient(layer, pass, window, grads.input);
    if (need_weights) weight_gradients(layer, pass, window, grads, stream);
  }
  if (need_input && layer.rows < layer.N) zero_known_tail(layer, grads.input, 1, layer.I);
  pass.spend_gates();
  grads.round_sums();
  return grads;
}

}  // namespace rnn_fused
