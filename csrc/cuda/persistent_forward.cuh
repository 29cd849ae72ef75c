// The forward pass of all timesteps, or of a window of them, in one launch.
//
// Each block owns hidden units of one direction. Their rows of W_hh stay in registers, and in
// shared memory what registers have no room for, as does c (large blocks: streamed_product.cuh); h
// goes from block to block through device memory (L2), with one barrier a step of the blocks of a
// direction and slice of the batch, or by hand-off (exchange.cuh).
//
// What a step costs: every SM reads all of h from L2, B * H * 2 bytes at 64 bytes a clock (B = 32,
// H = 1024: 64 KiB, 0.6 us at 1.75 GHz; 1.5 us if L2 gives 128 SMs no more than 3100), and h
// crosses L2 three times (stored, announced, read), about 1.3 us. The products take less: B * H *
// 32 * 2 flops of an SM, 0.2 us. So W_ih x is read before others are waited for, and reads of h
// are on the way while others are multiplied.
#pragma once

#include "csrc/core/cells.h"
#include "csrc/core/params.h"
#include "csrc/cuda/exchange.cuh"
#include "csrc/cuda/math.cuh"
#include "csrc/cuda/persistent.h"
#include "csrc/cuda/persistent_block.cuh"
#include "csrc/cuda/streamed_product.cuh"

namespace rnn_fused::persistent {

// Some hidden units of one direction, and what a step does with them besides the product: the
// threads of a block own them and a tile of sequences. kCell: rnn_tanh stands for both RNNs.
// kSumWarps: whose sums of the product are in shared memory. kOwned: sequences of a thread.
template <class Policy, Cell kCell, int kUnits, int kSumWarps, int kOwned = kOwn>
class ForwardUnits {
 protected:
  using T = typename Policy::T;
  using Owned = Own<kUnits, kOwned>;
  static constexpr int G = gate_count(kCell), S = saved_count(kCell);
  static constexpr int kPitch = sum_pitch(G, kUnits);
  static constexpr bool kLstm = kCell == Cell::lstm;
  static constexpr bool kGru = kCell == Cell::gru;

  // block: of the direction's units. shared: sums, biases and the state, which comes last.
  __device__ __forceinline__ ForwardUnits(const ForwardParams& p, int direction, Slice slice,
                                          int block, int tile, float* shared)
      : p_(p),
        direction_(direction),
        dir_(p.direction[direction]),
        slice_(slice),
        tile_(tile),
        first_unit_(block * kUnits),
        unit_(first_unit_ + Owned::unit()),
        sums_(shared),
        bias_(shared + kSumWarps * tile * kPitch),
        state_(bias_ + S * kUnits) {
    if (owns() && threadIdx.x < kUnits) add_biases();
  }

  // Behind the state of so many sequences.
  __device__ __forceinline__ float* behind_state(int64_t sequences) const {
    return state_ + state_count(kCell, false) * sequences * kUnits;
  }

  // The weights [k, k + 8) of one of the block's units.
  __device__ __forceinline__ Eight<T> load_weights(int gate, int of_block, int k) const {
    const int unit = first_unit_ + of_block;
    const T* const weights = static_cast<const T*>(dir_.weight_hh);
    if (unit >= p_.H) return Eight<T>();
    return load_eight(rows_aligned<T>(weights, p_.H, p_.H),
                      weights + (gate * p_.H + unit) * p_.H + k, static_cast<int>(p_.H) - k);
  }

  // c, or h of a GRU.
  __device__ __forceinline__ void begin_state() {
    if constexpr (kLstm || kGru)
      Owned::for_all_sequences(owns() ? slice_.size() : 0, tile_, [&](int b) {
        state_[b * kUnits + Owned::unit()] =
            kLstm && dir_.steps_before > 0 ? static_cast<const float*>(dir_.carried_c)[given(b)]
                                           : value_or_zero<T>(kLstm ? dir_.c0 : dir_.h0, given(b));
      });
  }

  // c behind the window's last step, for the next window.
  __device__ __forceinline__ void end_state() const {
    if constexpr (kLstm)
      Owned::for_all_sequences(
          owns() && dir_.steps_after > 0 ? slice_.size() : 0, tile_, [&](int b) {
            static_cast<float*>(dir_.carried_c)[given(b)] = state_[b * kUnits + Owned::unit()];
          });
  }

  // Of the thread's unit in a state [B, H] that the caller gave, or wants.
  __device__ int64_t given(int sequence) const {
    return int64_t{slice_.begin() + sequence} * p_.H + unit_;
  }

  __device__ bool owns() const { return unit_ < p_.H; }
  // Of the pass whose input was loaded last.
  __device__ bool was_reset(int b) const { return resets_ >> b & 1; }

