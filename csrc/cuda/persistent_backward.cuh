// The backward pass of a window of timesteps in one launch: the chain of dh (and dc) through time.
//
// Each block owns hidden units of one direction, and their columns of W_hh in registers and shared
// memory, where dh and dc stay too. The gradients of the pre-activations go from block to block
// through grad_gates, with one barrier of the direction's blocks a step.
//
// What a step costs: every SM reads the gradients of all gates from L2, G times what the forward
// pass reads (LSTM, B = 32, H = 1024: 256 KiB, 2.3 us at 64 bytes a clock and 1.75 GHz), and they
// cross L2 three times, about 1.3 us. What the next step needs of the saved tensors is read before
// the barrier is waited for.
#pragma once

#include "csrc/core/cells.h"
#include "csrc/core/params.h"
#include "csrc/cuda/math.cuh"
#include "csrc/cuda/persistent_block.cuh"
#include "csrc/cuda/persistent_product.cuh"

namespace rnn_fused::persistent {

// kCell: rnn_tanh stands for both RNNs.
template <class Policy, Cell kCell, int kBlocks, bool kAligned>
class Backward {
  using T = typename Policy::T;
  static constexpr int G = gate_count(kCell), S = saved_count(kCell);
  static constexpr int kUnits = units_of(kBlocks), kPitch = sum_pitch(1, kUnits);
  static constexpr bool kLstm = kCell == Cell::lstm;
  static constexpr bool kGru = kCell == Cell::gru;
  using Owned = Own<kUnits>;

  // What the forward pass left of one row, and the gradient that the caller has for its h.
  struct Saved {
    float gates[S];  // an RNN: h
    float c;
    float before;  // c of the step before, or h of a GRU
    float grad_output;
  };

 public:
  // shared: [plan.shared_bytes]
  __device__ __forceinline__ Backward(const BackwardParams& p, int direction, int tile,
                                      float* shared)
      : p_(p),
        direction_(direction),
        dir_(p.direction[direction]),
        tile_(tile),
        unit_(static_cast<int>(blockIdx.x) * kUnits + Owned::unit()),
        sums_(shared),
        dh_(shared + kWarps * tile * kPitch),
        dc_(dh_ + p.B * kUnits),
        product_(static_cast<int>(p.H), dh_ + state_count(kCell, true) * p.B * kUnits,
                 [&](int, int gate, int of_block, int k) {
                   const int unit = blockIdx.x * kUnits + of_block;
                   const T* const weights = static_cast<const T*>(dir_.weight_hh);
                   return gather_eight(weights + (gate * p.H + k) * p.H + unit, p.H,
                                       unit < p.H ? static_cast<int>(p.H) - k : 0);
                 }) {
    Owned::for_all_sequences(owns() ? p_.B : 0, tile_, [&](int b) {
      const int64_t i = b * p_.H + unit_;
      dh_[b * kUnits + Owned::unit()] = first(dir_.grad_h_n, dir_.carried_dh, i);
      if constexpr (kLstm)
        dc_[b * kUnits + Owned::unit()] = first(dir_.grad_c_n, dir_.carried_dc, i);
    });
  }

  __device__ __forceinline__ void run(gpu::GridBarrier barrier) {
    const bool down = direction_ == 0;
    const auto [begin, end] = p_.steps();
    Step now = step_at(p_, down, begin), next = step_at(p_, down, begin + 1);
    load_saved(now, next, 0);
    for (int64_t s = begin; s < end; ++s) {
      const Step border = down ? now : next;
      for (int first = 0; first < now.active; first += tile_) {
        if (first > 0) load_saved(now, next, first);
        differentiate(now, border, first);
      }
      const Step after = step_at(p_, down, s + 2);
      barrier.arrive();
      if (s + 1 < end) load_saved(next, after, 0);
      barrier.wait();
      for (int first = 0; first < now.active; first += tile_) {
        if (first > 0) __syncthreads();  // the sums of the pass before have been read
        multiply(now, first);
        __syncthreads();
        add_product(now, border, first);
      }
      now = next;
      next = after;
    }
    Owned::for_all_sequences(owns() ? p_.B : 0, tile_, [&](int b) {
      const int64_t i = b * p_.H + unit_;
      leave(dh_[b * kUnits + Owned::unit()], dir_.grad_h0, dir_.carried_dh, i);
      if constexpr (kLstm) leave(dc_[b * kUnits + Owned::unit()], dir_.grad_c0, dir_.carried_dc, i);
    });
  }

 private:
  __device__ bool owns() const { return unit_ < p_.H; }
  __device__ T* grad_gates(int64_t row) const {
    return static_cast<T*>(dir_.grad_gates) + (row - dir_.first_row) * S * p_.H;
  }
  __device__ float output(int64_t row) const {
    return static_cast<float>(static_cast<const T*>(dir_.output)[row * p_.output_stride + unit_]);
  }

