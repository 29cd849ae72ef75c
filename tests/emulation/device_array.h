// Arrays for kernels, in tests that run on a GPU and under emulation.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstring>
#include <new>
#include <vector>

#ifdef __CUDACC__
#include "csrc/cuda/check.h"
#endif

namespace rnn_fused {

// Exactly `size` elements, so that AddressSanitizer sees any overrun; NaN until they are written.
template <class T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t size) : size_(size), data_(static_cast<T*>(allocate(bytes()))) {}
  explicit DeviceArray(const std::vector<T>& values) : DeviceArray(values.size()) {
    copy(data_, values.data());
  }
  DeviceArray(const DeviceArray&) = delete;
  ~DeviceArray() { deallocate(data_); }

  T* get() { return data_; }
  size_t size() const { return size_; }
  size_t bytes() const { return size_ * sizeof(T); }

  // The elements once all kernels have ended.
  std::vector<T> host() const {
    std::vector<T> values(size_);
    copy(values.data(), data_);
    return values;
  }

 private:
#ifdef __CUDACC__
  static void* allocate(size_t bytes) {
    void* p = nullptr;
    CHECK_CUDA("test", cudaMalloc(&p, bytes));
    CHECK_CUDA("test", cudaMemset(p, 0xff, bytes));
    return p;
  }
  static void deallocate(void* p) { cudaFree(p); }
  void copy(T* to, const T* from) const {
    CHECK_CUDA("test", cudaMemcpy(to, from, bytes(), cudaMemcpyDefault));
  }
#else
  static constexpr std::align_val_t kAlignment{256};  // cudaMalloc's
  static void* allocate(size_t bytes) {
    return std::memset(::operator new(bytes, kAlignment), 0xff, bytes);
  }
  static void deallocate(void* p) { ::operator delete(p, kAlignment); }
  void copy(T* to, const T* from) const { std::memcpy(to, from, bytes()); }
#endif

  size_t size_;
  T* data_;
};

}  // namespace rnn_fused
