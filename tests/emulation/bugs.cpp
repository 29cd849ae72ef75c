// The classic mistakes of CUDA kernels, each planted in a kernel of its own whose healthy twin is
// the same source: what the emulation is worth is what it says here. CMakeLists.txt has what each
// build must say.
//
//   emulation_bugs NAME bug|healthy
#include <cstdio>
#include <string>
#include <vector>

#include "csrc/cuda/primitives.cuh"
#include "tests/emulation/device_array.h"

namespace rnn_fused {
namespace {

constexpr int kThreads = 64, kBlocks = 2;

struct Params {
  const float* in;    // [kBlocks, kThreads], element i is i
  float* scratch;     // the same shape
  float* out;         // the same shape, expected to become what expected() says
  uint32_t* counter;  // [1], zero
};

__device__ int global_index() { return blockIdx.x * blockDim.x + threadIdx.x; }

// The threads of every block, and with `blocks` the blocks too, in reverse order.
float expected(int i, bool blocks) {
  const int block = i / kThreads, thread = i % kThreads;
  return (blocks ? kBlocks - 1 - block : block) * kThreads + (kThreads - 1 - thread);
}

// No barrier between the writes and the reads of shared memory.
template <bool bug>
__global__ void block_barrier(Params p) {
  RNN_FUSED_SHARED(float, values, [kThreads]);
  values[threadIdx.x] = p.in[global_index()];
  if (!bug) __syncthreads();
  p.out[global_index()] = values[kThreads - 1 - threadIdx.x];
}

// No barrier between the writes and the reads of a warp.
template <bool bug>
__global__ void warp_barrier(Params p) {
  RNN_FUSED_SHARED(float, values, [kThreads]);
  values[threadIdx.x] = p.in[blockIdx.x * kThreads + (threadIdx.x + 32) % kThreads];
  if (!bug) __syncwarp();
  p.out[global_index()] = values[threadIdx.x ^ 31];
}

// No barrier between blocks.
template <bool bug>
__global__ void grid_barrier(Params p) {
  gpu::GridBarrier barrier(p.counter);
  p.scratch[global_index()] = p.in[global_index()];
  if (!bug) barrier.sync();
  p.out[global_index()] = p.scratch[kBlocks * kThreads - 1 - global_index()];
}

// A block relies on an earlier one, as if the blocks of an ordinary launch came in order.
template <bool bug>
__global__ void order_of_blocks(Params p) {
  RNN_FUSED_SHARED(float, values, [kThreads]);
  const int from = bug && blockIdx.x > 0 ? global_index() - kThreads : global_index();
  p.scratch[global_index()] = p.in[global_index()];
  values[threadIdx.x] = p.scratch[from] + (global_index() - from);
  __syncthreads();
  p.out[global_index()] = values[kThreads - 1 - threadIdx.x];
}

// The barrier's counter is raised without a release.
template <bool bug>
__global__ void relaxed(Params p) {
  p.scratch[global_index()] = p.in[global_index()];
  __syncthreads();
  if (threadIdx.x == 0) {
    if (bug)
      atomicAdd(p.counter, 1u);
    else
      gpu::reduce_release_add(p.counter, 1);
    while (gpu::load_acquire(p.counter) < kBlocks) gpu::spin_pause();
  }
  __syncthreads();
  p.out[global_index()] = p.scratch[kBlocks * kThreads - 1 - global_index()];
}

// Writes one element behind an array. `size` hides it from the compiler.
template <bool bug>
__device__ float* element(float* values, int i, int size) {
  return &values[bug && i == size - 1 ? size : i];
}

template <bool bug>
__global__ void static_shared_index(Params p) {
  RNN_FUSED_SHARED(float, values, [kThreads]);
  *element<bug>(values, threadIdx.x, blockDim.x) = p.in[global_index()];
  __syncthreads();
  p.out[global_index()] = values[kThreads - 1 - threadIdx.x];
}

template <bool bug>
__global__ void dynamic_shared_index(Params p) {
  RNN_FUSED_DYNAMIC_SHARED(float, values);
  *element<bug>(values, threadIdx.x, blockDim.x) = p.in[global_index()];
  __syncthreads();
  p.out[global_index()] = values[kThreads - 1 - threadIdx.x];
}

template <bool bug>
__global__ void output_index(Params p) {
  const int last = gridDim.x * blockDim.x - 1;
  RNN_FUSED_SHARED(float, values, [kThreads]);
  values[threadIdx.x] = p.in[global_index()];
  __syncthreads();
  *element<bug>(p.out, global_index(), last + 1) = values[kThreads - 1 - threadIdx.x];
}

// Half of the threads meet at another barrier than the rest.
template <bool bug>
__global__ void divergent_barrier(Params p) {
  RNN_FUSED_SHARED(float, values, [kThreads]);
  values[threadIdx.x] = p.in[global_index()];
  if (bug && threadIdx.x < 32)
    __syncthreads();  // here
  else
    __syncthreads();  // or there
  p.out[global_index()] = values[kThreads - 1 - threadIdx.x];
}

// Some threads leave before a barrier.
template <bool bug>
__global__ void left_before_barrier(Params p) {
  RNN_FUSED_SHARED(float, values, [kThreads]);
  values[threadIdx.x] = p.in[global_index()];
  __syncthreads();
  p.out[global_index()] = values[kThreads - 1 - threadIdx.x];
  if (bug && threadIdx.x < 32) return;
  __syncthreads();
}

// The copy is read before it is waited for.
template <bool bug>
__global__ void copy_not_awaited(Params p) {
  RNN_FUSED_SHARED(float, values, [kThreads]);
  gpu::cp_async<4>(&values[threadIdx.x], &p.in[global_index()]);
  gpu::cp_async_commit();
  if (!bug) gpu::cp_async_wait<0>();
  __syncthreads();
  p.out[global_index()] = values[kThreads - 1 - threadIdx.x];
}

// The next copy starts while other threads still read the last one.
template <bool bug>
__global__ void copy_too_early(Params p) {
  RNN_FUSED_SHARED(float, values, [kThreads]);
  const float* const next = &p.in[global_index()];
  gpu::cp_async<4>(&values[threadIdx.x], next);
  gpu::cp_async_commit();
  gpu::cp_async_wait<0>();
  __syncthreads();
  const float value = values[kThreads - 1 - threadIdx.x];
  if (!bug) __syncthreads();
  gpu::cp_async<4>(&values[threadIdx.x], next);
  gpu::cp_async_commit();
  gpu::cp_async_wait<0>();
  __syncthreads();
  p.out[global_index()] = (value + values[kThreads - 1 - threadIdx.x]) / 2;
}

// The source of a copy is written between its issue and its wait.
template <bool bug>
__global__ void copy_source_changes(Params p) {
  RNN_FUSED_SHARED(float, values, [kThreads]);
  p.scratch[global_index()] = p.in[global_index()];
  gpu::cp_async<4>(&values[threadIdx.x], &p.scratch[global_index()]);
  gpu::cp_async_commit();
  if (bug) p.scratch[global_index()] = 0;
  gpu::cp_async_wait<0>();
  __syncthreads();
  p.out[global_index()] = values[kThreads - 1 - threadIdx.x];
}

// Everybody waits for a flag that nobody sets.
template <bool bug>
__global__ void endless_spin(Params p) {
  RNN_FUSED_SHARED(float, values, [kThreads]);
  values[threadIdx.x] = p.in[global_index()];
  if (!bug && threadIdx.x == 0) gpu::store_release(p.counter, 1);
  while (gpu::load_acquire(p.counter) != 1) gpu::spin_pause();
  __syncthreads();
  p.out[global_index()] = values[kThreads - 1 - threadIdx.x];
}

// The same, by whole warps: that they meet is no progress.
template <bool bug>
__global__ void endless_spin_of_warps(Params p) {
  RNN_FUSED_SHARED(float, values, [kThreads]);
  values[threadIdx.x] = p.in[global_index()];
  if (!bug && threadIdx.x == 0) gpu::store_release(p.counter, 1);
  while (!__any_sync(~0u, gpu::load_acquire(p.counter) == 1)) gpu::spin_pause();
  __syncthreads();
  p.out[global_index()] = values[kThreads - 1 - threadIdx.x];
}

// A shuffle reads a lane that is not in its mask.
template <bool bug>
__global__ void lane_not_in_mask(Params p) {
  RNN_FUSED_SHARED(float, values, [kThreads]);
  float value = p.in[global_index()];
  if (threadIdx.x % 32 < 16) value = __shfl_sync(0xffff, value, threadIdx.x ^ (bug ? 16 : 0));
  values[threadIdx.x] = value;
  __syncthreads();
  p.out[global_index()] = values[kThreads - 1 - threadIdx.x];
}

// What the next kernels send to the other block of a cluster of two: four of the block's numbers.
constexpr int kVectors = kThreads / 4;

__device__ uint4 four(const Params& p, int v) {
  const float* const from = &p.in[blockIdx.x * kThreads + 4 * v];
  return make_uint4(__float_as_uint(from[0]), __float_as_uint(from[1]), __float_as_uint(from[2]),
                    __float_as_uint(from[3]));
}

// No wait between the stores into the other block's shared memory and its reads.
template <bool bug>
__global__ void cluster_barrier(Params p) {
  RNN_FUSED_SHARED(float, values, [kThreads]);
  const uint32_t other = 1 - gpu::cluster_rank();
  gpu::cluster_arrive();
  gpu::cluster_wait();
  if (threadIdx.x < kVectors)
    gpu::store_shared(gpu::shared_of(&values[4 * threadIdx.x], other), four(p, threadIdx.x));
  if (!bug) gpu::cluster_arrive();
  if (!bug) gpu::cluster_wait();
  p.out[global_index()] = values[kThreads - 1 - threadIdx.x];
  gpu::cluster_arrive();
  gpu::cluster_wait();
}

// What is stored between the halves of the barrier is not carried by it.
template <bool bug>
__global__ void cluster_store_after_arrival(Params p) {
  RNN_FUSED_SHARED(float, values, [kThreads]);
  const uint32_t other = 1 - gpu::cluster_rank();
  gpu::cluster_arrive();
  gpu::cluster_wait();
  if (bug) gpu::cluster_arrive();
  if (threadIdx.x < kVectors)
    gpu::store_shared(gpu::shared_of(&values[4 * threadIdx.x], other), four(p, threadIdx.x));
  if (!bug) gpu::cluster_arrive();
  gpu::cluster_wait();
  p.out[global_index()] = values[kThreads - 1 - threadIdx.x];
  gpu::cluster_arrive();
  gpu::cluster_wait();
}

// Stores to a block that may not have begun.
template <bool bug>
__global__ void cluster_not_begun(Params p) {
  RNN_FUSED_SHARED(float, values, [kThreads]);
  const uint32_t other = 1 - gpu::cluster_rank();
  if (!bug) gpu::cluster_arrive();
  if (!bug) gpu::cluster_wait();
  if (threadIdx.x < kVectors)
    gpu::store_shared(gpu::shared_of(&values[4 * threadIdx.x], other), four(p, threadIdx.x));
  gpu::cluster_arrive();
  gpu::cluster_wait();
  p.out[global_index()] = values[kThreads - 1 - threadIdx.x];
}

// A block leaves while the other one still stores into its shared memory.
template <bool bug>
__global__ void cluster_left(Params p) {
  RNN_FUSED_SHARED(float, values, [kThreads]);
  const uint32_t rank = gpu::cluster_rank();
  gpu::cluster_arrive();
  gpu::cluster_wait();
  p.out[global_index()] = p.in[kBlocks * kThreads - 1 - global_index()];
  if (bug && rank == 0) return;
  for (int i = 0; rank == 1 && i < 4; ++i) __syncthreads();  // takes its time
  if (rank == 1 && threadIdx.x < kVectors)
    gpu::store_shared(gpu::shared_of(&values[4 * threadIdx.x], 0), four(p, threadIdx.x));
  if (!bug) gpu::cluster_arrive();
  if (!bug) gpu::cluster_wait();
}

// Sends the block's numbers to the other one's `to`, and counts them at its barrier.
__device__ void send_all(const Params& p, float* to, uint64_t* barrier) {
  const uint32_t other = 1 - gpu::cluster_rank();
  if (threadIdx.x < kVectors)
    gpu::store_async(gpu::shared_of(&to[4 * threadIdx.x], other), four(p, threadIdx.x),
                     gpu::shared_of(barrier, other));
}

__device__ void begin_transactions(uint64_t* barrier, uint32_t bytes) {
  if (threadIdx.x == 0) {
    gpu::make_barrier(barrier, 1);
    gpu::expect_bytes(barrier, bytes);
  }
  gpu::cluster_arrive();
  gpu::cluster_wait();
}

constexpr uint32_t kBytes = kThreads * sizeof(float);

// The barrier is made when the other block may be sending already.
template <bool bug>
__global__ void barrier_made_late(Params p) {
  RNN_FUSED_SHARED(float, values, [kThreads]);
  RNN_FUSED_SHARED(uint64_t, full, [1]);
  if (bug) gpu::cluster_arrive();
  if (bug) gpu::cluster_wait();
  if (threadIdx.x == 0) {
    gpu::make_barrier(full, 1);
    gpu::expect_bytes(full, kThreads * sizeof(float));
  }
  if (bug) __syncthreads();
  if (!bug) gpu::cluster_arrive();
  if (!bug) gpu::cluster_wait();
  const uint32_t other = 1 - gpu::cluster_rank();
  if (threadIdx.x < kVectors)
    gpu::store_async(gpu::shared_of(&values[4 * threadIdx.x], other), four(p, threadIdx.x),
                     gpu::shared_of(full, other));
  gpu::wait_for_phase(full, 0);
  p.out[global_index()] = values[kThreads - 1 - threadIdx.x];
  gpu::cluster_arrive();
  gpu::cluster_wait();
}

// What was sent is read before it is waited for.
template <bool bug>
__global__ void store_not_awaited(Params p) {
  RNN_FUSED_SHARED(float, values, [kThreads]);
  RNN_FUSED_SHARED(uint64_t, full, [1]);
  begin_transactions(full, kBytes);
  send_all(p, values, full);
  if (!bug) gpu::wait_for_phase(full, 0);
  p.out[global_index()] = values[kThreads - 1 - threadIdx.x];
  gpu::wait_for_phase(full, 0);
  gpu::cluster_arrive();
  gpu::cluster_wait();
}

// The next numbers are sent while the other block still reads the last ones.
template <bool bug>
__global__ void store_too_early(Params p) {
  RNN_FUSED_SHARED(float, values, [kThreads]);
  RNN_FUSED_SHARED(uint64_t, full, [2]);
  begin_transactions(&full[0], kBytes);
  begin_transactions(&full[1], kBytes);
  send_all(p, values, &full[0]);
  gpu::wait_for_phase(&full[0], 0);
  const float value = values[kThreads - 1 - threadIdx.x];
  if (!bug) gpu::cluster_arrive();
  if (!bug) gpu::cluster_wait();
  send_all(p, values, &full[1]);
  gpu::wait_for_phase(&full[1], 0);
  p.out[global_index()] = (value + values[kThreads - 1 - threadIdx.x]) / 2;
  gpu::cluster_arrive();
  gpu::cluster_wait();
}

// They are sent while the other block may still wait for the last ones, at the same barrier: two of
// its phases may be over before anybody there looks.
template <bool bug>
__global__ void phases_mixed(Params p) {
  RNN_FUSED_SHARED(float, values, [kThreads]);
  RNN_FUSED_SHARED(uint64_t, full, [1]);
  begin_transactions(full, kBytes);
  send_all(p, values, full);
  gpu::wait_for_phase(full, 0);
  const float value = values[kThreads - 1 - threadIdx.x];
  __syncthreads();
  if (threadIdx.x == 0) gpu::expect_bytes(full, kBytes);
  if (!bug) gpu::cluster_arrive();
  if (!bug) gpu::cluster_wait();
  send_all(p, values, full);
  gpu::wait_for_phase(full, 1);
  p.out[global_index()] = (value + values[kThreads - 1 - threadIdx.x]) / 2;
  gpu::cluster_arrive();
  gpu::cluster_wait();
}

// More bytes are expected than come.
template <bool bug>
__global__ void too_many_bytes(Params p) {
  RNN_FUSED_SHARED(float, values, [kThreads]);
  RNN_FUSED_SHARED(uint64_t, full, [1]);
  begin_transactions(full, bug ? 2 * kBytes : kBytes);
  send_all(p, values, full);
  gpu::wait_for_phase(full, 0);
  p.out[global_index()] = values[kThreads - 1 - threadIdx.x];
  gpu::cluster_arrive();
  gpu::cluster_wait();
}

// A store that nobody waits for, so that the block may leave before it comes.
template <bool bug>
__global__ void nobody_waits(Params p) {
  RNN_FUSED_SHARED(float, values, [kThreads]);
  RNN_FUSED_SHARED(uint64_t, full, [1]);
  begin_transactions(full, kBytes);
  send_all(p, values, full);
  p.out[global_index()] = p.in[kBlocks * kThreads - 1 - global_index()];
  if (!bug) gpu::wait_for_phase(full, 0);
  gpu::cluster_arrive();
  gpu::cluster_wait();
}

// How its kernels are launched.
enum class Launch { ordinary, cooperative, cluster };

struct Bug {
  const char* name;
  void (*healthy)(Params);
  void (*with_bug)(Params);
  Launch launch = Launch::ordinary;
  bool reverses_blocks = false;
};

#define KERNELS(name) #name, name<false>, name<true>

constexpr Bug kBugs[] = {
    {KERNELS(block_barrier)},
    {KERNELS(warp_barrier)},
    {KERNELS(grid_barrier), Launch::cooperative, true},
    {KERNELS(order_of_blocks)},
    {KERNELS(relaxed), Launch::cooperative, true},
    {KERNELS(static_shared_index)},
    {KERNELS(dynamic_shared_index)},
    {KERNELS(output_index)},
    {KERNELS(divergent_barrier)},
    {KERNELS(left_before_barrier)},
    {KERNELS(copy_not_awaited)},
    {KERNELS(copy_too_early)},
    {KERNELS(copy_source_changes)},
    {KERNELS(endless_spin)},
    {KERNELS(endless_spin_of_warps)},
    {KERNELS(lane_not_in_mask)},
    {KERNELS(cluster_barrier), Launch::cluster, true},
    {KERNELS(cluster_store_after_arrival), Launch::cluster, true},
    {KERNELS(cluster_not_begun), Launch::cluster, true},
    {KERNELS(cluster_left), Launch::cluster, true},
    {KERNELS(barrier_made_late), Launch::cluster, true},
    {KERNELS(store_not_awaited), Launch::cluster, true},
    {KERNELS(store_too_early), Launch::cluster, true},
    {KERNELS(phases_mixed), Launch::cluster, true},
    {KERNELS(too_many_bytes), Launch::cluster, true},
    {KERNELS(nobody_waits), Launch::cluster, true},
};

int run(void (*kernel)(Params), Launch launch, bool reverses_blocks) {
  constexpr int kSize = kBlocks * kThreads;
  std::vector<float> values(kSize);
  for (int i = 0; i < kSize; ++i) values[i] = i;
  DeviceArray<float> in(values), scratch(kSize), out(kSize);
  DeviceArray<uint32_t> counter(1);
  gpu::fill(counter.get(), 0, counter.bytes(), nullptr);
  const Params p = {in.get(), scratch.get(), out.get(), counter.get()};
  constexpr size_t kShared = kThreads * sizeof(float);
  switch (launch) {
    case Launch::ordinary: gpu::launch(kernel, kBlocks, kThreads, kShared, nullptr, p); break;
    case Launch::cooperative:
      gpu::launch_cooperative(1, kernel, kBlocks, kThreads, kShared, nullptr, p);
      break;
    case Launch::cluster:
      gpu::launch_clusters(kBlocks, kernel, kBlocks, kThreads, kShared, nullptr, p);
      break;
  }
  const std::vector<float> got = out.host();
  for (int i = 0; i < kSize; ++i)
    if (const float wanted = expected(i, reverses_blocks); !(got[i] == wanted)) {
      std::printf("wrong result: element %d is %g, not %g\n", i, got[i], wanted);
      return 1;
    }
  std::printf("right result\n");
  return 0;
}

int run(const std::string& name, bool with_bug) {
  // Blocks that wait for each other need a launch that makes them all resident.
  if (name == "not_cooperative")
    return run(grid_barrier<false>, with_bug ? Launch::ordinary : Launch::cooperative, true);
  for (const Bug& bug : kBugs)
    if (bug.name == name)
      return run(with_bug ? bug.with_bug : bug.healthy, bug.launch, bug.reverses_blocks);
  std::printf("no such kernel: %s\n", name.c_str());
  return 2;
}

}  // namespace
}  // namespace rnn_fused

int main(int argc, char** argv) {
  if (argc != 3) {
    std::printf("usage: emulation_bugs NAME bug|healthy\n");
    return 2;
  }
  try {
    return rnn_fused::run(argv[1], argv[2] == std::string("bug"));
  } catch (const rnn_fused::emulation::Error& error) {
    std::printf("mistake: %s\n", error.what());
    return 1;
  }
}
