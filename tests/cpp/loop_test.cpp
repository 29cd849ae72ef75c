// Every loop and product of the CPU core, on every instruction set, against plain double maths.
#include <doctest/doctest.h>

#include <array>

#include "tests/cpp/check.h"
#include "tests/cpp/isas.h"
#include "tests/cpp/padded.h"

namespace rnn_fused {
namespace {

constexpr Host kOneThread = {nullptr, 1};

void check_layer(const Sizes& sizes, uint64_t seed) {
  CAPTURE(sizes);
  const Layer l(sizes, seed);
  const Products exact(l, DType::f64), rounded(l, l.dtype);
  const Forward expected = reference_forward(l, exact.direction);
  const Forward expected_rounded = reference_forward(l, rounded.direction);
  const Forward saved = run_forward(Isa::portable, l, kOneThread, true);
  const bool absent_output = seed % 3 == 1, absent_state = seed % 3 == 2;
  const Upstream upstream(l, seed, absent_output, absent_state);
  const Backward expected_grads = reference_backward(l, saved, upstream);
  for (Isa isa : tested_isas()) {
    CAPTURE(isa);
    {
      INFO("the kernel multiplies the input");
      const Forward result = run_forward(isa, l, kOneThread, true);
      check_close(l, result, expected);
      CHECK(same_results(result, run_forward(isa, l, kOneThread, false), l.directions));
      for (int d = 0; d < l.directions && !l.rnn(); ++d)
        CHECK(rebuild_gates(isa, l, kOneThread, result, d) == result.direction[d].gates);
    }
    {
      INFO("the weights were packed before");
      const Forward result = run_packed(isa, l, kOneThread);
      if (repays_packing(l.shape()) && !l.split)  // of packed weights, products are exact
        CHECK(result == run_forward(isa, l, kOneThread, false));
      else
        check_close(l, result, expected, false);
    }
    {
      INFO("the caller multiplied the input");
      const Forward result = run_forward(isa, l, kOneThread, true, rounded.direction);
      check_close(l, result, expected_rounded);
      CHECK(same_results(result, run_forward(isa, l, kOneThread, false, rounded.direction),
                         l.directions));
    }
    const Backward grads = run_backward(isa, l, kOneThread, saved, upstream);
    check_close(l, grads, expected_grads);
    const int64_t window = 1 + static_cast<int64_t>(seed % static_cast<uint64_t>(l.T));
    CAPTURE(window);
    CHECK(run_backward(isa, l, kOneThread, saved, upstream, window) == grads);
    if (!l.ragged) continue;
    const Padded padded(l);
    CHECK(padded.run_forward(isa, kOneThread, true) == run_forward(isa, l, kOneThread, true));
    CHECK(padded.run_backward(isa, kOneThread, saved, upstream, window) == grads);
  }
}

TEST_CASE("layers of any size equal the reference") {
  Random random(1);
  for (DType dtype : kDTypes)
    for (Cell cell : kCells)
      for (int i = 0; i < 18; ++i) {
        Sizes s{cell, dtype, random.integer(1, 9), random.integer(1, 17)};
        s.I = random.one_of({1, 2, 3, 7, 16, 19, 40});
        s.H = random.one_of({1, 2, 5, 8, 13, 16, 17, 31, 33, 48, 67});
        draw_kind(s, random);
        check_layer(s, random.bits());
      }
}

// Where they can be: with tile registers, whole runs of each gate, and packed weights.
TEST_CASE("float32 layers with split products equal the reference") {
  Random random(7);
  for (Cell cell : kCells)
    for (int i = 0; i < 24; ++i) {
      Sizes s{cell, DType::f32, random.integer(2, 9), random.integer(1, 40)};
      s.I = random.one_of({1, 7, 16, 19, 40});
      s.H = random.one_of({16, 32, 33, 48, 80});
      draw_kind(s, random);
      s.split = true;
      const uint64_t seed = random.bits();
      check_layer(s, seed);

      Sizes exact = s;
      exact.split = false;
      const Layer l(s, seed);
      for (Isa isa : tested_isas()) {
        CAPTURE(s);
        CAPTURE(isa);
        const bool splits = isa == Isa::amx_bf16 && l.shape().split;
        CHECK(splits != (run_forward(isa, l, kOneThread, false) ==
                         run_forward(isa, Layer(exact, seed), kOneThread, false)));
      }
    }
}

// So few rows that the weights are read as they lie in memory (plan.cpp).
TEST_CASE("layers of few rows equal the reference") {
  Random random(2);
  for (DType dtype : kDTypes)
    for (Cell cell : kCells)
      for (int i = 0; i < 6; ++i) {
        Sizes s{cell, dtype, random.integer(1, 3), random.integer(1, 3)};
        s.I = random.one_of({1, 5, 33, 70});
        s.H = random.one_of({1, 7, 16, 35, 67});
        s.P = cell == Cell::lstm && random.coin() ? random.integer(1, s.H) : 0;
        s.directions = static_cast<int>(random.integer(1, 2));
        s.ragged = random.coin();
        s.resets = random.coin();
        s.options = s.ragged != s.resets;
        check_layer(s, random.bits());
      }
}

// So many that the input product takes several windows of timesteps (input_product.h).
TEST_CASE("layers of many rows equal the reference") {
  for (DType dtype : kDTypes)
    for (Cell cell : kCells)
      for (bool ragged : {false, true})
        check_layer({cell, dtype, 83, 5, 3, 67, cell == Cell::lstm && ragged ? 9 : 0, 2, ragged},
                    5);
}

// The timesteps [begin, end) of sequence b of `l`, as a batch of its own.
Layer alone(const Layer& l, int64_t b, int64_t begin, int64_t end) {
  Sizes sizes = l;
  sizes.T = end - begin;
  sizes.B = 1;
  sizes.ragged = false;
  Layer one(sizes, 0);
  for (int64_t t = 0; t < one.T; ++t)
    for (int64_t i = 0; i < l.I; ++i)
      one.input.set(t * l.I + i, l.input[l.row(begin + t, b) * l.I + i]);
  for (int d = 0; d < l.directions; ++d) {
    const Layer::Direction& w = l.direction[d];
    one.direction[d] = w;
    one.direction[d].h0 = w.h0.part(b * l.P, l.P);
    one.direction[d].c0 = w.c0.part(b * l.H, l.H);
  }
  return one;
}

// The rows of `part`, sequence 0, are those of `whole` from (b, begin) on.
bool same_rows(const Layer& part, const Forward& of_part, const Layer& whole,
               const Forward& of_whole, int64_t b, int64_t begin) {
  for (int64_t t = 0; t < part.T; ++t)
    for (int64_t p = 0; p < part.directions * part.P; ++p)
      if (of_part.output[t * part.output_stride() + p] !=
          of_whole.output[whole.row(begin + t, b) * whole.output_stride() + p])
        return false;
  return true;
}

TEST_CASE("a sequence has the same bits alone and in a batch") {
  for (DType dtype : kDTypes)
    for (Cell cell : kCells)
      for (int64_t H : {20, 67}) {
        Sizes sizes{cell, dtype, 40, 7, 5, H, cell == Cell::lstm ? 19 : 0, 2, true};
        const Layer l(sizes, 1);
        for (Isa isa : tested_isas()) {
          const Forward together = run_forward(isa, l, kOneThread, true);
          for (int64_t b = 0; b < l.B; ++b) {
            if (l.lengths[b] < 12) continue;  // whose weights are not packed: another order of sums
            const Layer one = alone(l, b, 0, l.lengths[b]);
            INFO(isa, " ", sizes, " b=", b);
            CHECK(same_rows(one, run_forward(isa, one, kOneThread, false), l, together, b, 0));
          }
        }
      }
}

TEST_CASE("a sequence has the same bits in one call and in two") {
  for (DType dtype : kDTypes)
    for (Cell cell : kCells) {
      if (cell == Cell::lstm && size_of(dtype) == 2) continue;  // c_n is rounded, c is not
      const Layer l({cell, dtype, 30, 1, 5, 40}, 1);
      for (Isa isa : tested_isas()) {
        INFO(isa, " ", static_cast<const Sizes&>(l));
        const Forward whole = run_forward(isa, l, kOneThread, false);
        const Layer first = alone(l, 0, 0, 14);
        const Forward begin = run_forward(isa, first, kOneThread, false);
        Layer second = alone(l, 0, 14, l.T);
        second.direction[0].h0 = begin.direction[0].h_n;
        second.direction[0].c0 = begin.direction[0].c_n;
        const Forward end = run_forward(isa, second, kOneThread, false);
        CHECK(same_rows(first, begin, l, whole, 0, 0));
        CHECK(same_rows(second, end, l, whole, 0, 14));
        CHECK(end.direction[0].h_n == whole.direction[0].h_n);
      }
    }
}

// |actual - expected| of a sum: rounding to the storage type, and `terms` roundings of the
// accumulation type on the sum of magnitudes.
struct Sum {
  double value = 0, magnitude = 0;
  void add(double x) {
    value += x;
    magnitude += std::abs(x);
  }
  bool equals(double actual, DType dtype, int64_t terms) const {
    const double subnormal = dtype == DType::f16 ? 0x1p-25 : 0;  // half of the smallest
    return std::abs(actual - value) <=
           subnormal + roundoff(dtype) * std::abs(value) +
               static_cast<double>(terms) * roundoff(accumulation(dtype)) * magnitude;
  }
};

// Of float32, which a split product is off by: 2^-16.
constexpr int64_t kSplitErrors = 256;

TEST_CASE("the input's gradient equals the reference") {
  Random random(3);
  for (DType dtype : kDTypes)
    for (int i = 0; i < 24; ++i) {
      const int directions = static_cast<int>(random.integer(1, 2));
      const int64_t N = random.one_of({1, 5, 11, 12, 47, 48, 49, 101});
      const int64_t K = random.one_of({1, 2, 9, 32, 75}), I = random.one_of({1, 6, 16, 33, 64, 90});
      const int64_t stride = K + random.one_of({0, 7});
      Array grads[2], weights[2];
      for (int d = 0; d < directions; ++d) {
        grads[d] = random.array(dtype, N * stride, 1);
        weights[d] = random.array(dtype, K * I, 1);
      }
      const bool accumulate = i % 2, split = i % 3 == 1;
      std::vector<int64_t> place(N);  // every other row, backwards
      for (int64_t n = 0; n < N; ++n) place[n] = 2 * (N - 1 - n);
      std::vector<Sum> expected(N * I);
      for (Sum& sum : expected) sum.add(accumulate ? 0.5 : 0);
      for (int d = 0; d < directions; ++d)
        for (int64_t n = 0; n < N; ++n)
          for (int64_t k = 0; k < K; ++k)
            for (int64_t c = 0; c < I; ++c)
              expected[n * I + c].add(grads[d][n * stride + k] * weights[d][k * I + c]);
      for (Isa isa : tested_isas()) {
        Array actual(dtype, (2 * N - 1) * I);
        for (int64_t j = 0; accumulate && j < actual.size(); ++j) actual.set(j, 0.5);
        const Array before = actual;
        cpu_input_gradient(isa,
                           {dtype,
                            directions,
                            N,
                            K,
                            I,
                            stride,
                            {grads[0].at(0), grads[1].at(0)},
                            {weights[0].at(0), weights[1].at(0)},
                            actual.at(0),
                            place.data(),
                            accumulate,
                            split},
                           kOneThread);
        int64_t wrong = 0;
        for (int64_t j = 0; j < N * I; ++j)
          wrong += !expected[j].equals(actual[place[j / I] * I + j % I], dtype,
                                       directions * K + 2 + split * kSplitErrors);
        for (int64_t n = 0; n < N - 1; ++n)
          wrong += actual.part((2 * n + 1) * I, I) != before.part((2 * n + 1) * I, I);
        INFO(isa, " ", dtype, " N=", N, " K=", K, " I=", I, " D=", directions,
             " accumulate=", accumulate);
        CHECK(wrong == 0);
      }
    }
}

TEST_CASE("outer products and the sums of rows equal the reference") {
  Random random(4);
  for (DType dtype : kDTypes)
    for (int i = 0; i < 24; ++i) {
      const int64_t N = random.one_of({1, 7, 8, 9, 100, 255, 256, 257, 300, 1023, 1025, 2100});
      const int64_t rows = random.one_of({1, 2, 13, 24, 50});
      const int64_t columns[2] = {random.one_of({1, 5, 16, 33, 64, 70}),
                                  random.one_of({0, 1, 16, 20, 48})};
      const int64_t stride = rows + random.one_of({0, 7});
      const int64_t bias_count = random.integer(0, 2);
      const Array left = random.array(dtype, N * stride, 1);
      const bool accumulate = i % 2, split = i % 3 == 1;
      const double before = accumulate ? 0.25 : 0;
      const DType of_result = accumulate ? accumulation(dtype) : dtype;
      std::vector<Sum> expected_sums(rows);
      for (Sum& sum : expected_sums) sum.add(before);
      for (int64_t j = 0; j < N * rows; ++j)
        expected_sums[j % rows].add(left[j / rows * stride + j % rows]);

      std::array<Array, 2> right;
      std::array<std::vector<const void*>, 2> pointers;
      std::array<std::vector<Sum>, 2> expected;
      for (int i = 0; i < 2; ++i) {
        right[i] = random.array(dtype, N * columns[i], 1);
        expected[i].resize(rows * columns[i]);
        for (Sum& sum : expected[i]) sum.add(before);
        for (int64_t n = 0; n < N; ++n) {
          const int64_t other = random.integer(0, N - 1);
          pointers[i].push_back(right[i].at(other * columns[i]));
          for (int64_t r = 0; r < rows; ++r)
            for (int64_t c = 0; c < columns[i]; ++c)
              expected[i][r * columns[i] + c].add(double(left[n * stride + r]) *
                                                  right[i][other * columns[i] + c]);
        }
      }
      for (Isa isa : tested_isas()) {
        std::array<Array, 2> actual, sums;
        for (int i = 0; i < 2; ++i) {
          actual[i] = Array(of_result, rows * columns[i]);
          sums[i] = Array(of_result, i < bias_count ? rows : 0);
          for (Array* results : {&actual[i], &sums[i]})
            for (int64_t j = 0; accumulate && j < results->size(); ++j) results->set(j, before);
        }
        cpu_outer_product(isa,
                          {dtype,
                           N,
                           rows,
                           left.at(0),
                           stride,
                           {{pointers[0].data(), columns[0], actual[0].at(0)},
                            {pointers[1].data(), columns[1], actual[1].at(0)}},
                           {sums[0].at(0), sums[1].at(0)},
                           accumulate,
                           split},
                          kOneThread);
        int64_t wrong = 0;
        for (int i = 0; i < 2; ++i) {
          for (int64_t j = 0; j < actual[i].size(); ++j)
            wrong += !expected[i][j].equals(actual[i][j], of_result,
                                            N + 2 + accumulate + split * kSplitErrors);
          for (int64_t r = 0; r < sums[i].size(); ++r)
            wrong += !expected_sums[r].equals(sums[i][r], of_result, N + 2 + accumulate);
        }
        INFO(isa, " ", dtype, " N=", N, " rows=", rows, " columns=", columns[0], "+", columns[1]);
        CHECK(wrong == 0);
      }
    }
}

// The sum of all results, weighted as `upstream` says: its gradient is what the backward pass
// computes.
double loss(const Layer& l, const Array* products, const Upstream& upstream) {
  const Forward result = reference_forward(l, products);
  double sum = 0;
  const auto add = [&](const Array& a, const Array& weight) {
    for (int64_t i = 0; i < a.size(); ++i)
      if (!std::isnan(a[i])) sum += a[i] * weight[i];
  };
  add(result.output, upstream.output);
  for (int d = 0; d < l.directions; ++d) {
    add(result.direction[d].h_n, upstream.h_n[d]);
    add(result.direction[d].c_n, upstream.c_n[d]);
  }
  return sum;
}

TEST_CASE("the reference's gradients are the differences of its forward pass") {
  for (Cell cell : kCells)
    for (int64_t P : {0, 2}) {
      if (P && cell != Cell::lstm) continue;
      Sizes sizes{cell, DType::f64, 4, 3, 2, 3, P, 2, true};
      sizes.resets = true;
      Layer l(sizes, 6);
      Products products(l, DType::f64);
      const Upstream upstream(l, 7);
      const Forward forward = reference_forward(l, products.direction);
      const Backward grads = reference_backward(l, forward, upstream);
      const auto check = [&](const doctest::String& what, Array& x, int64_t i, double gradient) {
        constexpr double kStep = 1e-5;
        const double value = x[i];
        x.set(i, value + kStep);
        const double above = loss(l, products.direction, upstream);
        x.set(i, value - kStep);
        const double below = loss(l, products.direction, upstream);
        x.set(i, value);
        CAPTURE(l);
        INFO(what, "[", i, "]");
        CHECK((above - below) / (2 * kStep) == doctest::Approx(gradient).epsilon(1e-8));
      };
      for (int d = 0; d < l.directions; ++d) {
        const Backward::Direction& g = grads.direction[d];
        Layer::Direction& w = l.direction[d];
        const int64_t GH = l.G() * l.H, SH = l.S() * l.H;
        for (int64_t n = 0; n < l.N; ++n)
          for (int64_t j = 0; j < GH; ++j)
            check("pre-activation", products.direction[d], n * GH + j, g.gates[n * SH + j]);
        for (int64_t i = 0; i < g.h0.size(); ++i) check("h0", w.h0, i, g.h0[i]);
        for (int64_t i = 0; i < g.c0.size(); ++i) check("c0", w.c0, i, g.c0[i]);
        for (int64_t i = 0; i < g.reset_h.size(); ++i) check("reset_h", w.reset_h, i, g.reset_h[i]);
        for (int64_t i = 0; i < g.reset_c.size(); ++i) check("reset_c", w.reset_c, i, g.reset_c[i]);
        for (int64_t j = 0; j < GH; ++j) {
          const int64_t saved = cell == Cell::gru && j >= 2 * l.H ? j + l.H : j;  // hn, not n
          double sum = 0;
          for (int64_t n = 0; n < l.N; ++n) sum += g.gates[n * SH + saved];
          check("bias_hh", w.bias_hh, j, sum);
        }
        for (int64_t i = 0; i < w.weight_hr.size(); ++i) {
          double sum = 0;
          for (int64_t n = 0; n < l.N; ++n)
            sum += g.projected[n * l.P + i / l.H] * g.hidden[n * l.H + i % l.H];
          check("weight_hr", w.weight_hr, i, sum);
        }
      }
    }
}

}  // namespace
}  // namespace rnn_fused
