// Storage types on a GPU, and the run-time values of params.h as template arguments.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "csrc/core/params.h"

namespace rnn_fused::gpu {

// Of maths and sums.
template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
RNN_FUSED_HD Acc<T> to_acc(T value) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return __bfloat162float(value);
  else if constexpr (std::is_same_v<T, __half>)
    return __half2float(value);
  else
    return value;
}

// Rounds to nearest even.
template <class T>
RNN_FUSED_HD T from_acc(Acc<T> value) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return __float2bfloat16(value);
  else if constexpr (std::is_same_v<T, __half>)
    return __float2half(value);
  else
    return value;
}

constexpr DType accumulation_type(DType dtype) {
  return dtype == DType::f64 ? DType::f64 : DType::f32;
}

// Calls body(T()) with the storage type.
template <class Body>
void with_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::f32: return body(float());
    case DType::f64: return body(double());
    case DType::bf16: return body(__nv_bfloat16());
    case DType::f16: return body(__half());
  }
}

// Calls body(std::integral_constant<Cell, cell>()).
template <class Body>
void with_cell(Cell cell, const Body& body) {
  switch (cell) {
    case Cell::lstm: return body(std::integral_constant<Cell, Cell::lstm>());
    case Cell::gru: return body(std::integral_constant<Cell, Cell::gru>());
    case Cell::rnn_tanh: return body(std::integral_constant<Cell, Cell::rnn_tanh>());
    case Cell::rnn_relu: return body(std::integral_constant<Cell, Cell::rnn_relu>());
  }
}

}  // namespace rnn_fused::gpu
