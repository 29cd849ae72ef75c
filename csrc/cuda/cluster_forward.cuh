// The forward pass of all timesteps in one launch, a thread-block cluster for some sequences of one
// direction: it waits for no other.
//
// As in persistent_forward.cuh the blocks own hidden units, and their weights stay in registers.
// But h does not go through L2. Each block has all of h in its shared memory, twice, and sends its
// own slice to the others as soon as it has it; the bytes count at an mbarrier of the receiver, and
// no step waits for more of other blocks than that.
//
// What a step costs: one trip from SM to SM, some 180 cycles (0.1 us), the product, the gates, and
// the block's slice sent to each of the others: B * 16 * 2 bytes 15 times, 16 bytes an instruction
// (B = 32: 960 of them, four a thread).
#pragma once

#include "csrc/cuda/persistent_forward.cuh"

namespace rnn_fused::persistent {

template <class Policy, Cell kCell, bool kAligned>
class ClusterForward : ForwardUnits<Policy, kCell, kClusterUnits> {
  using Units = ForwardUnits<Policy, kCell, kClusterUnits>;
  using typename Units::T;
  using Units::direction_;
  using Units::p_;
  using Units::tile_;
  static constexpr int kValues = 16 / sizeof(T);  // that are sent at a time

 public:
  // first: the cluster's first sequence. shared: [plan.shared_bytes]. full: [2] mbarriers.
  __device__ __forceinline__ ClusterForward(const ForwardParams& p, int direction, int first,
                                            int tile, float* shared, uint64_t* full)
      : Units(p, direction, gpu::cluster_rank(), tile, shared),
        first_(first),
        pitch_(cluster_pitch(p.H, sizeof(T))),
        h_(reinterpret_cast<T*>(this->behind_state(tile))),
        full_(full),
        product_(static_cast<int>(p.H), nullptr, [&](int gate, int, int unit, int k) {
          return this->template load_weights<kAligned>(gate, unit, k);
        }) {
    this->begin_state(first, min(static_cast<int64_t>(tile), p_.B - first));
    // What no unit fills is multiplied by zeros, and so must be no NaN.
    const int quads = 2 * tile * pitch_ / kValues;
    for (int i = threadIdx.x; i < quads; i += kThreads)
      reinterpret_cast<uint4*>(h_)[i] = make_uint4(0, 0, 0, 0);
  }

  __device__ __forceinline__ void run() {
    const auto [begin, end] = steps();
    Step before = {0, 0}, now = step(begin), next = step(begin + 1);
    if (threadIdx.x == 0 && begin < end) {
      gpu::make_barrier(&full_[0], 1);
      gpu::make_barrier(&full_[1], 1);
      expect(1, now);
      expect(0, next);
    }
    // Everybody's shared memory is ready.
    gpu::cluster_arrive();
    if (begin < end) this->load_input(now, first_);
    gpu::cluster_wait();
    // h goes into step i by buffer i % 2, that buffer's ((i - 1) / 2)-th transaction.
    for (int64_t i = 0; i < end - begin; ++i) {
      const int buffer = static_cast<int>(i % 2);
      const Step border = direction_ == 1 ? before : now;
      if (i > 0) gpu::wait_for_phase(&full_[buffer], (i - 1) / 2 % 2);
      multiply(before, now, border, buffer);
      __syncthreads();
      // All threads have seen the transaction, and have read the buffer. What the others send there
      // next goes into step i + 2; they do not before they have what this block sends below.
      if (threadIdx.x == 0 && i > 0) expect(buffer, next);
      this->activate(now, next, border, first_, 0,
                     [&](int b, T h) { h_of(1 - buffer, b)[this->unit_] = h; });
      if (begin + i + 1 == end) break;
      this->load_input(next, first_);
      __syncthreads();
      send(1 - buffer, rows(now));
      before = now;
      now = next;
      next = step(begin + i + 2);
    }
    gpu::cluster_arrive();
    gpu::cluster_wait();
  }

 private:
  __device__ Step step(int64_t s) const { return step_at(p_, direction_ == 1, s); }

  // Sequences of the cluster in a step.
  __device__ int rows(Step step) const { return max(0, pass_size(step.active, first_, tile_)); }

