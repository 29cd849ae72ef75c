// The product of large blocks, whose weights are more than an SM holds: the same sums as in
// persistent_product.cuh, K cut and permuted in the same way. Nothing stays in registers but the
// sums, of as many sequences as they have room for, so that every weight comes by once for all of
// these. Weights are in shared memory, and those that it has no room for in a part of the workspace
// that a step reads again: in the order in which they are used, 16 bytes of a thread beside its
// neighbour's, whatever the caller's matrix is like.
//
// The thread that writes weights there is the only one that reads them. It finds those in shared
// memory and the others in turns, evenly, so that L2 is asked for the latter all the time that the
// product takes; they are on the way while the octets before them are multiplied.
#pragma once

#include "csrc/cuda/persistent_product.cuh"

namespace rnn_fused::persistent {

template <class Policy, int kColumns, int kGroups>
class StreamedProduct {
  using T = typename Policy::T;
  static constexpr int kOctets = kLargeUnits / 8;
  static constexpr int kPitch = sum_pitch(kColumns, kLargeUnits);
  static constexpr int kSums = sum_warps(kAnyBlocks);
  // As registers allow: octets whose weights are on the way, and whether X of the next item is
  // while this one's is multiplied.
  static constexpr int kTiles = large_tiles(kColumns, sizeof(T));
  static constexpr int kAhead = kColumns * sizeof(T) <= 4 ? kOctets - 1 : 1;
  static constexpr bool kReadsAhead = kColumns < 4;
  static_assert(kAhead < kOctets);

  static constexpr int kQuads = kColumns * Eight<T>::kQuads;  // that a thread has of an octet

  using Weights = Eight<T>[kColumns];
  using Operand = Eight<T>[Policy::kRows];  // of a tile

 public:
  // shared: [shared_octets, columns, quads, kThreads]. memory: the same of the other octets, for
  // all blocks of the launch, aligned to 16. eight(column, group, unit, k): the weights [k, k + 8)
  // of the block's hidden unit.
  template <class Load>
  __device__ __forceinline__ StreamedProduct(int H, float* shared, int shared_octets, void* memory,
                                             Load eight)
      : H_(H), shared_octets_(shared_octets), shared_(reinterpret_cast<uint4*>(shared)) {
    const int64_t block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    streamed_ =
        static_cast<uint4*>(memory) + block * (octets() - shared_octets) * kQuads * kThreads;
    Walk walk(*this);
#pragma unroll 1
    for (int item = 0; item < items(); ++item)
#pragma unroll 1
      for (int octet = 0; octet < kOctets; ++octet) {
        Weights weights;
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          const int unit = 8 * octet + static_cast<int>(threadIdx.x) % 32 / 4;
          weights[c] = eight(c, item % kGroups, unit, own_k(item));
          Policy::prepare(weights[c]);
        }
        walk.store(weights);
      }
  }

