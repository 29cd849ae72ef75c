// Which layers the persistent kernels take, on GPUs as their data sheets describe them.
#include <doctest/doctest.h>

#include <algorithm>
#include <vector>

#include "csrc/cuda/plan.h"
#include "csrc/cuda/predict.h"
#include "tests/cpp/names.h"

namespace rnn_fused {
namespace {

constexpr GpuProperties kA100 = {80, 108, 65536, 167936, 166912};
constexpr GpuProperties kH100 = {90, 132, 65536, 233472, 232448};
constexpr GpuProperties kH200 = {90, 132, 65536, 233472, 232448};
constexpr GpuProperties kB200 = {100, 148, 65536, 233472, 232448};
constexpr GpuProperties kRtx5090 = {120, 170, 65536, 102400, 101376};
constexpr GpuProperties kRtx4090 = {89, 128, 65536, 102400, 101376};
constexpr GpuProperties kSmall = {86, 16, 65536, 102400, 101376};  // RTX 3050 of a laptop
constexpr GpuProperties kT4 = {75, 40, 65536, 65536, 65536};

LayerShape shape(int64_t B, int64_t H, int directions = 1, Cell cell = Cell::lstm,
                 DType dtype = DType::bf16) {
  return {cell, dtype, 100, B, H, H, directions, nullptr, nullptr};
}

// Persistent wherever that can run.
CudaPlan plan(const LayerShape& s, const GpuProperties& gpu, bool backward = false) {
  return plan_cuda(s, Precision::exact, gpu, backward, Family::persistent);
}

CudaPlan cluster(const LayerShape& s, const GpuProperties& gpu, bool backward = false) {
  return plan_cuda(s, Precision::exact, gpu, backward, Family::cluster);
}

bool mentions(const CudaPlan& plan, const std::string& text) {
  return plan.why.find(text) != std::string::npos;
}

double predicted(const LayerShape& s, const CudaPlan& plan, bool backward = false,
                 const GpuProperties& gpu = kH100) {
  return predict_step(s, Precision::exact, gpu, plan, backward).total();
}

TEST_CASE("a layer that fits has persistent kernels, in both passes") {
  for (const GpuProperties& gpu : {kH100, kH200, kB200})
    for (bool backward : {false, true})
      for (Cell cell : {Cell::lstm, Cell::gru, Cell::rnn_tanh, Cell::rnn_relu})
        for (DType dtype : {DType::f32, DType::bf16, DType::f16})
          for (Precision precision : {Precision::exact, Precision::tf32})
            for (int64_t H : {1, 8, 256, 257, 1000, 1024}) {
              const CudaPlan p = plan_cuda(shape(32, H, 1, cell, dtype), precision, gpu, backward,
                                           Family::persistent);
              CAPTURE(p.why);
              CHECK(p.family == Family::persistent);
              CHECK(p.why == "");
              CHECK(p.units == 8);
              CHECK(p.warps == 8);
              CHECK(p.k_blocks == (H + 255) / 256);
              CHECK(p.register_blocks == p.k_blocks);
              CHECK(p.launches == 1);
              CHECK(p.blocks == (H + 7) / 8 * slice_count(p, shape(32, H)));
              CHECK(p.batch_tile == (p.slice <= 16 ? 16 : 32));
            }
}

// As many slices as there are SMs for, but no more than a product has tiles.
TEST_CASE("where SMs are left over the batch is in slices") {
  struct Slices {
    int64_t slice, count;
    bool operator==(const Slices&) const = default;
  };
  const auto slices = [](const LayerShape& s, const GpuProperties& gpu,
                         Family family = Family::persistent) -> Slices {
    const CudaPlan p = plan_cuda(s, Precision::exact, gpu, true, family);
    CAPTURE(p.why);
    REQUIRE(p.family == family);
    const int64_t count = slice_count(p, s);
    const int64_t of_slice = p.blocks / count;
    CHECK(p.blocks == of_slice * count);
    if (count > 1) CHECK(p.blocks <= gpu.sm_count);
    CHECK(p.batch_tile <= (p.slice + 15) / 16 * 16);
    return {p.slice, count};
  };
  CHECK(slices(shape(1, 256), kH100) == Slices{1, 1});
  CHECK(slices(shape(16, 256), kH100) == Slices{16, 1});
  CHECK(slices(shape(17, 256), kH100) == Slices{9, 2});
  CHECK(slices(shape(64, 256), kH100) == Slices{16, 4});
  CHECK(slices(shape(65, 256), kH100) == Slices{17, 4});
  CHECK(slices(shape(2048, 256), kH100) == Slices{512, 4});
  CHECK(slices(shape(2048, 256, 2), kH100) == Slices{1024, 2});
  CHECK(slices(shape(64, 512), kH100) == Slices{32, 2});
  CHECK(slices(shape(64, 529), kH100) == Slices{64, 1});
  CHECK(slices(shape(64, 1024), kH100) == Slices{64, 1});
  CHECK(slices(shape(2048, 8), kH100) == Slices{128, 16});  // as many as there are barriers
  // Products of exact float32 take four sequences at a time.
  CHECK(slices(shape(16, 256, 1, Cell::lstm, DType::f32), kH100) == Slices{4, 4});
  CHECK(slices(shape(18, 256, 1, Cell::lstm, DType::f32), kH100) == Slices{5, 4});
  CHECK(slices(shape(64, 256), kH100, Family::handoff) == Slices{16, 4});
  CHECK(slices(shape(64, 256, 2), kSmall, Family::handoff).count == 1);  // two blocks to an SM
  // Its 32 blocks are 8 clusters of four, of which 32 are resident.
  CHECK(slices(shape(256, 256), kH100, Family::split) == Slices{64, 4});
  CHECK(slices(shape(256, 264), kH100, Family::split) == Slices{86, 3});
}

TEST_CASE("slices are never predicted to cost more than the whole batch") {
  for (const GpuProperties& gpu : {kH100, kRtx4090, kSmall})
    for (Cell cell : {Cell::lstm, Cell::gru, Cell::rnn_tanh})
      for (const auto& [dtype, precision] : {std::pair{DType::bf16, Precision::exact},
                                             {DType::f32, Precision::exact},
                                             {DType::f32, Precision::tf32}})
        for (int64_t H : {40, 256, 400, 768, 1024, 1056, 2112})
          for (int64_t B : {1, 16, 17, 20, 33, 48, 64, 100, 300})
            for (int directions : {1, 2})
              for (bool backward : {false, true}) {
                const LayerShape s = shape(B, H, directions, cell, dtype);
                const CudaPlan sliced = plan_cuda(s, precision, gpu, backward);
                if (sliced.family == Family::stepwise) continue;
                // The same blocks with fewer SMs beside them.
                GpuProperties few = gpu;
                few.sm_count = static_cast<int>(sliced.blocks / slice_count(sliced, s));
                const CudaPlan whole = plan_cuda(s, precision, few, backward, Family::persistent);
                if (whole.units != sliced.units || whole.launches != sliced.launches) continue;
                REQUIRE(slice_count(whole, s) == 1);
                CHECK(predict_step(s, precision, gpu, sliced, backward).total() <=
                      predict_step(s, precision, gpu, whole, backward).total());
              }
}

TEST_CASE("slices are predicted to cost less than the whole batch on fewer SMs") {
  for (bool backward : {false, true})
    for (int64_t B : {64, 512}) {
      const LayerShape s = shape(B, 256);
      GpuProperties few = kH100;
      few.sm_count = 32;
      const CudaPlan sliced = plan(s, kH100, backward), whole = plan(s, few, backward);
      REQUIRE(sliced.blocks == 4 * whole.blocks);
      CHECK(predicted(s, sliced, backward) < predicted(s, whole, backward));
    }
}

TEST_CASE("what the persistent kernels cannot do") {
  LayerShape s = shape(32, 256);
  s.P = 100;
  CHECK(mentions(plan(s, kH100), "projection, P = 100"));
  CHECK(mentions(plan(shape(32, 256, 1, Cell::gru, DType::f64), kH100), "float64"));
  CHECK(mentions(plan(shape(32, 256), kT4), "got 75"));
  const LayerShape exact = shape(32, 2049, 1, Cell::lstm, DType::f32);
  CHECK(mentions(plan(exact, kH100), "up to 2048, got 2049"));
  for (const CudaPlan& p : {plan(s, kH100), plan(exact, kB200)}) {
    CHECK(p.family == Family::stepwise);
    CHECK(p.blocks == 0);
    CHECK(p.shared_bytes == 0);
  }
}

// Of these the forward pass of an RNN keeps nothing in shared memory, which sets no limit to B.
TEST_CASE("blocks count sequences in 32 bits") {
  const auto forced = [](int64_t B) { return plan(shape(B, 1, 1, Cell::rnn_tanh), kH100); };
  CHECK(forced(int64_t{1} << 26).family == Family::persistent);
  for (int64_t B : {(int64_t{1} << 26) + 1, (int64_t{1} << 32) + 1})
    CHECK(mentions(forced(B), "in 32 bits, B up to 67108864, got " + std::to_string(B)));
}

TEST_CASE("large batches of large layers are left to products, where these are predicted faster") {
  for (bool backward : {false, true}) {
    bool left = false;
    for (int64_t B = 16; B <= 512; B += 16) {
      const LayerShape s = shape(B, 1024);
      const CudaPlan chosen = plan_cuda(s, Precision::exact, kH100, backward);
      const CudaPlan forced = plan(s, kH100, backward);
      REQUIRE(forced.family == Family::persistent);
      const double stepwise = predicted(s, {}, backward), its = predicted(s, chosen, backward);
      CHECK(its <= stepwise);
      CHECK(its <= predicted(s, forced, backward));
      const bool slower = chosen.family == Family::stepwise;
      CHECK(slower >= left);  // from some batch on
      left = slower;
    }
    CHECK(left);
    CHECK(plan_cuda(shape(16, 1024), Precision::exact, kH100, backward).why == "");
  }
  const CudaPlan large = plan_cuda(shape(512, 1024), Precision::exact, kH100, false);
  CHECK(mentions(large, "us a step, persistent "));
}

// Physics that any constants must keep.
TEST_CASE("predictions grow with the work, and with what limits it") {
  for (bool backward : {false, true})
    for (Cell cell : {Cell::lstm, Cell::gru, Cell::rnn_tanh})
      for (DType dtype : {DType::f32, DType::bf16}) {
        double last[3] = {};
        for (int64_t B : {1, 16, 64, 128, 1024}) {
          const LayerShape s = shape(B, 256, 1, cell, dtype);
          const CudaPlan plans[] = {{}, plan(s, kH100, backward), cluster(s, kH100, backward)};
          for (int i = 0; i < 3; ++i) {
            const StepCost cost = predict_step(s, Precision::exact, kH100, plans[i], backward);
            for (double part : {cost.waits, cost.traffic, cost.shared, cost.maths})
              CHECK(part >= 0);
            CHECK(cost.total() >= last[i]);
            last[i] = cost.total();
          }
          // No grid barrier, and a slice of the batch to an SM; but slices of 4 sequences, which
          // float32 products may have, are less work than 16.
          if (dtype != DType::f32 || B != 16)
            CHECK(predicted(s, plans[2], backward) < predicted(s, plans[1], backward));
        }
        // Twice as many clusters as there is room for take twice as long.
        const LayerShape few = shape(256, 256, 1, cell, dtype);
        const LayerShape many = shape(512, 256, 1, cell, dtype);
        CHECK(predicted(many, cluster(many, kH100, backward), backward) ==
              doctest::Approx(2 * predicted(few, cluster(few, kH100, backward), backward)));
      }
  // A launch after another is twice as long; both directions at once are not.
  const LayerShape both = shape(16, 2048, 2), one = shape(16, 2048, 1);
  CHECK(plan(both, kH100).launches == 2);
  CHECK(predicted(both, plan(both, kH100)) ==
        doctest::Approx(2 * predicted(one, plan(one, kH100))));
  const LayerShape pair = shape(16, 256, 2), single = shape(16, 256, 1);
  CHECK(predicted(pair, plan(pair, kH100)) < 1.1 * predicted(single, plan(single, kH100)));
}

// One block to an SM; two of 16-bit types for H up to 256. Where narrow blocks are too many, wide
// ones may fit, and where both directions do not, one after the other may; then large ones.
TEST_CASE("all blocks of a launch are resident at once") {
  struct How {
    int units, launches;  // 0 and 0: stepwise
    bool operator==(const How&) const = default;
  };
  const auto how = [](int64_t H, int directions, const GpuProperties& gpu) -> How {
    const CudaPlan p = plan(shape(16, H, directions), gpu);
    CAPTURE(p.why);
    CHECK((p.family == Family::stepwise) == (p.why != ""));
    if (p.family == Family::persistent) {
      CHECK(p.blocks == (H + p.units - 1) / p.units * directions / p.launches);
      CHECK(p.blocks <= gpu.sm_count * (p.units == 8 && H <= 256 ? 2 : 1));
    }
    return {p.units, p.launches};
  };
  CHECK(how(528, 2, kH100) == How{8, 1});
  CHECK(how(529, 2, kH100) == How{16, 1});
  CHECK(how(592, 2, kB200) == How{8, 1});
  CHECK(how(1024, 2, kH100) == How{16, 1});
  CHECK(how(1056, 2, kH100) == How{16, 1});
  CHECK(how(1057, 2, kH100) == How{16, 2});
  CHECK(how(1025, 1, kH100) == How{16, 1});
  CHECK(how(2048, 1, kH100) == How{16, 1});
  CHECK(how(2048, 2, kH100) == How{16, 2});
  CHECK(how(2049, 1, kH100) == How{32, 1});
  CHECK(how(2112, 2, kH100) == How{32, 1});
  CHECK(how(2113, 2, kH100) == How{32, 2});
  CHECK(how(4224, 1, kH100) == How{32, 1});
  CHECK(how(4225, 1, kH100) == How{0, 0});
  CHECK(how(864, 1, kA100) == How{8, 1});
  CHECK(how(865, 1, kA100) == How{16, 1});
  CHECK(how(864, 2, kA100) == How{16, 1});
  CHECK(how(872, 2, kA100) == How{16, 2});
  CHECK(how(1024, 1, kRtx4090) == How{8, 1});
  CHECK(how(256, 1, kSmall) == How{8, 1});
  CHECK(how(257, 1, kSmall) == How{32, 1});
  CHECK(how(512, 1, kSmall) == How{32, 1});
  CHECK(how(513, 1, kSmall) == How{0, 0});
  CHECK(how(128, 2, kSmall) == How{8, 1});
  CHECK(how(129, 2, kSmall) == How{8, 2});
  CHECK(plan(shape(16, 128, 1, Cell::lstm, DType::f32), kSmall).units == 8);
  CHECK(plan(shape(16, 129, 1, Cell::lstm, DType::f32), kSmall).units == 16);
  CHECK(mentions(plan(shape(16, 513), kSmall), "17 blocks of 32 hidden units must be resident"));
  CHECK(mentions(plan(shape(16, 513), kSmall), "room for 16"));
}

TEST_CASE("weights of large blocks are in shared memory as far as there is room") {
  for (Cell cell : {Cell::lstm, Cell::gru, Cell::rnn_tanh})
    for (const auto& [dtype, precision] :
         {std::pair{DType::bf16, Precision::exact}, {DType::f32, Precision::tf32}})
      for (int64_t H : {2560, 2816, 4096})
        for (int64_t B : {1, 32, 128})
          for (bool backward : {false, true}) {
            const LayerShape s = shape(B, H, 1, cell, dtype);
            const CudaPlan p = plan_cuda(s, precision, kH100, backward, Family::persistent);
            CAPTURE(p.why);
            REQUIRE(p.units == 32);
            CHECK(p.blocks == (H + 31) / 32);
            CHECK(p.register_blocks == 0);
            // All of them, as [k-block, group, octet of units] of some columns.
            const int gates = gate_count(cell), columns = backward ? 1 : gates;
            const int element = dtype == DType::f32 ? 4 : 2, octet = 8 * 256 * columns * element;
            const int all = static_cast<int>((H + 255) / 256) * (backward ? gates : 1) * 4;
            CHECK(p.shared_octets + p.streamed_octets == all);
            CHECK(p.shared_octets > 0);
            // [4 warps, tile, 32 units + 8, or 32 * 4 gates + 4] sums, biases, [B, 32] state, and
            // what is staged.
            const int tiles = columns * element <= 8 ? 2 : 1;
            CHECK(p.batch_tile == (B == 1 ? 16 : 16 * tiles));
            const int state = cell == Cell::rnn_tanh           ? backward
                              : backward && cell == Cell::lstm ? 2
                                                               : 1;
            const int64_t others = 4 * (4 * p.batch_tile * (columns == 1 ? 40 : 132) +
                                        (backward ? 0 : saved_count(cell) * 32) + state * B * 32) +
                                   element * p.batch_tile * 32 * (backward ? gates : 1);
            CHECK(p.shared_bytes == others + int64_t{p.shared_octets} * octet);
            CHECK(p.shared_bytes <= kH100.shared_per_block);
            CHECK((p.streamed_octets == 0 || p.shared_bytes + octet > kH100.shared_per_block));
          }
  // An RNN's fit.
  CHECK(plan(shape(16, 2560, 1, Cell::rnn_tanh), kH100).streamed_octets == 0);
}

TEST_CASE("what large blocks read from L2 is in their prediction") {
  // A GPU with less shared memory has the same blocks, and more to read.
  GpuProperties less = kH100;
  less.shared_per_block -= 64 << 10;
  const LayerShape s = shape(16, 2816, 1, Cell::gru);
  const CudaPlan p = plan(s, kH100), other = plan(s, less);
  CHECK(other.streamed_octets > p.streamed_octets);
  CHECK(predict_step(s, Precision::exact, less, other, false).traffic >
        predict_step(s, Precision::exact, kH100, p, false).traffic);
  // Sequences that are multiplied together cost no more reading, others do.
  const CudaPlan two_tiles = plan(shape(32, 2816, 1, Cell::gru), kH100);
  REQUIRE(two_tiles.batch_tile == 32);
  const auto beyond_h = [&](int64_t B) {
    const LayerShape many = shape(B, 2816, 1, Cell::gru);
    CudaPlan some = two_tiles;
    some.slice = B;
    CudaPlan none = some;
    none.streamed_octets = 0;
    const auto traffic = [&](const CudaPlan& plan) {
      return predict_step(many, Precision::exact, kH100, plan, false).traffic;
    };
    return traffic(some) - traffic(none);
  };
  CHECK(beyond_h(1) == doctest::Approx(beyond_h(32)));
  CHECK(beyond_h(64) == doctest::Approx(2 * beyond_h(32)).epsilon(0.02));
  // A sequence of one step has to write them too.
  LayerShape one = s;
  one.T = 1;
  CHECK(predicted(one, p) > predicted(s, p));
}

TEST_CASE("weights beyond a wide block's registers are in shared memory") {
  struct Case {
    Cell cell;
    DType dtype;
    int in_registers;
  };
  for (const auto& [cell, dtype, in_registers] :
       {Case{Cell::lstm, DType::bf16, 3}, Case{Cell::gru, DType::bf16, 4},
        Case{Cell::rnn_tanh, DType::bf16, 8}, Case{Cell::gru, DType::f32, 2},
        Case{Cell::rnn_tanh, DType::f32, 6}})
    for (bool backward : {false, true}) {
      CAPTURE(backward);
      const CudaPlan p = plan(shape(16, 1030, 1, cell, dtype), kH100, backward);
      REQUIRE(p.units == 16);
      CHECK(p.k_blocks == 5);
      CHECK(p.register_blocks == std::min(5, in_registers));
      // [8 warps, 16, 16 units + 8, or 16 * 4 gates + 4] sums, biases, [slice, 16] state, what
      // is staged, and weights: for each k-block 256 values of h for the units of each gate.
      const int gates = gate_count(cell), state = cell == Cell::rnn_tanh ? backward : 1;
      const int pitch = backward || gates == 1 ? 24 : 68;
      const int biases = backward ? 0 : saved_count(cell) * 16;
      const int element = dtype == DType::f32 ? 4 : 2;
      const int doubled = backward && cell == Cell::lstm ? 2 : 1;
      CHECK(p.shared_bytes == 4 * (8 * 16 * pitch + biases + doubled * state * p.slice * 16) +
                                  element * (16 * 16 * (backward ? gates : 1) +
                                             (5 - p.register_blocks) * 256 * 16 * gates));
    }
  CHECK(mentions(plan(shape(16, 1030, 1, Cell::lstm, DType::f32), kH100), "shared memory"));
}

TEST_CASE("shared memory holds the sums of a batch tile and the state of every sequence") {
  // All SMs have the same slice.
  GpuProperties gpu = kH100;
  gpu.sm_count = 8;
  CHECK(plan(shape(1, 64), gpu).batch_tile == 16);
  CHECK(plan(shape(33, 64), gpu).batch_tile == 48);
  CHECK(plan(shape(1000, 64), gpu).batch_tile == 64);
  // [8 warps, tile, 8 units * 4 gates + 4] sums, [4, 8] biases, [B, 8] c, and [tile, 8] staged
  CHECK(plan(shape(70, 64), gpu).shared_bytes == 4 * (8 * 64 * 36 + 32 + 70 * 8) + 2 * 64 * 8);
  CHECK(plan(shape(70, 64, 1, Cell::rnn_relu), gpu).shared_bytes ==
        4 * (8 * 64 * 8 + 8) + 2 * 64 * 8);
  // [8 warps, tile, 8 units] sums, [2, B, 8] dh and dc, of other cells dh alone; [tile,
  // gates, 8] staged
  CHECK(plan(shape(70, 64), gpu, true).shared_bytes ==
        4 * (8 * 64 * 8 + 2 * 70 * 8) + 2 * 4 * 64 * 8);
  CHECK(plan(shape(70, 64, 1, Cell::gru), gpu, true).shared_bytes ==
        4 * (8 * 64 * 8 + 70 * 8) + 2 * 3 * 64 * 8);

  int64_t last = 64;
  for (int64_t B = 64; B < 8000; B += 64) {
    const CudaPlan p = plan(shape(B, 64), gpu);
    if (p.family == Family::stepwise) {
      CHECK(B > 6600);
      CHECK(mentions(p, "shared memory"));
      CHECK(mentions(p, "233472"));
      return;
    }
    CHECK(p.shared_bytes <= gpu.shared_per_block);
    CHECK(p.batch_tile <= last);
    last = p.batch_tile;
  }
  FAIL("no batch is too large");
}

TEST_CASE("clusters hold small layers, with few sequences each where there is room for all") {
  for (Cell cell : {Cell::lstm, Cell::gru, Cell::rnn_tanh, Cell::rnn_relu})
    for (DType dtype : {DType::f32, DType::bf16, DType::f16})
      for (int64_t H : {1, 16, 17, 250, 256, 257, 500, 512})
        for (int64_t B : {1, 16, 100, 128, 129, 2048})
          for (int directions : {1, 2})
            for (bool backward : {false, true}) {
              const bool several = cell == Cell::lstm || cell == Cell::gru;
              if (H > 256 && several && dtype == DType::f32) continue;
              const CudaPlan p = cluster(shape(B, H, directions, cell, dtype), kH100, backward);
              CAPTURE(p.why);
              CHECK(p.family == Family::cluster);
              CHECK(p.units == (H <= 256 ? 16 : 32));
              CHECK(p.cluster == (H + p.units - 1) / p.units);
              // 132 SMs are 8 times 16 and some.
              const int64_t of_sixteen = (B + 15) / 16 * directions;
              const bool few = of_sixteen <= 8 * (16 / p.cluster) || p.units == 32;
              CHECK(p.batch_tile == (few ? 16 : 32));
              const int64_t slices = (B + p.batch_tile - 1) / p.batch_tile;
              CHECK(p.blocks == slices * directions * p.cluster);
              CHECK(p.shared_bytes + 1024 <= kH100.shared_per_block);
            }
}

TEST_CASE("what the blocks of a cluster have in shared memory") {
  // [4 warps, 16, 16 units * 4 gates + 4] sums, [4, 16] biases, [16, 16] c, h [3, 16, 256 + 32]
  CHECK(cluster(shape(1, 256), kH100).shared_bytes ==
        4 * (4 * 16 * 68 + 64 + 256) + 3 * 16 * 288 * 2);
  // [16 blocks, 16, 16 units] parts twice, dh and dc [16, 16], and gradients [16, 4 * 16 + 32]
  // twice
  CHECK(cluster(shape(1, 256), kH100, true).shared_bytes ==
        4 * (2 * 16 * 256 + 2 * 256) + 2 * 16 * 96 * 2);
  // Of the weights the last of four k-blocks of 128 values of h.
  const CudaPlan wide = cluster(shape(1, 512), kH100);
  CHECK(wide.k_blocks == 4);
  CHECK(wide.register_blocks == 3);
  CHECK(wide.shared_bytes ==
        4 * (4 * 16 * 132 + 4 * 32 + 16 * 32) + 3 * 16 * 544 * 2 + 128 * 4 * 32 * 2);
  CHECK(cluster(shape(1, 384), kH100).register_blocks == 3);
  CHECK(cluster(shape(1, 512, 1, Cell::gru), kH100).register_blocks == 4);
  // Backward the rows of the block's own units alone: runs of 32 gates' gradients.
  CHECK(cluster(shape(1, 512), kH100, true).k_blocks == 4);
  CHECK(cluster(shape(1, 256, 1, Cell::gru), kH100, true).k_blocks == 2);
}

TEST_CASE("what clusters cannot do") {
  LayerShape s = shape(32, 256);
  s.P = 100;
  for (bool backward : {false, true}) {
    CHECK(mentions(cluster(s, kH100, backward), "projection, P = 100"));
    CHECK(mentions(cluster(shape(32, 256, 1, Cell::gru, DType::f64), kH100, backward), "float64"));
    CHECK(mentions(cluster(shape(32, 256), kA100, backward), "at least 90 is needed, got 80"));
    CHECK(mentions(cluster(shape(32, 513), kH100, backward), "H up to 512, got 513"));
    CHECK(mentions(cluster(shape(32, 257, 1, Cell::lstm, DType::f32), kH100, backward),
                   "H up to 256, got 257"));
    CHECK(mentions(cluster(shape(32, 129, 1, Cell::gru, DType::f32), kRtx5090, backward),
                   "H up to 128, got 129"));
    CHECK(mentions(cluster(shape(32, 257), kRtx5090, backward), "H up to 256, got 257"));
    CHECK(mentions(cluster(shape(1 << 20, 32), kH100, backward), "B up to 1048560"));
    CHECK(cluster(shape(1048560, 32), kH100, backward).family == Family::cluster);
    CHECK(cluster(shape(32, 256), kRtx5090, backward).family == Family::cluster);
  }
}

CudaPlan split(const LayerShape& s, const GpuProperties& gpu, bool backward = true) {
  return plan_cuda(s, Precision::exact, gpu, backward, Family::split);
}

TEST_CASE("backward the blocks of a cluster divide the gates") {
  for (int64_t H : {8, 64, 256, 512, 768, 1024, 1536, 2048})
    for (const auto& [cell, gates] : {std::pair{Cell::lstm, 4}, {Cell::gru, 3}})
      for (DType dtype : {DType::f32, DType::bf16}) {
        const LayerShape s = shape(16, H, 1, cell, dtype);
        const CudaPlan p = split(s, kH100), forward = split(s, kH100, false);
        if (p.family == Family::stepwise || forward.family == Family::stepwise) {
          CHECK(H > 1024);
          CHECK((dtype == DType::f32 || cell == Cell::gru));  // 128 blocks are no multiple of 3
          continue;
        }
        CHECK(p.family == Family::split);
        CHECK(p.cluster == gates);
        CHECK(p.blocks % gates == 0);
        CHECK(p.blocks * p.units >= H);
        CHECK(p.blocks <= 120 * (p.k_blocks == 1 && dtype == DType::bf16 ? 2 : 1) + 8);
        CHECK(p.shared_bytes <= kH100.shared_per_block);
        CHECK(forward.family == Family::split);
        CHECK(forward.cluster == 1);
        CHECK(forward.shared_bytes == plan(s, kH100).shared_bytes);
      }
  // [8 warps, 16, 4 * 8 + 8] sums, [2, 4, 16, 8] parts, dh and dc [16, 8], two barriers, [16, 4,
  // 8] staged
  CHECK(split(shape(16, 256), kH100).shared_bytes ==
        4 * (8 * 16 * 40 + 2 * 4 * 16 * 8 + 2 * 16 * 8) + 16 + 2 * 4 * 16 * 8);
  // Of three gates 120 SMs are in clusters, 15 of each 16.
  CHECK(split(shape(16, 960, 1, Cell::gru), kH100).units == 8);
  CHECK(split(shape(16, 968, 1, Cell::gru), kH100).units == 16);
  CHECK(split(shape(16, 1024), kH100).units == 8);
  // Where the reading of gradients takes longest it is predicted to pay.
  for (int64_t H : {512, 768, 1024})
    CHECK(predicted(shape(64, H), split(shape(64, H), kH100), true) <
          0.8 * predicted(shape(64, H), plan(shape(64, H), kH100, true), true));
  CHECK(mentions(split(shape(16, 64), kA100), "at least 90 is needed, got 80"));
  CHECK(mentions(split(shape(16, 64, 1, Cell::rnn_relu), kH100), "one gate is nothing to divide"));
}

TEST_CASE("blocks that hand off are those of the persistent kernels") {
  for (int64_t H : {64, 768, 1728, 1729})
    for (int directions : {1, 2})
      for (bool backward : {false, true}) {
        const LayerShape s = shape(16, H, directions);
        const CudaPlan p = plan_cuda(s, Precision::exact, kA100, backward, Family::handoff);
        const CudaPlan with_barrier =
            plan_cuda(s, Precision::exact, kA100, backward, Family::persistent);
        if (with_barrier.units == 32 || with_barrier.family == Family::stepwise) {
          CHECK(p.family == Family::stepwise);  // large blocks do not
          continue;
        }
        CHECK(p.family == Family::handoff);
        CHECK(p.blocks == with_barrier.blocks);
        CHECK(p.shared_bytes == with_barrier.shared_bytes);
        CHECK(p.cluster == with_barrier.cluster);
        CHECK(predicted(s, p, backward) < predicted(s, with_barrier, backward));
      }
}

TEST_CASE("an empty batch has a plan") {
  for (Family family : {Family::persistent, Family::handoff, Family::split, Family::cluster})
    for (int64_t H : {64, 2048})
      for (DType dtype : {DType::f32, DType::bf16})
        for (bool backward : {false, true})
          for (std::optional<Family> forced : {std::optional<Family>(), std::optional(family)})
            CHECK(plan_cuda(shape(0, H, 1, Cell::lstm, dtype), Precision::exact, kH100, backward,
                            forced)
                      .blocks >= 0);
}

StackPlan stack(const LayerShape& s, int64_t layers, std::optional<Family> forced = {},
                bool backward = false) {
  return plan_cuda_stack(s, layers, Precision::exact, kH100, backward, forced);
}

// Every chunk of every layer once, behind those that it needs.
void check_order(const StackPlan& how, int64_t T, int64_t layers) {
  std::vector<int64_t> done(layers);  // chunks
  for (int64_t launch = 0; launch < how.launches(T, layers); ++launch) {
    std::vector<int64_t> before = done, running;
    for (int64_t place = 0; place < how.together; ++place) {
      const auto part = how.part(launch, place, T, layers);
      if (!part) continue;
      const auto [l, c] = *part;
      CHECK(l % how.together == place);
      CHECK(c == before[l]);
      if (l > 0) CHECK(c < before[l - 1]);
      ++done[l];
      running.push_back(l);
    }
    CHECK(!running.empty());
  }
  for (int64_t chunks : done) CHECK(chunks == how.chunks(T));
  for (int64_t place = 0; place < how.together; ++place)
    CHECK(!how.part(how.launches(T, layers), place, T, layers));
}

void check_stack(LayerShape s, int64_t layers, bool backward) {
  const StackPlan how = stack(s, layers, {}, backward);
  CHECK(how.together >= 1);
  CHECK(how.together <= std::min<int64_t>(layers, kMaxDirections));
  if (how.together == 1) {
    CHECK(how.us == how.us_in_turn);
    return;
  }
  CHECK(how.us < 0.95 * how.us_in_turn);
  CHECK(how.chunk % 2 == 0);
  CHECK(how.chunks(s.T) >= how.together);
  CHECK(how.plan.family == Family::persistent);
  CHECK(how.plan.launches == 1);
  CHECK(how.plan.blocks % how.together == 0);
  check_order(how, s.T, layers);
  // A launch: large blocks write the weights that they stream in each.
  const auto launches = static_cast<double>(how.launches(s.T, layers));
  s.T = how.chunk;
  s.directions = how.together;
  const double us = static_cast<double>(s.T) * predicted(s, how.plan, backward) + kLaunchOfLoop;
  CHECK(how.us == doctest::Approx(launches * us));
}

TEST_CASE("layers of a stack run side by side where SMs are idle") {
  for (Cell cell : {Cell::lstm, Cell::gru, Cell::rnn_tanh})
    for (DType dtype : {DType::bf16, DType::f32, DType::f64})
      for (int64_t layers : {1, 2, 3, 5, 8})
        for (int64_t T : {1, 2, 7, 25, 100, 1000})
          for (int64_t B : {0, 1, 16, 130})
            for (int64_t H : {8, 256, 1024, 2056})
              for (bool backward : {false, true}) {
                LayerShape s = shape(B, H, 1, cell, dtype);
                s.T = T;
                CAPTURE(cell);
                CAPTURE(layers);
                CAPTURE(T);
                CAPTURE(H);
                CAPTURE(backward);
                check_stack(s, layers, backward);
              }
  LayerShape small = shape(16, 256);
  small.T = 1000;
  CHECK(stack(small, 4).together == 4);
  CHECK(stack(small, 4).us < 0.4 * stack(small, 4).us_in_turn);
  CHECK(stack(small, 2, Family::cluster).plan.family == Family::cluster);
  CHECK(stack(small, 4, {}, true).together == 4);
  CHECK(stack(small, 2, Family::split, true).plan.cluster == 4);
  // One layer takes the whole chip, or a launch costs more than it saves.
  CHECK(stack(shape(64, 2048), 4).together == 1);
  small.T = 4;
  CHECK(stack(small, 2).together == 1);
  // The layer above needs both directions of the one below, and chunks of as many rows as the host
  // knows.
  CHECK(stack(shape(16, 256, 2), 2).together == 1);
  LayerShape ragged = shape(16, 256);
  ragged.sizes_on_device = true;
  CHECK(stack(ragged, 2).together == 1);
  CHECK(stack(shape(16, 256), 2, Family::stepwise).together == 1);
}

TEST_CASE("the backward pass may have another plan than the forward pass") {
  const LayerShape s = shape(16 * 4000, 64);  // in 16 slices
  CHECK(plan(s, kH100).family == Family::persistent);
  CHECK(plan(s, kH100, true).family == Family::stepwise);
}

}  // namespace
}  // namespace rnn_fused
