#include "csrc/cuda/check.h"
#include "csrc/cuda/probe.h"

namespace rnn_fused {
namespace {

// arch: [1]
__global__ void write_arch(int32_t* arch) {
#ifdef __CUDA_ARCH__
  *arch = __CUDA_ARCH__;
#endif
}

}  // namespace

int64_t probe_cuda_arch(int32_t* scratch, cudaStream_t stream) {
  constexpr const char* op = "cuda_probe";
  write_arch<<<1, 1, 0, stream>>>(scratch);
  CHECK_CUDA(op, cudaGetLastError());
  int32_t arch = 0;
  CHECK_CUDA(op, cudaMemcpyAsync(&arch, scratch, sizeof(arch), cudaMemcpyDeviceToHost, stream));
  CHECK_CUDA(op, cudaStreamSynchronize(stream));
  return arch;
}

}  // namespace rnn_fused
