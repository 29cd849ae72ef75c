// SIMD vectors from the compiler's vector extensions: one source for every instruction set.
//
// Included once per instruction set, with RNN_FUSED_ISA naming the namespace and
// RNN_FUSED_VECTOR_BYTES the width. Everything that the flags of one instruction set could compile
// lives in that namespace, so that no inline function is shared between differently compiled files.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

namespace rnn_fused::RNN_FUSED_ISA {

// Storage of the 16-bit types: bits only.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class T>
struct AccumulationType {
  using type = float;
};
template <>
struct AccumulationType<double> {
  using type = double;
};
template <class T>
using Acc = typename AccumulationType<T>::type;

template <class A>
constexpr int kLanes = RNN_FUSED_VECTOR_BYTES / sizeof(A);

template <class E, int N>
struct VectorOf {
  typedef E type __attribute__((vector_size(N * sizeof(E))));
};
// A register of A (float or double), and the same number of another element type.
template <class A>
using Vec = typename VectorOf<A, kLanes<A>>::type;
template <class A, class E>
using VecLike = typename VectorOf<E, kLanes<A>>::type;

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <class V>
inline V load_as(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <class V>
inline void store_as(void* p, const V& v) {
  std::memcpy(p, &v, sizeof(v));
}

// Loads a register of Acc<T> from kLanes elements of T, and stores one with rounding to nearest
// even.
inline Vec<float> load(const float* p) { return load_as<Vec<float>>(p); }
inline Vec<double> load(const double* p) { return load_as<Vec<double>>(p); }
inline void store(float* p, Vec<float> v) { store_as(p, v); }
inline void store(double* p, Vec<double> v) { store_as(p, v); }

using U16 = VecLike<float, uint16_t>;
using U32 = VecLike<float, uint32_t>;

inline Vec<float> load(const bf16* p) {
  return bit_cast<Vec<float>>(__builtin_convertvector(load_as<U16>(p), U32) << 16);
}

#if defined(__AVX512BF16__)
// Flushes subnormal values to zero, as the products of this instruction set do.
inline void store(bf16* p, Vec<float> v) { store_as(p, (__m256i)_mm512_cvtneps_pbh((__m512)v)); }
#else
inline void store(bf16* p, Vec<float> v) {
  const U32 bits = bit_cast<U32>(v);
  const U32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const U32 quiet_nan = (bits >> 16) | 0x40;
  store_as(p, __builtin_convertvector(v == v ? rounded : quiet_nan, U16));
}
#endif

#if defined(__AVX512F__)
inline Vec<float> load(const f16* p) {
  return reinterpret_cast<Vec<float>>(_mm512_maskz_cvtph_ps(0xffff, load_as<__m256i>(p)));
}
inline void store(f16* p, Vec<float> v) {
  store_as(p,
           _mm512_maskz_cvtps_ph(0xffff, reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__F16C__)
inline Vec<float> load(const f16* p) {
  return reinterpret_cast<Vec<float>>(_mm256_cvtph_ps(load_as<__m128i>(p)));
}
inline void store(f16* p, Vec<float> v) {
  store_as(p, _mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
}
#else
// Without conversion instructions: move the exponent by a multiplication, which also handles
// subnormals; infinities and NaN have the exponent all ones and are patched.
inline Vec<float> load(const f16* p) {
  const U32 half = __builtin_convertvector(load_as<U16>(p), U32);
  const U32 magnitude = (half & 0x7fff) << 13;
  const Vec<float> scaled = bit_cast<Vec<float>>(magnitude) * 0x1p112f;
  const U32 finite = bit_cast<U32>(scaled);
  const U32 special = magnitude | 0x7f800000;
  return bit_cast<Vec<float>>((magnitude >= 0x0f800000 ? special : finite) |
                              ((half & 0x8000) << 16));
}
inline void store(f16* p, Vec<float> v) {
  const U32 bits = bit_cast<U32>(v);
  const U32 sign = (bits >> 16) & 0x8000;
  const U32 magnitude = bits & 0x7fffffff;
  // Normal results: rebias and round to nearest even on the 13 bits that are dropped.
  const U32 normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Subnormal results: adding 0.5 aligns the mantissa so that the addition itself rounds.
  const Vec<float> aligned = bit_cast<Vec<float>>(magnitude) + 0.5f;
  const U32 subnormal = bit_cast<U32>(aligned) - 0x3f000000;
  const U32 overflow = magnitude > 0x7f800000 ? (U32{} + 0x7e00) : (U32{} + 0x7c00);
  const U32 finite = magnitude < 0x38800000 ? subnormal : normal;
  store_as(p, __builtin_convertvector((magnitude >= 0x477ff000 ? overflow : finite) | sign, U16));
}
#endif

// Lanes of a register of Acc<T> that `rest` more elements fill.
template <class T>
inline int lanes_left(int64_t rest) {
  return rest < kLanes<Acc<T>> ? static_cast<int>(rest) : kLanes<Acc<T>>;
}

// The first n lanes only; the others load as zero and are not stored.
template <class T>
inline Vec<Acc<T>> load(const T* p, int n) {
  if (n == kLanes<Acc<T>>) return load(p);
  T lanes[kLanes<Acc<T>>] = {};
  std::memcpy(lanes, p, n * sizeof(T));
  return load(lanes);
}

template <class T>
inline void store(T* p, Vec<Acc<T>> v, int n) {
  if (n == kLanes<Acc<T>>) return store(p, v);
  T lanes[kLanes<Acc<T>>];
  store(lanes, v);
  std::memcpy(p, lanes, n * sizeof(T));
}

// v as it reads back after being stored as T.
template <class T>
inline Vec<Acc<T>> round_to(Vec<Acc<T>> v) {
  if constexpr (sizeof(T) == sizeof(Acc<T>)) {
    return v;
  } else {
    T lanes[kLanes<Acc<T>>];
    store(lanes, v);
    return load(lanes);
  }
}

template <class A>
inline Vec<A> broadcast(A a) {
  return a - Vec<A>{};  // a + 0 would turn -0 into 0 and cost an addition
}

// The lesser and the greater; x where that is NaN. The compiler would not use the instructions,
// which treat the operands unequally as we want them.
template <class V>
inline V lesser(V limit, V x) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<V, Vec<float>>)
    return (V)_mm512_maskz_min_ps(0xffff, (__m512)limit, (__m512)x);
#elif defined(__AVX__)
  if constexpr (std::is_same_v<V, Vec<float>>) return (V)_mm256_min_ps((__m256)limit, (__m256)x);
#endif
  return limit < x ? limit : x;
}
template <class V>
inline V greater(V limit, V x) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<V, Vec<float>>)
    return (V)_mm512_maskz_max_ps(0xffff, (__m512)limit, (__m512)x);
#elif defined(__AVX__)
  if constexpr (std::is_same_v<V, Vec<float>>) return (V)_mm256_max_ps((__m256)limit, (__m256)x);
#endif
  return limit > x ? limit : x;
}

template <class T>
inline Acc<T> to_accumulation(T value) {
  return load(&value, 1)[0];
}

// The first halves, or the second ones, of all the kBlocks blocks that x consists of, and y.
template <class A, int kBlocks, bool kSecond, int... lane>
inline Vec<A> halves(Vec<A> x, Vec<A> y, std::integer_sequence<int, lane...>) {
  constexpr int kHalf = kLanes<A> / kBlocks / 2;
  return __builtin_shufflevector(
      x, y, (lane / kHalf * 2 * kHalf + lane % kHalf + (kSecond ? kHalf : 0))...);
}

// The sums over the lanes of as many registers as one has lanes: of each its first half plus its
// second, and so on. v is overwritten.
template <class A, int kBlocks = 1>
inline Vec<A> sums_of_lanes(Vec<A>* v) {
  constexpr int kCount = kLanes<A> / kBlocks;
  if constexpr (kCount == 1) {
    return v[0];
  } else {
    constexpr std::make_integer_sequence<int, kLanes<A>> lanes;
    for (int i = 0; i < kCount / 2; ++i)
      v[i] = halves<A, kBlocks, false>(v[2 * i], v[2 * i + 1], lanes) +
             halves<A, kBlocks, true>(v[2 * i], v[2 * i + 1], lanes);
    return sums_of_lanes<A, 2 * kBlocks>(v);
  }
}

}  // namespace rnn_fused::RNN_FUSED_ISA
