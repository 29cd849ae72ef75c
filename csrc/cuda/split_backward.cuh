// The backward pass of persistent_backward.cuh, for cells of several gates, with blocks in clusters
// of one to a gate, that divide K: each reads the gradients of its own gate alone from L2, and
// multiplies them by the columns of all the cluster's units. The parts of dh go to the block that
// owns the unit, through its shared memory, as in cluster_backward.cuh.
//
// What a step costs less: an SM reads B * H * 2 bytes instead of G times that (LSTM, B = 32, H =
// 1024: a quarter of 2.3 to 6 us). What it costs more: a trip from SM to SM, G times the sums of
// eight warps in shared memory, and a row of G * 8 of them sent to the others for each sequence (B
// = 32: 4 KiB).
#pragma once

#include "csrc/cuda/gradient_parts.cuh"
#include "csrc/cuda/persistent_backward.cuh"

namespace rnn_fused::persistent {

template <class Policy, Cell kCell, int kBlocks>
class SplitBackward : ExchangedBackwardUnits<Policy, kCell, kBlocks> {
  static constexpr int kUnits = units_of(kBlocks);
  using Units = ExchangedBackwardUnits<Policy, kCell, kBlocks>;
  using typename Units::T;
  using Units::dir_;
  using Units::direction_;
  using Units::exchange_;
  using Units::G;
  using Units::p_;
  using Units::slice_;
  using Units::tile_;
  static constexpr int kOfCluster = G * kUnits, kPitch = sum_pitch(1, kOfCluster);

 public:
  // shared: [plan.shared_bytes]. full: [2] mbarriers.
  __device__ __forceinline__ SplitBackward(const BackwardParams& p, const Launch& launch,
                                           float* shared, uint64_t* full)
      : Units(p, launch, false, shared + (kWarps * kPitch + 2 * kOfCluster) * launch.batch_tile),
        sums_(shared),
        parts_(tile_, shared + kWarps * kPitch * tile_, full),
        gate_(gpu::cluster_rank()),
        product_(static_cast<int>(p.H), exchange_.behind_staged(),
                 [&](int, int, int of_cluster, int k) {
                   const int unit = this->first_unit_ - gate_ * kUnits + of_cluster;
                   const T* const weights = static_cast<const T*>(dir_.weight_hh);
                   return gather_eight(weights + (gate_ * p.H + k) * p.H + unit, p.H,
                                       unit < p.H ? static_cast<int>(p.H) - k : 0);
                 }) {
    if (threadIdx.x == 0) parts_.begin();
  }

  __device__ __forceinline__ void run(gpu::GridBarrier barrier) {
    const bool down = !p_.reverse(direction_);
    const int64_t begin = dir_.steps_before;
    const auto end = [&] { return p_.T - dir_.steps_after; };  // no register has room for it
    Step now = slice_.step_at(down, begin), next = slice_.step_at(down, begin + 1);
    // Everybody's transactions can be counted.
    gpu::cluster_arrive();
    this->load_saved(now, next, 0);
    gpu::cluster_wait();
    uint32_t pass = 0;  // of all steps: it sends by buffer pass % 2, the (pass / 2)-th transaction
    for (int64_t s = begin; s < end(); ++s) {
      const Step after = slice_.step_at(down, s + 2);
      auto resets = this->exchange(s - begin, s + 1 == end(), now, next, after, barrier);
      for (int first = 0; first < now.active; first += tile_, ++pass) {
        const int buffer = pass % 2, rows = pass_size(now.active, first, tile_);
        if (first > 0) {
          __syncthreads();  // the sums of the pass before have been sent
          resets = this->resets(now, next, first);
        }
        multiply(exchange_.slot_of(s - begin), first, rows);
        // All threads have also read the parts of the pass before. The others overwrite them when
        // they have this pass's of this block.
        __syncthreads();
        if (threadIdx.x == 0) parts_.expect(buffer, rows);
        send(buffer, rows);
        parts_.wait(buffer, pass / 2);
        this->add_product(now, resets, first, [&](int b) { return parts_.sum(buffer, b); });
      }
      now = next;
      next = after;
    }
    this->end_state();
    gpu::cluster_arrive();
    gpu::cluster_wait();
  }

 private:
  // The gradients of the block's gate times its part of W_hh^T.
  __device__ __forceinline__ void multiply(int slot, int first, int rows) {
    product_.multiply(
        rows, [&](int b, int, int k) { return exchange_.load(slot, first + b, gate_, k); }, tile_,
        sums_);
  }

  // The sums of all warps, four units at a time, to the units' blocks.
  __device__ __forceinline__ void send(int buffer, int rows) {
    constexpr int kQuads = kOfCluster / 4;
    for (int i = threadIdx.x; i < rows * kQuads; i += kThreads) {
      const int b = i / kQuads, unit = i % kQuads * 4;
      float4 total = {};
#pragma unroll
      for (int warp = 0; warp < kWarps; ++warp) {
        const float4 sums =
            *reinterpret_cast<const float4*>(sums_ + (warp * tile_ + b) * kPitch + unit);
        total.x += sums.x;
        total.y += sums.y;
        total.z += sums.z;
        total.w += sums.w;
      }
      parts_.send(buffer, b, unit, total);
    }
  }

  float* const sums_;                     // [kWarps, tile, kPitch]
  const GradientParts<kUnits, G> parts_;  // behind them the state, what is staged, weights
  const int gate_;                        // whose gradients the block multiplies
  const Product<Policy, kOfCluster, 1, 1, kBlocks> product_;
};

// blockIdx: (block of units, direction behind the first, slice).
template <class Policy, Cell kCell, int kBlocks>
__global__ void __launch_bounds__(kThreads, blocks_per_sm(sizeof(typename Policy::T), kBlocks))
    split_backward_kernel(const __grid_constant__ BackwardParams p,
                          const __grid_constant__ Launch launch) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  RNN_FUSED_DYNAMIC_SHARED(float, shared);
  RNN_FUSED_SHARED(uint64_t, full, [2]);
  SplitBackward<Policy, kCell, kBlocks> block(p, launch, shared, full);
  block.run(barrier_of(launch));
#else
  __trap();
#endif
}

// Those that the plan has in clusters are split.
template <class Policy>
void launch_backward(const CudaPlan& plan, const BackwardParams& params, void* workspace,
                     cudaStream_t stream) {
  launch_persistent<Policy>(plan, params, workspace, stream, [&](auto cell, auto k_blocks) {
    if constexpr (gate_count(cell.value) > 1 && k_blocks.value != kAnyBlocks)
      if (plan.cluster > 1) return split_backward_kernel<Policy, cell.value, k_blocks.value>;
    return backward_kernel<Policy, cell.value, k_blocks.value>;
  });
}

}  // namespace rnn_fused::persistent
