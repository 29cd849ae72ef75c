// The stepwise loops on the CPU, against plain double maths.
#include "csrc/cuda/stepwise.h"

#include <doctest/doctest.h>

#include "tests/cpp/check.h"
#include "tests/emulation/device_product.h"
#include "tests/emulation/runtime.h"

namespace rnn_fused {
namespace {

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
  const Backward expected = reference_backward(l, saved, upstream);
  for (int64_t window : {l.T, 1 + static_cast<int64_t>(seed % static_cast<uint64_t>(l.T))}) {
    CAPTURE(window);
    const auto backward = [&](const BackwardParams& params) {
      DeviceWorkspace workspace(stepwise_backward_workspace(shape));
      stepwise_backward(params, workspace.get(), kProduct, nullptr);
    };
    check_close(l, run_backward(l, saved, upstream, backward, window), expected);
  }
}

TEST_CASE("stepwise: layers of any size equal the reference") {
  Random random(1);
  for (DType dtype : kDTypes)
    for (Cell cell : kCells)
      for (int i = 0; i < 8; ++i) {
        Sizes s{cell, dtype, random.integer(1, 6), random.integer(1, 9)};
        s.I = random.one_of({1, 3, 8});
        s.H = random.one_of({1, 2, 7, 16, 31, 40});
        draw_kind(s, random);
        check_layer(s, random.bits());
      }
}

}  // namespace
}  // namespace rnn_fused
