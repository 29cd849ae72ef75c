// The stable-ABI names and the few torch operators that the binding uses, in one place.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

// Absent from a torch without CUDA, the last from one before 2.13.
extern "C" {
__attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                        void** ret_stream);
__attribute__((weak)) AOTITorchError aoti_torch_cuda_addmm_out(AtenTensorHandle out,
                                                               AtenTensorHandle self,
                                                               AtenTensorHandle mat1,
                                                               AtenTensorHandle mat2, double beta,
                                                               double alpha);
__attribute__((weak)) const char* torch_exception_get_what_without_backtrace();
}

// A RuntimeError with exactly this message: STD_TORCH_CHECK would put the C++ file and line before
// it.
#define RNN_FUSED_CHECK(condition, ...)               \
  do {                                                \
    if (!(condition)) ::rnn_fused::fail(__VA_ARGS__); \
  } while (false)

namespace rnn_fused {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using OptionalTensor = std::optional<Tensor>;

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// A RuntimeError with torch's own message, where torch tells it; older ones print it and no more.
inline void check_torch(AOTITorchError status) {
  if (status == AOTI_TORCH_SUCCESS) return;
  if (torch_exception_get_what_without_backtrace == nullptr)
    fail("torch failed to allocate a tensor or to run an operator: its message is printed above");
  fail(torch_exception_get_what_without_backtrace());
}

// A call of torch's with one result. stack: the arguments.
template <size_t kSize>
Tensor call(const char* op, const char* overload, std::array<StableIValue, kSize> stack) {
  check_torch(torch_call_dispatcher(op, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

inline Tensor as_contiguous(const Tensor& t) {
  using torch::stable::detail::from;
  if (t.is_contiguous()) return t;
  return call<2>("aten::contiguous", "",
                 {from(t), from(torch::headeronly::MemoryFormat::Contiguous)});
}

// Like torch.empty, on the device of `like`. The shim costs a quarter of a dispatched new_empty,
// and a small layer is mostly such costs.
inline Tensor allocate(const Tensor& like, const std::vector<int64_t>& sizes,
                       std::optional<ScalarType> dtype = std::nullopt) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;)
    strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
  int32_t type = 0, device = 0, index = 0;
  if (dtype)
    type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(*dtype));
  else
    check_torch(aoti_torch_get_dtype(like.get(), &type));
  check_torch(aoti_torch_get_device_type(like.get(), &device));
  check_torch(aoti_torch_get_device_index(like.get(), &index));
  AtenTensorHandle tensor = nullptr;
  check_torch(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                       strides.data(), type, device, index, &tensor));
  return Tensor(tensor);
}

inline Tensor allocate_zeros(const Tensor& like, const std::vector<int64_t>& sizes,
                             std::optional<ScalarType> dtype = std::nullopt) {
  Tensor tensor = allocate(like, sizes, dtype);
  constexpr int64_t kSmall = 1 << 15;  // of values: up to here, torch has one thread zero them too
  if (!tensor.is_cpu() || tensor.numel() > kSmall) return torch::stable::zero_(tensor);
  std::memset(tensor.mutable_data_ptr(), 0, tensor.numel() * tensor.element_size());
  return tensor;
}

// Part of a tensor's storage, `offset` elements from its first.
inline Tensor vector(const Tensor& t, int64_t size, int64_t offset) {
  const int64_t stride = 1;
  AtenTensorHandle view = nullptr;
  check_torch(aoti_torch__reinterpret_tensor(t.get(), 1, &size, &stride, offset, &view));
  return Tensor(view);
}
inline Tensor matrix(const Tensor& t, int64_t rows, int64_t columns, int64_t row_stride,
                     int64_t column_stride = 1, int64_t offset = 0) {
  const int64_t sizes[] = {rows, columns};
  const int64_t strides[] = {row_stride, column_stride};
  AtenTensorHandle view = nullptr;
  check_torch(aoti_torch__reinterpret_tensor(t.get(), 2, sizes, strides, offset, &view));
  return Tensor(view);
}

// `count` entries of the first axis of a contiguous tensor, from `first` on.
inline Tensor part(const Tensor& t, int64_t first, int64_t count) {
  std::vector<int64_t> sizes(t.sizes().begin(), t.sizes().end());
  const std::vector<int64_t> strides(t.strides().begin(), t.strides().end());
  sizes[0] = count;
  AtenTensorHandle view = nullptr;
  check_torch(aoti_torch__reinterpret_tensor(t.get(), t.dim(), sizes.data(), strides.data(),
                                             first * strides[0], &view));
  return Tensor(view);
}

// Leaves a tensor, whoever else holds it, without values and memory.
inline void empty(const Tensor& t) { call<1>("aten::set_", "", {torch::stable::detail::from(t)}); }

// out = a * b, so many elements of contiguous tensors from `first` on.
inline void multiply(const Tensor& a, const Tensor& b, int64_t first, int64_t count,
                     const Tensor& out) {
  using torch::stable::detail::from;
  const auto elements = [&](const Tensor& t) { return from(vector(t, count, first)); };
  call<3>("aten::mul", "out", {elements(a), elements(b), elements(out)});
}

// out = a @ b, or out += a @ b.
inline void matmul(const Tensor& a, const Tensor& b, const Tensor& out, bool accumulate = false) {
  using torch::stable::detail::from;
  if (accumulate) {  // not through the dispatcher: the stable ABI has no Scalar arguments
    const auto addmm = out.is_cpu() ? aoti_torch_cpu_addmm_out : aoti_torch_cuda_addmm_out;
    check_torch(addmm(out.get(), out.get(), a.get(), b.get(), 1, 1));
  } else {
    call<3>("aten::mm", "out", {from(a), from(b), from(out)});
  }
}

// out = a @ b, where out has the dtype of a and b or, for 16-bit ones, float32; CUDA only.
inline void matmul_accumulated(const Tensor& a, const Tensor& b, const Tensor& out) {
  if (a.scalar_type() == out.scalar_type()) return matmul(a, b, out);
#ifdef RNN_FUSED_EMULATION
  return matmul(torch::stable::to(a, ScalarType::Float), torch::stable::to(b, ScalarType::Float),
                out);
#endif
  using torch::stable::detail::from;
  call<4>("aten::mm", "dtype_out", {from(a), from(b), from(out.scalar_type()), from(out)});
}

}  // namespace rnn_fused
