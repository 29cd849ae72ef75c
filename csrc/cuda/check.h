// Every CUDA call is checked: CHECK_CUDA("op", cudaFoo(...)) throws with the call and its error.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace rnn_fused {

inline void check_cuda(const char* op, cudaError_t status, const char* call) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string("[") + op + "] " + call + " failed: " +
                           cudaGetErrorString(status) + " (" + cudaGetErrorName(status) + ")");
}

}  // namespace rnn_fused

#define CHECK_CUDA(op, call) ::rnn_fused::check_cuda(op, call, #call)
