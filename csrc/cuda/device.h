// What the host asks of the current device.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "csrc/cuda/plan.h"

namespace rnn_fused {

GpuProperties current_gpu();

// Copies `count` numbers to device memory in the order of the stream. They travel in the arguments
// of kernels: unlike a copy from host memory, that needs no pinned buffer that outlives the call
// and may be captured in a CUDA graph.
void upload(const int64_t* from, int64_t count, int64_t* to, cudaStream_t stream);

}  // namespace rnn_fused
