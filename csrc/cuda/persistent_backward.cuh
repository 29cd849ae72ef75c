// The backward pass of a window of timesteps in one launch: the chain of dh (and dc) through time.
//
// Each block owns hidden units of one direction, and their columns of W_hh in registers and shared
// memory, where dh and dc stay too. The gradients of the pre-activations go from block to block
// through device memory (L2), with one barrier a step of the blocks of a direction and slice of the
// batch, or by hand-off (exchange.cuh).
//
// What a step costs: every SM reads the gradients of all gates from L2, G times what the forward
// pass reads (LSTM, B = 32, H = 1024: 256 KiB, 2.3 us at 64 bytes a clock and 1.75 GHz, 6 us if L2
// gives 128 SMs no more than 3100 together), and they cross L2 three times, about 1.3 us. What the
// next step needs of the saved tensors is read before the barrier is waited for.
#pragma once

#include "csrc/core/cells.h"
#include "csrc/core/params.h"
#include "csrc/cuda/exchange.cuh"
#include "csrc/cuda/math.cuh"
#include "csrc/cuda/persistent_block.cuh"
#include "csrc/cuda/streamed_product.cuh"

namespace rnn_fused::persistent {

// Some hidden units of one direction, and what a step does with them besides the product: the
// threads of a block own them and a tile of sequences. kCell: rnn_tanh stands for both RNNs.
// kOwned: sequences of a thread.
template <class Policy, Cell kCell, int kUnits, int kOwned = kOwn>
class BackwardUnits {
 protected:
  using T = typename Policy::T;
  using Owned = Own<kUnits, kOwned>;
  static constexpr int G = gate_count(kCell), S = saved_count(kCell);
  static constexpr bool kLstm = kCell == Cell::lstm;
  static constexpr bool kGru = kCell == Cell::gru;

  // block: of the direction's units. state: [state_count, sequences, kUnits].
  __device__ __forceinline__ BackwardUnits(const BackwardParams& p, int direction, Slice slice,
                                           int block, int tile, float* state, int64_t sequences)
      : p_(p),
        direction_(direction),
        dir_(p.direction[direction]),
        slice_(slice),
        tile_(tile),
        first_unit_(block * kUnits),
        unit_(first_unit_ + Owned::unit()),
        dh_(state),
        dc_(state + sequences * kUnits) {}

  // Behind the state of so many sequences.
  __device__ __forceinline__ float* behind_state(int64_t sequences) const {
    return dh_ + state_count(kCell, true) * sequences * kUnits;
  }

  // dh and dc before the window's first step.
  __device__ __forceinline__ void begin_state() {
    Owned::for_all_sequences(owns() ? slice_.size() : 0, tile_, [&](int b) {
      const int64_t i = given(b);
      dh_[b * kUnits + Owned::unit()] = begin(dir_.grad_h_n, dir_.carried_dh, i);
      if constexpr (kLstm)
        dc_[b * kUnits + Owned::unit()] = begin(dir_.grad_c_n, dir_.carried_dc, i);
    });
  }

  // And after its last one.
  __device__ __forceinline__ void end_state() const {
    Owned::for_all_sequences(owns() ? slice_.size() : 0, tile_, [&](int b) {
      const int64_t i = given(b);
      leave(dh_[b * kUnits + Owned::unit()], dir_.grad_h0, dir_.carried_dh, i);
      if constexpr (kLstm) leave(dc_[b * kUnits + Owned::unit()], dir_.grad_c0, dir_.carried_dc, i);
    });
  }

  __device__ bool owns() const { return unit_ < p_.H; }
  __device__ T* grad_gates(int64_t row) const {
    return static_cast<T*>(dir_.grad_gates) + (row - dir_.first_row) * S * p_.H;
  }

