// Comparisons of what kernels wrote with what the reference computed.
#pragma once

#include <doctest/doctest.h>

#include "tests/cpp/reference.h"

namespace rnn_fused {

// Rounding errors of the type that a value may have gathered over the steps.
inline double tolerance(DType dtype) { return (size_of(dtype) == 2 ? 2 : 32) * roundoff(dtype); }
inline double tolerance(const Layer& l) { return l.split ? 0x1p-14 : tolerance(l.dtype); }

// What was not to be written, NaN in `expected`, must be NaN still.
inline void check_close(const doctest::String& what, const Array& actual, const Array& expected,
                        double tolerance) {
  REQUIRE(actual.size() == expected.size());
  double worst = 0;
  int64_t at = 0;
  for (int64_t i = 0; i < actual.size(); ++i) {
    if (std::isnan(actual[i]) && std::isnan(expected[i])) continue;
    const double error = std::abs(actual[i] - expected[i]) / std::max(1.0, std::abs(expected[i]));
    if (error <= worst) continue;
    worst = std::isnan(error) ? std::numeric_limits<double>::infinity() : error;
    at = i;
  }
  INFO(what, "[", at, "] is ", worst / tolerance, " times the tolerance off");
  CHECK(worst <= tolerance);
}

// saved: whether gates and cells are there.
inline void check_close(const Layer& l, const Forward& actual, const Forward& expected,
                        bool saved = true) {
  const double tol = tolerance(l);
  check_close("output", actual.output, expected.output, tol);
  for (int d = 0; d < l.directions; ++d) {
    CAPTURE(d);
    const Forward::Direction &a = actual.direction[d], &e = expected.direction[d];
    if (saved) check_close("gates", a.gates, e.gates, tol);
    // c stays in float for the 16-bit types: it has the errors of h, damped, but none of its own.
    if (saved) check_close("cells", a.cells, e.cells, size_of(l.dtype) == 2 ? tol / 16 : tol);
    check_close("h_n", a.h_n, e.h_n, tol);
    check_close("c_n", a.c_n, e.c_n, tol);
  }
}

inline void check_close(const Layer& l, const Backward& actual, const Backward& expected) {
  const double tol = tolerance(l);
  for (int d = 0; d < l.directions; ++d) {
    CAPTURE(d);
    const Backward::Direction &a = actual.direction[d], &e = expected.direction[d];
    check_close("grad_gates", a.gates, e.gates, tol);
    check_close("grad_projected", a.projected, e.projected, tol);
    check_close("hidden", a.hidden, e.hidden, tol);
    check_close("grad_h0", a.h0, e.h0, tol);
    check_close("grad_c0", a.c0, e.c0, tol);
    check_close("grad_reset_h", a.reset_h, e.reset_h, tol);
    check_close("grad_reset_c", a.reset_c, e.reset_c, tol);
  }
}

inline bool same_results(const Forward& a, const Forward& b, int directions) {
  bool same = a.output == b.output;
  for (int d = 0; d < directions; ++d)
    same = same && a.direction[d].h_n == b.direction[d].h_n &&
           a.direction[d].c_n == b.direction[d].c_n;
  return same;
}

// The input's part of the pre-activations, rounded to `dtype`.
struct Products {
  Array direction[2];
  Products(const Layer& l, DType dtype) {
    for (int d = 0; d < l.directions; ++d) direction[d] = multiply_input(l, d, dtype);
  }
};

}  // namespace rnn_fused
