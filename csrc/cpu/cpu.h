// The CPU kernels as the binding sees them.
#pragma once

#include "csrc/core/params.h"
#include "csrc/cpu/parallel.h"
#include "csrc/cpu/plan.h"
#include "csrc/cpu/select.h"

namespace rnn_fused {

// T, B, N and H at least 1. Throws nothing but std::bad_alloc, before any output is written.
void cpu_forward(Isa isa, const ForwardParams& params, const Host& host);
// Layers whose weights are packed, the output of each the input of the next: one after the other,
// or side by side, each some timesteps behind the one below. The output of every other layer may
// have the same place.
void cpu_forward_stack(Isa isa, const ForwardParams* layers, int64_t count, const Host& host);
void cpu_backward(Isa isa, const BackwardParams& params, const Host& host);
void cpu_gates(Isa isa, const GatesParams& params, const Host& host);
void cpu_input_gradient(Isa isa, const InputGradientParams& params, const Host& host);
void cpu_outer_product(Isa isa, const OuterProductParams& params, const Host& host);
// Writes the packed weights to `out` unless it is null; returns how many values they are. Their
// layout is that of the instruction set.
int64_t cpu_pack_weights(Isa isa, const PackParams& params, void* out);

// A plan with the ranges of sequences of its row_parts.
struct Schedule : Plan {
  const Range* rows;  // [directions, row_parts]
};

// Layers of a stack, and how many parts of it run side by side.
struct StackParams {
  const ForwardParams* layers;
  int64_t count, parts;
};

// One set per instruction set, defined in isa_*.cpp.
#define RNN_FUSED_DECLARE_ISA(name)                                                         \
  namespace name {                                                                          \
  void forward(const ForwardParams& params, const Schedule& schedule, const Host& host);    \
  void forward_stack(const StackParams& stack, const Schedule& schedule, const Host& host); \
  void backward(const BackwardParams& params, const Schedule& schedule, const Host& host);  \
  void gates(const GatesParams& params, const Host& host);                                  \
  void input_gradient(const InputGradientParams& params, const Host& host);                 \
  void outer_product(const OuterProductParams& params, const Host& host);                   \
  int64_t pack_weights(const PackParams& params, void* out);                                \
  }
RNN_FUSED_DECLARE_ISA(portable)
RNN_FUSED_DECLARE_ISA(avx2)
RNN_FUSED_DECLARE_ISA(avx512)
RNN_FUSED_DECLARE_ISA(avx512_bf16)
RNN_FUSED_DECLARE_ISA(amx_bf16)
#undef RNN_FUSED_DECLARE_ISA

}  // namespace rnn_fused