  // `before`: the step that the forward pass made before `step`.
  __device__ __forceinline__ void load_saved(Step step, Step before, int first) {
    resets_ = resets(step, before, first);
    Owned::for_sequences(owns() ? pass_size(step.active, first, tile_) : 0, [&](int i, int b) {
      const int sequence = first + b;
      const int64_t row = step.row + sequence;
      const int64_t row_before = before.row + sequence, initial = given(sequence);
      const bool reset = resets_ >> b & 1;
      const bool begins = reset || sequence >= before.active;
      Saved& saved = saved_[i];

      saved.grad_output = value_or_zero<T>(dir_.grad_output, row * p_.output_stride + unit_);
      if constexpr (!kLstm && !kGru) {
        saved.gates[0] = output(row);
      } else {
        const T* const gates =
            static_cast<const T*>(dir_.gates) + (row - dir_.first_row) * S * p_.H + unit_;
#pragma unroll
        for (int gate = 0; gate < S; ++gate)
          saved.gates[gate] = static_cast<float>(gates[gate * p_.H]);
        if constexpr (kLstm) {
          const float* const cells = static_cast<const float*>(dir_.cells);
          saved.c = cells[row * p_.H + unit_];
          const void* const c_first = reset ? dir_.reset_c : dir_.c0;
          saved.before = begins ? static_cast<float>(static_cast<const T*>(c_first)[initial])
                                : cells[row_before * p_.H + unit_];
        } else {
          const void* const h_first = reset ? dir_.reset_h : dir_.h0;
          saved.before = begins ? static_cast<float>(static_cast<const T*>(h_first)[initial])
                                : output(row_before);
        }
      }
    });
  }

  // From the gradient of h to those of the pre-activations, in the pass that begins with `first`.
  // What reaches the h before without W_hh stays in dh.
  // put_too(b, group, gradient): what else becomes of those that a group of the product multiplies.
  template <class Put>
  __device__ __forceinline__ void differentiate(Step now, int first, Put put_too) {
    Owned::for_sequences(owns() ? pass_size(now.active, first, tile_) : 0, [&](int i, int b) {
      const int sequence = first + b, in_block = sequence * kUnits + Owned::unit();
      const Saved& saved = saved_[i];
      T* const grads = grad_gates(now.row + sequence) + unit_;
      const auto put = [&](int gate, float grad) {
        grads[gate * p_.H] = static_cast<T>(grad);
#pragma unroll
        for (int group = 0; group < G; ++group)
          if (saved_gate(group) == gate) put_too(b, group, static_cast<T>(grad));
      };
      float& dh = dh_[in_block];
      const float total = dh + saved.grad_output;
      if constexpr (kLstm) {
        float& dc = dc_[in_block];
        // Seldom there: not worth a register across the barrier.
        const float more =
            value_or_zero<float>(dir_.grad_cells, (now.row + sequence) * p_.H + unit_);
        const LstmGates<float> a = {saved.gates[0], saved.gates[1], saved.gates[2], saved.gates[3]};
        const LstmGrads<float> g =
            lstm_backward<gpu::Math>(a, saved.c, saved.before, total, dc + more, p_.options.f32);
        put(0, g.gates.i);
        put(1, g.gates.f);
        put(2, g.gates.g);
        put(3, g.gates.o);
        dc = g.c_prev;
        if (resets_ >> b & 1) end_at_reset(dir_.grad_reset_c, sequence, dc);
        dh = 0;
      } else if constexpr (kGru) {
        const GruGates<float> a = {saved.gates[0], saved.gates[1], saved.gates[2], saved.gates[3]};
        const GruGrads<float> g = gru_backward(a, saved.before, total, p_.options.f32);
        put(0, g.gates.r);
        put(1, g.gates.z);
        put(2, g.gates.n);
        put(3, g.gates.hn);
        dh = g.h_prev;
      } else {
        const float h = saved.gates[0];
        put(0, p_.cell == Cell::rnn_tanh ? total * (1 - h * h) : gpu::Math::relu_grad(h, total));
        dh = 0;
      }
    });
  }

  // The saved gate whose gradient a group of the product multiplies: that of a GRU's n reaches h
  // through hn.
  __device__ static constexpr int saved_gate(int group) { return kGru && group == 2 ? 3 : group; }

  // Which sequences of a pass come to a step with the reset state: of the pass whose saved tensors
  // were loaded last, or of any.
  using Resets = SequenceBits<kUnits>;
  __device__ Resets resets() const { return resets_; }
  __device__ Resets resets(Step step, Step before, int first) const {
    return reset_sequences<kUnits>(p_, p_.reverse(direction_) ? before : step, first,
                                   pass_size(step.active, first, tile_));
  }