  // As Product's, but it leaves the sums of sum_warps(kAnyBlocks), and never polls. By all threads.
  template <class Read>
  __device__ __forceinline__ void multiply(int count, Read read, int tile, float* sums,
                                           bool = false) const {
    constexpr int kStep = kTiles * Policy::kSequences;
    sums += warp() % kSums * tile * kPitch;
    for (int first = 0; first < count; first += kStep) {
      float d[kTiles][kOctets][kColumns][4] = {};
      multiply_tiles(first, count, read, d);
      const auto leave = [&](bool add) {
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
          const int b = first + i * Policy::kSequences;
#pragma unroll
          for (int octet = 0; octet < kOctets; ++octet)
            if (b < count) Policy::store(d[i][octet], octet, kPitch, sums + b * kPitch, add);
        }
      };
      if (warp() < kSums) leave(false);
      __syncthreads();
      if (warp() >= kSums) leave(true);
    }
  }

 private:
  // Through the weights of a thread, octet by octet.
  class Walk {
   public:
    __device__ explicit Walk(const StreamedProduct& p)
        : p_(p),
          octets_(p.octets()),
          shared_(p.shared_ + threadIdx.x),
          streamed_(p.streamed_ + threadIdx.x) {}

    __device__ __forceinline__ void load(Weights& weights) {
      const bool in_shared = step();
#pragma unroll
      for (int q = 0; q < kQuads; ++q)
        weights[q / Eight<T>::kQuads].set_quad(
            q % Eight<T>::kQuads,
            in_shared ? shared_[q * kThreads] : __ldcg(streamed_ + q * kThreads));
      advance(in_shared);
    }

    __device__ __forceinline__ void store(const Weights& weights) {
      const bool in_shared = step();
      uint4* const to = in_shared ? shared_ : streamed_;
#pragma unroll
      for (int q = 0; q < kQuads; ++q)
        to[q * kThreads] = weights[q / Eight<T>::kQuads].quad(q % Eight<T>::kQuads);
      advance(in_shared);
    }

   private:
    // Whether the next octet is in shared memory.
    __device__ bool step() {
      turn_ += p_.shared_octets_;
      return turn_ >= octets_;
    }
    __device__ void advance(bool in_shared) {
      if (in_shared) {
        turn_ -= octets_;
        shared_ += kQuads * kThreads;
      } else {
        streamed_ += kQuads * kThreads;
      }
    }

    const StreamedProduct& p_;
    const int octets_;
    uint4 *shared_, *streamed_;
    int turn_ = 0;
  };

  template <class Read>
  __device__ __forceinline__ void multiply_tiles(int first, int count, Read read,
                                                 float (&d)[kTiles][kOctets][kColumns][4]) const {
    const int items = this->items(), lane = threadIdx.x % 32;
    const auto load = [&](int item, int tile, Operand& x) {
#pragma unroll
      for (int r = 0; r < Policy::kRows; ++r) {
        const int b = first + tile * Policy::kSequences + Policy::sequence(lane, r);
        if (b < count)  // else whatever is there: its sums are not read
          x[r] = read(b, item % kGroups, own_k(item));
      }
    };
    if (items == 0) return;
    Walk walk(*this);
    Weights weights[kOctets];
    Operand x[kTiles], next[kTiles];
#pragma unroll
    for (int i = 0; i < kTiles; ++i) load(0, i, x[i]);
#pragma unroll
    for (int octet = 0; octet < kAhead; ++octet) walk.load(weights[octet]);
#pragma unroll 1
    for (int item = 0; item < items; ++item) {
      const bool last = item + 1 == items;
      if (kReadsAhead && !last)
#pragma unroll
        for (int i = 0; i < kTiles; ++i) load(item + 1, i, next[i]);
#pragma unroll
      for (int i = 0; i < kTiles; ++i)
#pragma unroll
        for (int r = 0; r < Policy::kRows; ++r) Policy::prepare(x[i][r]);
#pragma unroll
      for (int octet = 0; octet < kOctets; ++octet) {
        if (octet + kAhead < kOctets || !last) walk.load(weights[(octet + kAhead) % kOctets]);
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
          if (i == 0 || first + i * Policy::kSequences < count)
            Policy::multiply(d[i][octet], x[i], weights[octet]);
          if (octet + 1 < kOctets) continue;
          if constexpr (kReadsAhead) {
#pragma unroll
            for (int r = 0; r < Policy::kRows; ++r) x[i][r] = next[i][r];
          } else if (!last) {
            load(item + 1, i, x[i]);
          }
        }
      }
    }
  }

  // Of a block; some warps have fewer.
  __device__ int octets() const { return large_octets(H_, kGroups); }
  __device__ static int warp() { return static_cast<int>(threadIdx.x) / 32; }
  // Of the warp. Item i is k-block i / kGroups of group i % kGroups.
  __device__ int items() const {
    return ((H_ + kRun - 1) / kRun - warp() + kWarps - 1) / kWarps * kGroups;
  }
  __device__ static int own_k(int item) {
    return (item / kGroups * kWarps + warp()) * kRun + static_cast<int>(threadIdx.x) % 4 * 8;
  }

  const int H_, shared_octets_;
  uint4* const shared_;
  uint4* streamed_;  // of the block
};

// Whether a policy has large blocks: exact float32 sums take too many registers.
template <class Policy>
constexpr bool kHasLargeBlocks = std::is_base_of_v<MmaTile, Policy>;

// The product of a block of the persistent kernels.
template <class Policy, int kBlocks, int kColumns, int kGroups>
using BlockProduct =
    std::conditional_t<kBlocks == kAnyBlocks, StreamedProduct<Policy, kColumns, kGroups>,
                       Product<Policy, units_of(kBlocks), kColumns, kGroups, kBlocks>>;

// As the constructors of both.
template <class BlockProduct, class Load>
__device__ __forceinline__ BlockProduct make_product(int H, float* shared, int shared_octets,
                                                     void* memory, Load eight) {
  if constexpr (std::is_constructible_v<BlockProduct, int, float*, int, void*, Load>)
    return BlockProduct(H, shared, shared_octets, memory, eight);
  else
    return BlockProduct(H, shared, eight);
}

}  // namespace rnn_fused::persistent
