// The forward pass of all timesteps, or of a window of them, in one launch, a thread-block cluster
// for some sequences of one direction: it waits for no other.
//
// As in persistent_forward.cuh the blocks own hidden units, and their weights stay in registers,
// some of large layers in shared memory. But h does not go through L2. Each block has all of h in
// its shared memory, twice, and sends its own slice to the others as soon as it has it; the bytes
// count at an mbarrier of the receiver, and no step waits for more of other blocks than that.
//
// Four warps divide K, and the other four do so for the other half of the units: h is read twice,
// but half as many sums go through shared memory.
//
// What a step costs: one trip from SM to SM, some 180 cycles (0.1 us), the product, the gates, and
// the block's slice sent to each of the others: B * 16 * 2 bytes 15 times, 16 bytes an instruction
// (B = 32: 960 of them, four a thread).
#pragma once

#include "csrc/cuda/cluster_block.cuh"
#include "csrc/cuda/persistent_forward.cuh"

namespace rnn_fused::persistent {

template <class Policy, Cell kCell, int kUnits>
class ClusterForward : ForwardUnits<Policy, kCell, kUnits, kClusterKWarps> {
  using Units = ForwardUnits<Policy, kCell, kUnits, kClusterKWarps>;
  using typename Units::T;
  using Units::dir_;
  using Units::direction_;
  using Units::p_;
  using Units::slice_;
  using Units::tile_;
  static constexpr int kValues = 16 / sizeof(T);  // that are sent at a time
  static constexpr int kReset = 2;                // the buffer of the state after a reset

 public:
  // shared: [plan.shared_bytes]. full: [2] mbarriers.
  __device__ __forceinline__ ClusterForward(const ForwardParams& p, int direction, const int& tile,
                                            float* shared, uint64_t* full)
      : Units(p, direction, Slice(p, tile), gpu::cluster_rank(), tile, shared),
        pitch_(cluster_pitch(p.H, sizeof(T))),
        h_(reinterpret_cast<T*>(this->behind_state(tile))),
        full_(full),
        product_(
            static_cast<int>(p.H), reinterpret_cast<float*>(h_ + 3 * tile * pitch_),
            [&](int gate, int, int unit, int k) { return this->load_weights(gate, unit, k); }) {
    this->begin_state();
    // Any step may be a sequence's first.
    begin_h(0, dir_.h0);
    begin_h(1, dir_.h0);
    begin_h(kReset, dir_.reset_h);
  }

  __device__ __forceinline__ void run() {
    const bool down = p_.reverse(direction_);
    const Range window = {dir_.steps_before, p_.T - dir_.steps_after};
    const auto step = [&](int64_t s) {
      return s < window.end ? slice_.step_at(down, s) : Step{0, 0};
    };
    const auto [begin, end] = cluster_steps(p_, down, slice_, window);
    Step before = {0, 0}, now = step(begin), next = step(begin + 1);
    if (threadIdx.x == 0 && begin < end) {
      gpu::make_barrier(&full_[0], 1);
      gpu::make_barrier(&full_[1], 1);
      expect(1, now);
      expect(0, next);
    }
    // Everybody's shared memory is ready.
    gpu::cluster_arrive();
    if (begin < end) this->load_input(now, before, 0);
    gpu::cluster_wait();
    // h goes into step i by buffer i % 2, that buffer's ((i - 1) / 2)-th transaction.
    for (int64_t i = 0; i < end - begin; ++i) {
      const int buffer = static_cast<int>(i % 2);
      if (i > 0) gpu::wait_for_phase(&full_[buffer], (i - 1) / 2 % 2);
      multiply(now, buffer);
      __syncthreads();
      // All threads have seen the transaction, and have read the buffer. What the others send there
      // next goes into step i + 2; they do not before they have what this block sends below.
      if (threadIdx.x == 0 && i > 0) expect(buffer, next);
      this->activate(now, next, 0, [&](int b, T h) { h_of(1 - buffer, b)[this->unit_] = h; });
      if (begin + i + 1 == end) break;
      this->load_input(next, now, 0);
      __syncthreads();
      send(1 - buffer, now.active);
      before = now;
      now = next;
      next = step(begin + i + 2);
    }
    this->end_state();
    gpu::cluster_arrive();
    gpu::cluster_wait();
  }

