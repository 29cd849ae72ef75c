// Numbers as the tests see them: always double, stored as any of the layer's types.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <vector>

#include "csrc/core/params.h"

namespace rnn_fused {

// An IEEE format of 16 bits: a sign, the exponent, `mantissa` bits.
struct Format16 {
  int mantissa;
  int min_exponent;  // of normal numbers

  uint16_t infinity() const { return 0x7fff >> mantissa << mantissa; }

  double decode(uint16_t bits) const {
    const int magnitude = bits & 0x7fff;
    const int exponent = magnitude >> mantissa, fraction = magnitude & ((1 << mantissa) - 1);
    const double sign = bits & 0x8000 ? -1 : 1;
    if (magnitude > infinity()) return std::numeric_limits<double>::quiet_NaN();
    if (magnitude == infinity()) return sign * std::numeric_limits<double>::infinity();
    if (exponent == 0) return sign * std::ldexp(fraction, min_exponent - mantissa);
    return sign * std::ldexp(fraction + (1 << mantissa), min_exponent - mantissa + exponent - 1);
  }

  // To nearest, ties to even.
  uint16_t encode(double x) const {
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    if (std::isnan(x)) return sign | 0x7fff;
    if (std::isinf(x)) return sign | infinity();
    const int exponent = std::max(std::ilogb(x), min_exponent);
    const double units = std::nearbyint(std::ldexp(std::abs(x), mantissa - exponent));
    // The leading bit of a normal number, 1 << mantissa, adds one to the exponent field.
    const double bits = units + std::ldexp(exponent - min_exponent, mantissa);
    return sign | static_cast<uint16_t>(std::min<double>(bits, infinity()));
  }
};

constexpr Format16 kBf16 = {7, -126}, kF16 = {10, -14};

inline int64_t size_of(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

inline DType accumulation(DType dtype) { return dtype == DType::f64 ? dtype : DType::f32; }

// Largest relative error of rounding to the type.
inline double roundoff(DType dtype) {
  switch (dtype) {
    case DType::f32: return 0x1p-24;
    case DType::f64: return 0x1p-53;
    case DType::bf16: return 0x1p-8;
    case DType::f16: return 0x1p-11;
  }
  return 0;
}

inline double round_to(DType dtype, double x) {
  switch (dtype) {
    case DType::f32: return static_cast<float>(x);
    case DType::f64: return x;
    case DType::bf16: return kBf16.decode(kBf16.encode(x));
    case DType::f16: return kF16.decode(kF16.encode(x));
  }
  return 0;
}

// A tensor on the heap, exactly as large as its elements so that AddressSanitizer sees any overrun,
// and NaN until it is written. An empty one has a null pointer.
class Array {
 public:
  Array() = default;
  Array(DType dtype, int64_t size) : dtype_(dtype), bytes_(size * size_of(dtype), 0xff) {}

  static Array zeros(DType dtype, int64_t size) {
    Array array(dtype, size);
    for (int64_t i = 0; i < size; ++i) array.set(i, 0);
    return array;
  }

  int64_t size() const { return static_cast<int64_t>(bytes_.size()) / size_of(dtype_); }
  void* at(int64_t i) { return bytes_.empty() ? nullptr : bytes_.data() + i * size_of(dtype_); }
  const void* at(int64_t i) const { return const_cast<Array*>(this)->at(i); }

  double operator[](int64_t i) const {
    switch (dtype_) {
      case DType::f32: return get<float>(i);
      case DType::f64: return get<double>(i);
      case DType::bf16: return kBf16.decode(get<uint16_t>(i));
      case DType::f16: return kF16.decode(get<uint16_t>(i));
    }
    return 0;
  }

  void set(int64_t i, double x) {
    switch (dtype_) {
      case DType::f32: return store(i, static_cast<float>(x));
      case DType::f64: return store(i, x);
      case DType::bf16: return store(i, kBf16.encode(x));
      case DType::f16: return store(i, kF16.encode(x));
    }
  }

  // Of an empty array, an empty one.
  Array part(int64_t begin, int64_t count) const {
    Array result(dtype_, bytes_.empty() ? 0 : count);
    std::copy_n(bytes_.begin() + (bytes_.empty() ? 0 : begin * size_of(dtype_)),
                result.bytes_.size(), result.bytes_.begin());
    return result;
  }
  void put(int64_t begin, const Array& part) {
    std::copy(part.bytes_.begin(), part.bytes_.end(), bytes_.begin() + begin * size_of(dtype_));
  }

  std::vector<double> values() const {
    std::vector<double> all(size());
    for (int64_t i = 0; i < size(); ++i) all[i] = (*this)[i];
    return all;
  }

  bool operator==(const Array&) const = default;  // the same bits

 private:
  template <class E>
  E get(int64_t i) const {
    E e;
    std::memcpy(&e, bytes_.data() + i * sizeof(E), sizeof(E));
    return e;
  }
  template <class E>
  void store(int64_t i, E e) {
    std::memcpy(bytes_.data() + i * sizeof(E), &e, sizeof(E));
  }

  DType dtype_ = DType::f64;
  std::vector<unsigned char> bytes_;
};

// Numbers that are the same with every standard library.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t bits() {  // splitmix64
    uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }
  double uniform(double low, double high) {
    return low + (high - low) * std::ldexp(static_cast<double>(bits() >> 11), -53);
  }
  int64_t integer(int64_t low, int64_t high) {  // both included
    return low + static_cast<int64_t>(bits() % static_cast<uint64_t>(high - low + 1));
  }
  bool coin() { return bits() & 1; }
  template <class T>
  T one_of(std::initializer_list<T> values) {
    return values.begin()[integer(0, static_cast<int64_t>(values.size()) - 1)];
  }
  Array array(DType dtype, int64_t size, double bound) {
    Array a(dtype, size);
    for (int64_t i = 0; i < size; ++i) a.set(i, uniform(-bound, bound));
    return a;
  }

 private:
  uint64_t state_;
};

}  // namespace rnn_fused
