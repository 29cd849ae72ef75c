// The twins of csrc/cuda/primitives.cuh, which documents them, in plain C++.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstring>
#include <tuple>
#include <type_traits>

#include "tests/emulation/runtime.h"
#include "tests/emulation/vocabulary.h"

// A static variable of a function template is one per instantiation, as CUDA's shared memory is.
#define RNN_FUSED_SHARED(T, name, dims)           \
  static const char name##_key = 0;               \
  using name##_type = T dims;                     \
  name##_type& name = *static_cast<name##_type*>( \
      ::rnn_fused::emulation::static_shared(&name##_key, sizeof(name##_type)))

#define RNN_FUSED_DYNAMIC_SHARED(T, name) \
  T* const name = static_cast<T*>(::rnn_fused::emulation::dynamic_shared())

#define RNN_FUSED_CALLER \
  ::rnn_fused::emulation::Place caller = ::rnn_fused::emulation::Place::current()
#define RNN_FUSED_AT_CALLER caller

namespace rnn_fused::gpu {

// ---------------------------------------------------------------------------------------------
// Launch
// ---------------------------------------------------------------------------------------------

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
            A&&... args) {
  const std::tuple<P...> parameters(static_cast<P>(args)...);
  emulation::run_grid(grid, block, shared_bytes, {}, [&] { std::apply(kernel, parameters); });
}

template <class... P, class... A>
void launch_cooperative(unsigned cluster, void (*kernel)(P...), dim3 grid, dim3 block,
                        size_t shared_bytes, cudaStream_t, A&&... args) {
  const std::tuple<P...> parameters(static_cast<P>(args)...);
  emulation::run_grid(grid, block, shared_bytes, {.all = true, .cluster = cluster},
                      [&] { std::apply(kernel, parameters); });
}

template <class... P, class... A>
void launch_clusters(unsigned cluster, void (*kernel)(P...), dim3 grid, dim3 block,
                     size_t shared_bytes, cudaStream_t, A&&... args) {
  const std::tuple<P...> parameters(static_cast<P>(args)...);
  emulation::run_grid(grid, block, shared_bytes, {.cluster = cluster},
                      [&] { std::apply(kernel, parameters); });
}

inline void fill(void* p, int byte, size_t bytes, cudaStream_t) { std::memset(p, byte, bytes); }

// ---------------------------------------------------------------------------------------------
// Matrix products of a warp
// ---------------------------------------------------------------------------------------------

// In mma.cpp, for T = __nv_bfloat16 and __half.
template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], RNN_FUSED_CALLER);

void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                      RNN_FUSED_CALLER);

inline uint32_t to_tf32(float x) {
  if (!std::isfinite(x)) return __float_as_uint(x);
  return (__float_as_uint(x) + 0x1000u) & ~0x1fffu;
}

// Row i % 8 of matrix i / 8, for i of lane i: the addresses that the lanes bring.
template <int count>
emulation::Lanes<const void*> exchange_rows(const void* row, emulation::Place place) {
  if (emulation::lane() < 8 * count) emulation::check_shared(row, 16, 16, place);
  return emulation::exchange(~0u, row, place);
}

template <int count>
void load_matrices(uint32_t (&r)[count], const void* row, emulation::Place place) {
  const auto rows = exchange_rows<count>(row, place);
  const int g = emulation::lane() / 4, t = emulation::lane() % 4;
  for (int j = 0; j < count; ++j) r[j] = static_cast<const uint32_t*>(rows[8 * j + g])[t];
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, RNN_FUSED_CALLER) {
  load_matrices(r, row, caller);
}

inline void ldmatrix_x2(uint32_t (&r)[2], const void* row, RNN_FUSED_CALLER) {
  load_matrices(r, row, caller);
}

inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, RNN_FUSED_CALLER) {
  const auto rows = exchange_rows<4>(row, caller);
  const int g = emulation::lane() / 4, t = emulation::lane() % 4;
  for (int j = 0; j < 4; ++j) {
    const uint16_t low = static_cast<const uint16_t*>(rows[8 * j + 2 * t])[g];
    const uint16_t high = static_cast<const uint16_t*>(rows[8 * j + 2 * t + 1])[g];
    r[j] = low | static_cast<uint32_t>(high) << 16;
  }
}

// ---------------------------------------------------------------------------------------------
// Copies
// ---------------------------------------------------------------------------------------------

