#include "csrc/cuda/plan.h"

#include <algorithm>
#include <cstdio>

#include "csrc/cuda/predict.h"

namespace rnn_fused {
namespace {

constexpr int64_t kReservedShared = 1024;  // bytes of each block that the driver keeps

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

std::string text(int64_t n) { return std::to_string(n); }

std::string microseconds(double n) {
  char digits[32];
  std::snprintf(digits, sizeof digits, "%.1f us", n);
  return digits;
}

CudaPlan stepwise(const std::string& why) {
  CudaPlan plan;
  plan.why = why;
  return plan;
}

// Of a block that takes `tile` sequences in a pass; of a large one without weights.
int64_t shared_bytes(const LayerShape& s, const CudaPlan& plan, int64_t element_bytes,
                     bool backward, int tile) {
  using namespace persistent;
  const int units = plan.units, gates = gate_count(s.cell);
  const int64_t pitch = sum_pitch(columns_of(s.cell, backward), units * plan.cluster);
  const int64_t sums = int64_t{sum_warps(compiled_blocks(plan))} * tile * pitch;
  constexpr int64_t kBarriers = 4;  // two of 8 bytes, in static memory
  const int64_t parts = plan.cluster > 1 ? int64_t{2} * plan.cluster * tile * units + kBarriers : 0;
  const int64_t state = state_count(s.cell, backward) * plan.slice * units;
  const int64_t biases = backward ? 0 : saved_count(s.cell) * units;
  const int64_t in_shared = units == kLargeUnits ? 0 : plan.k_blocks - plan.register_blocks;
  const int64_t weights = in_shared * kKBlock * gates * units * element_bytes;
  const int64_t staged = int64_t{tile} * groups_of(s.cell, backward) * units * element_bytes;
  return (sums + parts + biases + state) * static_cast<int64_t>(sizeof(float)) + staged + weights;
}

// Of a block of a cluster.
int64_t shared_bytes_of_cluster(const LayerShape& s, const CudaPlan& plan, int64_t element_bytes,
                                bool backward) {
  using namespace persistent;
  const int units = plan.units, gates = gate_count(s.cell);
  const int64_t tile = plan.batch_tile;
  const auto rows = [&](int64_t K) { return tile * cluster_pitch(K, element_bytes); };
  int64_t floats = state_count(s.cell, backward) * tile * units, values;
  if (backward) {
    floats += 2 * plan.cluster * tile * units;  // parts of dh
    values = 2 * rows(int64_t{kRun} * plan.k_blocks);
  } else {
    floats += kClusterKWarps * tile * sum_pitch(gates, units) + saved_count(s.cell) * units;
    const int64_t weights = plan.k_blocks - plan.register_blocks;
    values = 3 * rows(s.H) + weights * kClusterBlock * gates * units;
  }
  return floats * static_cast<int64_t>(sizeof(float)) + values * element_bytes;
}

// Weights of a large block into what shared memory has left.
void keep_octets(const LayerShape& s, CudaPlan& plan, int64_t element_bytes, bool backward,
                 const GpuProperties& gpu) {
  using namespace persistent;
  const int64_t bytes = octet_bytes(columns_of(s.cell, backward), element_bytes);
  const int64_t all = large_octets(s.H, groups_of(s.cell, backward));
  const int64_t room = (gpu.shared_per_block - plan.shared_bytes) / bytes;
  plan.shared_octets = static_cast<int>(std::min(all, room));
  plan.streamed_octets = static_cast<int>(all) - plan.shared_octets;
  plan.shared_bytes += plan.shared_octets * bytes;
}

// A plan for blocks of `units` in so many launches, in clusters of so many blocks, which divide K
// among them, for at most so many slices; stepwise where the GPU has no room for it.
CudaPlan plan_persistent(const LayerShape& s, Precision precision, const GpuProperties& gpu,
                         bool backward, int units, int launches, int cluster, int64_t max_slices) {
  using namespace persistent;
  const int element_bytes = s.dtype == DType::f32 ? 4 : 2;
  CudaPlan plan;
  plan.family = Family::persistent;
  plan.units = units;
  plan.warps = kWarps;
  plan.k_blocks = k_blocks_of(s.H);
  const int compiled = compiled_blocks(plan);
  const int gates = gate_count(s.cell);
  const bool large = units == kLargeUnits;
  if (!large)
    plan.register_blocks = std::min(
        plan.k_blocks, cluster > 1 ? register_blocks(element_bytes, 1, gates * units, compiled)
                                   : register_blocks(element_bytes, gates, units, compiled));
  plan.launches = launches;
  plan.cluster = cluster;
  plan.blocks = round_up((s.H + units - 1) / units, cluster) * s.directions / launches;

  // As many slices as there are SMs for, but no more than a product has tiles; all alike.
  const int64_t sms = cluster > 1 ? resident_clusters(gpu, cluster) * cluster : gpu.sm_count;
  const int64_t least = sequences_of_product(s.dtype, precision);
  const int64_t slices =
      std::clamp<int64_t>(std::min(sms / plan.blocks, (s.B + least - 1) / least), 1, max_slices);
  plan.slice = (s.B + slices - 1) / slices;
  plan.blocks *= slice_count(plan, s);

  // The launch bounds promise these registers, in whole warps of 8 registers a thread.
  const int64_t by_registers =
      blocks_per_sm(element_bytes, compiled) * gpu.registers_per_sm / kRegistersPerSm;
  const int64_t needed = (plan.blocks + sms - 1) / sms;  // on an SM
  if (by_registers < needed)
    return stepwise(text(plan.blocks) + " blocks of " + text(units) +
                    " hidden units must be resident at once, there is room for " +
                    text(by_registers * sms));

  // A large tile has fewer barriers in a step, a small one leaves room for more blocks.
  plan.batch_tile = static_cast<int>(std::clamp<int64_t>(
      round_up(plan.slice, kMinBatchTile), kMinBatchTile,
      max_batch_tile(units, own_sequences(compiled, columns_of(s.cell, backward), element_bytes))));
  for (;; plan.batch_tile = static_cast<int>(round_up(plan.batch_tile / 2, kMinBatchTile))) {
    plan.shared_bytes = shared_bytes(s, plan, element_bytes, backward, plan.batch_tile);
    const int64_t resident = gpu.shared_per_sm / (plan.shared_bytes + kReservedShared);
    if (plan.shared_bytes <= gpu.shared_per_block && resident >= needed) {
      if (large) keep_octets(s, plan, element_bytes, backward, gpu);
      return plan;
    }
    if (plan.batch_tile == kMinBatchTile)
      return stepwise(text(needed) + " blocks of " + text(plan.shared_bytes) +
                      " bytes of shared memory must fit in an SM of " + text(gpu.shared_per_sm) +
                      ", " + text(gpu.shared_per_block) + " to a block");
  }
}

// Why no persistent kernel runs a layer on any GPU of this generation; empty where some may.
std::string obstacle(const LayerShape& s, const GpuProperties& gpu, int capability) {
  if (s.projected()) return "a projection, P = " + text(s.P);
  if (s.dtype == DType::f64) return "float64 has no persistent kernels";
  if (gpu.compute_capability < capability)
    return "compute capability at least " + text(capability) + " is needed, got " +
           text(gpu.compute_capability);
  return "";
}

CudaPlan plan_cluster(const LayerShape& s, const GpuProperties& gpu, bool backward) {
  using namespace persistent;
  if (const std::string why = obstacle(s, gpu, 90); !why.empty()) return stepwise(why);
  const int element_bytes = s.dtype == DType::f32 ? 4 : 2;
  // Of GPUs with more than 8 blocks in a cluster we know those of data centres.
  const int64_t most = gpu.compute_capability < 110 ? kMaxCluster : 8;
  int64_t largest = 0;
  CudaPlan plan;
  // Few units to a block give a sequence more SMs.
  for (int units : kClusterUnits) {
    if (!cluster_holds(s.cell, element_bytes, units)) continue;
    plan.units = units;
    largest = most * units;
    if (s.H <= largest) break;
  }
  if (s.H > largest)
    return stepwise("a cluster holds the weights of H up to " + text(largest) + ", got " +
                    text(s.H));
  constexpr int64_t kMost = int64_t{kMaxClusterSlices} * kMinBatchTile;
  if (s.B > kMost)
    return stepwise("a launch has at most " + text(kMaxClusterSlices) +
                    " slices of the batch, B up to " + text(kMost) + ", got " + text(s.B));
  plan.family = Family::cluster;
  plan.warps = kWarps;
  plan.launches = 1;
  if (backward) {
    plan.k_blocks = plan.register_blocks = cluster_runs(s.cell, plan.units);
  } else {
    plan.k_blocks = static_cast<int>((s.H + kClusterBlock - 1) / kClusterBlock);
    plan.register_blocks =
        std::min(plan.k_blocks, register_blocks(element_bytes, gate_count(s.cell),
                                                plan.units * kClusterKWarps / kWarps,
                                                cluster_k_blocks(plan.units)));
  }
  plan.cluster = static_cast<int>((s.H + plan.units - 1) / plan.units);
  // Few sequences a cluster where the GPU has room for all clusters at once.
  const auto clusters = [&](int tile) { return (s.B + tile - 1) / tile * s.directions; };
  const bool few = clusters(kMinBatchTile) <= resident_clusters(gpu, plan.cluster);
  plan.batch_tile = few ? kMinBatchTile : max_batch_tile(plan.units);
  plan.slice = std::min<int64_t>(s.B, plan.batch_tile);
  plan.blocks = clusters(plan.batch_tile) * plan.cluster;
  plan.shared_bytes = shared_bytes_of_cluster(s, plan, element_bytes, backward);
  if (plan.shared_bytes + kReservedShared > gpu.shared_per_block)
    return stepwise("a block of " + text(plan.shared_bytes) +
                    " bytes of shared memory must fit in " + text(gpu.shared_per_block));
  return plan;
}

}  // namespace

std::optional<Family> family_named(const std::string& name) {
  const auto found = std::find(std::begin(kFamilyNames), std::end(kFamilyNames), name);
  if (found == std::end(kFamilyNames)) return {};
  return static_cast<Family>(found - std::begin(kFamilyNames));
}

int64_t resident_clusters(const GpuProperties& gpu, int blocks) {
  constexpr int kSmsOfGpc = 16;
  return std::max(gpu.sm_count / kSmsOfGpc, 1) * (std::min(gpu.sm_count, kSmsOfGpc) / blocks);
}

CudaPlan plan_cuda(const LayerShape& s, Precision precision, const GpuProperties& gpu,
                   bool backward, std::optional<Family> forced) {
  using namespace persistent;
  if (forced == Family::stepwise) return {};
  if (forced == Family::cluster) return plan_cluster(s, gpu, backward);
  const bool split = forced == Family::split;
  if (const std::string why = obstacle(s, gpu, split ? 90 : 80); !why.empty()) return stepwise(why);
  if (split && gate_count(s.cell) == 1) return stepwise("one gate is nothing to divide");
  constexpr int64_t kMaxNarrow = int64_t{kMaxNarrowBlocks} * kKBlock;
  constexpr int64_t kMaxWide = int64_t{kWideBlocks} * kKBlock;
  const bool exact = s.dtype == DType::f32 && precision == Precision::exact;
  const bool large = !exact && (!forced || forced == Family::persistent);
  if (s.H > kMaxWide && !large)
    return stepwise("a block holds the weights of H up to " + text(kMaxWide) + ", got " +
                    text(s.H));

  if (s.B > kMaxSequences)
    return stepwise("a block counts sequences in 32 bits, B up to " + text(kMaxSequences) +
                    ", got " + text(s.B));

  // Narrow blocks divide the work among more SMs. Wide ones read h on fewer of them, and cost the
  // weights in shared memory a trip to the registers each step. Large ones, which may have to read
  // weights from L2, are for layers that fit in none of these.
  constexpr int kNarrow = units_of(kMaxNarrowBlocks), kWide = units_of(kWideBlocks);
  constexpr struct {
    int units, launches;
  } kWays[] = {{kNarrow, 1}, {kWide, 1},       {kNarrow, 2},
               {kWide, 2},   {kLargeUnits, 1}, {kLargeUnits, 2}};
  CudaPlan best;
  double cost = 0;
  for (const auto& [units, launches] : kWays) {
    if (launches > (s.stacked ? 1 : s.directions) || (units == kNarrow && s.H > kMaxNarrow) ||
        (units == kWide && s.H > kMaxWide) ||
        (units == kLargeUnits && (!large || best.family != Family::stepwise)))
      continue;
    // A slice costs its blocks' own copy of what they read of the weights in each step.
    for (const int64_t max_slices : {1, kMaxSlices}) {
      CudaPlan plan = plan_persistent(s, precision, gpu, backward, units, launches,
                                      split && backward ? gate_count(s.cell) : 1, max_slices);
      const bool runs = plan.family != Family::stepwise;
      if (runs && forced) plan.family = *forced;
      const double its = runs ? predict_step(s, precision, gpu, plan, backward).total() : 0;
      const bool first = best.family == Family::stepwise;
      if (runs ? first || its < cost : first) {
        best = plan;
        cost = its;
      }
    }
    if (forced && best.family != Family::stepwise) return best;
  }
  const double other = predict_step(s, precision, gpu, {}, backward).total();
  if (!forced && best.family != Family::stepwise && cost > other)
    return stepwise("predicted " + microseconds(other) + " a step, persistent " +
                    microseconds(cost));
  return best;
}

StackPlan plan_cuda_stack(const LayerShape& s, int64_t layers, Precision precision,
                          const GpuProperties& gpu, bool backward, std::optional<Family> forced) {
  constexpr int64_t kMaxChunks = 16;
  constexpr double kWorthIt = 0.95;
  // Of so many launches, of some steps each.
  const auto predict = [&](LayerShape shape, const CudaPlan& plan, int64_t launches,
                           int64_t steps) {
    shape.T = steps;
    const double step = predict_step(shape, precision, gpu, plan, backward).total();
    const double launch = plan.family == Family::stepwise ? 0 : kLaunchOfLoop;
    return static_cast<double>(launches) * (static_cast<double>(steps) * step + launch);
  };
  StackPlan best;
  best.us = predict(s, plan_cuda(s, precision, gpu, backward, forced), layers, s.T);
  best.us_in_turn = best.us;
  if (s.directions > 1 || s.sizes_on_device || s.B == 0) return best;
  LayerShape shape = s;
  shape.stacked = true;
  // Chunks are even, and there are as many as layers at once.
  const int64_t most = std::min<int64_t>({layers, kMaxDirections, (s.T + 1) / 2});
  for (int together = 2; together <= most; ++together) {
    shape.directions = together;
    StackPlan stack;
    stack.us_in_turn = best.us_in_turn;
    stack.together = together;
    stack.plan = plan_cuda(shape, precision, gpu, backward, forced);
    if (stack.plan.family == Family::stepwise) continue;
    for (int64_t chunks = together; chunks <= std::min(kMaxChunks, s.T); ++chunks) {
      stack.chunk = round_up((s.T + chunks - 1) / chunks, 2);  // as windows want it
      // A layer waits for the one below, and for the one that had its place.
      if (stack.chunks(s.T) < together) continue;
      stack.us = predict(shape, stack.plan, stack.launches(s.T, layers), stack.chunk);
      if (stack.us < std::min(best.us, kWorthIt * best.us_in_turn)) best = stack;
    }
  }
  return best;
}

}  // namespace rnn_fused