  // Adds what W_hh gives the h before. sum_of(b): of the pass's sequence.
  template <class Sum>
  __device__ __forceinline__ void add_product(Step now, Resets resets, int first, Sum sum_of) {
    Owned::for_sequences(owns() ? pass_size(now.active, first, tile_) : 0, [&](int, int b) {
      float& dh = dh_[(first + b) * kUnits + Owned::unit()];
      dh = clip(dh + sum_of(b), p_.options.f32.grad_clip);
      if (resets >> b & 1) end_at_reset(dir_.grad_reset_h, first + b, dh);
    });
  }

 private:
  // What the forward pass left of one row, and the gradient that the caller has for its h.
  struct Saved {
    float gates[S];  // an RNN: h
    float c;
    float before;  // c of the step before, or h of a GRU
    float grad_output;
  };

  __device__ float output(int64_t row) const {
    return static_cast<float>(static_cast<const T*>(dir_.output)[row * p_.output_stride + unit_]);
  }

  // dh or dc before the window's first step: the caller's, or what the window before left.
  __device__ float begin(const void* grad_n, const void* carried, int64_t i) const {
    if (dir_.steps_before > 0) return static_cast<const float*>(carried)[i];
    return value_or_zero<T>(grad_n, i);
  }
  // And after its last one.
  __device__ void leave(float gradient, void* grad_0, void* carried, int64_t i) const {
    if (dir_.steps_after > 0)
      static_cast<float*>(carried)[i] = gradient;
    else
      static_cast<T*>(grad_0)[i] = static_cast<T>(gradient);
  }

  // Of the thread's unit in a state [B, H] that the caller gave, or its gradient.
  __device__ int64_t given(int sequence) const {
    return int64_t{slice_.begin() + sequence} * p_.H + unit_;
  }

  // Hands what reaches the state before a step over to the reset state. Of this unit and sequence
  // no other thread adds.
  __device__ __forceinline__ void end_at_reset(void* sums, int sequence, float& gradient) const {
    static_cast<float*>(sums)[given(sequence)] += gradient;
    gradient = 0;
  }

 protected:
  const BackwardParams& p_;
  const int direction_;
  const BackwardDirection& dir_;
  const Slice slice_;
  const int tile_;
  const int first_unit_;  // of the block
  const int unit_;        // the thread's own

 private:
  float* const dh_;  // [sequences, kUnits]
  float* const dc_;  // [sequences, kUnits], an LSTM's
  Saved saved_[kOwned] = {};
  Resets resets_ = 0;
};

// The same in a grid whose blocks exchange the gradients of the gates.
template <class Policy, Cell kCell, int kBlocks>
class ExchangedBackwardUnits
    : protected BackwardUnits<Policy, kCell, units_of(kBlocks),
                              own_sequences(kBlocks, 1, sizeof(typename Policy::T))> {
  static constexpr int kUnits = units_of(kBlocks);
  using Units = typename ExchangedBackwardUnits::BackwardUnits;

 protected:
  using typename Units::T;
  using Units::p_;
  using Units::slice_;
  using Units::tile_;

  // state: behind it is what is staged.
  __device__ __forceinline__ ExchangedBackwardUnits(const BackwardParams& p, const Launch& launch,
                                                    bool handoff, float* state)
      : Units(p, launch.direction(), launch.slice_of(p), blockIdx.x, launch.batch_tile, state,
              launch.slice_of(p).size()),
        exchange_(p, launch, handoff, this->first_unit_,
                  reinterpret_cast<T*>(this->behind_state(slice_.size()))) {
    this->begin_state();
  }

  // The gradients of a step's gates, to all blocks and from them. What the next step needs of the
  // saved tensors is read meanwhile. i: of the launch. after: the step behind the next one. Returns
  // the resets of the first pass.
  __device__ __forceinline__ SequenceBits<kUnits> exchange(int64_t i, bool last, Step now,
                                                           Step next, Step after,
                                                           gpu::GridBarrier& barrier) {
    const auto resets = this->resets();
    for (int first = 0; first < now.active; first += tile_) {
      if (first > 0) {
        __syncthreads();  // what was staged has been published
        this->load_saved(now, next, first);
      }
      this->differentiate(
          now, first, [&](int b, int group, T gradient) { exchange_.stage(b, group, gradient); });
      __syncthreads();
      exchange_.publish(exchange_.slot_of(i), first, pass_size(now.active, first, tile_));
    }
    exchange_.announce(i, barrier);
    if (!last) this->load_saved(next, after, 0);
    exchange_.await(i, barrier);
    return resets;
  }

  const Exchange<T, gate_count(kCell), kUnits, 0> exchange_;
};

template <class Policy, Cell kCell, int kBlocks>
class Backward : ExchangedBackwardUnits<Policy, kCell, kBlocks> {
  static constexpr int kUnits = units_of(kBlocks), kPitch = sum_pitch(1, kUnits);
  static constexpr int kSumWarps = sum_warps(kBlocks);
  using Units = ExchangedBackwardUnits<Policy, kCell, kBlocks>;
  using BlockProduct = persistent::BlockProduct<Policy, kBlocks, 1, gate_count(kCell)>;
  using typename Units::Owned;
  using typename Units::T;
  using Units::dir_;
  using Units::direction_;
  using Units::exchange_;
  using Units::p_;
  using Units::slice_;
  using Units::tile_;

