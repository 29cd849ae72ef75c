// The persistent kernels: one cooperative launch for all timesteps, of all directions or of each;
// or one of clusters.
//
// In the params, batch_sizes and row_start point to device memory, as every other pointer does.
// input_in_gates is true: `gates` holds W_ih x on entry. Nothing here waits for the device, and all
// launches may be captured in a graph. The plan is plan_cuda's for the same shape, precision and
// pass, or plan_cuda_stack's, on the current device, and not stepwise.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "csrc/core/params.h"
#include "csrc/cuda/plan.h"

namespace rnn_fused {

// Bytes of device memory that a pass needs besides: the workspace, aligned to 16 bytes,
// overwritten.
int64_t persistent_workspace(const CudaPlan& plan, const LayerShape& shape, bool backward);

void persistent_forward(const CudaPlan& plan, Precision precision, const ForwardParams& params,
                        void* workspace, cudaStream_t stream);

// grad_projected and hidden are not used: a projection has no persistent kernels.
void persistent_backward(const CudaPlan& plan, Precision precision, const BackwardParams& params,
                         void* workspace, cudaStream_t stream);

}  // namespace rnn_fused
