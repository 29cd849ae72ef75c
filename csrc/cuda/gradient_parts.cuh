// dh in parts: each block of a cluster multiplies some of K for the units of all of them, and sends
// what it has to the blocks that own the units, which add up the parts of all, always in the same
// order.
#pragma once

#include "csrc/cuda/persistent_block.cuh"
#include "csrc/cuda/persistent_product.cuh"

namespace rnn_fused::persistent {

// Parts go into two buffers in turns, each with a transaction for every turn. kBlocks: of the
// cluster; 0 where only the launch knows.
template <int kUnits, int kBlocks>
class GradientParts {
 public:
  // shared: 2 * blocks * tile * kUnits floats. full: [2] mbarriers.
  __device__ GradientParts(int tile, float* shared, uint64_t* full)
      : tile_(tile), parts_(shared), full_(full) {}

  __device__ float* behind() const { return part(2, 0, 0); }

  // By one thread, before a barrier of the cluster.
  __device__ void begin() const {
    gpu::make_barrier(&full_[0], 1);
    gpu::make_barrier(&full_[1], 1);
  }

  // By one thread: so many sequences will come from all blocks, this one too.
  __device__ void expect(int buffer, int sequences) const {
    gpu::expect_bytes(&full_[buffer], blocks() * sequences * kUnits * sizeof(float));
  }

  // Four units of the cluster's, of one sequence.
  __device__ __forceinline__ void send(int buffer, int sequence, int unit, float4 sums) const {
    const int to = unit / kUnits;
    const float* const here = part(buffer, gpu::cluster_rank(), sequence) + unit % kUnits;
    gpu::store_async(gpu::shared_of(here, to), bits_of(sums), gpu::shared_of(&full_[buffer], to));
  }

  // turn: of the buffer, from 0 on.
  __device__ void wait(int buffer, uint32_t turn) const {
    gpu::wait_for_phase(&full_[buffer], turn % 2);
  }

  // Of the thread's own unit.
  __device__ __forceinline__ float sum(int buffer, int sequence) const {
    float sum = 0;
#pragma unroll 4
    for (int from = 0; from < blocks(); ++from)
      sum += part(buffer, from, sequence)[Own<kUnits>::unit()];
    return sum;
  }

 private:
  __device__ static int blocks() {
    return kBlocks > 0 ? kBlocks : static_cast<int>(gpu::cluster_size());
  }
  __device__ float* part(int buffer, int from, int sequence) const {
    return parts_ + ((buffer * blocks() + from) * tile_ + sequence) * kUnits;
  }

  const int tile_;
  float* const parts_;    // [2, blocks, tile, kUnits]
  uint64_t* const full_;  // [2]
};

}  // namespace rnn_fused::persistent
