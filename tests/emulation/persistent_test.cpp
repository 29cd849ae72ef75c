// The persistent kernels against the CPU core, on the same params.
#include "csrc/cuda/persistent.h"

#include <doctest/doctest.h>

#include "tests/cpp/reference.h"
#include "tests/emulation/device_product.h"
#include "tests/emulation/runtime.h"

namespace rnn_fused {
namespace {

constexpr Host kOneThread = {nullptr, 1};
constexpr GpuProperties kH100 = {90, 132, 65536, 233472, 232448};
// Of fewer SMs, so that small layers have one slice or a few, as large ones have on an H100: more
// would take longer and run the same code.
constexpr GpuProperties kSixteenSms = {90, 16, 65536, 233472, 232448};
constexpr GpuProperties kHalfOfThem = {90, 66, 65536, 233472, 232448};
// Room for one direction of up to 304 units in wide blocks.
constexpr GpuProperties kSmall = {90, 19, 65536, 233472, 232448};
// So few SMs that even layers of a few units are in large blocks. Of shared memory these have room
// for all weights, for some, or, forward in the LSTM with 16 sequences and more, for next to none.
constexpr GpuProperties kTwoSms = {80, 2, 65536, 233472, 232448};
constexpr GpuProperties kTwoSmallSms = {80, 2, 65536, 65536, 57344};
constexpr GpuProperties kFewSms = {120, 19, 65536, 102400, 101376};
// Wide blocks of an LSTM in TF32 find no room for the weights beyond the first k-block, so that
// both directions run in large ones at once.
constexpr GpuProperties kFewSmallSms = {120, 19, 65536, 65536, 57344};
// With the shared memory of an H100, but no clusters of more than 8 blocks.
constexpr GpuProperties kFewToACluster = {110, 132, 65536, 233472, 232448};

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
constexpr bool kSanitized = true;
#else
constexpr bool kSanitized = false;
#endif
#ifdef __SANITIZE_THREAD__
constexpr int64_t kMaxBlocks = 31;  // as many threads as ThreadSanitizer can tell apart
constexpr uint64_t kRounds = 1;
constexpr int64_t kLargeBatch = 17;
#else
constexpr int64_t kMaxBlocks = 132;
constexpr uint64_t kRounds = 4;
constexpr int64_t kLargeBatch = 40;  // more than a pass takes
#endif

struct Case : Sizes {
  Precision precision = Precision::exact;
  bool save = true;
  GpuProperties gpu = kH100;
  Family family = Family::persistent;
  int64_t unreset = 0;  // dense: all sequences are reset but in every so many-th timestep
};

// Of the error's norm to the result's: the same sums in another order, with TF32 of factors that
// are rounded, and with 16 bits in the backward pass of rounded gradients, as they are in
// grad_gates.
double tolerance(const Case& c) {
  if (c.precision == Precision::tf32) return 2e-3;
  return c.dtype == DType::f32 ? 2e-6 : 4 * roundoff(c.dtype);
}

// What was not to be written, NaN in `expected`, must be NaN still. `floor`: the error of one
// element where the norm is next to nothing.
void check_close(const doctest::String& what, const Array& actual, const Array& expected,
                 double tolerance, double floor) {
  REQUIRE(actual.size() == expected.size());
  double error = 0, norm = 0;
  for (int64_t i = 0; i < actual.size(); ++i) {
    if (std::isnan(actual[i]) && std::isnan(expected[i])) continue;
    error += std::pow(actual[i] - expected[i], 2);
    norm += std::pow(expected[i], 2);
  }
  INFO(what, ": relative error ", std::sqrt(error / norm));
  const double size = static_cast<double>(actual.size());
  // False where one of them is NaN.
  CHECK(std::sqrt(error) <= tolerance * std::sqrt(norm) + floor * std::sqrt(size));
}

CudaPlan plan_of(const Case& c, const LayerShape& shape, bool backward) {
  const CudaPlan plan = plan_cuda(shape, c.precision, c.gpu, backward, c.family);
  INFO(plan.why);
  REQUIRE(plan.family == c.family);
  return plan;
}

// Whether the emulation has room for all blocks.
bool fits(const Case& c) {
  if (c.family == Family::cluster) return true;  // one at a time
  const LayerShape shape = {c.cell, c.dtype, c.T, c.B, c.H, c.H, c.directions, nullptr, nullptr};
  return std::max(plan_of(c, shape, false).blocks, plan_of(c, shape, true).blocks) <= kMaxBlocks;
}

void check_case(const Case& c, uint64_t seed) {
  CAPTURE(static_cast<const Sizes&>(c));
  CAPTURE(c.save);
  Layer l(c, seed);
  for (int64_t n = 0; c.unreset > 0 && n < l.N; ++n) l.reset_flags[n] = n / l.B % c.unreset != 0;
  Array products[2];
  for (int d = 0; d < l.directions; ++d) products[d] = multiply_input(l, d, l.dtype);
  const auto forward = [&](const ForwardParams& params) {
    const CudaPlan plan = plan_of(c, params, false);
    DeviceWorkspace workspace(persistent_workspace(plan, params, false));
    persistent_forward(plan, c.precision, params, workspace.get(), nullptr);
  };
  const auto backward = [&](const BackwardParams& params) {
    const CudaPlan plan = plan_of(c, params, true);
    DeviceWorkspace workspace(persistent_workspace(plan, params, true));
    persistent_backward(plan, c.precision, params, workspace.get(), nullptr);
  };
  // In windows of so many steps, one after the other.
  const auto forward_in = [&](int64_t steps) {
    return [&, steps](ForwardParams params) {
      Array carried(DType::f32, l.lstm() ? l.B * l.H : 0);
      ForwardDirection& only = params.direction[0];
      only.carried_c = carried.at(0);
      for (int64_t begin = 0; begin < l.T; begin += steps) {
        only.steps_before = begin;
        only.steps_after = std::max<int64_t>(l.T - begin - steps, 0);
        if (begin > 0) only.h0 = only.h_n;
        forward(params);
      }
    };
  };
  const double tol = tolerance(c);
  // Few gates' gradients, rounded, may cancel each other.
  const double floor = c.dtype == DType::f32 ? 0 : roundoff(c.dtype) / 8;
  const Forward expected = run_forward(Isa::portable, l, kOneThread, c.save, products);
  const Forward saved =
      c.save ? expected : run_forward(Isa::portable, l, kOneThread, true, products);
  const Upstream upstream(l, seed, seed % 3 == 1, seed % 3 == 2);
  const Backward expected_grads = run_backward(Isa::portable, l, kOneThread, saved, upstream);
  for (uint64_t order : {0, 1}) {
    if (order == 0 && c.H > 100) continue;  // takes its time
    CAPTURE(order);
    emulation::set_seed(order);
    const int64_t window = order == 0 ? l.T : 1 + static_cast<int64_t>(seed % uint64_t(l.T));
    CAPTURE(window);
    const int64_t even = l.directions == 2 ? l.T : window + window % 2;
    const Forward result = even < l.T ? run_forward(l, c.save, products, forward_in(even))
                                      : run_forward(l, c.save, products, forward);
    check_close("output", result.output, expected.output, tol, floor);
    const Backward grads = run_backward(l, saved, upstream, backward, window);
    for (int d = 0; d < l.directions; ++d) {
      CAPTURE(d);
      const Forward::Direction &a = result.direction[d], &e = expected.direction[d];
      check_close("gates", a.gates, e.gates, tol, floor);
      check_close("cells", a.cells, e.cells, tol, floor);
      check_close("h_n", a.h_n, e.h_n, tol, floor);
      check_close("c_n", a.c_n, e.c_n, tol, floor);
      const Backward::Direction &g = grads.direction[d], &h = expected_grads.direction[d];
      check_close("grad_gates", g.gates, h.gates, tol, floor);
      check_close("grad_h0", g.h0, h.h0, tol, floor);
      check_close("grad_c0", g.c0, h.c0, tol, floor);
      check_close("grad_reset_h", g.reset_h, h.reset_h, tol, floor);
      check_close("grad_reset_c", g.reset_c, h.reset_c, tol, floor);
    }
  }
  emulation::set_seed(0);
}

// With other sizes and options each time.
void check_cells(DType dtype, Precision precision, int64_t H, std::initializer_list<Cell> cells,
                 std::initializer_list<int64_t> batches, std::initializer_list<int64_t> steps,
                 const GpuProperties& gpu, Random& random, Family family = Family::persistent) {
  for (Cell cell : cells) {
    if (cell == Cell::rnn_relu && H > 100) continue;  // rnn_tanh's kernels, and it takes long
    Case c{{cell, dtype, random.one_of(steps), random.one_of(batches)}};
    c.I = 3;
    c.H = H;
    c.directions = static_cast<int>(random.integer(1, 2));
    c.ragged = random.coin();
    c.bias = random.coin();
    c.resets = random.coin();
    c.options = c.ragged != c.resets;
    c.gap = random.one_of({0, 3, 8});
    c.precision = precision;
    c.save = random.coin();
    c.gpu = gpu;
    c.family = family;
    if (!fits(c)) continue;
    const uint64_t seed = random.bits();
    if (kSanitized && dtype == DType::f16 && H > 100)
      continue;  // bfloat16's code, and it takes long
    check_case(c, seed);
  }
}

void check_all(std::initializer_list<int64_t> sizes_of_h, std::initializer_list<int64_t> batches,
               std::initializer_list<int64_t> steps, uint64_t seed,
               const GpuProperties& gpu = kH100, Family family = Family::persistent) {
  Random random(seed);
  for (int64_t H : sizes_of_h)
    for (const auto& [dtype, precision] : {std::pair{DType::bf16, Precision::exact},
                                           {DType::f16, Precision::exact},
                                           {DType::f32, Precision::exact},
                                           {DType::f32, Precision::tf32}})
      check_cells(dtype, precision, H, {Cell::lstm, Cell::gru, Cell::rnn_tanh, Cell::rnn_relu},
                  batches, steps, gpu, random, family);
}

TEST_CASE("persistent kernels equal the CPU core") {
  for (uint64_t seed = 1; seed <= kRounds; ++seed)
    check_all({1, 7, 8, 9, 33, 40}, {1, 3, 8, 17, 70}, {1, 2, 5}, seed, kSixteenSms);
}

TEST_CASE("persistent kernels with two k-blocks equal the CPU core") {
  check_all({260}, {1, 17, 70}, {1, 2, 5}, 5, kHalfOfThem);
}

// So many threads that a small batch must do.
TEST_CASE("persistent kernels with four k-blocks equal the CPU core") {
  check_all({776}, {3}, {2}, 6);
}

// More steps than there are slots, so that each is written several times.
#ifndef __SANITIZE_THREAD__
TEST_CASE("blocks that hand off equal the CPU core") {
  check_all({1, 9, 40}, {1, 3, 17, 70}, {1, 5, 27}, 1, kSixteenSms, Family::handoff);
  Random random(13);
  check_cells(DType::bf16, Precision::exact, 260, {Cell::lstm, Cell::gru}, {17}, {11}, kHalfOfThem,
              random, Family::handoff);
  check_cells(DType::f16, Precision::exact, 300, {Cell::lstm}, {40}, {11}, kSmall, random,
              Family::handoff);
}

// As far as the barrier lets them: where all sequences are reset no block waits for another's h.
TEST_CASE("blocks that hand off may run ahead of each other") {
  uint64_t seed = 0;
  for (Cell cell : {Cell::lstm, Cell::gru, Cell::rnn_tanh})
    for (int64_t unreset : {4, 7, 9})
      for (int64_t B : {1, 3}) {
        Case c{{cell, DType::bf16, 40, B, 3, 24}};
        c.resets = true;
        c.directions = unreset == 4 ? 2 : 1;
        c.family = Family::handoff;
        c.unreset = unreset;
        check_case(c, ++seed);
      }
}
#else
TEST_CASE("blocks that hand off equal the CPU core") {
  check_all({40}, {1, 17}, {11}, 1, kSixteenSms, Family::handoff);
}
#endif

// Of cells of several gates; forward they are the persistent kernels.
#ifndef __SANITIZE_THREAD__
TEST_CASE("blocks that divide the gates equal the CPU core") {
  Random random(12);
  const auto check = [&](DType dtype, Precision precision, int64_t H,
                         std::initializer_list<int64_t> batches, std::initializer_list<int64_t> T) {
    check_cells(dtype, precision, H, {Cell::lstm, Cell::gru}, batches, T,
                H < 100 ? kSixteenSms : kH100, random, Family::split);
  };
  for (const auto& [dtype, precision] : {std::pair{DType::bf16, Precision::exact},
                                         {DType::f16, Precision::exact},
                                         {DType::f32, Precision::exact},
                                         {DType::f32, Precision::tf32}}) {
    for (int64_t H : {1, 8, 41}) check(dtype, precision, H, {1, 17, 70, 150}, {1, 2, 5});
    check(dtype, precision, 260, {3, 17}, {2});
  }
  check(DType::bf16, Precision::exact, 776, {3}, {2});
  check(DType::f16, Precision::exact, 1040, {3}, {2});
  check(DType::f32, Precision::tf32, 776, {3}, {2});
}
#else
TEST_CASE("blocks that divide the gates equal the CPU core") {
  Random random(12);
  for (int64_t batch : {1, 70})
    check_cells(DType::bf16, Precision::exact, 40, {Cell::lstm, Cell::gru}, {batch}, {1, 3},
                kSixteenSms, random, Family::split);
}
#endif

// Each in several passes. In the last timesteps of a ragged batch the last slices have no sequence.
TEST_CASE("slices of the batch equal the CPU core") {
  uint64_t seed = 0;
  for (Family family : {Family::persistent, Family::handoff, Family::split})
    for (bool ragged : {true, false}) {
      Case c{{family == Family::handoff ? Cell::gru : Cell::lstm, DType::bf16, 5, 220, 3, 40}};
      c.ragged = ragged;
      c.resets = !ragged;
      c.gpu = kSixteenSms;
      c.family = family;
      const LayerShape shape = {c.cell, c.dtype, c.T, c.B, c.H, c.H, 1, nullptr, nullptr};
      const CudaPlan plan = plan_of(c, shape, true);
      REQUIRE(plan.batch_tile < plan.slice);
      REQUIRE(plan.slice < c.B);
      check_case(c, ++seed);
      if (kSanitized && family != Family::handoff) break;
    }
}

// Of 16 units to a block; on the small GPU 32 sequences to a cluster.
#ifndef __SANITIZE_THREAD__
TEST_CASE("clusters equal the CPU core") {
  for (uint64_t seed = 1; seed <= kRounds / 2; ++seed) {
    check_all({1, 7, 16, 17, 40}, {1, 3, 17, 70}, {1, 2, 3, 6}, seed, kH100, Family::cluster);
    check_all({33}, {97}, {4}, seed, kSmall, Family::cluster);
  }
}

TEST_CASE("clusters of sixteen blocks equal the CPU core") {
  check_all({250}, {kLargeBatch}, {3}, 9, kH100, Family::cluster);
  check_all({256}, {kLargeBatch}, {3}, 10, kSmall, Family::cluster);
}

// Of several gates in 16-bit types only.
TEST_CASE("clusters of wide blocks equal the CPU core") {
  Random random(11);
  for (const auto& [dtype, precision, cell] :
       {std::tuple{DType::bf16, Precision::exact, Cell::lstm},
        std::tuple{DType::f16, Precision::exact, Cell::lstm},
        std::tuple{DType::bf16, Precision::exact, Cell::gru},
        std::tuple{DType::bf16, Precision::exact, Cell::rnn_tanh},
        std::tuple{DType::f32, Precision::exact, Cell::rnn_tanh},
        std::tuple{DType::f32, Precision::tf32, Cell::rnn_tanh}})
    for (int64_t H : {260, 510}) {
      check_cells(dtype, precision, H, {cell}, {17}, {3}, kH100, random, Family::cluster);
      // Eight blocks at most.
      check_cells(dtype, precision, H / 2, {cell}, {17}, {3}, kFewToACluster, random,
                  Family::cluster);
    }
}
#else  // some of the same, which takes minutes there
TEST_CASE("clusters equal the CPU core") {
  check_all({17, 40}, {1, 17}, {1, 3}, 1, kH100, Family::cluster);
  Random random(9);
  for (Cell cell : {Cell::lstm, Cell::gru})
    check_cells(DType::bf16, Precision::exact, 250, {cell}, {kLargeBatch}, {3}, kSmall, random,
                Family::cluster);
  check_cells(DType::bf16, Precision::exact, 270, {Cell::lstm}, {3}, {2}, kH100, random,
              Family::cluster);
}
#endif

// Of LSTMs in float32, which have the fewest weights in registers, some are in shared memory.
TEST_CASE("wide blocks, and one direction after the other, equal the CPU core") {
  check_all({300, 304}, {1, kLargeBatch}, {1, 3}, 7, kSmall);
}

// Which have weights in shared memory, and some in device memory.
TEST_CASE("large blocks equal the CPU core") {
  const LayerShape some = {Cell::lstm, DType::bf16, 2, 17, 40, 40, 1, nullptr, nullptr};
  for (bool backward : {false, true}) {
    const auto plan = [&](const GpuProperties& gpu) {
      return plan_cuda(some, Precision::exact, gpu, backward, Family::persistent);
    };
    REQUIRE(plan(kTwoSms).units == 32);
    REQUIRE(plan(kTwoSms).streamed_octets == 0);
    REQUIRE(plan(kTwoSmallSms).shared_octets > 0);
    REQUIRE(plan(kTwoSmallSms).streamed_octets > 0);
  }
  Random random(14);
  for (const auto& [dtype, precision] : {std::pair{DType::bf16, Precision::exact},
                                         {DType::f16, Precision::exact},
                                         {DType::f32, Precision::tf32}})
    for (const GpuProperties& gpu : {kTwoSmallSms, kTwoSms})
      for (int64_t H : {40, 64})
        for (Cell cell : {Cell::lstm, Cell::gru, Cell::rnn_tanh}) {
          if (kSanitized && (dtype == DType::f16 || H == 64)) continue;
#ifdef __SANITIZE_THREAD__  // takes long there
          if (dtype == DType::f32 || gpu.shared_per_sm == kTwoSms.shared_per_sm) continue;
#endif
          check_cells(dtype, precision, H, {cell}, {1, 3, 17, kLargeBatch}, {1, 3}, gpu, random);
        }
}

#ifndef __SANITIZE_THREAD__
TEST_CASE("large blocks of several k-blocks equal the CPU core") {
  Random random(15);
  check_cells(DType::bf16, Precision::exact, 600, {Cell::lstm}, {17}, {2}, kFewSms, random);
  if (kSanitized) return;
  check_cells(DType::bf16, Precision::exact, 600, {Cell::gru, Cell::rnn_tanh}, {3}, {2}, kFewSms,
              random);
  check_cells(DType::f32, Precision::tf32, 580, {Cell::lstm, Cell::gru, Cell::rnn_tanh}, {3}, {2},
              kFewSms, random);
}

TEST_CASE("large blocks of both directions, or of two slices, in one launch equal the CPU core") {
  Case c{{Cell::lstm, DType::f32, 2, 17, 3, 260}};
  c.precision = Precision::tf32;
  c.gpu = kFewSmallSms;
  for (int directions : {2, 1}) {
    c.directions = directions;
    for (bool backward : {false, true}) {
      const LayerShape shape = {c.cell, c.dtype, c.T, c.B, c.H, c.H, directions, nullptr, nullptr};
      const CudaPlan plan = plan_of(c, shape, backward);
      REQUIRE(plan.units == 32);
      REQUIRE(plan.launches == 1);
      REQUIRE(plan.blocks == 18);
      REQUIRE(plan.streamed_octets > 0);
    }
    for (bool ragged : {false, true}) {
      c.ragged = ragged;
      c.resets = !ragged;
      check_case(c, 15 + ragged);
      if (kSanitized) break;
    }
  }
}
#endif

#ifndef __SANITIZE_THREAD__  // more blocks than it has room for
TEST_CASE("wide blocks with weights in shared memory equal the CPU core") {
  Random random(8);
  const auto check = [&](DType dtype, Precision precision, int64_t H, Cell cell) {
    check_cells(dtype, precision, H, {cell}, {3}, {2}, kH100, random);
  };
  check(DType::bf16, Precision::exact, 1040, Cell::lstm);
  check(DType::f16, Precision::exact, 1042, Cell::gru);
  check(DType::f32, Precision::tf32, 1040, Cell::gru);
  check(DType::f32, Precision::exact, 1540, Cell::rnn_tanh);
}
#endif

}  // namespace
}  // namespace rnn_fused
