// The vectorised activations and 16-bit conversions of every instruction set, against exact values.
#include <doctest/doctest.h>

#include <array>

#include "tests/cpp/math_isa.h"
#include "tests/cpp/names.h"
#include "tests/cpp/storage.h"

namespace rnn_fused {
namespace {

struct NamedMath {
  Isa isa;
  const IsaMath* math;
};

std::vector<NamedMath> supported_math() {
  const NamedMath all[] = {
      {Isa::portable, &portable::math},
#if defined(__x86_64__)
      {Isa::avx2, &avx2::math},
      {Isa::avx512, &avx512::math},
      {Isa::avx512_bf16, &avx512_bf16::math},
      {Isa::amx_bf16, &amx_bf16::math},
#endif
  };
  std::vector<NamedMath> supported;
  for (const NamedMath& m : all)
    if (isa_supported(m.isa)) supported.push_back(m);
  return supported;
}

template <class A>
const Activations<A>& activations(const IsaMath& math) {
  if constexpr (sizeof(A) == 4)
    return math.f32;
  else
    return math.f64;
}

// Points at a time: they stay in the cache.
constexpr int64_t kBlock = 4096;

// The largest error of one function, in units in the last place of the exact value, for each
// instruction set. E holds the exact values: it has at least 11 bits more than A.
template <class A, class E>
class Sweep {
 public:
  Sweep(Map<A, A> Activations<A>::* function, E (*exact)(E))
      : function_(function), exact_(exact), math_(supported_math()), worst_(math_.size()) {}

  void add(A x) {
    x_[count_++] = x;
    if (count_ == kBlock) measure();
  }

  void check(double ulp) {
    std::fill(x_.begin() + count_, x_.end(), A{});
    measure();
    for (size_t i = 0; i < math_.size(); ++i) {
      INFO(math_[i].isa, ": ", worst_[i].ulp, " ulp at ", worst_[i].x);
      CHECK(worst_[i].ulp <= ulp);
    }
  }

 private:
  struct Worst {
    double ulp = 0;
    A x = 0;
  };

  void measure() {
    using Limits = std::numeric_limits<A>;
    for (int64_t i = 0; i < kBlock; ++i) {
      expected_[i] = exact_(x_[i]);
      const int exponent = std::max(std::ilogb(expected_[i]), Limits::min_exponent - 1);
      per_ulp_[i] = std::ldexp(E{1}, Limits::digits - 1 - exponent);
    }
    for (size_t m = 0; m < math_.size(); ++m) {
      (activations<A>(*math_[m].math).*function_)(x_.data(), y_.data(), kBlock);
      for (int64_t i = 0; i < kBlock; ++i) {
        const double ulp = static_cast<double>(std::abs(y_[i] - expected_[i]) * per_ulp_[i]);
        if (!(ulp <= worst_[m].ulp)) worst_[m] = {ulp, x_[i]};
      }
    }
    count_ = 0;
  }

