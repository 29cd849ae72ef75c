// What CUDA C++ offers a kernel without an include, for a kernel that a host compiler compiles.
// Limited to what our kernels use: add here what a new kernel needs.
//
// CUDA's own headers give the types and the conversions of 16-bit floats.
#pragma once

#include <vector_functions.h>
#include <vector_types.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "tests/emulation/runtime.h"

// One for all blocks, and the sanitizers would see the wrong size.
#undef __shared__
#define __shared__ static_assert(false, "shared memory is declared by RNN_FUSED_SHARED")

#undef __launch_bounds__
#define __launch_bounds__(...)

// The scheduler sets these before it lets a thread run.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

using std::max;
using std::min;

#define RNN_FUSED_HERE \
  ::rnn_fused::emulation::Place place = ::rnn_fused::emulation::Place::current()

// ---------------------------------------------------------------------------------------------
// Barriers. A lone fence orders nothing here: pass data by load_acquire and store_release.
// ---------------------------------------------------------------------------------------------

void __threadfence() = delete;
void __threadfence_block() = delete;

inline void __syncthreads(RNN_FUSED_HERE) { ::rnn_fused::emulation::block_barrier(place); }

inline void __syncwarp(uint32_t mask = ~0u, RNN_FUSED_HERE) {
  ::rnn_fused::emulation::warp_barrier(mask, place);
}

inline void __nanosleep(unsigned, RNN_FUSED_HERE) { ::rnn_fused::emulation::spin(place); }

namespace cooperative_groups {

struct thread_block {
  void sync(RNN_FUSED_HERE) const { ::rnn_fused::emulation::block_barrier(place); }
};

struct grid_group {
  void sync(RNN_FUSED_HERE) const { ::rnn_fused::emulation::grid_barrier(place); }
};

inline thread_block this_thread_block() { return {}; }
inline grid_group this_grid() { return {}; }

}  // namespace cooperative_groups

// ---------------------------------------------------------------------------------------------
// Warps
// ---------------------------------------------------------------------------------------------

template <class T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32, RNN_FUSED_HERE) {
  const unsigned lane = ::rnn_fused::emulation::lane(), segment = lane & ~(width - 1);
  return ::rnn_fused::emulation::exchange(mask, value, place)[segment | (source & (width - 1))];
}

template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32, RNN_FUSED_HERE) {
  const unsigned lane = ::rnn_fused::emulation::lane(), source = lane ^ bits;
  const bool inside = source < (lane & ~(width - 1)) + width;
  return ::rnn_fused::emulation::exchange(mask, value, place)[inside ? source : lane];
}

template <class T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32, RNN_FUSED_HERE) {
  const unsigned lane = ::rnn_fused::emulation::lane();
  const bool inside = (lane & (width - 1)) + delta < static_cast<unsigned>(width);
  return ::rnn_fused::emulation::exchange(mask, value, place)[inside ? lane + delta : lane];
}

template <class T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32, RNN_FUSED_HERE) {
  const unsigned lane = ::rnn_fused::emulation::lane();
  const bool inside = (lane & (width - 1)) >= delta;
  return ::rnn_fused::emulation::exchange(mask, value, place)[inside ? lane - delta : lane];
}

inline uint32_t __ballot_sync(uint32_t mask, int predicate, RNN_FUSED_HERE) {
  const auto lanes = ::rnn_fused::emulation::exchange(mask, predicate, place);
  uint32_t votes = 0;
  for (unsigned lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1) votes |= static_cast<uint32_t>(lanes[lane] != 0) << lane;
  return votes;
}

inline int __any_sync(uint32_t mask, int predicate, RNN_FUSED_HERE) {
  return __ballot_sync(mask, predicate, place) != 0;
}

inline int __all_sync(uint32_t mask, int predicate, RNN_FUSED_HERE) {
  return __ballot_sync(mask, predicate, place) == mask;
}

// ---------------------------------------------------------------------------------------------
// Atomics: relaxed, like CUDA's
// ---------------------------------------------------------------------------------------------

template <class T, class F>
T rnn_fused_atomic_update(T* p, F&& updated) {
  T old, next;
  __atomic_load(p, &old, __ATOMIC_RELAXED);
  do next = updated(old);
  while (!__atomic_compare_exchange(p, &old, &next, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  ::rnn_fused::emulation::note_progress();
  return old;
}

template <class T>
T atomicAdd(T* p, std::type_identity_t<T> v) {
  return rnn_fused_atomic_update(p, [v](T old) -> T { return old + v; });
}

template <class T>
T atomicMax(T* p, std::type_identity_t<T> v) {
  return rnn_fused_atomic_update(p, [v](T old) { return std::max(old, v); });
}

template <class T>
T atomicMin(T* p, std::type_identity_t<T> v) {
  return rnn_fused_atomic_update(p, [v](T old) { return std::min(old, v); });
}

template <class T>
T atomicExch(T* p, std::type_identity_t<T> v) {
  return rnn_fused_atomic_update(p, [v](T) { return v; });
}

template <class T>
T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> v) {
  return rnn_fused_atomic_update(p, [=](T old) { return old == expected ? v : old; });
}

// ---------------------------------------------------------------------------------------------
// Loads with a hint, bits and fast maths
// ---------------------------------------------------------------------------------------------

template <class T>
T __ldg(const T* p) {
  return *p;
}

template <class T>
T __ldcg(const T* p) {
  return *p;
}

template <class T>
T __ldcs(const T* p) {
  return *p;
}

template <class T>
void __stcg(T* p, T v) {
  *p = v;
}

template <class T>
void __stcs(T* p, T v) {
  *p = v;
}

inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(static_cast<unsigned>(x)) + 1; }

inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __saturatef(float x) { return std::min(std::max(x, 0.f), 1.f); }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }

#undef RNN_FUSED_HERE
