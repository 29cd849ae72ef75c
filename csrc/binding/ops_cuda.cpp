// The operators' CUDA implementations. USE_CUDA stays undefined, so this compiles and loads beside
// a torch without CUDA: the one CUDA function needed of torch is a weak symbol.
#include <torch/csrc/stable/accelerator.h>

#include "csrc/binding/compat.h"
#include "csrc/cuda/probe.h"

extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace rnn_fused {
namespace {

cudaStream_t current_cuda_stream(int32_t device_index) {
  RNN_FUSED_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                  "CUDA tensors need a PyTorch with CUDA support, got one without");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream));
  return static_cast<cudaStream_t>(stream);
}

int64_t cuda_probe(Tensor device_of) {
  const int32_t device = device_of.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);
  Tensor scratch = allocate(device_of, {1}, ScalarType::Int);
  return probe_cuda_arch(scratch.mutable_data_ptr<int32_t>(), current_cuda_stream(device));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rnn_fused, CUDA, m) { m.impl("cuda_probe", TORCH_BOX(&cuda_probe)); }

}  // namespace rnn_fused