  // What one pass needs of memory: W_ih x of the thread's sequences, and which are reset.
  __device__ __forceinline__ void load_input(Step step, Step before, int first) {
    const Step border = p_.reverse(direction_) ? before : step;
    resets_ = reset_sequences<kUnits>(p_, border, first, pass_size(step.active, first, tile_));
    Owned::for_sequences(owns() ? pass_size(step.active, first, tile_) : 0, [&](int i, int b) {
      const T* const row = gates(step.row + first + b);
#pragma unroll
      for (int gate = 0; gate < G; ++gate) x_[i].load(gate, row + gate * p_.H);
    });
  }

  // The gates of the pass that begins with `first`. put(b, h): what else becomes of h.
  template <class Put>
  __device__ __forceinline__ void activate(Step now, Step next, int first, Put put) {
    Owned::for_sequences(owns() ? pass_size(now.active, first, tile_) : 0, [&](int i, int b) {
      const int sequence = first + b;
      const int64_t row = now.row + sequence;
      float* const state = state_ + sequence * kUnits + Owned::unit();
      if ((kLstm || kGru) && was_reset(b))
        *state = value_or_zero<T>(kLstm ? dir_.reset_c : dir_.reset_h, given(sequence));
      float sums[G] = {};
      add_sums<kSumWarps>(sums_, tile_, kPitch, b, Owned::unit(), sums);
      float h;
      if constexpr (kLstm) {
        LstmGates<float> a = {x_[i][0] + bias(0) + sums[0], x_[i][1] + bias(1) + sums[1],
                              x_[i][2] + bias(2) + sums[2], x_[i][3] + bias(3) + sums[3]};
        lstm_activate<gpu::Math>(a, p_.options.f32);
        const LstmState<float> after = lstm_forward<gpu::Math>(a, *state, p_.options.f32);
        h = after.h;
        *state = after.c;
        if (p_.save_gates) save(row, a.i, a.f, a.g, a.o);
        if (dir_.cells) static_cast<float*>(dir_.cells)[row * p_.H + unit_] = after.c;
        if (sequence >= next.active)
          static_cast<T*>(dir_.c_n)[given(sequence)] = static_cast<T>(after.c);
      } else if constexpr (kGru) {
        GruGates<float> a = {x_[i][0] + bias(0) + sums[0], x_[i][1] + bias(1) + sums[1],
                             x_[i][2] + bias(2), sums[2] + bias(3)};
        gru_activate<gpu::Math>(a, p_.options.f32);
        h = gru_forward(a, *state);
        *state = static_cast<float>(static_cast<T>(h));
        if (p_.save_gates) save(row, a.r, a.z, a.n, a.hn);
      } else {
        const float a = x_[i][0] + bias(0) + sums[0];
        h = p_.cell == Cell::rnn_tanh ? gpu::Math::tanh(a) : gpu::Math::relu(a);
      }
      static_cast<T*>(dir_.output)[row * p_.output_stride + unit_] = static_cast<T>(h);
      put(b, static_cast<T>(h));
      // The sequence's last step.
      if (sequence >= next.active) static_cast<T*>(dir_.h_n)[given(sequence)] = static_cast<T>(h);
    });
  }

 private:
  // Both biases of a gate act together, but for those of the GRU's n, which its reset gate parts.
  __device__ __forceinline__ void add_biases() {
#pragma unroll
    for (int gate = 0; gate < G; ++gate) {
      const int64_t row = gate * p_.H + unit_;
      const float input = value_or_zero<T>(dir_.bias_ih, row);
      const float recurrent = value_or_zero<T>(dir_.bias_hh, row);
      const bool apart = kGru && gate == 2;
      bias_[gate * kUnits + Owned::unit()] = apart ? input : input + recurrent;
      if (apart) bias_[3 * kUnits + Owned::unit()] = recurrent;
    }
  }

  __device__ float bias(int gate) const { return bias_[gate * kUnits + Owned::unit()]; }

  __device__ T* gates(int64_t row) const {
    return static_cast<T*>(dir_.gates) + (row - dir_.first_row) * p_.gates_stride + unit_;
  }

  __device__ void save(int64_t row, float g0, float g1, float g2, float g3) {
    T* const to = gates(row);
    to[0] = static_cast<T>(g0);
    to[p_.H] = static_cast<T>(g1);
    to[2 * p_.H] = static_cast<T>(g2);
    to[3 * p_.H] = static_cast<T>(g3);
  }

 protected:
  const ForwardParams& p_;
  const int direction_;
  const ForwardDirection& dir_;
  const Slice slice_;
  const int tile_;
  const int first_unit_;  // of the block
  const int unit_;        // the thread's own
  float* const sums_;     // [kSumWarps, tile, kPitch]

