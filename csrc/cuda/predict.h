// What a timestep of a loop is expected to cost: the time by which the plan compares families.
//
// No constant has been measured yet. They are published latencies and rates of an H100 (sources in
// docs/performance.md), and what can only add up to a wrong prediction, never to a wrong result.
#pragma once

#include "csrc/cuda/plan.h"

namespace rnn_fused {

// Microseconds that a launch of the persistent kernels takes besides its steps: a guess. It and the
// product of its input are enqueued, weights are read, and blocks meet for the first time.
constexpr double kLaunchOfLoop = 10;

// Microseconds that a step of the whole batch, and of all directions, spends on each.
struct StepCost {
  double waits = 0;    // launches, barriers, trips between SMs
  double traffic = 0;  // L2, or the shared memory of other SMs
  double shared = 0;   // an SM's own shared memory
  double maths = 0;    // products and gates

  double total() const { return waits + traffic + shared + maths; }
};

StepCost predict_step(const LayerShape& shape, Precision precision, const GpuProperties& gpu,
                      const CudaPlan& plan, bool backward);

}  // namespace rnn_fused
