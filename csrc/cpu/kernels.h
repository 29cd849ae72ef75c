// The entry points of one instruction set: run-time types to templates. Included by isa_*.cpp.
#pragma once

#include "csrc/cpu/backward.h"
#include "csrc/cpu/forward.h"
#include "csrc/cpu/gates.h"
#include "csrc/cpu/input_gradient.h"
#include "csrc/cpu/outer_product.h"

namespace rnn_fused::RNN_FUSED_ISA {

template <template <class, Cell> class Loop, class T, class Params>
void run_cell(const Params& params, const Schedule& schedule, const Host& host) {
  switch (params.cell) {
    case Cell::lstm: return Loop<T, Cell::lstm>(params, schedule, host).run();
    case Cell::gru: return Loop<T, Cell::gru>(params, schedule, host).run();
    case Cell::rnn_tanh: return Loop<T, Cell::rnn_tanh>(params, schedule, host).run();
    case Cell::rnn_relu: return Loop<T, Cell::rnn_relu>(params, schedule, host).run();
  }
}

// Calls body(T()) with the storage type.
template <class Body>
void with_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::f32: return body(float());
    case DType::f64: return body(double());
    case DType::bf16: return body(bf16());
    case DType::f16: return body(f16());
  }
}

void forward(const ForwardParams& params, const Schedule& schedule, const Host& host) {
  with_type(params.dtype, [&](auto t) { run_cell<Forward, decltype(t)>(params, schedule, host); });
}

void backward(const BackwardParams& params, const Schedule& schedule, const Host& host) {
  with_type(params.dtype, [&](auto t) { run_cell<Backward, decltype(t)>(params, schedule, host); });
}

void gates(const GatesParams& params, const Host& host) {
  with_type(params.dtype, [&](auto t) {
    if (params.cell == Cell::gru)
      Gates<decltype(t), Cell::gru>(params, host).run();
    else
      Gates<decltype(t), Cell::lstm>(params, host).run();
  });
}

void input_gradient(const InputGradientParams& params, const Host& host) {
  with_type(params.dtype, [&](auto t) { multiply_by_weights<decltype(t)>(params, host); });
}

void outer_product(const OuterProductParams& params, const Host& host) {
  with_type(params.dtype, [&](auto t) { multiply_outer<decltype(t)>(params, host); });
}

}  // namespace rnn_fused::RNN_FUSED_ISA
