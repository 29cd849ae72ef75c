// The product of the persistent kernels: a block multiplies rows of X, one for each sequence, by
// weights that its registers and its shared memory hold for the whole sequence.
//
//   sums[b][unit][c] = sum over groups q and k < H of X[b][q, k] * W[c][q, k][unit]
//
// Forward: X is h and c the gate, one group. Backward: X is the gradient of the pre-activations,
// with the gates as groups, and one column per unit: the gradient of h.
//
// K is cut into runs of 32. Run j of a group belongs to warp j % kKWarps, as its k-block j /
// kKWarps, and eight consecutive k of a run to a lane: lane 4 * g + t holds, for unit g, those from
// 8 * t on (and for unit g + 8 in a block of 16), and it reads the same eight of X. So a lane reads
// h in words of 16 bytes straight into the operand of mma, without shared memory. For mma this
// permutes k inside a run: what stands in a fragment as k = 2t, 2t + 1, 2t + 8, 2t + 9 of the j-th
// m16n8k16 are the run's 8t + 4j to 8t + 4j + 3. A sum does not mind, as long as both operands are
// permuted alike.
//
// The sequences are the rows of mma, 16 at a time, and the units its columns: then three gates cost
// no more than three, one costs one, and both passes are the same code. With the weights as rows a
// batch of 8 or less would take half as many instructions, which is little beside the way to L2.
#pragma once

#include <algorithm>

#include "csrc/cuda/plan.h"
#include "csrc/cuda/primitives.cuh"

namespace rnn_fused::persistent {

// All bits set: no value that has been computed, which are whole words of memory.
constexpr uint32_t kBlank = 0xffffffff;

// Eight consecutive values of a row, as bits.
template <class T>
struct Eight {
  static constexpr int kWords = 2 * sizeof(T), kQuads = kWords / 4;
  uint32_t words[kWords] = {};

  __device__ __forceinline__ float value(int i) const { return __uint_as_float(words[i]); }

  // kBlank where it has any.
  __device__ __forceinline__ uint32_t largest() const {
    uint32_t all = 0;
#pragma unroll
    for (uint32_t word : words) all = max(all, word);
    return all;
  }

  __device__ __forceinline__ uint4 quad(int q) const {
    return {words[4 * q], words[4 * q + 1], words[4 * q + 2], words[4 * q + 3]};
  }
  __device__ __forceinline__ void set_quad(int q, uint4 quad) {
    words[4 * q] = quad.x;
    words[4 * q + 1] = quad.y;
    words[4 * q + 2] = quad.z;
    words[4 * q + 3] = quad.w;
  }
};

__device__ __forceinline__ uint4 bits_of(float4 v) {
  return {__float_as_uint(v.x), __float_as_uint(v.y), __float_as_uint(v.z), __float_as_uint(v.w)};
}

// Eight values `stride` apart, of which those from `count` on are zero and not read. From L2, since
// another SM may have written them.
template <class T>
__device__ __forceinline__ Eight<T> gather_eight(const T* from, int64_t stride, int count) {
  Eight<T> eight;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (i >= count) break;  // eight predicates would cost more registers
    if constexpr (sizeof(T) == 4)
      eight.words[i] = __ldcg(reinterpret_cast<const uint32_t*>(from) + i * stride);
    else
      eight.words[i / 2] |= uint32_t{__ldcg(reinterpret_cast<const uint16_t*>(from) + i * stride)}
                            << (16 * (i % 2));
  }
  return eight;
}

// Consecutive ones, aligned to 16 bytes.
template <class T>
__device__ __forceinline__ Eight<T> load_aligned(const T* from) {
  Eight<T> eight;
#pragma unroll
  for (int q = 0; q < Eight<T>::kQuads; ++q)
    eight.set_quad(q, gpu::load_relaxed(reinterpret_cast<const uint4*>(from) + q));
  return eight;
}

// Consecutive ones of any row, or of one in a matrix that is aligned.
template <class T>
__device__ __forceinline__ Eight<T> load_eight(bool aligned, const T* from, int count) {
  if (!aligned) return gather_eight(from, 1, count);
  return count > 0 ? load_aligned(from) : Eight<T>();
}