 private:
  // The transaction that brings the others' h of a step.
  __device__ void expect(int buffer, Step step) {
    gpu::expect_bytes(&full_[buffer], (gpu::cluster_size() - 1) * step.active * kUnits * sizeof(T));
  }

  __device__ T* h_of(int buffer, int b) const { return h_ + (buffer * tile_ + b) * pitch_; }

  // from: [B, H] or null. Zeros where the product reads what is no sequence's or no unit's: it
  // multiplies them by zeros, and so they must be no NaN.
  __device__ __forceinline__ void begin_h(int buffer, const void* from) {
    const bool aligned = rows_aligned<T>(from, p_.H, p_.H);
    const int H = static_cast<int>(p_.H), eights = (H + kRun - 1) / kRun * (kRun / 8);
    for (int i = threadIdx.x; i < tile_ * eights; i += kThreads) {
      const int b = i / eights, k = i % eights * 8;
      Eight<T> values;
      if (from && b < slice_.size())
        values = load_eight(aligned, static_cast<const T*>(from) + (slice_.begin() + b) * p_.H + k,
                            H - k);
#pragma unroll
      for (int q = 0; q < Eight<T>::kQuads; ++q)
        reinterpret_cast<uint4*>(h_of(buffer, b) + k)[q] = values.quad(q);
    }
  }

  __device__ __forceinline__ void multiply(Step now, int buffer) {
    product_.multiply(
        now.active,
        [&](int b, int, int k) {
          const int from = this->was_reset(b) ? kReset : buffer;
          const uint4* const quads = reinterpret_cast<const uint4*>(h_of(from, b) + k);
          Eight<T> eight;
#pragma unroll
          for (int q = 0; q < Eight<T>::kQuads; ++q) eight.set_quad(q, quads[q]);
          return eight;
        },
        tile_, this->sums_);
  }

  // The block's slice of h to all others, each warp to some of them.
  __device__ __forceinline__ void send(int buffer, int rows) {
    constexpr int kParts = kUnits / kValues;
    const int rank = gpu::cluster_rank(), others = gpu::cluster_size() - 1;
    for (int other = threadIdx.x / 32; other < others; other += kWarps) {
      const int to = other + (other >= rank ? 1 : 0);
      const auto barrier = gpu::shared_of(&full_[buffer], to);
      for (int i = threadIdx.x % 32; i < rows * kParts; i += 32) {
        const T* const from = h_of(buffer, i / kParts) + this->first_unit_ + i % kParts * kValues;
        const uint4 values = *reinterpret_cast<const uint4*>(from);
        gpu::store_async(gpu::shared_of(from, to), values, barrier);
      }
    }
  }

  const int pitch_;
  T* const h_;            // [3, tile, pitch]; behind it the weights
  uint64_t* const full_;  // [2]
  const Product<Policy, kUnits, gate_count(kCell), 1, cluster_k_blocks(kUnits), kClusterKWarps>
      product_;
};

// blockIdx: (block of units, direction, slice).
template <class Policy, Cell kCell, int kUnits>
__global__ void __launch_bounds__(kThreads, 1)
    cluster_forward_kernel(const __grid_constant__ ForwardParams p,
                           const __grid_constant__ int tile) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  RNN_FUSED_DYNAMIC_SHARED(float, shared);
  RNN_FUSED_SHARED(uint64_t, full, [2]);
  ClusterForward<Policy, kCell, kUnits> block(p, blockIdx.y, tile, shared, full);
  block.run();
#else
  __trap();
#endif
}

template <class Policy>
void launch_cluster_forward(const CudaPlan& plan, const ForwardParams& params,
                            cudaStream_t stream) {
  launch_cluster<Policy>(plan, params, stream, [](auto cell, auto units) {
    return cluster_forward_kernel<Policy, cell.value, units.value>;
  });
}

}  // namespace rnn_fused::persistent
