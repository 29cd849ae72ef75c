// Threads: the same bits for any number of them, and the plans that divide the work.
#include <doctest/doctest.h>

#include <array>
#include <atomic>
#include <numeric>
#include <thread>

#include "tests/cpp/isas.h"
#include "tests/cpp/padded.h"

namespace rnn_fused {
namespace {

using Body = void (*)(void* context, int64_t begin, int64_t end);

template <int kThreads>
void on_threads(int64_t n, Body body, void* context) {
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < kThreads; ++i) {
    const Range range = {n * i / kThreads, n * (i + 1) / kThreads};
    if (range.begin < range.end) threads.emplace_back(body, context, range.begin, range.end);
  }
  for (std::thread& thread : threads) thread.join();
}

// A nested parallel region.
void as_one_range(int64_t n, Body body, void* context) { body(context, 0, n); }

struct NamedHost {
  doctest::String name;
  Host host;
};
constexpr Host kOneThread = {as_one_range, 1};
const NamedHost kHosts[] = {
    {"2 threads", {on_threads<2>, 2}},           {"3 threads", {on_threads<3>, 3}},
    {"4 threads", {on_threads<4>, 4}},           {"3 asked for, 2 came", {on_threads<2>, 3}},
    {"4 asked for, 3 came", {on_threads<3>, 4}}, {"4 asked for, nested", {as_one_range, 4}},
};

// The division of work does not depend on the instruction set: the narrowest and the best.
std::vector<Isa> two_isas() {
  const Isa best = tested_isas().back();
  return best == Isa::portable ? std::vector{best} : std::vector{Isa::portable, best};
}

void check_same_bits(Sizes sizes, bool by_units) {
  sizes.resets = sizes.T % 2 == 0 || sizes.directions == 2;
  sizes.options = sizes.B % 2 == 0;
  CAPTURE(sizes);
  const Layer l(sizes, 1);
  const Padded padded(l);
  const Upstream upstream(l, 2);
  for (Isa isa : two_isas()) {
    CAPTURE(isa);
    const Forward forward = run_forward(isa, l, kOneThread, true);
    const Forward packed = run_packed(isa, l, kOneThread);
    const Backward backward = run_backward(isa, l, kOneThread, forward, upstream);
    for (const auto& [name, host] : kHosts) {
      CAPTURE(name);
      const Plan plan = plan_layer(l.shape(), host.threads);
      if (by_units && l.directions == host.threads) continue;  // a thread a direction is enough
      REQUIRE((by_units ? plan.unit_parts : plan.row_parts * l.directions) > 1);
      CHECK(run_forward(isa, l, host, true) == forward);
      CHECK(padded.run_forward(isa, host, true) == forward);
      CHECK(run_packed(isa, l, host) == packed);
      for (int64_t window : {l.T, (l.T + 2) / 3}) {
        CHECK(run_backward(isa, l, host, forward, upstream, window) == backward);
        CHECK(padded.run_backward(isa, host, forward, upstream, window) == backward);
      }
    }
  }
}

TEST_CASE("threads that divide the sequences change no bit") {
  for (DType dtype : kDTypes)
    for (Cell cell : kCells) {
      check_same_bits({cell, dtype, 9, 17, 5, 67, 0, 1, true}, false);
      check_same_bits({cell, dtype, 9, 5, 40, 90}, false);
      check_same_bits({cell, dtype, 9, 4, 5, 90, cell == Cell::lstm ? 33 : 0, 2}, false);
    }
}

TEST_CASE("threads that divide the hidden units in lockstep change no bit") {
  for (DType dtype : {DType::f32, DType::bf16})
    for (Cell cell : kCells) {
      check_same_bits({cell, dtype, 6, 1, 20, 250}, true);
      check_same_bits({cell, dtype, 5, 1, 3, 250, 0, 2}, true);
    }
  // Several windows of the input product (input_product.h).
  check_same_bits({Cell::lstm, DType::bf16, 160, 1, 19, 160}, true);
  check_same_bits({Cell::gru, DType::f32, 160, 1, 19, 160}, true);
}

// The stack layer by layer, each with the input that the one below left.
std::vector<Forward> run_in_turn(Isa isa, std::vector<Layer> layers) {
  std::vector<Forward> results;
  for (Layer& l : layers) {
    if (!results.empty()) l.input = results.back().output;
    results.push_back(run_packed(isa, l, kOneThread));
  }
  std::reverse(results.begin(), results.end());
  return results;
}

void check_stack(Sizes sizes, size_t count, bool side_by_side,
                 std::span<const NamedHost> hosts = kHosts,
                 const std::vector<Isa>& isas = two_isas()) {
  CAPTURE(sizes);
  CAPTURE(count);
  sizes.gap = 0;  // one layer's output is the next one's input
  std::vector<Layer> layers;
  for (size_t l = 0; l < count; ++l) {
    layers.emplace_back(sizes, l);
    // The same sequences.
    layers[l].N = layers[0].N;
    layers[l].lengths = layers[0].lengths;
    layers[l].active = layers[0].active;
    layers[l].starts = layers[0].starts;
    layers[l].reset_flags = layers[0].reset_flags;
    sizes.I = sizes.directions * (sizes.P ? sizes.P : sizes.H);
  }
  for (Isa isa : isas) {
    CAPTURE(isa);
    const std::vector<Forward> expected = run_in_turn(isa, layers);
    CHECK(run_stack(isa, layers, kOneThread) == expected);
    for (const auto& [name, host] : hosts) {
      CAPTURE(name);
      const auto layers_in_all = static_cast<int64_t>(count);
      REQUIRE((plan_stack(layers[0].shape(), layers_in_all, host.threads) > 1) == side_by_side);
      CHECK(run_stack(isa, layers, host) == expected);
    }
  }
}

TEST_CASE("layers of a stack side by side change no bit") {
  for (DType dtype : kDTypes)
    for (Cell cell : kCells) {
      Sizes sizes{cell, dtype, 8 * kTimestepsBehind + 3, 1, 5, 96};
      check_stack(sizes, 3, true);
      sizes.resets = sizes.options = true;
      check_stack(sizes, 5, true);
    }
  Sizes sizes{Cell::lstm, DType::bf16, 100, 1, 30, 100, 33};
  check_stack(sizes, 4, true);
}

// So many, of so many units, that the input is multiplied for fewer timesteps at a time than a
// layer is behind another.
TEST_CASE("layers side by side with some sequences each change no bit") {
  const NamedHost hosts[] = {{"13 asked for, nested", {as_one_range, 13}}};
  Sizes sizes{Cell::gru, DType::f64, 33 * kTimestepsBehind + 3, 9, 5, 176};
  check_stack(sizes, 13, true, hosts, {tested_isas().back()});
}

TEST_CASE("other stacks run layer after layer") {
  const Sizes few_steps{Cell::gru, DType::f32, kTimestepsBehind, 1, 120, 120};
  check_stack(few_steps, 2, false);
  Sizes both_directions{Cell::gru, DType::f32, 100, 1, 60, 60, 0, 2};
  check_stack(both_directions, 3, false);
  Sizes ragged{Cell::lstm, DType::f32, 30, 9, 60, 60};
  ragged.ragged = true;
  check_stack(ragged, 2, false);
  const Sizes many_sequences{Cell::lstm, DType::f32, 30, 9, 60, 60};
  check_stack(many_sequences, 2, false);
}

TEST_CASE("threads that divide the large products change no bit") {
  Random random(1);
  const int64_t N = 130, K = 70, I = 50;
  for (DType dtype : kDTypes) {
    const Array grads = random.array(dtype, 2 * N * K, 1),
                weights = random.array(dtype, 2 * K * I, 1);
    const Array input = random.array(dtype, N * I, 1);
    std::vector<const void*> rows(N);
    for (int64_t n = 0; n < N; ++n) rows[n] = input.at(n * I);
    std::vector<int64_t> place(N);
    std::iota(place.begin(), place.end(), 0);
    for (Isa isa : two_isas()) {
      const auto run = [&](const Host& host) {
        std::array results = {Array(dtype, N * I), Array(dtype, K * I), Array(dtype, K)};
        cpu_input_gradient(isa,
                           {dtype,
                            2,
                            N,
                            K,
                            I,
                            K,
                            {grads.at(0), grads.at(N * K)},
                            {weights.at(0), weights.at(K * I)},
                            results[0].at(0),
                            place.data()},
                           host);
        cpu_outer_product(
            isa,
            {dtype, N, K, grads.at(0), K, {{rows.data(), I, results[1].at(0)}}, {results[2].at(0)}},
            host);
        return results;
      };
      const auto expected = run(kOneThread);
      for (const auto& [name, host] : kHosts) {
        INFO(isa, " ", dtype, ", ", name);
        CHECK(run(host) == expected);
      }
    }
  }
}

// Parts are divided over fewer threads: each arrives for those that it covers.
TEST_CASE("a barrier lets nobody pass before all have arrived") {
  constexpr int kPhases = 300;
  for (const auto& [parts, threads] : {std::pair{1, 1}, {2, 2}, {4, 4}, {4, 3}, {4, 1}, {7, 3}}) {
    CAPTURE(parts);
    CAPTURE(threads);
    Barrier barrier(parts);
    std::atomic<int64_t> arrived{0}, early{0};
    std::vector<std::thread> team;
    for (int i = 0; i < threads; ++i)
      team.emplace_back([&, parts = parts, own = parts * (i + 1) / threads - parts * i / threads] {
        for (int phase = 1; phase <= kPhases; ++phase) {
          arrived += own;
          barrier.arrive_and_wait(own);
          if (arrived < parts * phase) ++early;
        }
      });
    for (std::thread& thread : team) thread.join();
    CHECK(early == 0);
    CHECK(arrived == parts * kPhases);
  }
}

TEST_CASE("a plan divides sequences or units but never more than there are") {
  Random random(2);
  for (int i = 0; i < 5000; ++i) {
    Sizes sizes{kCells[random.integer(0, 3)], DType::f32};
    sizes.T = random.integer(1, 200);
    sizes.B = random.integer(1, 40);
    sizes.H = random.integer(1, 600);
    sizes.P = sizes.cell == Cell::lstm && random.coin() ? random.integer(1, sizes.H) : sizes.H;
    sizes.directions = static_cast<int>(random.integer(1, 2));
    const LayerShape shape{sizes.cell, sizes.dtype,      sizes.T, sizes.B, sizes.H,
                           sizes.P,    sizes.directions, nullptr, nullptr};
    const int threads = static_cast<int>(random.integer(1, 9));
    const Plan plan = plan_layer(shape, threads);
    INFO(sizes, " on ", threads, " threads: ", plan.row_parts, " by rows, ", plan.unit_parts,
         " by units");
    CHECK((plan.row_parts == 1 || plan.unit_parts == 1));
    CHECK((plan.row_parts >= 1 && plan.row_parts <= std::min<int64_t>(threads, shape.B)));
    CHECK((plan.unit_parts >= 1 && plan.unit_parts <= std::min<int64_t>(threads, shape.H)));
    CHECK((plan.unit_parts == 1 || !shape.projected()));
    const int64_t layers = random.integer(1, 6), parts = plan_stack(shape, layers, threads);
    CHECK((parts >= 1 && parts <= std::min<int64_t>(threads, layers)));
    // Layers side by side are for threads that a layer by itself leaves idle.
    CHECK((parts == 1 || (shape.B < threads && parts > plan.row_parts && plan.unit_parts == 1)));
    // The weights' layout may change the order of sums, so that threads must not choose it.
    CHECK(plan.pack == plan_layer(shape, 1).pack);
  }
}

TEST_CASE("few rows wake threads for half the work") {
  const auto parts = [](int64_t T, int64_t B, int64_t H) {
    const Plan plan = plan_layer({Cell::lstm, DType::f32, T, B, H, H, 1, nullptr, nullptr}, 2);
    CHECK(plan.pack == (T * B >= 12));
    return std::max(plan.row_parts, plan.unit_parts);
  };
  CHECK(parts(1, 1, 256) == 2);  // 262 144 multiply-adds
  CHECK(parts(1, 4, 96) == 1);   // 147 456
  CHECK(parts(1, 4, 97) == 2);
  CHECK(parts(1, 16, 64) == 1);  // 262 144
  CHECK(parts(1, 16, 69) == 2);  // 304 704
}

TEST_CASE("ranges of sequences cover all and differ by less than two of the longest") {
  for (bool ragged : {false, true})
    for (Range timesteps : {Range{0, 12}, Range{3, 8}})
      for (int64_t B = 1; B <= 20; ++B)
        for (int64_t parts = 1; parts <= B; ++parts) {
          Sizes sizes{Cell::rnn_tanh, DType::f32, 12, B, 1, 1};
          sizes.ragged = ragged;
          const Layer l(sizes, static_cast<uint64_t>(B));
          const std::vector<Range> ranges = balanced_rows(l.shape(), timesteps, parts);
          REQUIRE(static_cast<int64_t>(ranges.size()) == parts);
          INFO("B=", B, " parts=", parts, " ragged=", ragged, " from ", timesteps.begin);
          const auto steps = [&](Range sequences) {
            int64_t sum = 0;
            for (int64_t b = sequences.begin; b < sequences.end; ++b)
              sum += std::clamp(l.lengths[b], timesteps.begin, timesteps.end) - timesteps.begin;
            return static_cast<double>(sum);
          };
          int64_t end = 0;
          for (const Range& range : ranges) {
            CHECK(range.begin == end);
            end = range.end;
            const double even = steps({0, B}) / static_cast<double>(parts);
            CHECK(std::abs(steps(range) - even) < static_cast<double>(l.T));
          }
          CHECK(end == B);
        }
}

}  // namespace
}  // namespace rnn_fused
