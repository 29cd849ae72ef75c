// The vector functions of csrc/cpu/math.h and simd.h over arrays, one table per instruction set.
#pragma once

#include <cstdint>

namespace rnn_fused {

// y[i] = f(x[i]), i < n, n a multiple of the lanes of any instruction set: kMostLanes.
template <class X, class Y>
using Map = void (*)(const X* x, Y* y, int64_t n);

constexpr int64_t kMostLanes = 16;

template <class A>
struct Activations {
  Map<A, A> sigmoid, tanh, relu;
};

struct Conversions {
  Map<uint16_t, float> load;
  Map<float, uint16_t> store;
};

struct IsaMath {
  Activations<float> f32;
  Activations<double> f64;
  Conversions bf16, f16;
};

#define RNN_FUSED_DECLARE_MATH(name) \
  namespace name {                   \
  extern const IsaMath math;         \
  }
RNN_FUSED_DECLARE_MATH(portable)
RNN_FUSED_DECLARE_MATH(avx2)
RNN_FUSED_DECLARE_MATH(avx512)
RNN_FUSED_DECLARE_MATH(avx512_bf16)
RNN_FUSED_DECLARE_MATH(amx_bf16)
#undef RNN_FUSED_DECLARE_MATH

}  // namespace rnn_fused
