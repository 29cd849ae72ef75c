// The kernels of microbench.cu. Each runs `steps` steps, one step being what a persistent RNN
// kernel would do once per timestep apart from its arithmetic, and reports what it checked.
//
// Blocks wait for each other only under a cooperative launch or inside a cluster, and every spin is
// bounded: a lost signal ends as a timeout in the report, never as a hang.
#pragma once

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace cg = cooperative_groups;

constexpr int kThreads = 256;
constexpr int kReaders = 512;                     // threads of broadcast_kernel
constexpr int kBatch = 4;                         // independent loads in flight per thread
constexpr unsigned kSpinLimit = 1u << 20;         // polls through L2: well under a few seconds
constexpr long long kClockLimit = 2'000'000'000;  // cycles: about one second

// What a launch found. One per launch, zeroed before it.
struct Report {
  unsigned long long checked;  // values compared with what they had to be
  unsigned wrong;
  unsigned timeouts;
};

// ---------------------------------------------------------------------------------------------
// Device helpers
// ---------------------------------------------------------------------------------------------

__host__ __device__ inline unsigned value_of(unsigned seed, unsigned step, unsigned index) {
  return seed ^ (step * 0x9E3779B9u + index * 0x85EBCA6Bu);
}

__device__ inline uint4 vector_of(unsigned seed, unsigned step, unsigned index) {
  const unsigned v = value_of(seed, step, index);
  return make_uint4(v, v + 1, v + 2, v + 3);
}

__device__ inline bool differs(uint4 a, uint4 b) {
  return ((a.x ^ b.x) | (a.y ^ b.y) | (a.z ^ b.z) | (a.w ^ b.w)) != 0;
}

__device__ inline unsigned load_acquire(const unsigned* p) {
  unsigned v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}

__device__ inline void store_release(unsigned* p, unsigned v) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

__device__ inline void add_release(unsigned* p, unsigned v) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

// Served by L2: no other SM's write can hide behind a stale line of L1.
__device__ inline uint4 load_l2(const uint4* p) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}

__device__ inline bool wait_at_least(const unsigned* p, unsigned goal) {
#pragma unroll 1
  for (unsigned polls = 0; polls < kSpinLimit; ++polls)
    if (load_acquire(p) >= goal) return true;
  return false;
}

__device__ inline void add_report(Report* report, unsigned checked, unsigned wrong, bool alive) {
  atomicAdd(&report->checked, static_cast<unsigned long long>(checked));
  if (wrong) atomicAdd(&report->wrong, wrong);
  if (!alive) atomicAdd(&report->timeouts, 1u);
}

// A word that carries its own flag, stored and loaded in one single-copy-atomic access: whoever
// sees the flag of this step has the payload too, so no barrier and no fence is needed.
struct Word8 {  // 4 bytes of payload, 4 of flag
  static constexpr int kPayload = 4;
  uint64_t bits;
  __device__ static Word8 make(unsigned v, unsigned flag) {
    return {v | static_cast<uint64_t>(flag) << 32};
  }
  __device__ unsigned flag() const { return static_cast<unsigned>(bits >> 32); }
  __device__ bool carries(unsigned v) const { return static_cast<unsigned>(bits) == v; }
  __device__ void store(Word8* p) const {
    asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(p), "l"(bits) : "memory");
  }
  __device__ static Word8 load(const Word8* p) {
    Word8 w;
    asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(w.bits) : "l"(p) : "memory");
    return w;
  }
};

struct alignas(16) Word16 {  // 12 bytes of payload, 4 of flag
  static constexpr int kPayload = 12;
  uint64_t low, high;
  __device__ static Word16 make(unsigned v, unsigned flag) {
    return {v | static_cast<uint64_t>(v + 1) << 32, (v + 2) | static_cast<uint64_t>(flag) << 32};
  }
  __device__ unsigned flag() const { return static_cast<unsigned>(high >> 32); }
  __device__ bool carries(unsigned v) const {
    return low == (v | static_cast<uint64_t>(v + 1) << 32) && static_cast<unsigned>(high) == v + 2;
  }
  __device__ void store(Word16* p) const {
    asm volatile(
        "{ .reg .b128 w; mov.b128 w, {%1, %2}; st.relaxed.gpu.global.b128 [%0], w; }" ::"l"(p),
        "l"(low), "l"(high)
        : "memory");
  }
  __device__ static Word16 load(const Word16* p) {
    Word16 w;
    asm volatile("{ .reg .b128 w; ld.relaxed.gpu.global.b128 w, [%2]; mov.b128 {%0, %1}, w; }"
                 : "=l"(w.low), "=l"(w.high)
                 : "l"(p)
                 : "memory");
    return w;
  }
};

