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

// Whether a sequence comes to a step with the reset state. border: of this step and the one that
// the forward pass made before it, the later one in time.
__device__ inline bool is_reset(const LayerShape& shape, Step border, int sequence) {
  return shape.resets && sequence < border.active && shape.resets[border.row + sequence];
}

// Sequences of the pass that begins with `first`.
__device__ inline int pass_size(int active, int first, int tile) {
  return min(tile, active - first);
}

// A thread owns one of the block's kUnits and, of every pass over a batch tile, kOwn sequences.
// Their state is its own, so that it may be read and written without a barrier.
template <int kUnits>
struct Own {
  __device__ static int unit() { return threadIdx.x % kUnits; }

  // Calls body(i, b) for the thread's sequences b < count of a pass, i < kOwn.
  template <class Body>
  __device__ __forceinline__ static void for_sequences(int count, Body body) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
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

// The workspace begins with a counter for each direction's barrier, in a cache line of its own;
// behind them are the directions' exchanges.
constexpr int kBarrierStride = 32;
constexpr int kBarrierBytes = 2 * kBarrierStride * sizeof(uint32_t);

__device__ inline gpu::GridBarrier barrier_of(void* workspace, int direction) {
  return {static_cast<uint32_t*>(workspace) + direction * kBarrierStride, gridDim.x};
}

// What the blocks of a direction read of each other goes through a buffer in device memory: rows of
// H values, one of each group for each sequence, in several slots. A step writes its slot before
// the barrier that the readers wait for. Two slots for the steps are enough: who writes one again
// has passed a barrier that its readers reached behind their reads.
//
// Not through the tensors that hold the same in the end, since their rows need not be aligned.

// Slots of h: those of the steps, of h0, and of the state after a reset. And those of the gates' gradients.
constexpr int kForwardSlots = 4, kInitialSlot = 2, kResetSlot = 3;
constexpr int kBackwardSlots = 2;

RNN_FUSED_HD constexpr int64_t exchange_pitch(int64_t H) { return (H + 7) / 8 * 8; }
constexpr int64_t exchanged_values(const LayerShape& s, int slots, int groups) {
  return s.B * slots * groups * exchange_pitch(s.H);
}

template <class T, int kSlots, int kGroups>
class Exchange {
 public:
  __device__ Exchange(const LayerShape& s, int direction, void* workspace)
      : s_(s), direction_(direction), workspace_(static_cast<char*>(workspace) + kBarrierBytes) {}

  // [pitch], aligned to 16 bytes.
  __device__ T* row(int slot, int sequence, int group) const {
    const int B = static_cast<int>(s_.B);
    return reinterpret_cast<T*>(workspace_) +
           (int64_t{direction_ * kSlots + slot} * B + sequence) * (kGroups * pitch()) +
           group * pitch();
  }
  __device__ int pitch() const { return static_cast<int>(exchange_pitch(s_.H)); }

 private:
  const LayerShape& s_;
  const int direction_;
  char* const workspace_;  // [directions, kSlots, B, kGroups, pitch]
};

template <class T>
using HiddenExchange = Exchange<T, kForwardSlots, 1>;
template <class T, Cell kCell>
using GradientExchange = Exchange<T, kBackwardSlots, gate_count(kCell)>;

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

// kernel_of(cell, k_blocks): the kernel for these std::integral_constants.
template <class Params, class KernelOf>
void launch_persistent(const CudaPlan& plan, const Params& params, void* workspace,
                       cudaStream_t stream, KernelOf kernel_of) {
  const auto launch = [&](void (*kernel)(Params, int, int, void*)) {
    const int directions = params.directions / plan.launches;
    const dim3 grid(static_cast<unsigned>(plan.blocks / directions), directions);
    gpu::zero(workspace, kBarrierBytes, stream);
    for (int first = 0; first < params.directions; first += directions)
      gpu::launch_cooperative(plan.cluster, kernel, grid, kThreads, plan.shared_bytes, stream,
                              params, first, plan.batch_tile, workspace);
  };
  with_kernels_of(params.cell, [&](auto cell) {
    switch (compiled_blocks(plan)) {
      case 1: return launch(kernel_of(cell, std::integral_constant<int, 1>()));
      case 2: return launch(kernel_of(cell, std::integral_constant<int, 2>()));
      case 4: return launch(kernel_of(cell, std::integral_constant<int, 4>()));
      case 8: return launch(kernel_of(cell, std::integral_constant<int, 8>()));
    }
  });
}

}  // namespace rnn_fused::persistent
