// The gate maths of every cell, once, for host and device.
//
// V is a float, a double or a SIMD vector of them; M supplies M::sigmoid, M::tanh and, for the ReLU
// RNN, M::relu and M::relu_grad on V. Pre-activations arrive with W_ih x, W_hh h and the biases
// summed. Equations: docs/design.md and rnn_fused/reference.py.
#pragma once

#include "csrc/core/host_device.h"

namespace rnn_fused {

template <class V>
struct LstmGates {
  V i, f, g, o;
};

template <class V>
struct LstmState {
  V h, c;
};

// Activates `a` in place.
template <class M, class V>
RNN_FUSED_HD LstmState<V> lstm_forward(LstmGates<V>& a, V c_prev) {
  a.i = M::sigmoid(a.i);
  a.f = M::sigmoid(a.f);
  a.g = M::tanh(a.g);
  a.o = M::sigmoid(a.o);
  const V c = a.f * c_prev + a.i * a.g;
  return {a.o * M::tanh(c), c};
}

template <class V>
struct LstmGrads {
  LstmGates<V> gates;  // of the pre-activations
  V c_prev;
  V hidden;  // o * tanh(c), recomputed: a projection's weight gradient needs it
};

// `a` holds the activated gates, dh the gradient of o * tanh(c), dc that of c from later timesteps.
template <class M, class V>
RNN_FUSED_HD LstmGrads<V> lstm_backward(const LstmGates<V>& a, V c, V c_prev, V dh, V dc) {
  const V tanh_c = M::tanh(c);
  const V dc_total = dc + dh * a.o * (1 - tanh_c * tanh_c);
  return {{dc_total * a.g * a.i * (1 - a.i), dc_total * c_prev * a.f * (1 - a.f),
           dc_total * a.i * (1 - a.g * a.g), dh * tanh_c * a.o * (1 - a.o)},
          dc_total * a.f,
          a.o * tanh_c};
}

template <class V>
struct GruGates {
  V r, z, n;
  V hn;  // W_hn h + b_hn, which the reset gate multiplies
};

// Activates `a` in place and returns h. On entry a.n is W_in x + b_in alone.
template <class M, class V>
RNN_FUSED_HD V gru_forward(GruGates<V>& a, V h_prev) {
  a.r = M::sigmoid(a.r);
  a.z = M::sigmoid(a.z);
  a.n = M::tanh(a.n + a.r * a.hn);
  return a.n + a.z * (h_prev - a.n);
}

template <class V>
struct GruGrads {
  GruGates<V> gates;  // of the pre-activations, hn's own included
  V h_prev;  // the direct path h -> z * h_prev; the paths through W_hh come from the product
};

template <class V>
RNN_FUSED_HD GruGrads<V> gru_backward(const GruGates<V>& a, V h_prev, V dh) {
  const V dn = dh * (1 - a.z) * (1 - a.n * a.n);
  return {{dn * a.hn * a.r * (1 - a.r), dh * (h_prev - a.n) * a.z * (1 - a.z), dn, dn * a.r},
          dh * a.z};
}

}  // namespace rnn_fused