// ---------------------------------------------------------------------------------------------
// Kernels over the whole grid
// ---------------------------------------------------------------------------------------------

// One tick of a chain of dependent kernels. counters [gridDim.x]
__global__ void tick_kernel(unsigned* counters) {
  if (threadIdx.x == 0) ++counters[blockIdx.x];
}

enum class Barrier { kGridSync, kCounter, kFlags };

// `steps` grid barriers. With kExchange each step also writes this block's 128 bytes of h and reads
// everyone's: "write h, barrier, read h"; without it only the last step does, as the check.
// sync: zeroed, [1] counter or [gridDim.x] flags. h [2, gridDim.x, 8], the two halves alternating:
// half p is rewritten two barriers after it was read.
template <Barrier kBarrier, bool kExchange>
__global__ void __launch_bounds__(kThreads)
    barrier_kernel(unsigned* sync, uint4* h, unsigned seed, unsigned steps, Report* report) {
  const unsigned vectors = gridDim.x * 8;
  unsigned checked = 0, wrong = 0;
  bool alive = true;
  for (unsigned step = 1; step <= steps; ++step) {
    const bool exchange = kExchange || step == steps;
    uint4* half = h + (step & 1) * vectors;
    if (exchange && threadIdx.x < 8) {
      const unsigned index = blockIdx.x * 8 + threadIdx.x;
      half[index] = vector_of(seed, step, index);
    }
    if constexpr (kBarrier == Barrier::kGridSync) {
      cg::this_grid().sync();
    } else if constexpr (kBarrier == Barrier::kCounter) {
      __syncthreads();
      if (threadIdx.x == 0) {
        add_release(sync, 1);
        alive = alive && wait_at_least(sync, step * gridDim.x);
      }
      __syncthreads();
    } else {
      __syncthreads();
      if (threadIdx.x == 0) store_release(sync + blockIdx.x, step);
      for (unsigned b = threadIdx.x; b < gridDim.x; b += blockDim.x)
        alive = alive && wait_at_least(sync + b, step);
      __syncthreads();
    }
    if (!exchange) continue;
    for (unsigned first = threadIdx.x; first < vectors; first += kBatch * kThreads) {
      uint4 got[kBatch];
#pragma unroll
      for (int k = 0; k < kBatch; ++k)
        if (first + k * kThreads < vectors) got[k] = load_l2(half + first + k * kThreads);
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        const unsigned index = first + k * kThreads;
        if (index >= vectors) continue;
        ++checked;
        wrong += differs(got[k], vector_of(seed, step, index));
      }
    }
    // The next step starts when h is there, as a product would; a wrong value spoils the rest.
    if (__syncthreads_or(wrong != 0)) ++seed;
  }
  add_report(report, checked, wrong, alive);
}

// Flagged words between blocks 0 and `partner`, there and back each step; all others leave.
// mail [2, 16]: one line for each direction.
template <class Word>
__global__ void pair_kernel(Word* mail, unsigned partner, unsigned seed, unsigned steps,
                            Report* report) {
  if (threadIdx.x != 0 || (blockIdx.x != 0 && blockIdx.x != partner)) return;
  const unsigned me = blockIdx.x != 0;
  unsigned checked = 0, wrong = 0;
  bool alive = true;
  const auto receive = [&](unsigned step) {
    for (unsigned polls = 0; alive; ++polls) {
      const Word got = Word::load(mail + (me ^ 1) * 16);
      if (got.flag() == step) {
        ++checked;
        wrong += !got.carries(value_of(seed, step, me ^ 1));
        return;
      }
      alive = polls < kSpinLimit;
    }
  };
  for (unsigned step = 1; step <= steps && alive; ++step) {
    if (me == 1) receive(step);
    Word::make(value_of(seed, step, me), step).store(mail + me * 16);
    if (me == 0) receive(step);
  }
  add_report(report, checked, wrong, alive);
}

