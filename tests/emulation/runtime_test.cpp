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
  gpu::launch_cooperative(1, sync_grid, 2, 1, 0, nullptr, out.get());
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

__global__ void leave(int*) {}

__global__ void wait_without_arrival(int*) { gpu::cluster_wait(); }

__global__ void arrive_twice(int*) {
  gpu::cluster_arrive();
  gpu::cluster_arrive();
}

__global__ void beyond_the_cluster(int*) {
  RNN_FUSED_SHARED(uint4, values, [1]);
  gpu::shared_of(values, 2);
}

__global__ void store_to_global(int* out) {
  gpu::store_shared(reinterpret_cast<unsigned char*>(out), {});
}

__global__ void barrier_that_nobody_made(int*) {
  RNN_FUSED_SHARED(uint64_t, full, [1]);
  gpu::wait_for_phase(full, 0);
}

__global__ void too_many_arrivals(int*) {
  RNN_FUSED_SHARED(uint64_t, full, [1]);
  gpu::make_barrier(full, 1);
  gpu::expect_bytes(full, 16);
  gpu::expect_bytes(full, 16);
}

TEST_CASE("mistakes in a cluster are errors with a place") {
  DeviceArray<int> out(4);
  const auto check = [&](void (*kernel)(int*), const char* message, unsigned cluster = 2) {
    CAPTURE(message);
    CHECK_THROWS_WITH_AS(gpu::launch_clusters(cluster, kernel, 2, 1, 0, nullptr, out.get()),
                         doctest::Contains(message), emulation::Error);
  };
  check(leave, "clusters have 1 to 16 blocks, of which x has a multiple, got 3 of 2", 3);
  check(leave, "clusters have 1 to 16 blocks, of which x has a multiple, got 32 of 2", 32);
  check(wait_without_arrival, "a wait for the cluster without an arrival, at ");
  check(arrive_twice, "a second arrival at the cluster's barrier, at ");
  check(beyond_the_cluster, "a cluster of 2 blocks has no block 2, at ");
  check(store_to_global, "an address is not shared memory of the cluster, at ");
  check(barrier_that_nobody_made, "no make_barrier has been here, at ");
  check(too_many_arrivals, "more arrivals than a phase has, at ");
  check(too_many_arrivals, "runtime_test.cpp:");
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
