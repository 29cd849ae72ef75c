// The PTX instructions that the kernels use, on sm_80 and later, and the launches.
//
// nvcc compiles what stands here; another compiler gets the twins in tests/emulation/primitives.h,
// which run the same kernel source on a CPU. For that, kernels keep a few rules:
// - PTX only through this header; shared memory through RNN_FUSED_SHARED; launches through
// launch();
// - what one thread writes, another reads after a barrier or after an acquire of a release, or it
//   is a relaxed word that says itself whether it is there: never through volatile, __threadfence
//   or a plain load in a loop;
// - every loop that waits for another thread calls spin_pause().
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#ifndef __CUDACC__

#include "tests/emulation/primitives.h"

#else

#include "csrc/cuda/check.h"

// Static shared memory, T name dims, as in RNN_FUSED_SHARED(float, sums, [4][33]).
#define RNN_FUSED_SHARED(T, name, dims) __shared__ __align__(16) T name dims

// T* name: the shared memory whose size the launch gives.
#define RNN_FUSED_DYNAMIC_SHARED(T, name)                       \
  extern __shared__ __align__(16) unsigned char name##_bytes[]; \
  T* const name = reinterpret_cast<T*>(name##_bytes)

// In a function that waits: its last parameter, and the argument that hands it on. Under emulation
// they tell a report where the kernel called the function; here they are nothing.
#define RNN_FUSED_CALLER
#define RNN_FUSED_AT_CALLER

namespace rnn_fused::gpu {

// ---------------------------------------------------------------------------------------------
// Launch
// ---------------------------------------------------------------------------------------------

// Allows the kernel all the dynamic shared memory that the device has. Always the same limit, since
// another thread may be launching the same kernel with another size.
inline void allow_dynamic_shared(const void* kernel) {
  int device = 0, limit = 0;
  cudaFuncAttributes attributes;
  CHECK_CUDA("launch", cudaGetDevice(&device));
  CHECK_CUDA("launch",
             cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  CHECK_CUDA("launch", cudaFuncGetAttributes(&attributes, kernel));
  CHECK_CUDA("launch", cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                            limit - static_cast<int>(attributes.sharedSizeBytes)));
}

template <class... P, class... A>
void launch_with(cudaLaunchAttribute* attributes, unsigned attribute_count, void (*kernel)(P...),
                 dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream, A&&... args) {
  // The kernel's static part counts too, so that even less than 48 KiB may need leave.
  if (shared_bytes > 0) allow_dynamic_shared(reinterpret_cast<const void*>(kernel));
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = attribute_count;
  CHECK_CUDA("launch", cudaLaunchKernelEx(&config, kernel, static_cast<P>(args)...));
}

// kernel<<<grid, block, shared_bytes, stream>>>(args...), checked. Its blocks run in any order, not
// all at once: they must not wait for each other.
template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
            A&&... args) {
  launch_with(nullptr, 0, kernel, grid, block, shared_bytes, stream, args...);
}

inline cudaLaunchAttribute cluster_of(unsigned blocks) {
  cudaLaunchAttribute dimension = {};
  dimension.id = cudaLaunchAttributeClusterDimension;
  dimension.val.clusterDim.x = blocks;
  dimension.val.clusterDim.y = dimension.val.clusterDim.z = 1;
  return dimension;
}

// Throws unless the device has room for so many blocks in clusters, which lies with the SMs of each
// of its GPCs: a grid barrier of blocks that are not all there never ends.
template <class... P>
void check_resident(unsigned cluster, void (*kernel)(P...), dim3 grid, dim3 block,
                    size_t shared_bytes) {
  if (shared_bytes > 0) allow_dynamic_shared(reinterpret_cast<const void*>(kernel));
  cudaLaunchAttribute dimension = cluster_of(cluster);
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.attrs = &dimension;
  config.numAttrs = 1;
  int clusters = 0;
  CHECK_CUDA("launch", cudaOccupancyMaxActiveClusters(&clusters, kernel, &config));
  const int64_t blocks = int64_t{grid.x} * grid.y * grid.z;
  if (int64_t{clusters} * cluster < blocks)
    throw std::runtime_error("[launch] " + std::to_string(blocks) + " blocks in clusters of " +
                             std::to_string(cluster) +
                             " must be resident at once, the device has room for " +
                             std::to_string(clusters) + " clusters");
}

// The same with all blocks resident at once; throws where the device has no room for them. On sm_90
// and later they may be in clusters of up to 8; elsewhere cluster is 1.
template <class... P, class... A>
void launch_cooperative(unsigned cluster, void (*kernel)(P...), dim3 grid, dim3 block,
                        size_t shared_bytes, cudaStream_t stream, A&&... args) {
  cudaLaunchAttribute attributes[2] = {{}, cluster_of(cluster)};
  attributes[0].id = cudaLaunchAttributeCooperative;
  attributes[0].val.cooperative = 1;
  if (cluster > 1) check_resident(cluster, kernel, grid, block, shared_bytes);
  launch_with(attributes, cluster > 1 ? 2 : 1, kernel, grid, block, shared_bytes, stream, args...);
}

// The same in clusters of so many blocks, neighbours in x, each all resident at once; one cluster
// must not wait for another. sm_90 and later; up to 8 blocks, on devices that have room for
// them 16.
template <class... P, class... A>
void launch_clusters(unsigned cluster, void (*kernel)(P...), dim3 grid, dim3 block,
                     size_t shared_bytes, cudaStream_t stream, A&&... args) {
  constexpr unsigned kPortable = 8;
  if (cluster > kPortable)
    CHECK_CUDA("launch", cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                              cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  cudaLaunchAttribute dimension = cluster_of(cluster);
  launch_with(&dimension, 1, kernel, grid, block, shared_bytes, stream, args...);
}

// Fills device memory with a byte in the order of the stream.
inline void fill(void* p, int byte, size_t bytes, cudaStream_t stream) {
  CHECK_CUDA("launch", cudaMemsetAsync(p, byte, bytes, stream));
}

// ---------------------------------------------------------------------------------------------
// Matrix products of a warp. All 32 lanes take part.
//
// lane = 4 * g + t. "A[g][2t..]" is a register with A[g][2t] in its lower and A[g][2t + 1] in its
// upper half. B is stored by columns: its fragments come from rows of B^T, so from a weight [N, K].
// ---------------------------------------------------------------------------------------------

// d[16, 8] += a[16, 16] b[16, 8] for T = __nv_bfloat16 or __half, summed in float32.
//   a: A[g][2t..], A[g + 8][2t..], A[g][2t + 8..], A[g + 8][2t + 8..]
//   b: B[2t..][g], B[2t + 8..][g]
//   d: D[g][2t], D[g][2t + 1], D[g + 8][2t], D[g + 8][2t + 1]
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// d[16, 8] += a[16, 8] b[8, 8] for float32 values of 10 bits of mantissa; the lower 13 are ignored.
//   a: A[g][t], A[g + 8][t], A[g][t + 4], A[g + 8][t + 4]
//   b: B[t][g], B[t + 4][g]
//   d: as in mma_m16n8k16
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4],
                                                 const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// x to the nearest TF32 value, ties away from zero. The lower 13 bits may be anything.
__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

// Loads four 8x8 matrices of 16-bit values. Lane i gives the address of row i % 8 of matrix i / 8:
// 16 bytes of shared memory, aligned to 16. r[j] = M_j[g][2t..]. A 16x16 A fragment: rows 0-7, rows
// 8-15, then both again 8 columns further.
// Lanes that wrote the rows must have met the reader at a barrier, if only __syncwarp().
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}

