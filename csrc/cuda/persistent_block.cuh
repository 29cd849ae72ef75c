// What the blocks of both passes have in common: how they walk through time, and which thread owns
// what.
#pragma once

#include <type_traits>

#include "csrc/core/params.h"
#include "csrc/cuda/persistent.h"
#include "csrc/cuda/plan.h"
#include "csrc/cuda/primitives.cuh"

namespace rnn_fused::persistent {

// One timestep: its sequences, and the row of the first.
struct Step {
  int active;
  int64_t row;
};

// Step s of a pass that walks down through time, or up. Without sequences after the last one.
__device__ inline Step step_at(const LayerShape& shape, bool down, int64_t s) {
  if (s >= shape.T) return {0, 0};
  const int64_t t = down ? shape.T - 1 - s : s;
  return {static_cast<int>(shape.active(t)), shape.row(t)};
}

// The sequences of the batch that a block runs: slice blockIdx.z of `most` sequences. All that it
// has is counted from the first of these on. Reckoned from the kernel's parameters each time, which
// costs no register in a loop: shape and `most` must be (part of) __grid_constant__ ones.
class Slice {
 public:
  __device__ Slice(const LayerShape& shape, const int& most) : shape_(shape), most_(most) {}

  __device__ int begin() const { return static_cast<int>(blockIdx.z) * most_; }
  __device__ int size() const { return min(most_, static_cast<int>(shape_.B) - begin()); }
  // Its `active` may be 0.
  __device__ Step step_at(bool down, int64_t s) const {
    const Step step = persistent::step_at(shape_, down, s);
    return {min(max(step.active - begin(), 0), size()), step.row + begin()};
  }

 private:
  const LayerShape& shape_;
  const int& most_;
};

// How a launch runs, as its plan has it.
struct Launch {
  int first_direction;
  int slice;       // sequences
  int batch_tile;  // sequences of a pass
  int shared_octets;
  bool handoff;
  void* workspace;

  __device__ int direction() const { return first_direction + static_cast<int>(blockIdx.y); }
  __device__ Slice slice_of(const LayerShape& shape) const { return {shape, slice}; }
};

// A bit for each sequence of a pass.
template <int kUnits>
using SequenceBits = std::conditional_t<(max_batch_tile(kUnits) > 32), uint64_t, uint32_t>;

// Which of them come to a step with the reset state. border: of this step and the one that the
// forward pass made before it, the later one in time. By whole warps.
template <int kUnits>
__device__ inline SequenceBits<kUnits> reset_sequences(const LayerShape& shape, Step border,
                                                       int first, int count) {
  using Bits = SequenceBits<kUnits>;
  Bits bits = 0;
  if (!shape.resets) return bits;
  for (int b = 0; b < count; b += 32) {
    const int own = b + static_cast<int>(threadIdx.x) % 32;
    const int sequence = first + own;
    const bool reset =
        own < count && sequence < border.active && shape.resets[border.row + sequence];
    bits |= Bits{__ballot_sync(~0u, reset)} << b;
  }
  return bits;
}

// Sequences of the pass that begins with `first`.
__device__ inline int pass_size(int active, int first, int tile) {
  return min(tile, active - first);
}

// A thread owns one of the block's kUnits and, of every pass over a batch tile, kSequences of them.
// Their state is its own, so that it may be read and written without a barrier.
template <int kUnits, int kSequences = kOwn>
struct Own {
  static_assert(max_batch_tile(kUnits, kSequences) <= 8 * sizeof(SequenceBits<kUnits>));

  __device__ static int unit() { return threadIdx.x % kUnits; }

  // Calls body(i, b) for the thread's sequences b < count of a pass, i < kSequences.
  template <class Body>
  __device__ __forceinline__ static void for_sequences(int count, Body body) {
#pragma unroll
    for (int i = 0; i < kSequences; ++i) {
      const int b = threadIdx.x / kUnits + i * (kThreads / kUnits);
      if (b < count) body(i, b);
    }
  }

  // The same for each of all B sequences.
  template <class Body>
  __device__ __forceinline__ static void for_all_sequences(int64_t B, int tile, Body body) {
    for (int first = 0; first < B; first += tile)
      for_sequences(pass_size(static_cast<int>(B), first, tile),
                    [&](int, int b) { body(first + b); });
  }
};

// Some values as they were loaded: those of 16 bits two to a register.
template <class T, int kCount>
struct Loaded {
  static constexpr int kToWord = 4 / sizeof(T);
  uint32_t words[(kCount + kToWord - 1) / kToWord] = {};

  __device__ __forceinline__ void load(int i, const T* from) {
    uint32_t& word = words[i / kToWord];
    if constexpr (kToWord == 1) {
      word = *reinterpret_cast<const uint32_t*>(from);
    } else {
      const uint32_t bits = *reinterpret_cast<const uint16_t*>(from);
      word = i % 2 == 0 ? bits : word | bits << 16;  // in the order of i
    }
  }

  __device__ __forceinline__ float operator[](int i) const {
    const uint32_t word = words[i / kToWord];
    if constexpr (kToWord == 1) {
      return __uint_as_float(word);
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      return __uint_as_float(i % 2 == 0 ? word << 16 : word & 0xffff0000);
    } else {
      return __half2float(__ushort_as_half(static_cast<uint16_t>(word >> 16 * (i % 2))));
    }
  }
};

template <class T>
__device__ inline float value_or_zero(const void* from, int64_t i) {
  return from ? static_cast<float>(static_cast<const T*>(from)[i]) : 0;
}

// ---------------------------------------------------------------------------------------------
// Launch
// ---------------------------------------------------------------------------------------------

// Calls body(cell) with a std::integral_constant; rnn_tanh stands for both RNNs.
template <class Body>
void with_kernels_of(Cell cell, const Body& body) {
  switch (cell) {
    case Cell::lstm: return body(std::integral_constant<Cell, Cell::lstm>());
    case Cell::gru: return body(std::integral_constant<Cell, Cell::gru>());
    case Cell::rnn_tanh:
    case Cell::rnn_relu: return body(std::integral_constant<Cell, Cell::rnn_tanh>());
  }
}

}  // namespace rnn_fused::persistent
