// The stepwise loops: for each timestep a product, which is the caller's, and one kernel for
// everything else. Any sizes, any dtype, projections; nothing waits for the device and nothing is
// allocated, so that a call may be captured in a CUDA graph.
//
// All pointers in the params are device memory but batch_sizes and row_start, which the loop reads;
// with sizes_on_device they are too, and each step multiplies all B sequences.
//
// The final states of a sequence without timesteps are left alone.
#pragma once

#include <cuda_runtime_api.h>

#include "csrc/core/params.h"

namespace rnn_fused {

// Strides in elements.
struct DeviceMatrix {
  const void* data;
  DType dtype;
  int64_t rows, columns, row_stride, column_stride;
};

// out = a @ b on the stream, none of them empty. a and b have the layer's dtype, summed in its
// accumulation type (float, or double of float64), which is out's dtype or is rounded to out's.
struct DeviceProduct {
  void (*multiply)(void* context, const DeviceMatrix& a, const DeviceMatrix& b,
                   const DeviceMatrix& out);
  void* context;

  void operator()(const DeviceMatrix& a, const DeviceMatrix& b, const DeviceMatrix& out) const {
    if (out.rows > 0 && out.columns > 0) multiply(context, a, b, out);
  }
};

// input_in_gates is true: `gates` (an RNN's output) holds W_ih x on entry.
// workspace: so many bytes, aligned to 256, overwritten.
int64_t stepwise_forward_workspace(const LayerShape& shape);
void stepwise_forward(const ForwardParams& params, void* workspace, const DeviceProduct& product,
                      cudaStream_t stream);

int64_t stepwise_backward_workspace(const LayerShape& shape);
void stepwise_backward(const BackwardParams& params, void* workspace, const DeviceProduct& product,
                       cudaStream_t stream);

// The activated gates of some rows of an LSTM or GRU. gates: [rows, 4*H], holds W_ih x on entry;
// sums: [rows, G*H] W_hh h in the accumulation type.
void activate_gates(const LayerShape& shape, const DirectionWeights& weights, int64_t rows,
                    const void* sums, void* gates, cudaStream_t stream);

// sums += more, of so many values in the accumulation type of dtype.
void add_to_sums(DType dtype, int64_t count, const void* more, void* sums, cudaStream_t stream);

// h before the step of each row of the window, what W_hh was multiplied with. out: [M, P], whose
// tail is left alone.
void gather_previous_h(const BackwardParams& params, int direction, void* out, cudaStream_t stream);

// Zeroes the tail of [N, row_bytes], of a shape with sizes_on_device.
void zero_tail(const LayerShape& shape, int64_t N, int64_t row_bytes, void* data,
               cudaStream_t stream);

}  // namespace rnn_fused