// Two matrices; the addresses of lanes 16-31 do not matter. A 16x8 B fragment from rows of B^T.
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}

// Four matrices, each transposed: r[j] has M_j[2t][g] and M_j[2t + 1][g].
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}

// ---------------------------------------------------------------------------------------------
// Copies from global to shared memory that run beside the thread
// ---------------------------------------------------------------------------------------------

// Copies N = 4, 8 or 16 bytes, or writes zeros where `valid` is false, without reading `from`. Both
// addresses are aligned to N. 16 bytes come from L2; 4 and 8 may come from an old line of L1, so
// that values which another block wrote need an address that this SM has not read before.
template <int N>
__device__ __forceinline__ void cp_async_or_zero(void* to, const void* from, bool valid) {
  static_assert(N == 4 || N == 8 || N == 16);
  const uint32_t shared = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  const int bytes = valid ? N : 0;
  if constexpr (N == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(from),
                 "r"(bytes)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared), "l"(from), "n"(N),
                 "r"(bytes)
                 : "memory");
}

template <int N>
__device__ __forceinline__ void cp_async(void* to, const void* from) {
  static_assert(N == 4 || N == 8 || N == 16);
  const uint32_t shared = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  if constexpr (N == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(from) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared), "l"(from), "n"(N)
                 : "memory");
}