  // The steps in which the cluster has any. Sequences leave as time goes on, and join backwards.
  __device__ Range steps() const {
    if (!p_.batch_sizes) return {0, p_.T};
    // The first step in which that changes.
    const bool joins = direction_ == 1;
    int64_t low = 0, high = p_.T;
    while (low < high) {
      const int64_t s = (low + high) / 2;
      if ((rows(step(s)) > 0) == joins)
        high = s;
      else
        low = s + 1;
    }
    return joins ? Range{low, p_.T} : Range{0, low};
  }

  // The transaction that brings the others' h of a step.
  __device__ void expect(int buffer, Step step) {
    gpu::expect_bytes(&full_[buffer],
                      (gpu::cluster_size() - 1) * rows(step) * kClusterUnits * sizeof(T));
  }

  __device__ T* h_of(int buffer, int b) const { return h_ + (buffer * tile_ + b) * pitch_; }

  // Where h of a sequence is that comes to a step with another one than that of the step before:
  // one that begins now has it in h0, and one that was reset in reset_h. Else null.
  __device__ __forceinline__ const T* given_h(Step before, Step border, int sequence) const {
    if (is_reset(p_, border, sequence))
      return static_cast<const T*>(this->dir_.reset_h) + sequence * p_.H;
    return sequence < before.active ? nullptr
                                    : static_cast<const T*>(this->dir_.h0) + sequence * p_.H;
  }

  __device__ __forceinline__ void multiply(Step before, Step now, Step border, int buffer) {
    product_.multiply(
        rows(now),
        [&](int b, int, int k) {
          if (const T* const row = given_h(before, border, first_ + b))
            return load_eight<kAligned>(row + k, static_cast<int>(p_.H) - k);
          Eight<T> eight;
          const uint4* const from = reinterpret_cast<const uint4*>(h_of(buffer, b) + k);
#pragma unroll
          for (int q = 0; q < Eight<T>::kQuads; ++q) eight.set_quad(q, from[q]);
          return eight;
        },
        this->sums_of_warp());
  }

  // The block's slice of h to all others, each warp to some of them.
  __device__ __forceinline__ void send(int buffer, int rows) {
    constexpr int kParts = kClusterUnits / kValues;
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

  const int first_;  // sequence of the cluster
  const int pitch_;
  T* const h_;            // [2, tile, pitch]
  uint64_t* const full_;  // [2]
  const Product<Policy, kClusterUnits, gate_count(kCell), 1, 1, kAligned> product_;
};

// blockIdx: (block of units of a slice of the sequences, direction).
template <class Policy, Cell kCell, bool kAligned>
__global__ void __launch_bounds__(kThreads, 1)
    cluster_forward_kernel(const __grid_constant__ ForwardParams p, int tile) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  RNN_FUSED_DYNAMIC_SHARED(float, shared);
  RNN_FUSED_SHARED(uint64_t, full, [2]);
  const int first = blockIdx.x / gpu::cluster_size() * tile;
  ClusterForward<Policy, kCell, kAligned> block(p, blockIdx.y, first, tile, shared, full);
  block.run();
#else
  __trap();
#endif
}

template <class Policy>
void launch_cluster_forward(const CudaPlan& plan, const ForwardParams& params,
                            cudaStream_t stream) {
  const auto launch = [&](void (*kernel)(ForwardParams, int)) {
    const dim3 grid(static_cast<unsigned>(plan.blocks / params.directions), params.directions);
    gpu::launch_clusters(plan.cluster, kernel, grid, kThreads, plan.shared_bytes, stream, params,
                         plan.batch_tile);
  };
  const auto with_cell = [&](auto cell) {
    if (given_rows_aligned<typename Policy::T>(params))
      launch(cluster_forward_kernel<Policy, cell.value, true>);
    else
      launch(cluster_forward_kernel<Policy, cell.value, false>);
  };
  switch (params.cell) {
    case Cell::lstm: return with_cell(std::integral_constant<Cell, Cell::lstm>());
    case Cell::gru: return with_cell(std::integral_constant<Cell, Cell::gru>());
    case Cell::rnn_tanh:
    case Cell::rnn_relu: return with_cell(std::integral_constant<Cell, Cell::rnn_tanh>());
  }
}

}  // namespace rnn_fused::persistent