 public:
  // shared: [plan.shared_bytes]
  __device__ __forceinline__ Backward(const BackwardParams& p, const Launch& launch, float* shared)
      : Units(p, launch, launch.handoff, shared + kSumWarps * launch.batch_tile * kPitch),
        sums_(shared),
        product_(make_product<BlockProduct>(
            static_cast<int>(p.H), exchange_.behind_staged(), launch.shared_octets,
            exchange_.behind_slots(), [&](int, int gate, int of_block, int k) {
              const int unit = this->first_unit_ + of_block;
              const T* const weights = static_cast<const T*>(dir_.weight_hh);
              return gather_eight(weights + (gate * p.H + k) * p.H + unit, p.H,
                                  unit < p.H ? static_cast<int>(p.H) - k : 0);
            })) {}

  __device__ __forceinline__ void run(gpu::GridBarrier barrier) {
    const bool down = !p_.reverse(direction_);
    const auto [begin, end] = p_.steps(direction_);
    Step now = slice_.step_at(down, begin), next = slice_.step_at(down, begin + 1);
    this->load_saved(now, next, 0);
    for (int64_t s = begin; s < end; ++s) {
      const Step after = slice_.step_at(down, s + 2);
      auto resets = this->exchange(s - begin, s + 1 == end, now, next, after, barrier);
      for (int first = 0; first < now.active; first += tile_) {
        if (first > 0) {
          __syncthreads();  // the sums of the pass before have been read
          resets = this->resets(now, next, first);
        }
        multiply(exchange_.slot_of(s - begin), now, first);
        __syncthreads();
        this->add_product(now, resets, first, [&](int b) {
          float sums[1] = {};
          add_sums<kSumWarps>(sums_, tile_, kPitch, b, Owned::unit(), sums);
          return sums[0];
        });
      }
      now = next;
      next = after;
    }
    this->end_state();
  }

 private:
  // W_hh^T times the gradients of the pre-activations.
  __device__ __forceinline__ void multiply(int slot, Step now, int first) {
    product_.multiply(
        pass_size(now.active, first, tile_),
        [&](int b, int group, int k) { return exchange_.load(slot, first + b, group, k); }, tile_,
        sums_, exchange_.handoff());
  }

  float* const sums_;  // [kSumWarps, tile, kPitch]; behind them the state, what is staged, weights
  const BlockProduct product_;
};

// blockIdx: (block of units, direction behind the first, slice).
template <class Policy, Cell kCell, int kBlocks>
__global__ void __launch_bounds__(kThreads, blocks_per_sm(sizeof(typename Policy::T), kBlocks))
    backward_kernel(const __grid_constant__ BackwardParams p,
                    const __grid_constant__ Launch launch) {
  RNN_FUSED_DYNAMIC_SHARED(float, shared);
  Backward<Policy, kCell, kBlocks> block(p, launch, shared);
  block.run(barrier_of(launch));
}

}  // namespace rnn_fused::persistent
