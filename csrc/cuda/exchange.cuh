// How the blocks of a direction and slice of the batch hand h, or the gradients of the gates, to
// each other: rows of H values through a buffer in device memory (L2), aligned to 16 bytes whatever
// the caller's tensors are. A row is that of one sequence and group; a step has a slot of them.
//
// A reader knows that a row is there by one of two ways.
//
// By the barrier of all blocks behind which it reads. Two slots are enough: who writes one again
// has passed a barrier that its readers reached behind their reads. What is handed on crosses L2
// three times: it is stored, announced, and read.
//
// By hand-off: by the values themselves, in one crossing. A slot is blank until it is written, all
// bits set, a NaN that no value has; who finds a blank reads again. Each 32 bits are stored and
// loaded whole, and nothing else is asked of the order of memory. But a slot has to be blank again,
// for everybody, before it is written again. So blocks also meet at a barrier, which nobody has to
// wait for: they arrive behind every even step i, and wait behind step i + 1. Then all are done
// with what was written before step i, of which step i + 2 blanks i - 2 and step i + 3 blanks
// i - 1; the barriers of i + 2 and i + 4 tell the others so, which they have passed when they wait
// for what is written there in steps i + 6 and i + 7. Six slots would do; eight spare a division.
#pragma once

#include <stdexcept>

#include "csrc/cuda/persistent_block.cuh"
#include "csrc/cuda/streamed_product.cuh"

namespace rnn_fused::persistent {

// The workspace begins with a counter for the barrier of each direction and slice, in a cache line
// of its own; behind them are the directions' slots.
constexpr int kBarrierStride = 32;
constexpr int kBarrierBytes = kMaxDirections * kMaxSlices * kBarrierStride * sizeof(uint32_t);

__device__ inline gpu::GridBarrier barrier_of(const Launch& launch) {
  const int i = launch.direction() * kMaxSlices + static_cast<int>(blockIdx.z);
  return {static_cast<uint32_t*>(launch.workspace) + i * kBarrierStride, gridDim.x};
}

RNN_FUSED_HD constexpr int step_slots(bool handoff) { return handoff ? 8 : 2; }

// Forward, slots of the states that are given come first.
constexpr int kInitialSlot = 0, kResetSlot = 1, kGivenSlots = 2;

RNN_FUSED_HD constexpr int64_t exchange_pitch(int64_t H) { return (H + 7) / 8 * 8; }

// Values of all slots of one direction.
RNN_FUSED_HD constexpr int64_t exchanged_values(const LayerShape& s, bool backward, bool handoff) {
  const int slots = step_slots(handoff) + (backward ? 0 : kGivenSlots);
  return s.B * slots * groups_of(s.cell, backward) * exchange_pitch(s.H);
}

// The value, or another NaN where it has the bits of a blank.
template <class T>
__device__ __forceinline__ T not_blank(T value) {
  const float number = static_cast<float>(value);
  return number == number ? value : static_cast<T>(__uint_as_float(0x7fffffff));
}

// kGiven: slots before those of the steps.
template <class T, int kGroups, int kUnits, int kGiven>
class Exchange {
 public:
  // handoff: the launch's, or false. first_unit: of the block. staged: shared memory,
  // [staged_values].
  __device__ __forceinline__ Exchange(const LayerShape& s, const Launch& launch, bool handoff,
                                      int first_unit, T* staged)
      : s_(s),
        launch_(launch),
        first_unit_(first_unit),
        direction_(launch.direction()),
        handoff_(handoff),
        slots_(reinterpret_cast<T*>(static_cast<char*>(launch.workspace) + kBarrierBytes) +
               int64_t{launch.slice_of(s).begin()} * kGroups * pitch()),
        staged_(staged) {
    // Those behind the last unit stay zeros: the product multiplies them by zeros.
#pragma unroll 1
    for (int i = threadIdx.x; i < staged_values() / kValues; i += kThreads)
      reinterpret_cast<uint4*>(staged)[i] = make_uint4(0, 0, 0, 0);
    __syncthreads();
  }

  __device__ int staged_values() const { return launch_.batch_tile * kGroups * kUnits; }
  __device__ float* behind_staged() const {
    return reinterpret_cast<float*>(staged_ + staged_values());
  }

  // Device memory behind those of all directions.
  __device__ void* behind_slots() const {
    const int64_t rows = s_.B * kGroups * slots_of_direction() * s_.directions;
    return static_cast<char*>(launch_.workspace) + kBarrierBytes +
           rows * pitch() * static_cast<int64_t>(sizeof(T));
  }

  __device__ bool handoff() const { return handoff_; }
  __device__ int slot_of(int64_t step) const {
    return kGiven + (static_cast<int>(step) & (step_slots(handoff()) - 1));
  }

