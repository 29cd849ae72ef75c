// How failed checks print the core's enumerations (doctest finds toString).
#pragma once

#include <doctest/doctest.h>

#include "csrc/core/params.h"
#include "csrc/cpu/select.h"

namespace rnn_fused {

inline doctest::String toString(Isa isa) { return isa_name(isa); }

inline doctest::String toString(DType dtype) {
  constexpr const char* kNames[] = {"f32", "f64", "bf16", "f16"};
  return kNames[static_cast<int>(dtype)];
}

inline doctest::String toString(Cell cell) {
  constexpr const char* kNames[] = {"lstm", "gru", "rnn_tanh", "rnn_relu"};
  return kNames[static_cast<int>(cell)];
}

}  // namespace rnn_fused
