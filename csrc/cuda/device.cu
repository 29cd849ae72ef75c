#include "csrc/cuda/device.h"

#include <algorithm>

#include "csrc/cuda/primitives.cuh"

namespace rnn_fused {
namespace {

constexpr int kNumbers = 256;  // 2 KiB of the 4 KiB of arguments that a kernel may have

struct Numbers {
  int64_t value[kNumbers];
};

__global__ void write_numbers(Numbers numbers, int64_t* to, int count) {
  const int i = static_cast<int>(threadIdx.x);
  if (i < count) to[i] = numbers.value[i];
}

}  // namespace

void upload(const int64_t* from, int64_t count, int64_t* to, cudaStream_t stream) {
  for (int64_t begin = 0; begin < count; begin += kNumbers) {
    const int64_t size = std::min<int64_t>(kNumbers, count - begin);
    Numbers numbers{};
    std::copy_n(from + begin, size, numbers.value);
    gpu::launch(write_numbers, 1, kNumbers, 0, stream, numbers, to + begin, static_cast<int>(size));
  }
}

GpuProperties current_gpu() {
#ifdef __CUDACC__
  int device = 0;
  CHECK_CUDA("device", cudaGetDevice(&device));
  const auto get = [&](cudaDeviceAttr attribute) {
    int value = 0;
    CHECK_CUDA("device", cudaDeviceGetAttribute(&value, attribute, device));
    return value;
  };
  return {10 * get(cudaDevAttrComputeCapabilityMajor) + get(cudaDevAttrComputeCapabilityMinor),
          get(cudaDevAttrMultiProcessorCount), get(cudaDevAttrMaxRegistersPerMultiprocessor),
          get(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
          get(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
#else
  return {90, 132, 65536, 233472, 232448};  // of an H100, for the emulation
#endif
}

}  // namespace rnn_fused