  // Of the thread's own unit and the b-th sequence of a pass. Behind it a block barrier and
  // publish(), and another before this is called again.
  __device__ __forceinline__ void stage(int b, int group, T value) const {
    staged_[(b * kGroups + group) * kUnits + Own<kUnits>::unit()] = not_blank(value);
  }
  __device__ __forceinline__ void publish(int slot, int first, int sequences) const {
    store(slot, first, sequences,
          [&](int i) { return reinterpret_cast<const uint4*>(staged_)[i]; });
  }

  // Of all that has been published in a step; and before what others have is read.
  __device__ __forceinline__ void announce(int64_t step, gpu::GridBarrier& barrier) const {
    if (!handoff()) return barrier.arrive();
    store(slot_of(step + 4), 0, launch_.slice_of(s_).size(),
          [](int) { return make_uint4(kBlank, kBlank, kBlank, kBlank); });
    if (step % 2 == 0) barrier.arrive();
  }
  __device__ __forceinline__ void await(int64_t step, gpu::GridBarrier& barrier) const {
    if (!handoff() || step % 2 == 1) barrier.wait();
  }

  // The values [k, k + 8) of a row; zeros for k from H on. Some are blank where a hand-off has not
  // come yet.
  __device__ __forceinline__ Eight<T> load(int slot, int sequence, int group, int k) const {
    Eight<T> eight;
    if (k < s_.H) eight = load_aligned(row(slot, sequence * kGroups + group) + k);
    return eight;
  }

 private:
  static constexpr int kValues = 16 / sizeof(T);

  __device__ int pitch() const { return static_cast<int>(exchange_pitch(s_.H)); }
  __device__ int slots_of_direction() const { return kGiven + step_slots(handoff()); }
  // i: [sequence, group]
  __device__ T* row(int slot, int i) const {
    const int rows = static_cast<int>(s_.B) * kGroups;
    const int64_t of_all = direction_ * slots_of_direction() + slot;
    return slots_ + (of_all * rows + i) * pitch();
  }

  // quad_of(i): the i-th 16 bytes of the block's values.
  template <class QuadOf>
  __device__ __forceinline__ void store(int slot, int first, int sequences, QuadOf quad_of) const {
    constexpr int kQuads = kUnits / kValues;
#pragma unroll 1  // seldom a second round, and registers are scarce
    for (int i = threadIdx.x; i < sequences * kGroups * kQuads; i += kThreads) {
      const int unit = first_unit_ + i % kQuads * kValues;
      if (unit < pitch())
        gpu::store_relaxed(reinterpret_cast<uint4*>(row(slot, first * kGroups + i / kQuads) + unit),
                           quad_of(i));
    }
  }

  const LayerShape& s_;
  const Launch& launch_;
  const int first_unit_;
  // Of the launch: read from there again, large blocks would spill on sm_80.
  const int direction_;
  const bool handoff_;
  T* const slots_;   // [directions, slots_of_direction, B, kGroups, pitch], of the slice's first
  T* const staged_;  // [batch_tile, kGroups, kUnits]
};

// ---------------------------------------------------------------------------------------------
// Launch
// ---------------------------------------------------------------------------------------------

// kernel_of(cell, k_blocks): the kernel for these std::integral_constants.
template <class Policy, class Params, class KernelOf>
void launch_persistent(const CudaPlan& plan, const Params& params, void* workspace,
                       cudaStream_t stream, KernelOf kernel_of) {
  constexpr bool kBackward = std::is_same_v<Params, BackwardParams>;
  const auto launch = [&](void (*kernel)(Params, Launch)) {
    const int directions = params.directions / plan.launches;
    const auto slices = static_cast<unsigned>(slice_count(plan, params));
    const dim3 grid(static_cast<unsigned>(plan.blocks / directions) / slices, directions, slices);
    const bool handoff = plan.family == Family::handoff;
    gpu::fill(workspace, 0, kBarrierBytes, stream);
    if (handoff)
      gpu::fill(static_cast<char*>(workspace) + kBarrierBytes, 0xff,
                persistent_workspace(plan, params, kBackward) - kBarrierBytes, stream);
    for (int first = 0; first < params.directions; first += directions)
      gpu::launch_cooperative(plan.cluster, kernel, grid, kThreads, plan.shared_bytes, stream,
                              params,
                              Launch{first, static_cast<int>(plan.slice), plan.batch_tile,
                                     plan.shared_octets, handoff, workspace});
  };
  with_kernels_of(params.cell, [&](auto cell) {
    switch (compiled_blocks(plan)) {
      case 1: return launch(kernel_of(cell, std::integral_constant<int, 1>()));
      case 2: return launch(kernel_of(cell, std::integral_constant<int, 2>()));
      case 4: return launch(kernel_of(cell, std::integral_constant<int, 4>()));
      case 8: return launch(kernel_of(cell, std::integral_constant<int, 8>()));
      case kAnyBlocks:
        if constexpr (kHasLargeBlocks<Policy>)
          return launch(kernel_of(cell, std::integral_constant<int, kAnyBlocks>()));
        throw std::invalid_argument("[persistent] exact float32 has no large blocks");
    }
  });
}

}  // namespace rnn_fused::persistent
