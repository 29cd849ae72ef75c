#include "csrc/cuda/plan.h"

#include <algorithm>

namespace rnn_fused {
namespace {

constexpr int64_t kReservedShared = 1024;  // bytes of each block that the driver keeps

// Predicted, not measured: at 64 bytes a clock an SM takes some 9 us for so many, where the two
// launches of a stepwise step and its product, which every byte reaches but once, take as long.
constexpr int64_t kMaxBytesOfAStep = 1 << 20;

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

CudaPlan stepwise(const std::string& why) {
  CudaPlan plan;
  plan.why = why;
  return plan;
}

// Of a block that takes `tile` sequences in a pass.
int64_t shared_bytes(const LayerShape& s, bool backward, int tile) {
  using namespace persistent;
  const int64_t sums = int64_t{kWarps} * tile * sum_pitch(backward ? 1 : gate_count(s.cell));
  const int64_t state = state_count(s.cell, backward) * s.B * kUnits;
  const int64_t biases = backward ? 0 : saved_count(s.cell) * kUnits;
  return (sums + biases + state) * static_cast<int64_t>(sizeof(float));
}

}  // namespace

CudaPlan plan_cuda(const LayerShape& s, Precision, const GpuProperties& gpu, bool backward,
                   bool forced) {
  using namespace persistent;
  const auto text = [](int64_t n) { return std::to_string(n); };
  if (s.projected()) return stepwise("a projection, P = " + text(s.P));
  if (s.dtype == DType::f64) return stepwise("float64 has no persistent kernels");
  if (gpu.compute_capability < 80)
    return stepwise("compute capability at least 80 is needed, got " +
                    text(gpu.compute_capability));
  constexpr int64_t kMaxH = int64_t{kMaxKBlocks} * kWarps * kRun;
  if (s.H > kMaxH)
    return stepwise("registers hold the weights of H up to " + text(kMaxH) + ", got " + text(s.H));

  const int64_t element_bytes = s.dtype == DType::f32 ? 4 : 2;
  const int64_t bytes = (backward ? gate_count(s.cell) : 1) * s.B * s.H * element_bytes;
  if (bytes > kMaxBytesOfAStep && !forced)
    return stepwise("every SM would read " + text(bytes) + " bytes each step, more than " +
                    text(kMaxBytesOfAStep));

  CudaPlan plan;
  plan.family = Family::persistent;
  plan.units = kUnits;
  plan.warps = kWarps;
  plan.k_blocks = static_cast<int>((s.H + kWarps * kRun - 1) / (kWarps * kRun));
  plan.blocks = (s.H + kUnits - 1) / kUnits * s.directions;

  // The launch bounds promise these registers, in whole warps of 8 registers a thread.
  const int64_t by_registers =
      blocks_per_sm(element_bytes, plan.k_blocks) * gpu.registers_per_sm / kRegistersPerSm;
  const int64_t needed = (plan.blocks + gpu.sm_count - 1) / gpu.sm_count;  // on an SM
  if (by_registers < needed)
    return stepwise(text(plan.blocks) +
                    " blocks must be resident at once, registers leave room for " +
                    text(by_registers * gpu.sm_count));

  // A large tile has fewer barriers in a step, a small one leaves room for more blocks.
  plan.batch_tile =
      static_cast<int>(std::min<int64_t>(round_up(s.B, kMinBatchTile), kMaxBatchTile));
  for (;; plan.batch_tile = static_cast<int>(round_up(plan.batch_tile / 2, kMinBatchTile))) {
    plan.shared_bytes = shared_bytes(s, backward, plan.batch_tile);
    const int64_t resident = gpu.shared_per_sm / (plan.shared_bytes + kReservedShared);
    if (plan.shared_bytes <= gpu.shared_per_block && resident >= needed) return plan;
    if (plan.batch_tile == kMinBatchTile)
      return stepwise(text(needed) + " blocks of " + text(plan.shared_bytes) +
                      " bytes of shared memory must fit in an SM of " + text(gpu.shared_per_sm) +
                      ", " + text(gpu.shared_per_block) + " to a block");
  }
}

}  // namespace rnn_fused
