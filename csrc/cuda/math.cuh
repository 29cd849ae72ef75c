// The scalar maths of csrc/core/cells.h on a GPU, a few ulp from the exact values. Infinities
// saturate, NaN stays NaN. tanh.approx would err by 2^-11, more than a step of float16.
#pragma once

#include <cmath>

#include "csrc/core/host_device.h"

namespace rnn_fused::gpu {

struct Math {
  // exp overflows to infinity where the result is to be 0.
  RNN_FUSED_HD static float sigmoid(float x) {
#ifdef __CUDA_ARCH__
    return __fdividef(1.0f, 1.0f + expf(-x));  // 2 ulp, without the division's slow path
#else
    return 1.0f / (1.0f + expf(-x));
#endif
  }
  RNN_FUSED_HD static double sigmoid(double x) { return 1.0 / (1.0 + exp(-x)); }

  RNN_FUSED_HD static float tanh(float x) { return tanhf(x); }
  RNN_FUSED_HD static double tanh(double x) { return ::tanh(x); }

  template <class V>
  RNN_FUSED_HD static V relu(V x) {
    return x < V(0) ? V(0) : x;  // NaN stays NaN, as in torch
  }
  template <class V>
  RNN_FUSED_HD static V relu_grad(V y, V dy) {
    return y <= V(0) ? V(0) : dy;
  }
};

}  // namespace rnn_fused::gpu
