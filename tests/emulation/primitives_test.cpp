#include <doctest/doctest.h>

#include "tests/emulation/persistent_kernel.cuh"
#include "tests/emulation/primitives_kernels.cuh"

namespace rnn_fused {
namespace {

// Several orders of the threads.
void check_orders(std::string (*check)()) {
  for (uint64_t seed = 0; seed < 4; ++seed) {
    CAPTURE(seed);
    emulation::set_seed(seed);
    CHECK(check() == "");
  }
  emulation::set_seed(0);
}

TEST_CASE("each primitive computes what plain maths do") {
  for (const primitive_tests::Case& test : primitive_tests::kCases) {
    CAPTURE(test.name);
    check_orders(test.check);
  }
}

TEST_CASE("a persistent kernel, made of the primitives") {
  check_orders(persistent_tests::check_persistent);
}

}  // namespace
}  // namespace rnn_fused
