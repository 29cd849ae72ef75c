// The twins of csrc/cuda/primitives.cuh, which documents them, in plain C++.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <array>
#include <bit>
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
  emulation::run_grid(grid, block, shared_bytes, false, [&] { std::apply(kernel, parameters); });
}

template <class... P, class... A>
void launch_cooperative(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes,
                        cudaStream_t, A&&... args) {
  const std::tuple<P...> parameters(static_cast<P>(args)...);
  emulation::run_grid(grid, block, shared_bytes, true, [&] { std::apply(kernel, parameters); });
}

inline void zero(void* p, size_t bytes, cudaStream_t) { std::memset(p, 0, bytes); }

// ---------------------------------------------------------------------------------------------
// Matrix products of a warp
// ---------------------------------------------------------------------------------------------

// The fragments that one lane brings to a product.
struct MmaOperands {
  uint32_t a[4], b[2];
};

inline emulation::Lanes<MmaOperands> exchange_operands(const uint32_t (&a)[4],
                                                       const uint32_t (&b)[2],
                                                       emulation::Place place) {
  return emulation::exchange(~0u, MmaOperands{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}}, place);
}

// One of the two values of T in a register.
template <class T>
float value_in(uint32_t bits, int half) {
  return static_cast<float>(std::bit_cast<T>(static_cast<uint16_t>(bits >> (16 * half))));
}

// d += the product of the matrices that A(row, k) and B(k, column) give, in this lane's part of D.
template <int K, class A, class B>
void multiply_add(float (&d)[4], A&& a, B&& b) {
  const int g = emulation::lane() / 4, t = emulation::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = g + 8 * (i / 2), column = 2 * t + i % 2;
    float sum = 0;
    for (int k = 0; k < K; ++k) sum += a(row, k) * b(k, column);
    d[i] += sum;
  }
}

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], RNN_FUSED_CALLER) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
  const auto lanes = exchange_operands(a, b, caller);
  multiply_add<16>(
      d,
      [&](int row, int k) {
        const uint32_t pair = lanes[4 * (row % 8) + k % 8 / 2].a[row / 8 + 2 * (k / 8)];
        return value_in<T>(pair, k % 2);
      },
      [&](int k, int column) {
        return value_in<T>(lanes[4 * column + k % 8 / 2].b[k / 8], k % 2);
      });
}

inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             RNN_FUSED_CALLER) {
  const auto lanes = exchange_operands(a, b, caller);
  const auto tf32 = [](uint32_t bits) { return __uint_as_float(bits & ~0x1fffu); };
  multiply_add<8>(
      d,
      [&](int row, int k) { return tf32(lanes[4 * (row % 8) + k % 4].a[row / 8 + 2 * (k / 4)]); },
      [&](int k, int column) { return tf32(lanes[4 * column + k % 4].b[k / 4]); });
}

inline uint32_t to_tf32(float x) {
  if (!std::isfinite(x)) return __float_as_uint(x);
  return (__float_as_uint(x) + 0x1000u) & ~0x1fffu;
}

// The rows of `count` 8x8 matrices, whose addresses the lanes of the warp bring.
template <int count>
std::array<const uint16_t*, 8 * count> matrix_rows(const void* row, emulation::Place place) {
  if (emulation::lane() < 8 * count) emulation::check_shared(row, 16, 16, place);
  const auto lanes = emulation::exchange(~0u, row, place);
  std::array<const uint16_t*, 8 * count> rows;
  for (int i = 0; i < 8 * count; ++i) rows[i] = static_cast<const uint16_t*>(lanes[i]);
  return rows;
}

template <int count>
void load_matrices(uint32_t (&r)[count], const void* row, emulation::Place place) {
  const auto rows = matrix_rows<count>(row, place);
  const int g = emulation::lane() / 4, t = emulation::lane() % 4;
  for (int j = 0; j < count; ++j) std::memcpy(&r[j], &rows[8 * j + g][2 * t], sizeof(r[j]));
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, RNN_FUSED_CALLER) {
  load_matrices(r, row, caller);
}

inline void ldmatrix_x2(uint32_t (&r)[2], const void* row, RNN_FUSED_CALLER) {
  load_matrices(r, row, caller);
}

inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, RNN_FUSED_CALLER) {
  const auto rows = matrix_rows<4>(row, caller);
  const int g = emulation::lane() / 4, t = emulation::lane() % 4;
  for (int j = 0; j < 4; ++j)
    r[j] = rows[8 * j + 2 * t][g] | static_cast<uint32_t>(rows[8 * j + 2 * t + 1][g]) << 16;
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

inline void spin_pause(RNN_FUSED_CALLER) { emulation::spin(caller); }

}  // namespace rnn_fused::gpu
