// The backward pass of a window of timesteps in one launch, a thread-block cluster for some
// sequences of one direction: it waits for no other.
//
// The blocks own hidden units as those of cluster_forward.cuh do, but divide K: each multiplies the
// gradients of its own units' gates, which no other block needs, by their rows of W_hh in its
// registers, and sends the sums, which are parts of dh of all units, to the blocks that own these.
// Those add up the parts of all blocks, always in the same order. To send the gradients themselves
// would take G / 2 times as many bytes in 16-bit types, G times in float32.
//
// What a step costs: one trip from SM to SM, some 180 cycles (0.1 us), the product, the gates'
// gradients, and B * H * 4 bytes that each block sends and receives, 16 to an instruction (B = 16,
// H = 256: 1024 of them, four a thread).
#pragma once

#include "csrc/cuda/cluster_block.cuh"
#include "csrc/cuda/gradient_parts.cuh"
#include "csrc/cuda/persistent_backward.cuh"

namespace rnn_fused::persistent {

template <class Policy, Cell kCell, int kUnits>
class ClusterBackward : BackwardUnits<Policy, kCell, kUnits> {
  using Units = BackwardUnits<Policy, kCell, kUnits>;
  using typename Units::Owned;
  using typename Units::T;
  using Units::dir_;
  using Units::direction_;
  using Units::first_unit_;
  using Units::G;
  using Units::p_;
  using Units::slice_;
  using Units::tile_;
  static constexpr int kRuns = cluster_runs(kCell, kUnits);
  static constexpr int kOctets = Policy::kOctets;  // of units that are multiplied at a time
  static constexpr int kRounds = cluster_octets(kUnits) / kOctets;
  static constexpr int kTogether = kRounds % 2 == 0 ? 2 : 1;  // rounds that wait for each other
  static constexpr int kPitch = cluster_pitch(kRuns * kRun, sizeof(T));

 public:
  // shared: [plan.shared_bytes]. full: [2] mbarriers.
  __device__ __forceinline__ ClusterBackward(const BackwardParams& p, int direction,
                                             const int& tile, float* shared, uint64_t* full)
      : Units(p, direction, Slice(p, tile), gpu::cluster_rank(), tile, shared, tile),
        parts_(tile, this->behind_state(tile), full),
        grads_(reinterpret_cast<T*>(parts_.behind())) {
    this->begin_state();
    load_weights();
    // Zeros where the product reads what is no unit's gradient: it multiplies them by zeros, and so
    // they must be no NaN.
    for (int i = threadIdx.x; i < 2 * tile * kPitch / kValues; i += kThreads)
      reinterpret_cast<uint4*>(grads_)[i] = make_uint4(0, 0, 0, 0);
  }

  __device__ __forceinline__ void run() {
    const bool down = !p_.reverse(direction_);
    const auto step = [&](int64_t s) { return slice_.step_at(down, s); };
    const auto [begin, end] = cluster_steps(p_, down, slice_, p_.steps(direction_));
    Step now = step(begin), next = step(begin + 1);
    if (threadIdx.x == 0 && begin < end) {
      parts_.begin();
      parts_.expect(0, now.active);
    }
    // Everybody's barriers are ready, and all of grads.
    gpu::cluster_arrive();
    if (begin < end) this->load_saved(now, next, 0);
    gpu::cluster_wait();
    // Step i sends by buffer i % 2, that buffer's (i / 2)-th transaction.
    for (int64_t i = 0; i < end - begin; ++i) {
      const int buffer = static_cast<int>(i % 2);
      const bool last = begin + i + 1 == end;
      const auto resets = this->resets();
      this->differentiate(now, 0, [&](int b, int gate, T gradient) {
        grads_of(buffer, b)[gate * kUnits + Owned::unit()] = gradient;
      });
      // Before anybody sends for step i + 1: they do not before they have what this block sends
      // below. Then all threads have also read the parts of step i - 1, which that overwrites.
      if (threadIdx.x == 0 && !last) parts_.expect(1 - buffer, next.active);
      __syncthreads();
      multiply_and_send(buffer, now.active);
      const Step after = step(begin + i + 2);
      if (!last) this->load_saved(next, after, 0);
      parts_.wait(buffer, static_cast<uint32_t>(i / 2));
      this->add_product(now, resets, 0, [&](int b) { return parts_.sum(buffer, b); });
      now = next;
      next = after;
    }
    this->end_state();
    gpu::cluster_arrive();
    gpu::cluster_wait();
  }