// Whether each row of a matrix [rows, H] begins and ends at a multiple of 16 bytes.
template <class T>
RNN_FUSED_HD bool rows_aligned(const void* first, int64_t stride, int64_t H) {
  return reinterpret_cast<uintptr_t>(first) % 16 == 0 && stride * sizeof(T) % 16 == 0 && H % 8 == 0;
}

// ---------------------------------------------------------------------------------------------
// Policies: how a warp multiplies a tile of kSequences rows of X by its weights of one k-block,
// both prepared
// ---------------------------------------------------------------------------------------------

// Of both kinds of mma: a lane has the sequences g and g + 8, and of the sums the units 2t, 2t + 1.
struct MmaTile {
  static constexpr int kSequences = 16;
  static constexpr int kRows = 2;    // of X that a lane reads
  static constexpr int kOctets = 1;  // that share a call of quads()

  __device__ static int sequence(int lane, int r) { return lane / 4 + 8 * r; }

  // For quads(): the unit whose weights a lane has for the octet.
  __device__ static int unit(int lane, int) { return lane / 4; }

  // Calls put(b, unit, sums) for four units of each sequence of the tile, one to a lane.
  template <class Put>
  __device__ __forceinline__ static void quads(const float (&d)[kOctets][4], Put put) {
    const int lane = threadIdx.x % 32, t = lane % 4;
    // Each of two lanes gives the other's sequence away.
    const bool odd = t % 2;
    const float2 own = odd ? make_float2(d[0][2], d[0][3]) : make_float2(d[0][0], d[0][1]);
    const float2 given = odd ? make_float2(d[0][0], d[0][1]) : make_float2(d[0][2], d[0][3]);
    const float2 got =
        make_float2(__shfl_xor_sync(~0u, given.x, 1), __shfl_xor_sync(~0u, given.y, 1));
    put(sequence(lane, odd), t / 2 * 4,
        odd ? make_float4(got.x, got.y, own.x, own.y) : make_float4(own.x, own.y, got.x, got.y));
  }

  // sums: those of the tile's first sequence. d: of units 8 * octet to 8 * octet + 7. add: to what
  // is there.
  template <int kColumns>
  __device__ static void store(const float (&d)[kColumns][4], int octet, int pitch, float* sums,
                               bool add = false) {
    const int lane = threadIdx.x % 32, unit = 8 * octet + lane % 4 * 2;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float* const row = sums + sequence(lane, r) * pitch;
      if constexpr (kColumns == 1) {
        float2& to = *reinterpret_cast<float2*>(row + unit);
        const float2 own = make_float2(d[0][2 * r], d[0][2 * r + 1]);
        to = add ? make_float2(to.x + own.x, to.y + own.y) : own;
      } else {
#pragma unroll
        for (int u = 0; u < 2; ++u) {
          float4& to = reinterpret_cast<float4*>(row)[unit + u];
          const float4 own = make_float4(d[0][2 * r + u], d[1][2 * r + u], d[2][2 * r + u],
                                         kColumns == 4 ? d[kColumns - 1][2 * r + u] : 0);
          to = add ? make_float4(to.x + own.x, to.y + own.y, to.z + own.z, to.w + own.w) : own;
        }
      }
    }
  }
};

// bfloat16 and float16.
template <class T_>
struct Mma : MmaTile {
  using T = T_;
  static constexpr int kMaxInFlight = 4;  // k-blocks that are on the way from L2 at a time

  __device__ static void prepare(Eight<T>&) {}

  template <int kColumns>
  __device__ __forceinline__ static void multiply(float (&d)[kColumns][4],
                                                  const Eight<T> (&x)[kRows],
                                                  const Eight<T> (&w)[kColumns]) {
#pragma unroll
    for (int j = 0; j < 4; j += 2) {
      const uint32_t a[4] = {x[0].words[j], x[1].words[j], x[0].words[j + 1], x[1].words[j + 1]};
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const uint32_t b[2] = {w[c].words[j], w[c].words[j + 1]};
        gpu::mma_m16n8k16<T>(d[c], a, b);
      }
    }
  }
};

// float32 with both factors rounded to 10 bits of mantissa.
struct Tf32 : MmaTile {
  using T = float;
  static constexpr int kMaxInFlight = 4;

