// How the CPU runs a layer: packed weights or not, and which thread does what.
#pragma once

#include <limits>
#include <vector>

#include "csrc/core/params.h"
#include "csrc/cpu/parallel.h"

namespace rnn_fused {

// Measured: docs/performance.md.
constexpr double kRowsToRepayPacking = 12;       // rows that weights multiply
constexpr double kWorkToRepayThreads = 300e3;    // multiply-adds
constexpr double kWeightsToRepayThreads = 64e3;  // weights to pack

struct Plan {
  bool pack = false;  // rearrange the recurrent weights before the loop
  // Either the sequences of each direction are divided, and no thread waits for another, or the
  // hidden units are, with a barrier every step.
  int64_t row_parts = 1;
  int64_t unit_parts = 1;
  // How many timesteps of the input are there when the first of them runs: windows one after
  // another.
  int64_t window = std::numeric_limits<int64_t>::max();
};

// Whether a layer rearranges its weights, which decides the order of its sums.
inline bool repays_packing(const LayerShape& shape) {
  return static_cast<double>(shape.T) * shape.B >= kRowsToRepayPacking;
}

// Whether all products of a layer can be split: of the loop the operands are whole runs of 16
// numbers, of each gate, and the weights are packed for them.
inline bool can_split(const LayerShape& shape) {
  return shape.dtype == DType::f32 && shape.H % 16 == 0 && repays_packing(shape);
}

// A pure function of the layer's shape.
Plan plan_layer(const LayerShape& shape, int threads);

// In how many parts, of some layers each, a stack of such layers runs: at the same time, each part
// kTimestepsBehind behind the one below. 1: layer after layer.
constexpr int64_t kTimestepsBehind = 8;
int64_t plan_stack(const LayerShape& shape, int64_t layers, int threads);

// Splits the sequences into ranges of nearly equal work in these timesteps.
std::vector<Range> balanced_rows(const LayerShape& shape, Range timesteps, int64_t parts);

}  // namespace rnn_fused
