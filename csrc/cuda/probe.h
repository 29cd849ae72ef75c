#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace rnn_fused {

// The __CUDA_ARCH__ (900 for sm_90) of the code that the current device runs, which throws where
// this library has no code for the device. Waits for `stream`.
// scratch: [1], device memory, overwritten.
int64_t probe_cuda_arch(int32_t* scratch, cudaStream_t stream);

}  // namespace rnn_fused
