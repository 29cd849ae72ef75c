// The stepwise loops on the CPU, against plain double maths.
#include "csrc/cuda/stepwise.h"

#include <doctest/doctest.h>

#include "csrc/cuda/storage.cuh"
#include "tests/cpp/check.h"
#include "tests/emulation/device_array.h"
#include "tests/emulation/runtime.h"

namespace rnn_fused {
namespace {

// An element anywhere in memory, as the arrays of the tests see it.
double element(const DeviceMatrix& m, int64_t r, int64_t c) {
  double value = 0;
  gpu::with_type(m.dtype, [&](auto storage) {
    using T = decltype(storage);
    value = gpu::to_acc(static_cast<const T*>(m.data)[r * m.row_stride + c * m.column_stride]);
  });
  return value;
}

void multiply(void*, const DeviceMatrix& a, const DeviceMatrix& b, const DeviceMatrix& out) {
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

constexpr DeviceProduct kProduct = {multiply, nullptr};

// Exactly the bytes asked for, aligned as the caller promises, NaN at first.
class DeviceWorkspace {
 public:
  explicit DeviceWorkspace(int64_t bytes) : bytes_(static_cast<size_t>(bytes)) {}
  void* get() { return bytes_.get(); }

 private:
  DeviceArray<char> bytes_;
};

void check_layer(const Sizes& sizes, uint64_t seed) {
  CAPTURE(sizes);
  emulation::set_seed(seed % 3);
  const Layer l(sizes, seed);
  const LayerShape shape = l.shape();
  const Products products(l, l.dtype);
  const auto forward = [&](const ForwardParams& params) {
    DeviceWorkspace workspace(stepwise_forward_workspace(shape));
    stepwise_forward(params, workspace.get(), kProduct, nullptr);
  };
  const Forward saved = run_forward(l, true, products.direction, forward);
  check_close(l, saved, reference_forward(l, products.direction));
  CHECK(same_results(saved, run_forward(l, false, products.direction, forward), l.directions));

  const Upstream upstream(l, seed, seed % 3 == 1, seed % 3 == 2);
  const Backward grads = run_backward(l, saved, upstream, [&](const BackwardParams& params) {
    DeviceWorkspace workspace(stepwise_backward_workspace(shape));
    stepwise_backward(params, workspace.get(), kProduct, nullptr);
  });
  check_close(l, grads, reference_backward(l, saved, upstream));
}

TEST_CASE("stepwise: layers of any size equal the reference") {
  Random random(1);
  for (DType dtype : kDTypes)
    for (Cell cell : kCells)
      for (int i = 0; i < 8; ++i) {
        Sizes s{cell, dtype, random.integer(1, 6), random.integer(1, 9)};
        s.I = random.one_of({1, 3, 8});
        s.H = random.one_of({1, 2, 7, 16, 31, 40});
        s.P = cell == Cell::lstm && random.coin() ? random.integer(1, s.H) : 0;
        s.directions = static_cast<int>(random.integer(1, 2));
        s.ragged = random.coin();
        s.bias = random.coin();
        s.resets = random.coin();
        s.options = random.coin();
        check_layer(s, random.bits());
      }
}

}  // namespace
}  // namespace rnn_fused
