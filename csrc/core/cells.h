// The gate maths of every cell, once, for host and device.
//
// V is a float, a double or a SIMD vector of them; M supplies M::sigmoid, M::tanh and, for the ReLU
// RNN, M::relu and M::relu_grad on V. Pre-activations arrive with W_ih x, W_hh h and the biases
// summed. Equations: docs/design.md and rnn_fused/reference.py.
#pragma once

#include "csrc/core/params.h"

namespace rnn_fused {

// Whether a bound is known to be none, NaN. The host asks before it compares every value; on a
// device a branch costs more than the comparisons.
template <class A>
RNN_FUSED_HD bool surely_unbounded(A bound) {
#ifdef __CUDA_ARCH__
  return false;
#else
  return !(bound > 0);
#endif
}

// NaN stays NaN.
template <class V, class A>
RNN_FUSED_HD V clip(V x, A bound) {
  if (surely_unbounded(bound)) return x;
  const V high = V{} + bound, low = V{} - bound;
  return x > high ? high : x < low ? low : x;
}

// The gradient of x, from that of clip(x, bound): none where the bound is reached.
template <class V, class A>
RNN_FUSED_HD V through_clip(V clipped, A bound, V grad) {
  if (surely_unbounded(bound)) return grad;
  const V high = V{} + bound, low = V{} - bound;
  return clipped >= high ? V{} : clipped <= low ? V{} : grad;
}

template <class V>
struct LstmGates {
  V i, f, g, o;
};

template <class V>
struct LstmState {
  V h, c;
};

// Activates pre-activations in place.
template <class M, class V, class A>
RNN_FUSED_HD void lstm_activate(LstmGates<V>& a, const CellOptions<A>& options) {
  a.i = M::sigmoid(options.gate_slope * a.i);
  a.f = M::sigmoid(options.gate_slope * a.f);
  a.g = M::tanh(a.g);
  a.o = M::sigmoid(options.gate_slope * a.o);
}

// The state from the activated gates.
template <class M, class V, class A>
RNN_FUSED_HD LstmState<V> lstm_forward(const LstmGates<V>& a, V c_prev,
                                       const CellOptions<A>& options) {
  const V c = clip(a.f * c_prev + a.i * a.g, options.cell_clip);
  return {a.o * M::tanh(c), c};
}

template <class V>
struct LstmGrads {
  LstmGates<V> gates;  // of the pre-activations
  V c_prev;
  V hidden;  // o * tanh(c), recomputed: a projection's weight gradient needs it
};

// `a` holds the activated gates, dh the gradient of o * tanh(c), dc that of c from elsewhere.
template <class M, class V, class A>
RNN_FUSED_HD LstmGrads<V> lstm_backward(const LstmGates<V>& a, V c, V c_prev, V dh, V dc,
                                        const CellOptions<A>& options) {
  const A slope = options.gate_slope;
  const V tanh_c = M::tanh(c);
  const V dc_total = through_clip(c, options.cell_clip, dc + dh * a.o * (1 - tanh_c * tanh_c));
  return {{dc_total * a.g * a.i * (slope - slope * a.i),
           dc_total * c_prev * a.f * (slope - slope * a.f), dc_total * a.i * (1 - a.g * a.g),
           dh * tanh_c * a.o * (slope - slope * a.o)},
          clip(dc_total * a.f, options.grad_clip),
          a.o * tanh_c};
}

template <class V>
struct GruGates {
  V r, z, n;
  V hn;  // W_hn h + b_hn, which the reset gate multiplies
};

// On entry a.n is W_in x + b_in alone.
template <class M, class V, class A>
RNN_FUSED_HD void gru_activate(GruGates<V>& a, const CellOptions<A>& options) {
  a.r = M::sigmoid(options.gate_slope * a.r);
  a.z = M::sigmoid(options.gate_slope * a.z);
  a.n = M::tanh(a.n + a.r * a.hn);
}

// h from the activated gates.
template <class V>
RNN_FUSED_HD V gru_forward(const GruGates<V>& a, V h_prev) {
  return a.n + a.z * (h_prev - a.n);
}

template <class V>
struct GruGrads {
  GruGates<V> gates;  // of the pre-activations, hn's own included
  V h_prev;  // the direct path h -> z * h_prev; the paths through W_hh come from the product
};

template <class V, class A>
RNN_FUSED_HD GruGrads<V> gru_backward(const GruGates<V>& a, V h_prev, V dh,
                                      const CellOptions<A>& options) {
  const A slope = options.gate_slope;
  const V dn = dh * (1 - a.z) * (1 - a.n * a.n);
  return {{dn * a.hn * a.r * (slope - slope * a.r),
           dh * (h_prev - a.n) * a.z * (slope - slope * a.z), dn, dn * a.r},
          dh * a.z};
}

}  // namespace rnn_fused
