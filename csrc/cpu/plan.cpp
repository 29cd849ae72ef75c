#include "csrc/cpu/plan.h"

#include <algorithm>

namespace rnn_fused {

namespace {

// Multiply-adds of the recurrent product of a step.
double work_of_step(const LayerShape& s) {
  const double columns = gate_count(s.cell) * s.H + (s.projected() ? s.H : 0);
  return columns * s.P * s.B * s.directions;
}

}  // namespace

Plan plan_layer(const LayerShape& s, int threads) {
  // Measured: docs/performance.md.
  constexpr double kStepToRepayBarrier = 60e3;
  constexpr int64_t kUnitsOfAPart = 64;  // fewer leave parts without a panel, which only wait
  constexpr int64_t kFewSequences = 2;   // of a part: reading the weights takes longest

  Plan plan;
  plan.pack = repays_packing(s);
  const double step = work_of_step(s);
  // Of few rows, whose weights are not packed, reading these takes as long again.
  const double work = step * s.T * (plan.pack ? 1 : 2);
  if (threads == 1 || work < kWorkToRepayThreads) return plan;

  // The directions run side by side, so that each wants half of an even number of threads.
  const int64_t wanted = s.directions == 2 && threads % 2 == 0 ? threads / 2 : threads;
  const int64_t unit_parts = std::clamp<int64_t>(s.H / kUnitsOfAPart, 1, threads);
  // Parts that divide the sequences read all weights each, those that divide the units their own.
  const bool idle = s.B < wanted && unit_parts > s.B && step >= kStepToRepayBarrier;
  const bool reads = wanted > 1 && s.B <= kFewSequences * wanted && unit_parts == threads &&
                     step >= kStepToRepayBarrier / 2 * threads;
  if ((idle || reads) && !s.projected())
    plan.unit_parts = unit_parts;
  else
    plan.row_parts = std::min<int64_t>(wanted, s.B);
  return plan;
}

int64_t plan_stack(const LayerShape& s, int64_t layers, int threads) {
  const int64_t parts = std::min<int64_t>(layers, threads);
  const double work = work_of_step(s) * s.T * layers;
  if (parts < 2 || s.B >= threads || s.directions > 1 || s.batch_sizes ||
      work < kWorkToRepayThreads)
    return 1;
  // The upper parts begin late, and the lower ones end early.
  const int64_t chunks = (s.T + kTimestepsBehind - 1) / kTimestepsBehind;
  const Plan plan = plan_layer(s, threads);
  const double speedup = static_cast<double>(parts) * chunks / (chunks + parts - 1);
  return plan.unit_parts == 1 && speedup > plan.row_parts ? parts : 1;
}

std::vector<Range> balanced_rows(const LayerShape& s, Range timesteps, int64_t parts) {
  std::vector<Range> ranges;
  if (!s.batch_sizes) {
    for (int64_t i = 0; i < parts; ++i) ranges.push_back({s.B * i / parts, s.B * (i + 1) / parts});
    return ranges;
  }
  std::vector<int64_t> steps(s.B);  // of the sequences up to and with b
  int64_t total = 0;
  for (int64_t b = 0, end = timesteps.end; b < s.B; ++b) {
    while (end > timesteps.begin && s.batch_sizes[end - 1] <= b) --end;
    steps[b] = total += end - timesteps.begin;
  }
  for (int64_t i = 1, b = 0; i <= parts; ++i) {
    const int64_t begin = b;
    while (b < s.B && steps[b] * parts <= total * i) ++b;
    ranges.push_back({begin, b});
  }
  return ranges;
}

}  // namespace rnn_fused