 private:
  static constexpr int kValues = 16 / sizeof(T);

  // K is [gate, unit of the block]. Two buffers, so that a warp may come to the next step while
  // another still multiplies.
  __device__ T* grads_of(int buffer, int b) const { return grads_ + (buffer * tile_ + b) * kPitch; }

  // The units of dh that the warp multiplies in a round: neighbours are other warps', so that all
  // have some in small layers.
  __device__ static int first_of(int round) {
    return (round * kWarps + static_cast<int>(threadIdx.x) / 32) * 8 * kOctets;
  }

  __device__ __forceinline__ void load_weights() {
    const T* const weights = static_cast<const T*>(dir_.weight_hh);
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      const int k = run * kRun + lane % 4 * 8, gate = k / kUnits;
      const int row = first_unit_ + k % kUnits;
#pragma unroll
      for (int round = 0; round < kRounds; ++round)
#pragma unroll
        for (int octet = 0; octet < kOctets; ++octet) {
          const int unit = first_of(round) + Policy::unit(lane, octet);
          const bool there = gate < G && unit < p_.H;
          Eight<T>& eight = weights_[run][round][octet];
          eight = gather_eight(weights + (gate * p_.H + row) * p_.H + unit, p_.H,
                               there ? static_cast<int>(p_.H) - row : 0);
          Policy::prepare(eight);
        }
    }
  }

  __device__ __forceinline__ void multiply_and_send(int buffer, int rows) {
    const int lane = threadIdx.x % 32;
    const int units = static_cast<int>(gpu::cluster_size()) * kUnits;
    for (int first = 0; first < rows; first += Policy::kSequences) {
      Eight<T> x[kRuns][Policy::kRows];
#pragma unroll
      for (int run = 0; run < kRuns; ++run)
#pragma unroll
        for (int r = 0; r < Policy::kRows; ++r) {
          // Beyond the last sequence: sums that nobody sends.
          const T* const row = grads_of(buffer, first + Policy::sequence(lane, r));
          const uint4* const quads =
              reinterpret_cast<const uint4*>(row + run * kRun + lane % 4 * 8);
#pragma unroll
          for (int q = 0; q < Eight<T>::kQuads; ++q) x[run][r].set_quad(q, quads[q]);
          Policy::prepare(x[run][r]);
        }
#pragma unroll
      for (int round = 0; round < kRounds; round += kTogether) {
        if (first_of(round) >= units) break;
        float d[kTogether][kOctets][4] = {};
#pragma unroll
        for (int run = 0; run < kRuns; ++run)
#pragma unroll
          for (int i = 0; i < kTogether; ++i)
            Policy::multiply(d[i], x[run], weights_[run][round + i]);
#pragma unroll
        for (int i = 0; i < kTogether; ++i)
          Policy::quads(d[i], [&](int b, int unit, float4 sums) {
            unit += first_of(round + i);
            if (first + b < rows && unit < units) parts_.send(buffer, first + b, unit, sums);
          });
      }
    }
  }

  const GradientParts<kUnits, 0> parts_;
  T* const grads_;  // [2, tile, kPitch]
  Eight<T> weights_[kRuns][kRounds][kOctets];
};

// blockIdx: (block of units, direction, slice).
template <class Policy, Cell kCell, int kUnits>
__global__ void __launch_bounds__(kThreads, 1)
    cluster_backward_kernel(const __grid_constant__ BackwardParams p,
                            const __grid_constant__ int tile) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  RNN_FUSED_DYNAMIC_SHARED(float, shared);
  RNN_FUSED_SHARED(uint64_t, full, [2]);
  ClusterBackward<Policy, kCell, kUnits> block(p, blockIdx.y, tile, shared, full);
  block.run();
#else
  __trap();
#endif
}

template <class Policy>
void launch_cluster_backward(const CudaPlan& plan, const BackwardParams& params,
                             cudaStream_t stream) {
  launch_cluster<Policy>(plan, params, stream, [](auto cell, auto units) {
    return cluster_backward_kernel<Policy, cell.value, units.value>;
  });
}

}  // namespace rnn_fused::persistent
