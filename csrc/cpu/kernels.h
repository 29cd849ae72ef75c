// The entry points of one instruction set: run-time types to templates. Included by isa_*.cpp.
#pragma once

#include "csrc/cpu/backward.h"
#include "csrc/cpu/forward.h"
#include "csrc/cpu/gates.h"
#include "csrc/cpu/input_gradient.h"
#include "csrc/cpu/outer_product.h"
#include "csrc/cpu/wavefront.h"

namespace rnn_fused::RNN_FUSED_ISA {

template <template <class, Cell> class Loop, class T, class Params>
void run_cell(Cell cell, const Params& params, const Schedule& schedule, const Host& host) {
  switch (cell) {
    case Cell::lstm: return Loop<T, Cell::lstm>(params, schedule, host).run();
    case Cell::gru: return Loop<T, Cell::gru>(params, schedule, host).run();
    case Cell::rnn_tanh: return Loop<T, Cell::rnn_tanh>(params, schedule, host).run();
    case Cell::rnn_relu: return Loop<T, Cell::rnn_relu>(params, schedule, host).run();
  }
}

// Calls body(T()) with the storage type. split: see params.h.
template <class Body>
void with_type(DType dtype, [[maybe_unused]] bool split, const Body& body) {
  switch (dtype) {
    case DType::f32:
#if defined(RNN_FUSED_AMX)
      if (split) return body(split32());
#endif
      return body(float());
    case DType::f64: return body(double());
    case DType::bf16: return body(bf16());
    case DType::f16: return body(f16());
  }
}

void forward(const ForwardParams& params, const Schedule& schedule, const Host& host) {
  with_type(params.dtype, params.split,
            [&](auto t) { run_cell<Forward, decltype(t)>(params.cell, params, schedule, host); });
}

void forward_stack(const StackParams& stack, const Schedule& schedule, const Host& host) {
  with_type(stack.layers->dtype, false, [&](auto t) {
    run_cell<Wavefront, decltype(t)>(stack.layers->cell, stack, schedule, host);
  });
}

void backward(const BackwardParams& params, const Schedule& schedule, const Host& host) {
  with_type(params.dtype, params.split,
            [&](auto t) { run_cell<Backward, decltype(t)>(params.cell, params, schedule, host); });
}

template <class T, Cell kCell>
int64_t pack(const PackParams& p, void* out) {
  using Packed = PackedWeights<T, kCell>;
  const Packed packed(out, p.I, p.H, p.P);
  const auto put = [](auto weights, const T* to) {
    weights.pack(0, weights.panel_count());
    std::memcpy(const_cast<T*>(to), weights.panels(), weights.bytes());
  };
  if (!out) return packed.size;
  put(typename Packed::Gate(p.weight_ih, p.H, p.I, true, GateBias<T, kCell>::kFirstGate),
      packed.ih);
  put(typename Packed::Gate(p.weight_hh, p.H, p.P, true), packed.hh);
  if (packed.hr) put(typename Packed::Projection(p.weight_hr, p.P, p.H, true), packed.hr);
  const auto put_bias = [&](const void* bias, const T* to) {
    const int64_t count = gate_count(kCell) * p.H;
    if (bias)
      std::copy_n(static_cast<const T*>(bias), count, const_cast<T*>(to));
    else
      std::fill_n(const_cast<T*>(to), count, T{});
  };
  put_bias(p.bias_ih, packed.bias_ih);
  put_bias(p.bias_hh, packed.bias_hh);
  return packed.size;
}

int64_t pack_weights(const PackParams& params, void* out) {
  int64_t size = 0;
  with_type(params.dtype, false, [&](auto t) {
    using T = decltype(t);
    size = params.cell == Cell::lstm  ? pack<T, Cell::lstm>(params, out)
           : params.cell == Cell::gru ? pack<T, Cell::gru>(params, out)
                                      : pack<T, Cell::rnn_tanh>(params, out);
  });
  return size;
}

void gates(const GatesParams& params, const Host& host) {
  with_type(params.dtype, params.split, [&](auto t) {
    if (params.cell == Cell::gru)
      Gates<decltype(t), Cell::gru>(params, host).run();
    else
      Gates<decltype(t), Cell::lstm>(params, host).run();
  });
}

void input_gradient(const InputGradientParams& params, const Host& host) {
  with_type(params.dtype, params.split,
            [&](auto t) { multiply_by_weights<decltype(t)>(params, host); });
}

void outer_product(const OuterProductParams& params, const Host& host) {
  with_type(params.dtype, params.split, [&](auto t) { multiply_outer<decltype(t)>(params, host); });
}

}  // namespace rnn_fused::RNN_FUSED_ISA