  __device__ static void prepare(Eight<T>& factor) {
#pragma unroll
    for (int i = 0; i < 8; ++i) factor.words[i] = gpu::to_tf32(factor.value(i));
  }

  template <int kColumns>
  __device__ __forceinline__ static void multiply(float (&d)[kColumns][4],
                                                  const Eight<T> (&x)[kRows],
                                                  const Eight<T> (&w)[kColumns]) {
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      const uint32_t a[4] = {x[0].words[j], x[1].words[j], x[0].words[j + 1], x[1].words[j + 1]};
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const uint32_t b[2] = {w[c].words[j], w[c].words[j + 1]};
        gpu::mma_m16n8k8_tf32(d[c], a, b);
      }
    }
  }
};

// float32 without rounding. A lane multiplies its k of four sequences, and the four lanes of a unit
// then add up: each gets one sequence.
struct Ffma {
  using T = float;
  static constexpr int kSequences = 4;
  static constexpr int kRows = 4;
  static constexpr int kOctets = 4;
  static constexpr int kMaxInFlight = 2;

  __device__ static int sequence(int, int r) { return r; }
  __device__ static void prepare(Eight<T>&) {}

  template <int kColumns>
  __device__ __forceinline__ static void multiply(float (&d)[kColumns][4],
                                                  const Eight<T> (&x)[kRows],
                                                  const Eight<T> (&w)[kColumns]) {
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int c = 0; c < kColumns; ++c)
#pragma unroll
        for (int b = 0; b < 4; ++b) d[c][b] += x[b].value(i) * w[c].value(i);
  }

  // The four lanes' sum of the sequence of this one.
  __device__ __forceinline__ static float add_lanes(const float (&d)[4]) {
    // Each half of the four lanes gives the other's sequences away.
    const int t = threadIdx.x % 4;
    const bool high = t >= 2, odd = t % 2;
    const float first = (high ? d[2] : d[0]) + __shfl_xor_sync(~0u, high ? d[0] : d[2], 2);
    const float second = (high ? d[3] : d[1]) + __shfl_xor_sync(~0u, high ? d[1] : d[3], 2);
    return (odd ? second : first) + __shfl_xor_sync(~0u, odd ? first : second, 1);
  }

  template <int kColumns>
  __device__ static void store(const float (&d)[kColumns][4], int octet, int pitch, float* sums) {
    const int lane = threadIdx.x % 32, unit = 8 * octet + lane / 4, t = lane % 4;
    float total[4] = {};
#pragma unroll
    for (int c = 0; c < kColumns; ++c) total[c] = add_lanes(d[c]);
    float* const row = sums + t * pitch;
    if constexpr (kColumns == 1)
      row[unit] = total[0];
    else
      reinterpret_cast<float4*>(row)[unit] = make_float4(total[0], total[1], total[2], total[3]);
  }

  // As those of MmaTile.
  __device__ static int unit(int lane, int octet) { return lane / 4 * 4 + octet; }
  template <class Put>
  __device__ __forceinline__ static void quads(const float (&d)[kOctets][4], Put put) {
    const int lane = threadIdx.x % 32;
    put(lane % 4, lane / 4 * 4,
        make_float4(add_lanes(d[0]), add_lanes(d[1]), add_lanes(d[2]), add_lanes(d[3])));
  }
};

// ---------------------------------------------------------------------------------------------
// One warp's part of the product
// ---------------------------------------------------------------------------------------------

// The largest divisor of n up to limit.
constexpr int largest_divisor(int n, int limit) {
  while (n % limit != 0) --limit;
  return limit;
}

// Item i is k-block i / kGroups of group i % kGroups. kKWarps: the warps that divide K among them;
// the others divide it again, for other units: where X is in shared memory, and so near.
template <class Policy, int kUnits, int kColumns, int kGroups, int kBlocks, int kKWarps = kWarps>
class Product {
  using T = typename Policy::T;
  static constexpr int kOwnUnits = kUnits * kKWarps / kWarps;  // of a warp
  static constexpr int kOctets = kOwnUnits / 8;
  static constexpr int kPitch = sum_pitch(kColumns, kUnits);
  static constexpr int kItems = kGroups * kBlocks;  // of a tile
  static constexpr int kInRegisters =
      kGroups * register_blocks(sizeof(T), kColumns* kGroups, kOwnUnits, kBlocks);