  Map<A, A> Activations<A>::* function_;
  E (*exact_)(E);
  std::vector<NamedMath> math_;
  std::vector<Worst> worst_;
  int64_t count_ = 0;
  std::array<A, kBlock> x_{}, y_{};
  std::array<E, kBlock> expected_{}, per_ulp_{};
};

template <class E>
E exact_sigmoid(E x) {
  return 1 / (1 + std::exp(-x));
}
template <class E>
E exact_tanh(E x) {
  return std::tanh(x);
}

// Every 257th bit pattern with |x| <= limit: all exponents, and all low bits of the mantissa.
template <class Body>
void for_floats(float limit, const Body& body) {
  const uint32_t end = std::bit_cast<uint32_t>(limit);
  for (uint32_t bits = 0; bits <= end; bits += 257) {
    body(std::bit_cast<float>(bits));
    body(-std::bit_cast<float>(bits));
  }
  body(limit);
  body(-limit);
}

// Half of the points even over the range, half over its exponents from 2^-60 on.
template <class Body>
void for_doubles(double limit, const Body& body) {
  Random random(1);
  for (int i = 0; i < 400'000; ++i) {
    body(random.uniform(-limit, limit));
    const double x = std::exp2(random.uniform(-60, std::log2(limit)));
    body(random.coin() ? x : -x);
  }
  body(limit);
  body(-limit);
}

// As stated in csrc/cpu/math.h.
constexpr double kUlp = 3.1;
// Below, the sigmoid is 0; its value here is next to the smallest normal number.
constexpr double kSigmoidLimitFloat = 87, kSigmoidLimitDouble = 708;

TEST_CASE("sigmoid in float is as accurate as stated") {
  Sweep<float, double> sweep(&Activations<float>::sigmoid, exact_sigmoid<double>);
  for_floats(kSigmoidLimitFloat, [&](float x) { sweep.add(x); });
  sweep.check(kUlp);
}

TEST_CASE("tanh in float is as accurate as stated") {
  Sweep<float, double> sweep(&Activations<float>::tanh, exact_tanh<double>);
  for_floats(100, [&](float x) { sweep.add(x); });
  sweep.check(kUlp);
}

TEST_CASE("sigmoid in double is as accurate as stated") {
  Sweep<double, long double> sweep(&Activations<double>::sigmoid, exact_sigmoid<long double>);
  for_doubles(kSigmoidLimitDouble, [&](double x) { sweep.add(x); });
  sweep.check(kUlp);
}

TEST_CASE("tanh in double is as accurate as stated") {
  Sweep<double, long double> sweep(&Activations<double>::tanh, exact_tanh<long double>);
  for_doubles(30, [&](double x) { sweep.add(x); });
  sweep.check(kUlp);
}

template <class A>
A apply(Map<A, A> function, A x) {
  std::array<A, kMostLanes> in, out;
  in.fill(x);
  function(in.data(), out.data(), kMostLanes);
  for (A y : out) CHECK(std::memcmp(&y, &out[0], sizeof(A)) == 0);
  return out[0];
}

TEST_CASE_TEMPLATE("activations keep NaN and signed zero and saturate", A, float, double) {
  using Limits = std::numeric_limits<A>;
  constexpr A inf = Limits::infinity(), nan = Limits::quiet_NaN();
  for (const NamedMath& m : supported_math()) {
    CAPTURE(m.isa);
    const Activations<A>& f = activations<A>(*m.math);
    for (A x : {nan, -nan}) {
      CHECK(std::isnan(apply(f.sigmoid, x)));
      CHECK(std::isnan(apply(f.tanh, x)));
      CHECK(std::isnan(apply(f.relu, x)));
    }
    for (A zero : {A{0}, -A{0}}) {
      CHECK(apply(f.sigmoid, zero) == A{0.5});
      CHECK(apply(f.tanh, zero) == 0);
      CHECK(std::signbit(apply(f.tanh, zero)) == std::signbit(zero));
      CHECK(apply(f.relu, zero) == 0);
    }
    const A one = sizeof(A) == 4 ? 18 : 38;  // from here on 1 is the nearest number
    for (A x : {one, A{100}, A{800}, Limits::max(), inf}) {
      CAPTURE(x);
      CHECK(apply(f.sigmoid, x) == 1);
      CHECK(apply(f.tanh, x) == 1);
      CHECK(apply(f.tanh, -x) == -1);
      CHECK(apply(f.relu, x) == x);
      CHECK(apply(f.relu, -x) == 0);
    }
    for (A x : {A{-800}, Limits::lowest(), -inf}) CHECK(apply(f.sigmoid, x) == 0);
    for (A x : {Limits::denorm_min(), Limits::min(), Limits::min() / 2}) {
      CHECK(apply(f.tanh, x) == x);
      CHECK(apply(f.tanh, -x) == -x);
    }
  }
}

struct Conversion {
  doctest::String name;
  Format16 format;
  Conversions IsaMath::* functions;
};
const Conversion kConversions[] = {{"bfloat16", kBf16, &IsaMath::bf16},
                                   {"float16", kF16, &IsaMath::f16}};

// Of bfloat16, the instruction sets with conversions of their own take subnormal numbers as zero.
uint16_t stored(Isa isa, const Format16& format, float x) {
  const bool flushed = isa >= Isa::avx512_bf16 && format.mantissa == kBf16.mantissa &&
                       std::fpclassify(x) == FP_SUBNORMAL;
  return format.encode(flushed ? std::copysign(0.0f, x) : x);
}

TEST_CASE("every 16-bit pattern loads as its value and stores back") {
  std::vector<uint16_t> patterns(0x10000), back(0x10000);
  for (int i = 0; i < 0x10000; ++i) patterns[i] = static_cast<uint16_t>(i);
  for (const NamedMath& m : supported_math())
    for (const auto& [name, format, functions] : kConversions) {
      CAPTURE(m.isa);
      CAPTURE(name);
      std::vector<float> values(0x10000);
      (m.math->*functions).load(patterns.data(), values.data(), 0x10000);
      (m.math->*functions).store(values.data(), back.data(), 0x10000);
      int wrong = 0;
      for (int i = 0; i < 0x10000; ++i) {
        const double expected = format.decode(patterns[i]);
        if (std::isnan(expected))
          wrong += !std::isnan(values[i]) || !std::isnan(format.decode(back[i]));
        else
          wrong += values[i] != expected || back[i] != stored(m.isa, format, values[i]);
      }
      CHECK(wrong == 0);
    }
}

TEST_CASE("16-bit stores round to nearest even and keep NaN, infinity and subnormals") {
  // The high half of a float is any pattern. Of the low half, the values next to a multiple of
  // 0x1000: all ties of both types, those of float16's subnormals included, are such multiples.
  constexpr int64_t kLow = 3 * 16;
  std::vector<float> values(0x10000 * kLow);
  for (uint32_t high = 0; high < 0x10000; ++high)
    for (uint32_t i = 0; i < kLow; ++i) {
      const uint32_t low = (i / 3 * 0x1000 + i % 3 - 1) & 0xffff;
      values[high * kLow + i] = std::bit_cast<float>(high << 16 | low);
    }
  const int64_t n = static_cast<int64_t>(values.size());
  std::vector<uint16_t> actual(n);
  for (const auto& [name, format, functions] : kConversions)
    for (const NamedMath& m : supported_math()) {
      CAPTURE(name);
      CAPTURE(m.isa);
      (m.math->*functions).store(values.data(), actual.data(), n);
      int64_t wrong = 0;
      for (int64_t i = 0; i < n; ++i)
        wrong += std::isnan(values[i]) ? !std::isnan(format.decode(actual[i]))
                                       : actual[i] != stored(m.isa, format, values[i]);
      CHECK(wrong == 0);
    }
}

}  // namespace
}  // namespace rnn_fused
