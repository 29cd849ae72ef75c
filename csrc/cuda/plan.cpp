#include "csrc/cuda/plan.h"

#include <algorithm>

namespace rnn_fused {
namespace {

constexpr int64_t kReservedShared = 1024;  // bytes of each block that the driver keeps

// Predicted, not measured: at 64 bytes a clock an SM takes some 9 us for so many, where the two
// launches of a stepwise step and its product, which every byte reaches but once, take as long.
constexpr int64_t kMaxBytesOfAStep = 1 << 20;

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

std::string text(int64_t n) { return std::to_string(n); }

CudaPlan stepwise(const std::string& why) {
  CudaPlan plan;
  plan.why = why;
  return plan;
}

// Of a block that takes `tile` sequences in a pass.
int64_t shared_bytes(const LayerShape& s, const CudaPlan& plan, int64_t element_bytes,
                     bool backward, int tile) {
  using namespace persistent;
  const int units = plan.units, gates = gate_count(s.cell);
  const int64_t sums = int64_t{kWarps} * tile * sum_pitch(backward ? 1 : gates, units);
  const int64_t state = state_count(s.cell, backward) * s.B * units;
  const int64_t biases = backward ? 0 : saved_count(s.cell) * units;
  const int64_t weights =
      int64_t{plan.k_blocks - plan.register_blocks} * kWarps * kRun * gates * units * element_bytes;
  return (sums + biases + state) * static_cast<int64_t>(sizeof(float)) + weights;
}

// A plan for blocks of `units` in so many launches; stepwise where the GPU has no room for it.
CudaPlan plan_persistent(const LayerShape& s, const GpuProperties& gpu, bool backward, int units,
                         int launches) {
  using namespace persistent;
  const int element_bytes = s.dtype == DType::f32 ? 4 : 2;
  CudaPlan plan;
  plan.family = Family::persistent;
  plan.units = units;
  plan.warps = kWarps;
  plan.k_blocks = static_cast<int>((s.H + kWarps * kRun - 1) / (kWarps * kRun));
  const int compiled = compiled_blocks(plan);
  plan.register_blocks =
      std::min(plan.k_blocks, register_blocks(element_bytes, gate_count(s.cell), compiled));
  plan.launches = launches;
  plan.blocks = (s.H + units - 1) / units * s.directions / launches;

  // The launch bounds promise these registers, in whole warps of 8 registers a thread.
  const int64_t by_registers =
      blocks_per_sm(element_bytes, compiled) * gpu.registers_per_sm / kRegistersPerSm;
  const int64_t needed = (plan.blocks + gpu.sm_count - 1) / gpu.sm_count;  // on an SM
  if (by_registers < needed)
    return stepwise(text(plan.blocks) + " blocks of " + text(units) +
                    " hidden units must be resident at once, registers leave room for " +
                    text(by_registers * gpu.sm_count));

  // A large tile has fewer barriers in a step, a small one leaves room for more blocks.
  plan.batch_tile =
      static_cast<int>(std::min<int64_t>(round_up(s.B, kMinBatchTile), max_batch_tile(units)));
  for (;; plan.batch_tile = static_cast<int>(round_up(plan.batch_tile / 2, kMinBatchTile))) {
    plan.shared_bytes = shared_bytes(s, plan, element_bytes, backward, plan.batch_tile);
    const int64_t resident = gpu.shared_per_sm / (plan.shared_bytes + kReservedShared);
    if (plan.shared_bytes <= gpu.shared_per_block && resident >= needed) return plan;
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

}  // namespace

CudaPlan plan_cluster(const LayerShape& s, const GpuProperties& gpu) {
  using namespace persistent;
  if (const std::string why = obstacle(s, gpu, 90); !why.empty()) return stepwise(why);
  // Of GPUs with more than 8 blocks in a cluster we know those of data centres.
  const int64_t most = gpu.compute_capability < 110 ? 16 : 8;
  const int64_t largest = std::min(most * kClusterUnits, kMaxClusterHidden);
  if (s.H > largest)
    return stepwise("a cluster holds the weights of H up to " + text(largest) + ", got " +
                    text(s.H));
  if (s.B > kMaxSequences)
    return stepwise("a block counts sequences in 32 bits, B up to " + text(kMaxSequences) +
                    ", got " + text(s.B));
  const int element_bytes = s.dtype == DType::f32 ? 4 : 2;
  CudaPlan plan;
  plan.family = Family::cluster;
  plan.units = kClusterUnits;
  plan.warps = kWarps;
  plan.k_blocks = plan.register_blocks = plan.launches = 1;
  plan.cluster = static_cast<int>((s.H + kClusterUnits - 1) / kClusterUnits);
  // Few sequences a cluster where the GPU has room for all clusters at once. A cluster lies within
  // a GPC, which has 16 SMs or a few more, and an SM has one of these blocks: predicted, not
  // measured.
  constexpr int kSmsOfGpc = 16;
  const int64_t room = std::max(gpu.sm_count / kSmsOfGpc, 1) * (kSmsOfGpc / plan.cluster);
  const auto clusters = [&](int tile) { return (s.B + tile - 1) / tile * s.directions; };
  plan.batch_tile = clusters(kMinBatchTile) <= room ? kMinBatchTile : max_batch_tile(kClusterUnits);
  plan.blocks = clusters(plan.batch_tile) * plan.cluster;
  const int gates = gate_count(s.cell), tile = plan.batch_tile;
  const int64_t floats = int64_t{kWarps} * tile * sum_pitch(gates, kClusterUnits) +
                         saved_count(s.cell) * kClusterUnits +
                         state_count(s.cell, false) * tile * kClusterUnits;
  plan.shared_bytes = floats * static_cast<int64_t>(sizeof(float)) +
                      int64_t{2} * tile * cluster_pitch(s.H, element_bytes) * element_bytes;
  if (plan.shared_bytes + kReservedShared > gpu.shared_per_block)
    return stepwise("a block of " + text(plan.shared_bytes) +
                    " bytes of shared memory must fit in " + text(gpu.shared_per_block));
  return plan;
}

CudaPlan plan_cuda(const LayerShape& s, Precision, const GpuProperties& gpu, bool backward,
                   bool forced) {
  using namespace persistent;
  if (const std::string why = obstacle(s, gpu, 80); !why.empty()) return stepwise(why);
  constexpr int64_t kMaxNarrow = int64_t{kMaxNarrowBlocks} * kWarps * kRun;
  constexpr int64_t kMaxWide = int64_t{kWideBlocks} * kWarps * kRun;
  if (s.H > kMaxWide)
    return stepwise("a block holds the weights of H up to " + text(kMaxWide) + ", got " +
                    text(s.H));

  if (s.B > kMaxSequences)
    return stepwise("a block counts sequences in 32 bits, B up to " + text(kMaxSequences) +
                    ", got " + text(s.B));

  const int64_t bytes =
      (backward ? gate_count(s.cell) : 1) * s.B * s.H * (s.dtype == DType::f32 ? 4 : 2);
  if (bytes > kMaxBytesOfAStep && !forced)
    return stepwise("every SM would read " + text(bytes) + " bytes each step, more than " +
                    text(kMaxBytesOfAStep));

  // Narrow blocks divide the work among more SMs. Wide ones read h on fewer of them, and cost the
  // weights in shared memory a trip to the registers each step.
  CudaPlan plan;
  for (int launches = 1; launches <= s.directions; ++launches)
    for (int units : {units_of(kMaxNarrowBlocks), units_of(kWideBlocks)}) {
      if (units == units_of(kMaxNarrowBlocks) && s.H > kMaxNarrow) continue;
      plan = plan_persistent(s, gpu, backward, units, launches);
      if (plan.family == Family::persistent) return plan;
    }
  return plan;
}

}  // namespace rnn_fused
