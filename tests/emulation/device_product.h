// What the stepwise loops ask of their caller: products, in double, and a workspace.
#pragma once

#include <doctest/doctest.h>

#include "csrc/cuda/stepwise.h"
#include "csrc/cuda/storage.cuh"
#include "tests/emulation/device_array.h"

namespace rnn_fused {

// An element anywhere in memory, as the arrays of the tests see it.
inline double element(const DeviceMatrix& m, int64_t r, int64_t c) {
  double value = 0;
  gpu::with_type(m.dtype, [&](auto storage) {
    using T = decltype(storage);
    value = gpu::to_acc(static_cast<const T*>(m.data)[r * m.row_stride + c * m.column_stride]);
  });
  return value;
}

inline void multiply(void*, const DeviceMatrix& a, const DeviceMatrix& b, const DeviceMatrix& out) {
  REQUIRE(a.columns == b.rows);
  REQUIRE(out.rows == a.rows);
  REQUIRE(out.columns == b.columns);
  for (int64_t r = 0; r < out.rows; ++r)
    for (int64_t c = 0; c < out.columns; ++c) {
      double sum = 0;
      for (int64_t k = 0; k < a.columns; ++k) sum += element(a, r, k) * element(b, k, c);
      gpu::with_type(out.dtype, [&](auto storage) {
        using T = decltype(storage);
        T* data = static_cast<T*>(const_cast<void*>(out.data));
        data[r * out.row_stride + c * out.column_stride] =
            gpu::from_acc<T>(static_cast<gpu::Acc<T>>(sum));
      });
    }
}

inline constexpr DeviceProduct kProduct = {multiply, nullptr};

// Exactly the bytes asked for, aligned as the caller promises, NaN at first.
class DeviceWorkspace {
 public:
  explicit DeviceWorkspace(int64_t bytes) : bytes_(static_cast<size_t>(bytes)) {}
  void* get() { return bytes_.get(); }

 private:
  DeviceArray<char> bytes_;
};

}  // namespace rnn_fused
