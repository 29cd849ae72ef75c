// The entry points of one instruction set: run-time types to templates. Included by isa_*.cpp.
#pragma once

#include "csrc/cpu/backward.h"
#include "csrc/cpu/forward.h"

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

template <template <class, Cell> class Loop, class Params>
void run_typed(const Params& params, const Schedule& schedule, const Host& host) {
  switch (params.dtype) {
    case DType::f32: return run_cell<Loop, float>(params, schedule, host);
    case DType::f64: return run_cell<Loop, double>(params, schedule, host);
    case DType::bf16: return run_cell<Loop, bf16>(params, schedule, host);
    case DType::f16: return run_cell<Loop, f16>(params, schedule, host);
  }
}

void forward(const ForwardParams& params, const Schedule& schedule, const Host& host) {
  run_typed<Forward>(params, schedule, host);
}

void backward(const BackwardParams& params, const Schedule& schedule, const Host& host) {
  run_typed<Backward>(params, schedule, host);
}

}  // namespace rnn_fused::RNN_FUSED_ISA
