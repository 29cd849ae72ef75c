// Tensors beyond 2^31 elements on every instruction set, by address arithmetic: the bits of a layer
// whose rows lie far apart are those of the same layer without the gaps.
#include <doctest/doctest.h>

#include <array>

#include "tests/cpp/check.h"
#include "tests/cpp/isas.h"
#include "tests/cpp/spread.h"

namespace rnn_fused {
namespace {

constexpr Host kOneThread = {nullptr, 1};

void check_spread(const Sizes& sizes, const Spread& spread, uint64_t seed) {
  CAPTURE(sizes);
  const Layer l(sizes, seed);
  const Products products(l, l.dtype);
  const FarLayer far(l, spread);
  const Upstream upstream(l, seed);
  for (Isa isa : tested_isas()) {
    CAPTURE(isa);
    const auto forward = [&](const ForwardParams& params) { cpu_forward(isa, params, kOneThread); };
    const auto backward = [&](const BackwardParams& params) {
      cpu_backward(isa, params, kOneThread);
    };
    const Forward saved = run_forward(l, true, nullptr, forward);
    CHECK(far.run_forward(true, nullptr, forward) == saved);
    for (bool save : {false, true})
      CHECK(far.run_forward(save, products.direction, forward) ==
            run_forward(l, save, products.direction, forward));
    CHECK(far.run_backward(saved, upstream, backward) ==
          run_backward(l, saved, upstream, backward));
  }
}

// H and P so small that the address space suffices, ThreadSanitizer's too.
void check_layers(const Spread& spread, bool ragged) {
  uint64_t seed = 0;
  for (DType dtype : kDTypes)
    for (Cell cell : kCells)
      for (int directions : {1, 2}) {
        Sizes s{cell, dtype, 3, 3, 2, 3};
        s.P = cell == Cell::lstm && directions == 2 ? 2 : 0;
        s.directions = dtype == DType::f64 ? 1 : directions;
        s.ragged = ragged;
        s.resets = directions == 2;
        check_spread(s, spread, ++seed);
      }
}

TEST_CASE("timesteps beyond 2^31 rows give the bits of neighbouring ones") {
  check_layers(kFarTimesteps, true);
}

TEST_CASE("timesteps of equal batches beyond 2^31 rows give the bits of neighbouring ones") {
  check_layers(kFarTimesteps, false);
}

TEST_CASE("rows 2^31 elements apart give the bits of neighbouring ones") {
  check_layers(kFarRows, true);
  check_layers(kFarRows, false);
}

TEST_CASE("the input's gradient from rows 2^31 elements apart") {
  Random random(1);
  for (DType dtype : kDTypes)
    for (int64_t N : {1, 5}) {
      constexpr int64_t K = 7, I = 5, stride = (int64_t{1} << 31) + 5;
      constexpr int64_t place[] = {0, 1, 2, 3, 4};
      const Array grads = random.array(dtype, N * K, 1), weight = random.array(dtype, K * I, 1);
      const AddressSpace far(N * stride * size_of(dtype));
      for (int64_t n = 0; n < N; ++n)
        std::memcpy(far.at(n * stride * size_of(dtype)), grads.at(n * K), K * size_of(dtype));
      for (Isa isa : tested_isas()) {
        const auto run = [&](const void* grads, int64_t stride) {
          Array result(dtype, N * I);
          cpu_input_gradient(isa,
                             {dtype,
                              1,
                              N,
                              K,
                              I,
                              stride,
                              {grads, nullptr},
                              {weight.at(0), nullptr},
                              result.at(0),
                              place},
                             kOneThread);
          return result;
        };
        INFO(isa, " ", dtype, " N=", N);
        CHECK(run(far.at(0), stride) == run(grads.at(0), K));
      }
    }
}

TEST_CASE("outer products of rows 2^31 elements apart") {
  Random random(2);
  for (DType dtype : kDTypes)
    for (int64_t N : {3, 13}) {  // as they lie, and rearranged
      constexpr int64_t rows = 7, columns = 5, stride = (int64_t{1} << 31) + 5;
      const Array left = random.array(dtype, N * rows, 1);
      const Array right = random.array(dtype, N * columns, 1);
      const int64_t size = size_of(dtype);
      const AddressSpace far_left(N * stride * size), far_right(N * stride * size);
      std::vector<const void*> near, far;
      for (int64_t n = 0; n < N; ++n) {
        std::memcpy(far_left.at(n * stride * size), left.at(n * rows), rows * size);
        std::memcpy(far_right.at(n * stride * size), right.at(n * columns), columns * size);
        near.push_back(right.at(n * columns));
        far.push_back(far_right.at(n * stride * size));
      }
      for (Isa isa : tested_isas()) {
        const auto run = [&](const void* left, int64_t stride, const void* const* right) {
          std::array<Array, 2> result = {Array(dtype, rows * columns), Array(dtype, rows)};
          cpu_outer_product(isa,
                            {dtype,
                             N,
                             rows,
                             left,
                             stride,
                             {{right, columns, result[0].at(0)}, {}},
                             {result[1].at(0), nullptr}},
                            kOneThread);
          return result;
        };
        INFO(isa, " ", dtype, " N=", N);
        CHECK(run(far_left.at(0), stride, far.data()) == run(left.at(0), rows, near.data()));
      }
    }
}

}  // namespace
}  // namespace rnn_fused
