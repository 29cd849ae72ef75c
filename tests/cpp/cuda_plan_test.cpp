// Which layers the persistent kernels take, on GPUs as their data sheets describe them.
#include <doctest/doctest.h>

#include <algorithm>

#include "csrc/cuda/plan.h"
#include "tests/cpp/names.h"

namespace rnn_fused {
namespace {

constexpr GpuProperties kA100 = {80, 108, 65536, 167936, 166912};
constexpr GpuProperties kH100 = {90, 132, 65536, 233472, 232448};
constexpr GpuProperties kH200 = {90, 132, 65536, 233472, 232448};
constexpr GpuProperties kB200 = {100, 148, 65536, 233472, 232448};
constexpr GpuProperties kRtx5090 = {120, 170, 65536, 102400, 101376};
constexpr GpuProperties kRtx4090 = {89, 128, 65536, 102400, 101376};
constexpr GpuProperties kSmall = {86, 16, 65536, 102400, 101376};  // RTX 3050 of a laptop
constexpr GpuProperties kT4 = {75, 40, 65536, 65536, 65536};

LayerShape shape(int64_t B, int64_t H, int directions = 1, Cell cell = Cell::lstm,
                 DType dtype = DType::bf16) {
  return {cell, dtype, 100, B, H, H, directions, nullptr, nullptr};
}

CudaPlan plan(const LayerShape& s, const GpuProperties& gpu, bool backward = false) {
  return plan_cuda(s, Precision::exact, gpu, backward);
}

bool mentions(const CudaPlan& plan, const std::string& text) {
  return plan.why.find(text) != std::string::npos;
}

TEST_CASE("a layer that fits has persistent kernels, in both passes") {
  for (const GpuProperties& gpu : {kH100, kH200, kB200})
    for (bool backward : {false, true})
      for (Cell cell : {Cell::lstm, Cell::gru, Cell::rnn_tanh, Cell::rnn_relu})
        for (DType dtype : {DType::f32, DType::bf16, DType::f16})
          for (Precision precision : {Precision::exact, Precision::tf32})
            for (int64_t H : {1, 8, 256, 257, 1000, 1024}) {
              const CudaPlan p = plan_cuda(shape(32, H, 1, cell, dtype), precision, gpu, backward);
              CAPTURE(p.why);
              CHECK(p.family == Family::persistent);
              CHECK(p.why == "");
              CHECK(p.units == 8);
              CHECK(p.warps == 8);
              CHECK(p.k_blocks == (H + 255) / 256);
              CHECK(p.register_blocks == p.k_blocks);
              CHECK(p.launches == 1);
              CHECK(p.blocks == (H + 7) / 8);
              CHECK(p.batch_tile == 32);
            }
}

TEST_CASE("what the persistent kernels cannot do") {
  LayerShape s = shape(32, 256);
  s.P = 100;
  CHECK(mentions(plan(s, kH100), "projection, P = 100"));
  CHECK(mentions(plan(shape(32, 256, 1, Cell::gru, DType::f64), kH100), "float64"));
  CHECK(mentions(plan(shape(32, 256), kT4), "got 75"));
  CHECK(mentions(plan(shape(32, 2049), kH100), "up to 2048, got 2049"));
  for (const CudaPlan& p : {plan(s, kH100), plan(shape(32, 2049), kB200)}) {
    CHECK(p.family == Family::stepwise);
    CHECK(p.blocks == 0);
    CHECK(p.shared_bytes == 0);
  }
}

// Of these the forward pass of an RNN keeps nothing in shared memory, which sets no limit to B.
TEST_CASE("blocks count sequences in 32 bits") {
  const auto forced = [](int64_t B) {
    return plan_cuda(shape(B, 1, 1, Cell::rnn_tanh), Precision::exact, kH100, false, true);
  };
  CHECK(forced(int64_t{1} << 26).family == Family::persistent);
  for (int64_t B : {(int64_t{1} << 26) + 1, (int64_t{1} << 32) + 1})
    CHECK(mentions(forced(B), "in 32 bits, B up to 67108864, got " + std::to_string(B)));
}

// Forward h, backward the gradients of four gates: an SM reads 1 MiB of them at most.
TEST_CASE("large batches of large layers are left to products") {
  CHECK(plan(shape(512, 1024), kH100).family == Family::persistent);
  CHECK(mentions(plan(shape(513, 1024), kH100), "would read 1050624 bytes each step"));
  CHECK(plan(shape(128, 1024), kH100, true).family == Family::persistent);
  CHECK(mentions(plan(shape(129, 1024), kH100, true), "would read 1056768 bytes each step"));
  const CudaPlan forced = plan_cuda(shape(129, 1024), Precision::exact, kH100, true, true);
  CHECK(forced.family == Family::persistent);
}

// One block to an SM; two of 16-bit types for H up to 256. Where narrow blocks are too many, wide
// ones may fit, and where both directions do not, one after the other may.
TEST_CASE("all blocks of a launch are resident at once") {
  struct How {
    int units, launches;  // 0 and 0: stepwise
    bool operator==(const How&) const = default;
  };
  const auto how = [](int64_t H, int directions, const GpuProperties& gpu) -> How {
    const CudaPlan p = plan(shape(16, H, directions), gpu);
    CAPTURE(p.why);
    CHECK((p.family == Family::stepwise) == (p.why != ""));
    if (p.family == Family::persistent) {
      CHECK(p.blocks == (H + p.units - 1) / p.units * directions / p.launches);
      CHECK(p.blocks <= gpu.sm_count * (p.units == 8 && H <= 256 ? 2 : 1));
    }
    return {p.units, p.launches};
  };
  CHECK(how(528, 2, kH100) == How{8, 1});
  CHECK(how(529, 2, kH100) == How{16, 1});
  CHECK(how(592, 2, kB200) == How{8, 1});
  CHECK(how(1024, 2, kH100) == How{16, 1});
  CHECK(how(1056, 2, kH100) == How{16, 1});
  CHECK(how(1057, 2, kH100) == How{16, 2});
  CHECK(how(1025, 1, kH100) == How{16, 1});
  CHECK(how(2048, 1, kH100) == How{16, 1});
  CHECK(how(2048, 2, kH100) == How{16, 2});
  CHECK(how(864, 1, kA100) == How{8, 1});
  CHECK(how(865, 1, kA100) == How{16, 1});
  CHECK(how(864, 2, kA100) == How{16, 1});
  CHECK(how(872, 2, kA100) == How{16, 2});
  CHECK(how(1024, 1, kRtx4090) == How{8, 1});
  CHECK(how(256, 1, kSmall) == How{8, 1});
  CHECK(how(257, 1, kSmall) == How{0, 0});
  CHECK(how(128, 2, kSmall) == How{8, 1});
  CHECK(how(129, 2, kSmall) == How{8, 2});
  CHECK(plan(shape(16, 128, 1, Cell::lstm, DType::f32), kSmall).units == 8);
  CHECK(plan(shape(16, 129, 1, Cell::lstm, DType::f32), kSmall).units == 16);
  CHECK(mentions(plan(shape(16, 257), kSmall), "17 blocks of 16 hidden units must be resident"));
  CHECK(mentions(plan(shape(16, 257), kSmall), "room for 16"));
}

TEST_CASE("weights beyond a wide block's registers are in shared memory") {
  struct Case {
    Cell cell;
    DType dtype;
    int in_registers;
  };
  for (const auto& [cell, dtype, in_registers] :
       {Case{Cell::lstm, DType::bf16, 3}, Case{Cell::gru, DType::bf16, 4},
        Case{Cell::rnn_tanh, DType::bf16, 8}, Case{Cell::gru, DType::f32, 2},
        Case{Cell::rnn_tanh, DType::f32, 6}})
    for (bool backward : {false, true}) {
      CAPTURE(backward);
      const CudaPlan p = plan(shape(16, 1030, 1, cell, dtype), kH100, backward);
      REQUIRE(p.units == 16);
      CHECK(p.k_blocks == 5);
      CHECK(p.register_blocks == std::min(5, in_registers));
      // [8 warps, 16, 16 units, or 16 * 4 gates + 4] sums, biases, [16, 16] state, and weights: for
      // each k-block 256 values of h for the units of each gate.
      const int gates = gate_count(cell), state = cell == Cell::rnn_tanh ? backward : 1;
      const int pitch = backward || gates == 1 ? 16 : 68;
      const int biases = backward ? 0 : saved_count(cell) * 16;
      const int doubled = backward && cell == Cell::lstm ? 2 : 1;
      CHECK(p.shared_bytes ==
            4 * (8 * 16 * pitch + biases + doubled * state * 256) +
                (5 - p.register_blocks) * 256 * 16 * gates * (dtype == DType::f32 ? 4 : 2));
    }
  CHECK(mentions(plan(shape(16, 1030, 1, Cell::lstm, DType::f32), kH100), "shared memory"));
}

TEST_CASE("shared memory holds the sums of a batch tile and the state of every sequence") {
  CHECK(plan(shape(1, 64), kH100).batch_tile == 16);
  CHECK(plan(shape(33, 64), kH100).batch_tile == 48);
  CHECK(plan(shape(1000, 64), kH100).batch_tile == 64);
  // [8 warps, tile, 8 units * 4 gates + 4] sums, [4, 8] biases, [B, 8] c
  CHECK(plan(shape(70, 64), kH100).shared_bytes == 4 * (8 * 64 * 36 + 32 + 70 * 8));
  CHECK(plan(shape(70, 64, 1, Cell::rnn_relu), kH100).shared_bytes == 4 * (8 * 64 * 8 + 8));
  // [8 warps, tile, 8 units] sums, [2, B, 8] dh and dc; of other cells dh alone
  CHECK(plan(shape(70, 64), kH100, true).shared_bytes == 4 * (8 * 64 * 8 + 2 * 70 * 8));
  CHECK(plan(shape(70, 64, 1, Cell::gru), kH100, true).shared_bytes == 4 * (8 * 64 * 8 + 70 * 8));

  int64_t last = 64;
  for (int64_t B = 64; B < 8000; B += 64) {
    const CudaPlan p = plan(shape(B, 64), kH100);
    if (p.family == Family::stepwise) {
      CHECK(B > 6600);
      CHECK(mentions(p, "shared memory"));
      CHECK(mentions(p, "233472"));
      return;
    }
    CHECK(p.shared_bytes <= kH100.shared_per_block);
    CHECK(p.batch_tile <= last);
    last = p.batch_tile;
  }
  FAIL("no batch is too large");
}

TEST_CASE("clusters hold small layers, with few sequences each where there is room for all") {
  for (Cell cell : {Cell::lstm, Cell::gru, Cell::rnn_tanh, Cell::rnn_relu})
    for (DType dtype : {DType::f32, DType::bf16, DType::f16})
      for (int64_t H : {1, 16, 17, 250, 256})
        for (int64_t B : {1, 16, 100, 128, 129, 2048})
          for (int directions : {1, 2}) {
            const CudaPlan p = plan_cluster(shape(B, H, directions, cell, dtype), kH100);
            CAPTURE(p.why);
            CHECK(p.family == Family::cluster);
            CHECK(p.cluster == (H + 15) / 16);
            // 132 SMs are 8 times 16 and some.
            const int64_t of_sixteen = (B + 15) / 16 * directions;
            CHECK(p.batch_tile == (of_sixteen <= 8 * (16 / p.cluster) ? 16 : 32));
            const int64_t slices = (B + p.batch_tile - 1) / p.batch_tile;
            CHECK(p.blocks == slices * directions * p.cluster);
            CHECK(p.shared_bytes + 1024 <= kH100.shared_per_block);
          }
  // [8 warps, 16, 16 units * 4 gates + 4] sums, [4, 16] biases, [16, 16] c, twice h [16, 256 + 32]
  CHECK(plan_cluster(shape(1, 256), kH100).shared_bytes ==
        4 * (8 * 16 * 68 + 64 + 256) + 2 * 16 * 288 * 2);
}

TEST_CASE("what clusters cannot do") {
  LayerShape s = shape(32, 256);
  s.P = 100;
  CHECK(mentions(plan_cluster(s, kH100), "projection, P = 100"));
  CHECK(mentions(plan_cluster(shape(32, 256, 1, Cell::gru, DType::f64), kH100), "float64"));
  CHECK(mentions(plan_cluster(shape(32, 256), kA100), "at least 90 is needed, got 80"));
  CHECK(mentions(plan_cluster(shape(32, 257), kH100), "H up to 256, got 257"));
  CHECK(mentions(plan_cluster(shape(32, 129), kRtx5090), "H up to 128, got 129"));
  CHECK(mentions(plan_cluster(shape((1 << 26) + 1, 32), kH100), "B up to 67108864"));
  CHECK(plan_cluster(shape(32, 128), kRtx5090).family == Family::cluster);
}

TEST_CASE("the backward pass may have another plan than the forward pass") {
  const LayerShape s = shape(4000, 64);
  CHECK(plan(s, kH100).family == Family::persistent);
  CHECK(plan(s, kH100, true).family == Family::stepwise);
}

}  // namespace
}  // namespace rnn_fused