  // dh or dc before the window's first step: the caller's, or what the window before left.
  __device__ float first(const void* grad_n, const void* carried, int64_t i) const {
    if (p_.steps_before > 0) return static_cast<const float*>(carried)[i];
    return value_or_zero<T>(grad_n, i);
  }
  // And after its last one.
  __device__ void leave(float gradient, void* grad_0, void* carried, int64_t i) const {
    if (p_.steps_after > 0)
      static_cast<float*>(carried)[i] = gradient;
    else
      static_cast<T*>(grad_0)[i] = static_cast<T>(gradient);
  }

  // `before`: the step that the forward pass made before `step`.
  __device__ __forceinline__ void load_saved(Step step, Step before, int first) {
    const Step border = direction_ == 0 ? step : before;
    Owned::for_sequences(owns() ? pass_size(step.active, first, tile_) : 0, [&](int i, int b) {
      const int sequence = first + b;
      const int64_t row = step.row + sequence;
      const int64_t row_before = before.row + sequence, initial = sequence * p_.H + unit_;
      const bool reset = is_reset(p_, border, sequence);
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

  // From the gradient of h to those of the pre-activations. What reaches the h before without W_hh
  // stays in dh.
  __device__ __forceinline__ void differentiate(Step now, Step border, int first) {
    Owned::for_sequences(owns() ? pass_size(now.active, first, tile_) : 0, [&](int i, int b) {
      const int sequence = first + b;
      const Saved& saved = saved_[i];
      T* const grads = grad_gates(now.row + sequence) + unit_;
      const auto put = [&](int gate, float grad) { grads[gate * p_.H] = static_cast<T>(grad); };
      float& dh = dh_[sequence * kUnits + Owned::unit()];
      const float total = dh + saved.grad_output;
      if constexpr (kLstm) {
        float& dc = dc_[sequence * kUnits + Owned::unit()];
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
        if (is_reset(p_, border, sequence)) end_at_reset(dir_.grad_reset_c, sequence, dc);
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

  // W_hh^T times the gradients of the pre-activations. Those of a GRU's n reach h through hn.
  __device__ __forceinline__ void multiply(Step now, int first) {
    product_.multiply(
        pass_size(now.active, first, tile_),
        [&](int b, int gate, int k) {
          const T* const row =
              grad_gates(now.row + first + b) + (kGru && gate == 2 ? 3 : gate) * p_.H;
          return load_eight<kAligned>(row + k, static_cast<int>(p_.H) - k);
        },
        sums_ + threadIdx.x / 32 * tile_ * kPitch);
  }

  __device__ __forceinline__ void add_product(Step now, Step border, int first) {
    Owned::for_sequences(owns() ? pass_size(now.active, first, tile_) : 0, [&](int, int b) {
      float sums[1] = {};
      add_sums(sums_, tile_, kPitch, b, Owned::unit(), sums);
      float& dh = dh_[(first + b) * kUnits + Owned::unit()];
      dh = clip(dh + sums[0], p_.options.f32.grad_clip);
      if (is_reset(p_, border, first + b)) end_at_reset(dir_.grad_reset_h, first + b, dh);
    });
  }

  // Hands what reaches the state before a step over to the reset state. Of this unit and sequence
  // no other thread adds.
  __device__ __forceinline__ void end_at_reset(void* sums, int sequence, float& gradient) const {
    static_cast<float*>(sums)[sequence * p_.H + unit_] += gradient;
    gradient = 0;
  }

  const BackwardParams& p_;
  const int direction_;
  const BackwardDirection& dir_;
  const int tile_;
  const int unit_;     // the thread's own
  float* const sums_;  // [kWarps, tile, kPitch]
  float* const dh_;    // [B, kUnits]
  float* const dc_;    // [B, kUnits], an LSTM's; behind them the weights in shared memory
  const Product<Policy, kUnits, 1, G, kBlocks, kAligned> product_;
  Saved saved_[kOwn] = {};
};

// blockIdx: (block of units, direction behind the first). counters: zero, kBarrierStride apart.
template <class Policy, Cell kCell, int kBlocks, bool kAligned>
__global__ void __launch_bounds__(kThreads, blocks_per_sm(sizeof(typename Policy::T), kBlocks))
    backward_kernel(const __grid_constant__ BackwardParams p, int first_direction, int tile,
                    uint32_t* counters) {
  RNN_FUSED_DYNAMIC_SHARED(float, shared);
  const int direction = first_direction + blockIdx.y;
  Backward<Policy, kCell, kBlocks, kAligned> block(p, direction, tile, shared);
  block.run(gpu::GridBarrier(counters + direction * kBarrierStride, gridDim.x));
}

template <class Policy>
void launch_backward(const CudaPlan& plan, const BackwardParams& params, uint32_t* counters,
                     cudaStream_t stream) {
  bool aligned = true;
  for (int d = 0; d < params.directions; ++d)
    aligned = aligned &&
              rows_aligned<typename Policy::T>(params.direction[d].grad_gates, params.H, params.H);
  launch_persistent(plan, aligned, params, counters, stream,
                    [](auto cell, auto k_blocks, auto aligned) {
                      return backward_kernel<Policy, cell.value, k_blocks.value, aligned.value>;
                    });
}

}  // namespace rnn_fused::persistent
