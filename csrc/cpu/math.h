// Vectorised exp, sigmoid and tanh for float and double, in the compiler's vector extensions.
//
// Largest errors, relative to the exact value: 3.1 ulp (tests/cpp/math_test.cpp). NaN gives NaN,
// infinities saturate; sigmoid is 0 below -87 (float), where it is 1.6e-38, or -708 (double),
// 3e-308.
#pragma once

#include "csrc/cpu/simd.h"

namespace rnn_fused::RNN_FUSED_ISA {

template <class A>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  using Int = int32_t;
  static constexpr int mantissa_bits = 23;
  static constexpr Int exponent_bias = 127;
  // Adding it rounds to an integer n, with n + exponent_bias in the low bits.
  static constexpr float round_magic = 0x1.8p23f + exponent_bias;
  static constexpr float log2e = 0x1.715476p+0f;
  static constexpr float ln2_high = 0x1.62e4p-1f;  // short enough that n * ln2_high is exact
  static constexpr float ln2_low = 0x1.7f7d1cp-20f;
  static constexpr float sigmoid_limit = 87.0f;  // exp stays a normal number
  static constexpr float tanh_limit = 9.1f;      // beyond it tanh rounds to 1
  // expm1(r) = r + r^2 * q(r) on |r| <= ln2 / 2. Weighted least squares, reweighted towards equal
  // ripple (Lawson): relative error of expm1 1.4e-8.
  static constexpr float q[] = {0x1.fffffep-2f, 0x1.5554b0p-3f, 0x1.555674p-5f, 0x1.1227b0p-7f,
                                0x1.6bebfep-10f};
};

template <>
struct ExpConstants<double> {
  using Int = int64_t;
  static constexpr int mantissa_bits = 52;
  static constexpr Int exponent_bias = 1023;
  static constexpr double round_magic = 0x1.8p52 + exponent_bias;
  static constexpr double log2e = 0x1.71547652b82fep+0;
  static constexpr double ln2_high = 0x1.62e42fefap-1;
  static constexpr double ln2_low = 0x1.cf79abc9e3b3ap-40;
  static constexpr double sigmoid_limit = 708.0;
  static constexpr double tanh_limit = 20.0;
  // Taylor: the first omitted term is below 2^-54 of r.
  static constexpr double q[] = {1.0 / 2,       1.0 / 6,        1.0 / 24,        1.0 / 120,
                                 1.0 / 720,     1.0 / 5040,     1.0 / 40320,     1.0 / 362880,
                                 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800};
};

template <class A>
struct Math {
  using V = Vec<A>;
  using C = ExpConstants<A>;
  using Int = typename C::Int;
  using IntV = VecLike<A, Int>;

  static V sigmoid(V x) {
    const Reduced e = reduce(-clamp(x, C::sigmoid_limit));
    const V y = reciprocal(e.scale * e.expm1 + (e.scale + 1));
    // A gate that is shut lets nothing through: what is left, times a huge x, would be a gradient.
    return x < -C::sigmoid_limit ? V{} : y;
  }

  // tanh|x| = expm1(2|x|) / (expm1(2|x|) + 2), which keeps the relative accuracy near zero; of the
  // magnitude, because near 1 the error of expm1 then cancels, and with it that of 1 - tanh^2.
  static V tanh(V x) {
    const IntV sign = bit_cast<IntV>(x) & sign_bit();
    const V magnitude = bit_cast<V>(bit_cast<IntV>(x) ^ sign);
    const Reduced e = reduce(2 * lesser(broadcast(C::tanh_limit), magnitude));
    const V expm1 = e.scale * e.expm1 + (e.scale - 1);
    return bit_cast<V>(bit_cast<IntV>(expm1 * reciprocal(expm1 + 2)) ^ sign);
  }

  static V relu(V x) { return x < 0 ? V{} : x; }  // NaN stays NaN, as in torch
  static V relu_grad(V y, V dy) { return y <= 0 ? V{} : dy; }

 private:
  // 1 / x for normal x with a normal result. A division takes twice as long as an estimate and a
  // Newton step, where the estimate is good enough (AVX-512: 14 bits).
  static V reciprocal(V x) {
#if defined(__AVX512F__)
    if constexpr (sizeof(A) == 4) {
      const V estimate = (V)_mm512_maskz_rcp14_ps(0xffff, (__m512)x);
      // A fused product: its rounding would be as large as the correction.
      const V error = (V)_mm512_fnmadd_ps((__m512)x, (__m512)estimate, _mm512_set1_ps(1));
      return estimate + estimate * error;
    }
#endif
    return 1 / x;
  }

  struct Reduced {  // exp = scale * (1 + expm1)
    V scale, expm1;
  };

  static IntV sign_bit() { return bit_cast<IntV>(broadcast(A(-0.0))); }

  static V clamp(V x, A limit) { return lesser(broadcast(limit), greater(broadcast(-limit), x)); }

  static Reduced reduce(V x) {
    const V shifted = x * C::log2e + C::round_magic;
    const V n = shifted - C::round_magic;
    const V r = (x - n * C::ln2_high) - n * C::ln2_low;
    constexpr int degree = sizeof(C::q) / sizeof(A);
    V q = V{} + C::q[degree - 1];
    for (int i = degree - 2; i >= 0; --i) q = q * r + C::q[i];
    return {bit_cast<V>(bit_cast<IntV>(shifted) << C::mantissa_bits), r + r * r * q};
  }
};

}  // namespace rnn_fused::RNN_FUSED_ISA