// Closes this thread's group of copies; a group may be empty.
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most `keep` of this thread's groups, the youngest, are under way. Other threads
// see the copies after a further barrier.
template <int keep>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(keep) : "memory");
}

// ---------------------------------------------------------------------------------------------
// Global memory between blocks, at the scope of the GPU
// ---------------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t load_acquire(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}

__device__ __forceinline__ void store_release(uint32_t* p, uint32_t v) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

// Adds without returning the old value. Releases of several threads to one word add up: an acquire
// of the sum sees what each of them wrote before.
__device__ __forceinline__ void reduce_release_add(uint32_t* p, uint32_t v) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

// Relaxed: ld.relaxed.gpu and st.relaxed.gpu go to L2 and order nothing around them. 32 and 64 bits
// arrive whole, so that a 64-bit value may carry its own flag.
__device__ __forceinline__ uint32_t load_relaxed(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}

__device__ __forceinline__ uint64_t load_relaxed(const uint64_t* p) {
  uint64_t v;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
  return v;
}

// ld.relaxed.gpu.v4.u32: each of the four words arrives whole, the 16 bytes need not.
__device__ __forceinline__ uint4 load_relaxed(const uint4* p) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}

__device__ __forceinline__ void store_relaxed(uint32_t* p, uint32_t v) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

__device__ __forceinline__ void store_relaxed(uint64_t* p, uint64_t v) {
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}

// st.relaxed.gpu.v4.u32: whole words, as load_relaxed.
__device__ __forceinline__ void store_relaxed(uint4* p, uint4 v) {
  asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
}

// ---------------------------------------------------------------------------------------------
// Inside a cluster. sm_90 and later: on older GPUs each of these stops the kernel
// ---------------------------------------------------------------------------------------------

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define RNN_FUSED_PTX_OF_CLUSTERS(...) asm volatile(__VA_ARGS__)
#else
#define RNN_FUSED_PTX_OF_CLUSTERS(...) __trap()
#endif

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// The block's number in its cluster, and how many blocks that has: never another, and so not
// volatile.
__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank = 0;
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#else
  __trap();
#endif
  return rank;
}

__device__ __forceinline__ uint32_t cluster_size() {
  uint32_t size = 0;
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
#else
  __trap();
#endif
  return size;
}

// A barrier of all threads of the cluster, in two halves; each thread calls both in turn. What was
// written before arrive, to global memory or to any shared memory of the cluster, is seen after
// wait. A block's shared memory is there for the others from the first barrier of the kernel on,
// and until it leaves: so the last thing in a kernel is a barrier too.
__device__ __forceinline__ void cluster_arrive() {
  RNN_FUSED_PTX_OF_CLUSTERS("barrier.cluster.arrive.release.aligned;" :: : "memory");
}

__device__ __forceinline__ void cluster_wait() {
  RNN_FUSED_PTX_OF_CLUSTERS("barrier.cluster.wait.acquire.aligned;" :: : "memory");
}

// What lies in another block's shared memory where p lies in this one's.
using ClusterAddress = uint32_t;