 private:
  float* const bias_;   // [S, kUnits]
  float* const state_;  // [sequences, kUnits] c, or h of a GRU
  Loaded<T, G> x_[kOwned];
  SequenceBits<kUnits> resets_ = 0;
};

template <class Policy, Cell kCell, int kBlocks>
using ExchangedForwardUnits =
    ForwardUnits<Policy, kCell, units_of(kBlocks), sum_warps(kBlocks),
                 own_sequences(kBlocks, gate_count(kCell), sizeof(typename Policy::T))>;

template <class Policy, Cell kCell, int kBlocks>
class Forward : ExchangedForwardUnits<Policy, kCell, kBlocks> {
  using Units = ExchangedForwardUnits<Policy, kCell, kBlocks>;
  using BlockProduct = persistent::BlockProduct<Policy, kBlocks, gate_count(kCell), 1>;
  using typename Units::Owned;
  using typename Units::T;
  using Units::dir_;
  using Units::direction_;
  using Units::p_;
  using Units::slice_;
  using Units::tile_;

 public:
  // shared: [plan.shared_bytes]
  __device__ __forceinline__ Forward(const ForwardParams& p, const Launch& launch, float* shared)
      : Units(p, launch.direction(), launch.slice_of(p), blockIdx.x, launch.batch_tile, shared),
        exchange_(p, launch, launch.handoff, this->first_unit_,
                  reinterpret_cast<T*>(this->behind_state(slice_.size()))),
        product_(make_product<BlockProduct>(
            static_cast<int>(p.H), exchange_.behind_staged(), launch.shared_octets,
            exchange_.behind_slots(),
            [&](int gate, int, int unit, int k) { return this->load_weights(gate, unit, k); })) {
    this->begin_state();
    publish_state(kInitialSlot, dir_.h0);
    if (p.resets) publish_state(kResetSlot, dir_.reset_h);
  }

  __device__ __forceinline__ void run(gpu::GridBarrier barrier) {
    const bool down = p_.reverse(direction_);
    const int64_t begin = dir_.steps_before;
    const auto end = [&] { return p_.T - dir_.steps_after; };  // no register has room for it
    Step before = {0, 0}, now = slice_.step_at(down, begin);
    barrier.arrive();
    this->load_input(now, before, 0);
    barrier.wait();
    for (int64_t s = begin; s < end(); ++s) {
      const Step next = s + 1 < end() ? slice_.step_at(down, s + 1) : Step{0, 0};
      for (int first = 0; first < now.active; first += tile_) {
        if (first > 0) this->load_input(now, before, first);
        multiply(s, before, now, first);
        __syncthreads();
        this->activate(now, next, first, [&](int b, T h) { exchange_.stage(b, 0, h); });
        __syncthreads();  // and the sums have been read
        exchange_.publish(exchange_.slot_of(s), first, pass_size(now.active, first, tile_));
      }
      if (s + 1 == end()) break;
      exchange_.announce(s, barrier);
      this->load_input(next, now, 0);
      exchange_.await(s, barrier);
      before = now;
      now = next;
    }
    this->end_state();
  }

 private:
  // The block's units of a state that is given, for all blocks.
  __device__ __forceinline__ void publish_state(int slot, const void* state) {
    for (int first = 0; first < slice_.size(); first += tile_) {
      const int count = pass_size(slice_.size(), first, tile_);
      Owned::for_sequences(this->owns() ? count : 0, [&](int, int b) {
        exchange_.stage(b, 0, static_cast<const T*>(state)[this->given(first + b)]);
      });
      __syncthreads();
      exchange_.publish(slot, first, count);
      __syncthreads();
    }
  }

  // W_hh h of one pass: of the h that a sequence left in the step before, of h0 where it begins
  // now, of reset_h where it was reset.
  __device__ __forceinline__ void multiply(int64_t s, Step before, Step now, int first) {
    const int slot_before = exchange_.slot_of(s - 1);
    product_.multiply(
        pass_size(now.active, first, tile_),
        [&](int b, int, int k) {
          const int sequence = first + b;
          const int slot = this->was_reset(b)         ? kResetSlot
                           : sequence < before.active ? slot_before
                                                      : kInitialSlot;
          return exchange_.load(slot, sequence, 0, k);
        },
        tile_, this->sums_, exchange_.handoff());
  }

  const Exchange<T, 1, units_of(kBlocks), kGivenSlots> exchange_;
  const BlockProduct product_;
};

// blockIdx: (block of units, direction behind the first, slice).
template <class Policy, Cell kCell, int kBlocks>
__global__ void __launch_bounds__(kThreads, blocks_per_sm(sizeof(typename Policy::T), kBlocks))
    forward_kernel(const __grid_constant__ ForwardParams p, const __grid_constant__ Launch launch) {
  RNN_FUSED_DYNAMIC_SHARED(float, shared);
  Forward<Policy, kCell, kBlocks> block(p, launch, shared);
  block.run(barrier_of(launch));
}

template <class Policy>
void launch_forward(const CudaPlan& plan, const ForwardParams& params, void* workspace,
                    cudaStream_t stream) {
  launch_persistent<Policy>(plan, params, workspace, stream, [](auto cell, auto k_blocks) {
    return forward_kernel<Policy, cell.value, k_blocks.value>;
  });
}

}  // namespace rnn_fused::persistent
