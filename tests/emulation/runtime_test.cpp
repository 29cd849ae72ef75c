// The runtime itself: what a launch refuses, and that a mistake leaves nothing behind.
#include <doctest/doctest.h>

#include "csrc/cuda/primitives.cuh"
#include "tests/emulation/device_array.h"

namespace rnn_fused {
namespace {

__global__ void indices(int* out) {
  const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] = block * 1000 + thread;
}

__global__ void sync_grid(int* out) {
  if (blockIdx.x == 0) *out = 1;
  cooperative_groups::this_grid().sync();
  if (blockIdx.x == 1) *out += 1;
}

__global__ void half_waits(int* out) {
  out[threadIdx.x] = threadIdx.x;
  if (threadIdx.x % 2 == 0) __syncthreads();
}

__global__ void copy_to_global(int* out) { gpu::cp_async<4>(out, out); }

__global__ void copy_misaligned(int* out) {
  RNN_FUSED_SHARED(int, values, [8]);
  gpu::cp_async<8>(&values[1], out);
}

__global__ void mma_of_half_a_warp(int*) {
  float d[4] = {};
  gpu::mma_m16n8k8_tf32(d, {}, {});
}

TEST_CASE("grids and blocks of three dimensions") {
  DeviceArray<int> out(2 * 3 * 4 * 60);
  gpu::launch(indices, dim3(2, 3, 4), dim3(5, 4, 3), 0, nullptr, out.get());
  for (int i = 0; i < 2 * 3 * 4 * 60; ++i) CHECK(out.host()[i] == i / 60 * 1000 + i % 60);
}

TEST_CASE("this_grid().sync() needs a cooperative launch") {
  DeviceArray<int> out(1);
  gpu::launch_cooperative(sync_grid, 2, 1, 0, nullptr, out.get());
  CHECK(out.host()[0] == 2);
  CHECK_THROWS_WITH_AS(gpu::launch(sync_grid, 2, 1, 0, nullptr, out.get()),
                       doctest::Contains("a grid barrier outside a cooperative launch"),
                       emulation::Error);
}

TEST_CASE("a launch that no GPU could run") {
  DeviceArray<int> out(1);
  CHECK_THROWS_AS(gpu::launch(indices, 1, 1025, 0, nullptr, out.get()), emulation::Error);
  CHECK_THROWS_AS(gpu::launch(indices, 1, 32, 300'000, nullptr, out.get()), emulation::Error);
  CHECK_THROWS_AS(gpu::launch(indices, 0, 32, 0, nullptr, out.get()), emulation::Error);
}

TEST_CASE("mistakes at primitives are errors with a place") {
  DeviceArray<int> out(2);
  const auto run = [&](void (*kernel)(int*), int threads) {
    gpu::launch(kernel, 1, threads, 0, nullptr, out.get());
  };
  CHECK_THROWS_WITH_AS(run(copy_to_global, 1), doctest::Contains("not this block's shared memory"),
                       emulation::Error);
  CHECK_THROWS_WITH_AS(run(copy_misaligned, 1), doctest::Contains("not aligned to 8 bytes"),
                       emulation::Error);
  CHECK_THROWS_WITH_AS(run(mma_of_half_a_warp, 16), doctest::Contains("lanes that the warp lacks"),
                       emulation::Error);
  CHECK_THROWS_WITH_AS(run(mma_of_half_a_warp, 16), doctest::Contains("runtime_test.cpp:"),
                       emulation::Error);
}

TEST_CASE("a launch after a mistake is as good as any") {
  for (int i = 0; i < 3; ++i) {
    DeviceArray<int> out(64);
    CHECK_THROWS_AS(gpu::launch(half_waits, 2, 64, 0, nullptr, out.get()), emulation::Error);
    CHECK(out.host()[63] == 63);
    gpu::launch(indices, 1, 64, 0, nullptr, out.get());
    CHECK(out.host()[63] == 63);
  }
}

}  // namespace
}  // namespace rnn_fused