__device__ __forceinline__ ClusterAddress shared_of(const void* p, uint32_t rank) {
  ClusterAddress address = 0;
  RNN_FUSED_PTX_OF_CLUSTERS(
      "mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(p)), "r"(rank));
  return address;
}

// An ordinary store of 16 bytes there, for a reader behind a cluster barrier.
__device__ __forceinline__ void store_shared(ClusterAddress to, uint4 v) {
  RNN_FUSED_PTX_OF_CLUSTERS("st.shared::cluster.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v.x),
                            "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// ---------------------------------------------------------------------------------------------
// Transaction barriers (mbarrier), 8 bytes of shared memory each. A phase ends when the arrivals
// that it was made for have come, and as many bytes as those said to expect.
// ---------------------------------------------------------------------------------------------

// By one thread. Others of the block see it after a block barrier, other blocks after a cluster
// barrier.
__device__ __forceinline__ void make_barrier(uint64_t* barrier, uint32_t arrivals) {
  RNN_FUSED_PTX_OF_CLUSTERS(
      "mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(arrivals) : "memory");
  RNN_FUSED_PTX_OF_CLUSTERS("fence.mbarrier_init.release.cluster;" :: : "memory");
}

// One arrival, and so many bytes more that this phase waits for.
__device__ __forceinline__ void expect_bytes(uint64_t* barrier, uint32_t bytes) {
  RNN_FUSED_PTX_OF_CLUSTERS(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes) : "memory");
}

// Stores 16 bytes at some time, and then counts them at a barrier of the same block. Whoever waits
// there sees them.
__device__ __forceinline__ void store_async(ClusterAddress to, uint4 v, ClusterAddress barrier) {
  RNN_FUSED_PTX_OF_CLUSTERS(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(to),
      "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(barrier) : "memory");
}

// Waits for the end of a phase: parity 0 for the first, then 1, 0, ... Nobody may be two behind.
__device__ __forceinline__ void wait_for_phase(const uint64_t* barrier, uint32_t parity) {
  uint32_t ended = 0;
  do {
    RNN_FUSED_PTX_OF_CLUSTERS(
        "{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; "
        "selp.u32 %0, 1, 0, p; }" : "=r"(ended) : "r"(shared_address(barrier)),
        "r"(parity) : "memory");
  } while (!ended);
}

#undef RNN_FUSED_PTX_OF_CLUSTERS

// In every loop that waits for another thread. Nothing on a GPU, where the poll's own trip to L2 is
// pause enough; under emulation it lets the other thread run.
__device__ __forceinline__ void spin_pause() {}

}  // namespace rnn_fused::gpu

#endif  // __CUDACC__

namespace rnn_fused::gpu {

// A barrier of all blocks of a cooperative launch, or of `blocks` of them that share a counter.
//
// All threads call it, in one and the same order of calls. What a thread wrote before is seen by
// every thread after. Any number of steps: the counter may wrap around, since no block is ever a
// whole step ahead of another, and the comparison is that of a difference.
class GridBarrier {
 public:
  // counter: [1] in global memory, zero when the kernel starts, and of this barrier alone.
  __device__ explicit GridBarrier(uint32_t* counter)
      : GridBarrier(counter, gridDim.x * gridDim.y * gridDim.z) {}
  __device__ GridBarrier(uint32_t* counter, uint32_t blocks) : counter_(counter), blocks_(blocks) {}

  __device__ void sync(RNN_FUSED_CALLER) {
    arrive(RNN_FUSED_AT_CALLER);
    wait(RNN_FUSED_AT_CALLER);
  }

  // The halves of sync(). Work that no other block depends on fits between them.
  __device__ void arrive(RNN_FUSED_CALLER) {
    __syncthreads(RNN_FUSED_AT_CALLER);
    goal_ += blocks_;
    if (leads()) reduce_release_add(counter_, 1);
  }

  __device__ void wait(RNN_FUSED_CALLER) {
    if (leads())
      while (static_cast<int32_t>(load_acquire(counter_) - goal_) < 0)
        spin_pause(RNN_FUSED_AT_CALLER);
    __syncthreads(RNN_FUSED_AT_CALLER);
  }

 private:
  __device__ static bool leads() {
    return threadIdx.x == 0 && threadIdx.y == 0 && threadIdx.z == 0;
  }

  uint32_t* counter_;
  uint32_t blocks_;
  uint32_t goal_ = 0;  // of the counter, when all have arrived
};

}  // namespace rnn_fused::gpu
