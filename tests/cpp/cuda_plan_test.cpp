// Which layers the persistent kernels take, on GPUs as their data sheets describe them.
#include <doctest/doctest.h>

#include "csrc/cuda/plan.h"
#include "tests/cpp/names.h"

namespace rnn_fused {
namespace {

constexpr GpuProperties kA100 = {80, 108, 65536, 167936, 166912};
constexpr GpuProperties kH100 = {90, 132, 65536, 233472, 232448};
constexpr GpuProperties kH200 = {90, 132, 65536, 233472, 232448};
constexpr GpuProperties kB200 = {100, 148, 65536, 233472, 232448};
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
  CHECK(mentions(plan(shape(32, 1025), kH100), "up to 1024, got 1025"));
  for (const CudaPlan& p : {plan(s, kH100), plan(shape(32, 1025), kB200)}) {
    CHECK(p.family == Family::stepwise);
    CHECK(p.blocks == 0);
    CHECK(p.shared_bytes == 0);
  }
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

// One block to an SM; two of 16-bit types for H up to 256.
TEST_CASE("all blocks of all directions are resident at once") {
  const auto persistent = [](int64_t H, int directions, const GpuProperties& gpu) {
    const CudaPlan p = plan(shape(16, H, directions), gpu);
    CHECK((p.family == Family::stepwise) == mentions(p, "must be resident at once"));
    return p.family == Family::persistent;
  };
  CHECK(persistent(528, 2, kH100));
  CHECK(!persistent(529, 2, kH100));
  CHECK(persistent(592, 2, kB200));
  CHECK(persistent(864, 1, kA100));
  CHECK(!persistent(865, 1, kA100));
  CHECK(persistent(1024, 1, kRtx4090));
  CHECK(persistent(256, 1, kSmall));
  CHECK(!persistent(257, 1, kSmall));
  CHECK(persistent(128, 2, kSmall));
  CHECK(!persistent(129, 2, kSmall));
  CHECK(plan(shape(16, 128, 1, Cell::lstm, DType::f32), kSmall).family == Family::persistent);
  CHECK(plan(shape(16, 129, 1, Cell::lstm, DType::f32), kSmall).family == Family::stepwise);
  CHECK(mentions(plan(shape(16, 1024, 2), kH100), "256 blocks"));
  CHECK(mentions(plan(shape(16, 1024, 2), kH100), "room for 132"));
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

TEST_CASE("the backward pass may have another plan than the forward pass") {
  const LayerShape s = shape(4000, 64);
  CHECK(plan(s, kH100).family == Family::persistent);
  CHECK(plan(s, kH100, true).family == Family::stepwise);
}

}  // namespace
}  // namespace rnn_fused