// All-gather of h by flagged words: each step, every block writes its `words` and reads everyone's
// as they come. mail [2, gridDim.x, words], flags poisoned. Half p is safe to rewrite two steps on:
// a block publishes step s+1 only after its own __syncthreads has closed its reading of step s.
template <class Word>
__global__ void __launch_bounds__(kThreads)
    handoff_kernel(Word* mail, unsigned words, unsigned seed, unsigned steps, Report* report) {
  const unsigned total = gridDim.x * words;
  unsigned checked = 0, wrong = 0;
  bool alive = true;
  for (unsigned step = 1; step <= steps; ++step) {
    Word* half = mail + static_cast<size_t>(step & 1) * total;
    for (unsigned w = threadIdx.x; w < words; w += kThreads) {
      const unsigned index = blockIdx.x * words + w;
      Word::make(value_of(seed, step, index), step).store(half + index);
    }
    for (unsigned first = threadIdx.x; first < total; first += kBatch * kThreads) {
      Word got[kBatch];
      bool ready;
      unsigned polls = 0;
      do {
        ready = true;
#pragma unroll
        for (int k = 0; k < kBatch; ++k)
          if (first + k * kThreads < total) got[k] = Word::load(half + first + k * kThreads);
#pragma unroll
        for (int k = 0; k < kBatch; ++k)
          if (first + k * kThreads < total) ready = ready && got[k].flag() == step;
        alive = alive && ++polls < kSpinLimit;
      } while (!ready && alive);
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        const unsigned index = first + k * kThreads;
        if (index >= total) continue;
        ++checked;
        wrong += !got[k].carries(value_of(seed, step, index));
      }
    }
    if (__syncthreads_or(wrong != 0)) ++seed;
  }
  add_report(report, checked, wrong, alive);
}

// Every block reads all of h [vectors] from L2 each step, from `buffers` copies in turn, kLoads
// loads of each thread in flight. vectors is a multiple of kLoads * kReaders, or smaller than
// kReaders with kLoads = 1. sums [gridDim.x]: the wrapping sum of all words read, for the host.
template <int kLoads>
__global__ void __launch_bounds__(kReaders)
    broadcast_kernel(const uint4* h, unsigned vectors, unsigned buffers, unsigned steps,
                     unsigned* sums, Report* report) {
  unsigned sum = 0, checked = 0, hits = 0;
  for (unsigned step = 0; step < steps; ++step) {
    const uint4* from = h + static_cast<size_t>(step % buffers) * vectors;
    for (unsigned first = threadIdx.x; first < vectors; first += kLoads * kReaders) {
      uint4 got[kLoads];
#pragma unroll
      for (int k = 0; k < kLoads; ++k) got[k] = load_l2(from + first + k * kReaders);
#pragma unroll
      for (int k = 0; k < kLoads; ++k) sum += got[k].x + got[k].y + got[k].z + got[k].w;
      checked += kLoads;
    }
    // The sum goes through the barrier, so that no load of this step is still in flight after it.
    hits += __syncthreads_or(sum == 1) != 0;
  }
  if (hits == ~0u) ++sum;  // never; keeps the barrier's result, and so the wait, alive
  atomicAdd(sums + blockIdx.x, sum);
  add_report(report, checked, 0, true);
}

// ---------------------------------------------------------------------------------------------
// Kernels inside clusters (sm_90 and later; empty elsewhere and never launched there)
// ---------------------------------------------------------------------------------------------

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define RNN_FUSED_HAS_CLUSTERS 1

__device__ inline unsigned shared_address(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

// The address of the same variable in the shared memory of block `rank` of this cluster.
__device__ inline unsigned remote_address(const void* p, unsigned rank) {
  unsigned remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(remote)
               : "r"(shared_address(p)), "r"(rank));
  return remote;
}

// kRelease = false orders no memory: release costs a fence of the whole GPU in the machine code.
template <bool kRelease = true>
__device__ inline void cluster_sync() {
  if constexpr (kRelease)
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  else
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ inline void store_remote(unsigned address, uint4 v) {
  asm volatile("st.shared::cluster.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x),
               "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

// Stores 16 bytes remotely and then credits them to the mbarrier beside them.
__device__ inline void store_async(unsigned address, uint4 v, unsigned mbarrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(address),
      "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(mbarrier)
      : "memory");
}

__device__ inline void copy_bulk(unsigned address, const void* from, unsigned bytes,
                                 unsigned mbarrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];" ::"r"(address),
      "r"(shared_address(from)), "r"(bytes), "r"(mbarrier)
      : "memory");
}

// Release at block scope suffices: arming a barrier publishes no data to other blocks.
__device__ inline void expect_bytes(uint64_t* mbarrier, unsigned bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(mbarrier)),
      "r"(bytes)
      : "memory");
}

__device__ inline bool wait_phase(const uint64_t* mbarrier, unsigned parity) {
  const long long start = clock64();
  do {
    unsigned done;
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; "
        "selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(shared_address(mbarrier)), "r"(parity)
        : "memory");
    if (done) return true;
  } while (clock64() - start < kClockLimit);
  return false;
}
#endif

enum class ClusterBarrier { kRelaxed, kRelease, kExchange };