template <int N>
void cp_async_or_zero(void* to, const void* from, bool valid, RNN_FUSED_CALLER) {
  static_assert(N == 4 || N == 8 || N == 16);
  emulation::check_shared(to, N, N, caller);
  if (reinterpret_cast<uintptr_t>(from) % N != 0)
    throw emulation::Error("cp.async from an address that is not aligned, at ", caller);
  emulation::async_copies().add(to, from, N, valid, caller);
}

template <int N>
void cp_async(void* to, const void* from, RNN_FUSED_CALLER) {
  cp_async_or_zero<N>(to, from, true, caller);
}

inline void cp_async_commit() { emulation::async_copies().commit(); }

template <int keep>
void cp_async_wait() {
  emulation::async_copies().wait(keep);
}

// ---------------------------------------------------------------------------------------------
// Global memory between blocks
// ---------------------------------------------------------------------------------------------

inline uint32_t load_acquire(const uint32_t* p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }

inline void store_release(uint32_t* p, uint32_t v) {
  __atomic_store_n(p, v, __ATOMIC_RELEASE);
  emulation::note_progress();
}

inline void reduce_release_add(uint32_t* p, uint32_t v) {
  __atomic_fetch_add(p, v, __ATOMIC_RELEASE);
  emulation::note_progress();
}

inline uint32_t load_relaxed(const uint32_t* p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
inline uint64_t load_relaxed(const uint64_t* p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }

inline uint4 load_relaxed(const uint4* p) {
  return {load_relaxed(&p->x), load_relaxed(&p->y), load_relaxed(&p->z), load_relaxed(&p->w)};
}

inline void store_relaxed(uint32_t* p, uint32_t v) {
  __atomic_store_n(p, v, __ATOMIC_RELAXED);
  emulation::note_progress();
}

inline void store_relaxed(uint64_t* p, uint64_t v) {
  __atomic_store_n(p, v, __ATOMIC_RELAXED);
  emulation::note_progress();
}

inline void store_relaxed(uint4* p, uint4 v) {
  store_relaxed(&p->x, v.x);
  store_relaxed(&p->y, v.y);
  store_relaxed(&p->z, v.z);
  store_relaxed(&p->w, v.w);
}

// ---------------------------------------------------------------------------------------------
// Inside a cluster
// ---------------------------------------------------------------------------------------------

inline uint32_t cluster_rank() { return emulation::cluster_rank(); }
inline uint32_t cluster_size() { return emulation::cluster_size(); }
inline void cluster_arrive(RNN_FUSED_CALLER) { emulation::cluster_arrive(caller); }
inline void cluster_wait(RNN_FUSED_CALLER) { emulation::cluster_wait(caller); }

using ClusterAddress = unsigned char*;

inline ClusterAddress shared_of(const void* p, uint32_t rank, RNN_FUSED_CALLER) {
  return emulation::shared_of(p, rank, caller);
}

inline void store_shared(ClusterAddress to, uint4 v, RNN_FUSED_CALLER) {
  emulation::check_shared_of_cluster(to, sizeof v, caller);
  std::memcpy(to, &v, sizeof v);
}

// ThreadSanitizer sees that the barrier is made here, and used where it is.
inline void make_barrier(uint64_t* barrier, uint32_t arrivals, RNN_FUSED_CALLER) {
  emulation::make_barrier(barrier, arrivals, caller);
  *static_cast<volatile uint64_t*>(barrier) = 0;
}

inline void use_barrier(const void* barrier) {
  static_cast<void>(*static_cast<const volatile uint64_t*>(barrier));
}

inline void expect_bytes(uint64_t* barrier, uint32_t bytes, RNN_FUSED_CALLER) {
  emulation::expect_bytes(barrier, bytes, caller);
  use_barrier(barrier);
}

// The target is NaN from here until the bytes arrive: whoever reads it still, or already, is wrong.
inline void store_async(ClusterAddress to, uint4 v, ClusterAddress barrier, RNN_FUSED_CALLER) {
  emulation::check_shared_of_cluster(to, sizeof v, caller);
  // By words, since a memset of a known size is one that ThreadSanitizer does not see.
  for (int i = 0; i < 4; ++i) static_cast<volatile uint32_t*>(static_cast<void*>(to))[i] = ~0u;
  emulation::send(barrier, to, &v, caller);
  use_barrier(barrier);
}

inline void wait_for_phase(const uint64_t* barrier, uint32_t parity, RNN_FUSED_CALLER) {
  while (!emulation::phase_ended(barrier, parity, caller)) emulation::spin(caller);
  use_barrier(barrier);
}

inline void spin_pause(RNN_FUSED_CALLER) { emulation::spin(caller); }

}  // namespace rnn_fused::gpu