  // What a thread's registers hold besides addresses and the gates' own: weights, operands that are
  // on the way from L2 and sums of the tiles that go together, where one tile has fewer k-blocks
  // than should be on the way. Most that compiles without a spill.
  static constexpr bool kMany = kOctets > 2 && sizeof(T) == 4;  // of weights from shared memory
  static constexpr int kRegisters = kOctets == 1 ? 144 : kMany ? 120 : 160;
  static constexpr int kWeights = kInRegisters * kOctets * kColumns * Eight<T>::kWords;
  static constexpr int kOperand = Policy::kRows * Eight<T>::kWords;
  static constexpr int kMaxInFlight = kKWarps == kWarps ? Policy::kMaxInFlight : 2;
  static constexpr int kInFlight =
      std::clamp((kRegisters - kWeights - 4 * kOctets * kColumns) / kOperand, 1, kMaxInFlight);
  static constexpr int kTiles =
      kOctets > 1 ? 1 : std::max(1, std::min(kInFlight / kItems, 8 / kColumns));
  static constexpr int kStepItems = kTiles * kItems;
  static constexpr int kOperands = largest_divisor(kStepItems, kInFlight);

  using Weights = Eight<T>[kOctets][kColumns];

 public:
  // shared: the bytes that the plan has for weights, aligned to 16.
  // eight(column, group, unit, k): the weights [k, k + 8) of the block's hidden unit.
  template <class Load>
  __device__ __forceinline__ Product(int H, float* shared, Load eight)
      : H_(H), shared_(reinterpret_cast<uint4*>(shared)) {
    const auto load = [&](int i, Weights& weights) {
#pragma unroll
      for (int octet = 0; octet < kOctets; ++octet)
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          const int unit = 8 * (first_octet() + octet) + static_cast<int>(threadIdx.x) % 32 / 4;
          weights[octet][c] = eight(c, i % kGroups, unit, own_k(i));
          Policy::prepare(weights[octet][c]);
        }
    };
#pragma unroll
    for (int i = 0; i < kInRegisters; ++i) load(i, weights_[i]);
    // Only those that the plan counts: K may end before.
#pragma unroll 1
    for (int i = kInRegisters; i < kItems && i / kGroups * kKWarps * kRun < H; ++i) {
      Weights weights;
      load(i, weights);
#pragma unroll
      for (int octet = 0; octet < kOctets; ++octet)
#pragma unroll
        for (int c = 0; c < kColumns; ++c)
#pragma unroll
          for (int q = 0; q < Eight<T>::kQuads; ++q)
            *in_shared(i, octet, c, q) = weights[octet][c].quad(q);
    }
  }

  // read(b, group, k): the Eight<T> that X has from [group, k] on for sequence b < count.
  // sums: [kKWarps, tile, kPitch]; what a warp writes begins at its first sequence, and ends at
  // `count` rounded up to kSequences. polls: what is blank is on the way, and so read again.
  template <class Read>
  __device__ __forceinline__ void multiply(int count, Read read, int tile, float* sums,
                                           bool polls = false) const {
    constexpr int kStep = kTiles * Policy::kSequences;
    sums += warp() % kKWarps * tile * kPitch;
    const int lane = threadIdx.x % 32;
    if (polls) await_some(count, read);
    Eight<T> x[kOperands][Policy::kRows];
    // The round before `low` only reads, so that the code of a read stands here once.
    int low = 0;
    for (int first = -kStep; first < count; first += kStep) {
      uint32_t largest = 0;
      float d[kTiles][kOctets][kColumns][4] = {};
#pragma unroll
      for (int i = 0; i < kStepItems; ++i) {
        auto& operand = x[i % kOperands];
        if (first >= low && first + i / kItems * Policy::kSequences < count &&
            run(i % kItems) < H_) {
          if (polls)
#pragma unroll
            for (int r = 0; r < Policy::kRows; ++r) largest = max(largest, operand[r].largest());
          add(d[i / kItems], operand, i % kItems);
        }
        // What has been multiplied makes room for what comes kOperands later.
        const int next = (i + kOperands) % kStepItems, item = next % kItems;
        const int next_first = first + (i + kOperands < kStepItems ? 0 : kStep);
        if (next_first < low || next_first >= count || run(item) >= H_) continue;
#pragma unroll
        for (int r = 0; r < Policy::kRows; ++r) {
          const int b = next_first + next / kItems * Policy::kSequences + Policy::sequence(lane, r);
          if (b < count)  // else whatever is there: its sums are not read
            operand[r] = read(b, item % kGroups, own_k(item));
        }
      }
      if (first < low) continue;
      // Products of what is blank are worth nothing.
      if (polls && __any_sync(~0u, largest == kBlank)) {
        gpu::spin_pause();
        low = first;
        first -= 2 * kStep;
        continue;
      }
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        const int b = first + i * Policy::kSequences;
#pragma unroll
        for (int octet = 0; octet < kOctets; ++octet)
          if (b < count)
            Policy::store(d[i][octet], first_octet() + octet, kPitch, sums + b * kPitch);
      }
    }
  }

 private:
  __device__ static int warp() { return static_cast<int>(threadIdx.x) / 32; }
  __device__ static int first_octet() { return warp() / kKWarps * kOctets; }

  // Waits for values of one sequence from each block that the warp hears from. A block sends all
  // sequences of a pass at once, so the others are likely to be there then. Until then 16 bytes a
  // lane are read again and again, or 32, instead of whole tiles by all SMs.
  template <class Read>
  __device__ __forceinline__ void await_some(int count, Read read) const {
    const int item = static_cast<int>(threadIdx.x) % 32 / 4 % kBlocks * kGroups;
    for (;;) {
      uint32_t largest = 0;
      if (run(item) < H_) largest = read(count - 1, 0, own_k(item)).largest();
      if (!__any_sync(~0u, largest == kBlank)) break;
      gpu::spin_pause();
    }
  }

  // Where the run of an item begins in its group.
  __device__ static int run(int item) {
    return (item / kGroups * kKWarps + warp() % kKWarps) * kRun;
  }
  __device__ static int own_k(int item) {
    return run(item) + static_cast<int>(threadIdx.x) % 4 * 8;
  }

  // Where the thread keeps weights beyond those in registers: 16 bytes beside its neighbour's, free
  // of bank conflicts. No other thread reads them, so they need no barrier.
  __device__ uint4* in_shared(int item, int octet, int column, int quad) const {
    const int octets = (item - kInRegisters) * kOctets + octet;
    const int quads = (octets * kColumns + column) * Eight<T>::kQuads + quad;
    return shared_ + quads * kThreads + threadIdx.x;
  }

  // d += x times an item's weights.
  __device__ __forceinline__ void add(float (&d)[kOctets][kColumns][4],
                                      Eight<T> (&x)[Policy::kRows], int item) const {
#pragma unroll
    for (int r = 0; r < Policy::kRows; ++r) Policy::prepare(x[r]);
#pragma unroll
    for (int octet = 0; octet < kOctets; ++octet) {
      if (item < kInRegisters) {
        Policy::multiply(d[octet], x, weights_[item][octet]);
      } else {
        Eight<T> weights[kColumns];
#pragma unroll
        for (int c = 0; c < kColumns; ++c)
#pragma unroll
          for (int q = 0; q < Eight<T>::kQuads; ++q)
            weights[c].set_quad(q, *in_shared(item, octet, c, q));
        Policy::multiply(d[octet], x, weights);
      }
    }
  }

  const int H_;
  uint4* const shared_;
  Weights weights_[kInRegisters];
};

// What all warps have summed for one unit of one sequence of the pass; always in the same order.
// sums: [kSumWarps, tile, pitch]
template <int kSumWarps, int kColumns>
__device__ __forceinline__ void add_sums(const float* sums, int tile, int pitch, int b, int unit,
                                         float (&total)[kColumns]) {
#pragma unroll
  for (int warp = 0; warp < kSumWarps; ++warp) {
    const float* const row = sums + (warp * tile + b) * pitch;
    if constexpr (kColumns == 1) {
      total[0] += row[unit];
    } else {
      const float4 v = reinterpret_cast<const float4*>(row)[unit];
      total[0] += v.x;
      total[1] += v.y;
      total[2] += v.z;
      if constexpr (kColumns == 4) total[3] += v.w;
    }
  }
}

}  // namespace rnn_fused::persistent