// `steps` cluster barriers, all but the last without memory order for kRelaxed; for kExchange each
// step (else only the last) passes one 16-byte vector to the right-hand neighbour's shared memory.
template <ClusterBarrier kBarrier>
__global__ void __launch_bounds__(kThreads)
    cluster_kernel(unsigned seed, unsigned steps, Report* report) {
#ifdef RNN_FUSED_HAS_CLUSTERS
  __shared__ uint4 inbox[2];
  const unsigned rank = cg::this_cluster().block_rank();
  const unsigned size = cg::this_cluster().num_blocks();
  if (threadIdx.x < 2) inbox[threadIdx.x] = make_uint4(~0u, ~0u, ~0u, ~0u);
  cluster_sync();
  unsigned checked = 0, wrong = 0;
  for (unsigned step = 1; step <= steps; ++step) {
    if (kBarrier == ClusterBarrier::kRelaxed && step != steps) {
      cluster_sync<false>();
      continue;
    }
    const bool exchange =
        (kBarrier == ClusterBarrier::kExchange || step == steps) && threadIdx.x == 0;
    uint4* box = inbox + (step & 1);
    if (exchange)
      store_remote(remote_address(box, (rank + 1) % size), vector_of(seed, step, blockIdx.x));
    cluster_sync();
    if (!exchange) continue;
    const unsigned from = rank == 0 ? blockIdx.x + size - 1 : blockIdx.x - 1;
    ++checked;
    wrong += differs(*box, vector_of(seed, step, from));
  }
  cluster_sync();  // nobody leaves while a neighbour may still write here
  add_report(report, checked, wrong, true);
#endif
}

enum class Push { kStore, kAsync, kBulk };

// All-gather of h [vectors] inside a cluster: each block sends its slice to every block's shared
// memory. kStore: remote stores and a cluster barrier; kAsync: st.async crediting an mbarrier;
// kBulk: bulk copies from a staged slice, likewise. vectors and the cluster size are powers of two.
// Dynamic shared memory: h [2, vectors], and for kBulk stage [2, vectors / size].
template <Push kPush>
__global__ void __launch_bounds__(kThreads)
    push_kernel(unsigned vectors, unsigned seed, unsigned steps, Report* report) {
#ifdef RNN_FUSED_HAS_CLUSTERS
  extern __shared__ uint4 h[];
  __shared__ uint64_t full[2];
  const unsigned rank = cg::this_cluster().block_rank();
  const unsigned size = cg::this_cluster().num_blocks();
  const unsigned cluster = blockIdx.x / size;
  const unsigned slice = vectors / size, slice_bits = __popc(slice - 1), bytes = vectors * 16;
  uint4* stage = h + 2 * vectors;

  for (unsigned v = threadIdx.x; v < 2 * vectors; v += kThreads)
    h[v] = make_uint4(~0u, ~0u, ~0u, ~0u);
  if (kPush != Push::kStore && threadIdx.x == 0) {
    for (uint64_t* mbarrier : {full, full + 1})
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(mbarrier))
                   : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    expect_bytes(full, bytes);
    expect_bytes(full + 1, bytes);
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  cluster_sync();

  unsigned checked = 0, wrong = 0;
  bool alive = true;
  for (unsigned step = 1; step <= steps; ++step) {
    const unsigned p = step & 1;
    uint4* half = h + p * vectors;
    if constexpr (kPush == Push::kBulk) {
      uint4* mine = stage + p * slice;
      for (unsigned v = threadIdx.x; v < slice; v += kThreads)
        mine[v] = vector_of(seed, step, cluster + rank * slice + v);
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
      __syncthreads();
      if (threadIdx.x < size && alive)
        copy_bulk(remote_address(half + rank * slice, threadIdx.x), mine, slice * 16,
                  remote_address(full + p, threadIdx.x));
    } else {
      for (unsigned item = threadIdx.x; item < vectors && alive; item += kThreads) {
        const unsigned to = item >> slice_bits;
        const unsigned v = rank * slice + (item & (slice - 1));
        const uint4 word = vector_of(seed, step, cluster + v);
        if constexpr (kPush == Push::kAsync)
          store_async(remote_address(half + v, to), word, remote_address(full + p, to));
        else
          store_remote(remote_address(half + v, to), word);
      }
    }
    if constexpr (kPush == Push::kStore) {
      cluster_sync();
    } else {
      alive = alive && wait_phase(full + p, ((step - 1) >> 1) & 1);
      // Armed again before this block's next push, and so before anyone can push step + 2 here.
      if (threadIdx.x == 0 && alive) expect_bytes(full + p, bytes);
    }
    for (unsigned v = threadIdx.x; v < vectors; v += kThreads) {
      ++checked;
      wrong += differs(half[v], vector_of(seed, step, cluster + v));
    }
    if (__syncthreads_or(wrong != 0)) ++seed;
  }
  cluster_sync();  // nobody leaves while a neighbour may still write here
  add_report(report, checked, wrong, alive);
#endif
}
