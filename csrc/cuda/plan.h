// How a CUDA device runs a layer. A pure function of the layer and the device: no CUDA headers.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "csrc/core/params.h"

namespace rnn_fused {

struct GpuProperties {
  int compute_capability;  // 10 * major + minor
  int sm_count;
  int64_t registers_per_sm;
  int64_t shared_per_sm;     // bytes
  int64_t shared_per_block;  // bytes, with opt-in
};

// handoff: persistent, but no step waits for a barrier, only for what it reads. split: persistent,
// but backward the blocks of a cluster divide the gates among them.
enum class Family { stepwise, persistent, handoff, split, cluster };
constexpr const char* kFamilyNames[] = {"stepwise", "persistent", "handoff", "split", "cluster"};
std::optional<Family> family_named(const std::string& name);

// Of float32 products; 16-bit types have but one.
enum class Precision { exact, tf32 };

struct CudaPlan {
  Family family = Family::stepwise;
  // Of the persistent kernels, and of those of clusters; all 0 for the stepwise ones.
  int units = 0;            // hidden units of a block
  int warps = 0;            // of a block
  int k_blocks = 0;         // runs of 32 of h, or of gradients, that a warp multiplies
  int register_blocks = 0;  // with weights in registers; the rest have theirs in shared memory
  // Of a large block, whose weights are kept by octets: those of eight units for a k-block of h, or
  // of one gate's gradients. In shared memory, and read from L2 in every step.
  int shared_octets = 0, streamed_octets = 0;
  // Sequences of a slice of the batch, which has blocks of its own; these wait for no other
  // slice's.
  int64_t slice = 0;
  int batch_tile = 0;        // sequences of a pass
  int launches = 0;          // 2: one direction after the other
  int64_t blocks = 0;        // of a launch
  int cluster = 0;           // blocks of a cluster; 1 if they are in none
  int64_t shared_bytes = 0;  // of a block
  std::string why;           // what rules out the others; empty for these, and if it is forced
};

inline int64_t slice_count(const CudaPlan& plan, const LayerShape& shape) {
  return plan.slice == 0 ? 0 : (shape.B + plan.slice - 1) / plan.slice;
}

// The persistent kernels where they are predicted to be as fast as the stepwise ones, never the
// others: no GPU has run these. forced: that family, in narrow blocks if these fit, or where it
// cannot run a stepwise plan.
CudaPlan plan_cuda(const LayerShape& shape, Precision precision, const GpuProperties& gpu,
                   bool backward, std::optional<Family> forced = {});

// How a pass of a stack runs whose layers have one direction. `together` layers are side by side in
// one launch, as directions of one layer are, each a chunk of timesteps behind the one below, or
// backward the one above; a launch runs a chunk of each. 1: layer after layer, by plans of their
// own.
struct StackPlan {
  int together = 1;
  int64_t chunk = 0;  // timesteps
  CudaPlan plan;      // of a launch with all of them
  // Predicted, of the loops of all layers: this way, and layer after layer.
  double us = 0, us_in_turn = 0;

  // Where they are side by side. Layer l, backward counted from the last, has place l % together,
  // when the layer before it there is done and a launch behind layer l - 1.
  int64_t chunks(int64_t T) const { return (T + chunk - 1) / chunk; }
  int64_t launches(int64_t T, int64_t layers) const {
    return (layers - 1) / together * chunks(T) + (layers - 1) % together + chunks(T);
  }
  struct Part {
    int64_t layer, chunk;
  };
  // What a place runs in a launch, if anything.
  std::optional<Part> part(int64_t launch, int64_t place, int64_t T, int64_t layers) const {
    const int64_t i = launch - place;  // of the place's own chunks
    const Part part = {i / chunks(T) * together + place, i % chunks(T)};
    if (i < 0 || part.layer >= layers) return {};
    return part;
  }
};

// Side by side only in the persistent kernels, where that is predicted to be faster by a twentieth.
StackPlan plan_cuda_stack(const LayerShape& shape, int64_t layers, Precision precision,
                          const GpuProperties& gpu, bool backward,
                          std::optional<Family> forced = {});

// Clusters of so many blocks, one block to an SM, that run at once. A cluster lies within a GPC,
// which has 16 SMs or a few more: predicted, not measured.
int64_t resident_clusters(const GpuProperties& gpu, int blocks);

// What the plan and the persistent kernels agree on.
namespace persistent {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kRun = 32;                // consecutive values of h that a warp multiplies at a time
constexpr int kKBlock = kWarps * kRun;  // values of h in a k-block
RNN_FUSED_HD constexpr int k_blocks_of(int64_t H) {
  return static_cast<int>((H + kKBlock - 1) / kKBlock);
}

// What a step multiplies: forward h, for a sum of each gate; backward the gradients of all gates,
// in a group each, for one sum.
RNN_FUSED_HD constexpr int columns_of(Cell cell, bool backward) {
  return backward ? 1 : gate_count(cell);
}
RNN_FUSED_HD constexpr int groups_of(Cell cell, bool backward) {
  return backward ? gate_count(cell) : 1;
}

// Kernels are compiled for these numbers of k-blocks; H between them leaves some out. The narrow
// ones have all weights in registers, the wide one the rest in shared memory. The large one runs
// any number: its weights are in shared memory, and the rest of them in L2.
constexpr int kNarrowBlocks[] = {1, 2, 4};
constexpr int kMaxNarrowBlocks = 4;
constexpr int kWideBlocks = 8;
constexpr int kAnyBlocks = 0;
RNN_FUSED_HD constexpr int units_of(int k_blocks) {
  return k_blocks == kAnyBlocks ? 32 : k_blocks > kMaxNarrowBlocks ? 16 : 8;
}
constexpr int kLargeUnits = units_of(kAnyBlocks);

// Bytes of an octet in a block: of its eight units, those of all warps.
RNN_FUSED_HD constexpr int64_t octet_bytes(int columns, int64_t element_bytes) {
  return int64_t{8} * kKBlock * columns * element_bytes;
}
RNN_FUSED_HD constexpr int large_octets(int64_t H, int groups) {
  return k_blocks_of(H) * groups * kLargeUnits / 8;
}

// Tiles of sequences that a large block multiplies together, so that every weight comes by once for
// all of these: as many as registers have sums for.
RNN_FUSED_HD constexpr int large_tiles(int columns, int64_t element_bytes) {
  return columns * element_bytes <= 8 ? 2 : 1;
}

// A thread's own sequences of a pass; each is one unit's.
constexpr int kOwn = 2;
RNN_FUSED_HD constexpr int own_sequences(int k_blocks, int columns, int64_t element_bytes) {
  return k_blocks == kAnyBlocks ? large_tiles(columns, element_bytes) * kOwn : kOwn;
}
RNN_FUSED_HD constexpr int max_batch_tile(int units, int own = kOwn) {
  return own * kThreads / units;
}
constexpr int kMinBatchTile = 16;  // the rows of one mma

// Sequences that a product takes at a time.
constexpr int sequences_of_product(DType dtype, Precision precision) {
  return dtype == DType::f32 && precision == Precision::exact ? 4 : kMinBatchTile;
}

// Each has a barrier in each direction.
constexpr int kMaxSlices = 16;
// Of clusters: blocks of a grid in z.
constexpr int kMaxClusterSlices = 65535;

// Warps whose sums of the product are in shared memory: in large blocks the others add theirs.
RNN_FUSED_HD constexpr int sum_warps(int k_blocks) {
  return k_blocks == kAnyBlocks ? kWarps / 2 : kWarps;
}

// Sequences, and their places in shared memory, are ints in a block.
constexpr int64_t kMaxSequences = 1 << 26;

constexpr int64_t kRegistersPerSm = 65536;  // that the launch bounds reckon with

// Blocks that the registers of an SM have room for: the launch bounds of the kernels, and what the
// plan relies on. A spill fails the build.
RNN_FUSED_HD constexpr int blocks_per_sm(int64_t element_bytes, int k_blocks) {
  return k_blocks != kAnyBlocks && element_bytes * k_blocks <= 2 ? 2 : 1;
}

// Of the kernel that runs a plan. K-blocks beyond the plan's multiply nothing.
inline int compiled_blocks(const CudaPlan& plan) {
  if (plan.units == kLargeUnits) return kAnyBlocks;
  if (plan.units == units_of(kWideBlocks)) return kWideBlocks;
  for (int k_blocks : kNarrowBlocks)
    if (k_blocks >= plan.k_blocks) return k_blocks;
  return kMaxNarrowBlocks;
}

// K-blocks of a kernel whose weights registers hold: those of so many columns, gates or one, of
// each of so many units.
RNN_FUSED_HD constexpr int register_blocks(int64_t element_bytes, int columns, int units,
                                           int k_blocks) {
  constexpr int kNarrow = 4 * 8;  // gates and units of an LSTM's narrow block
  if (k_blocks <= kMaxNarrowBlocks && columns * units <= kNarrow) return k_blocks;
  // Registers of a thread of wide blocks; in float32 the sums of many units leave room for fewer.
  const int weights = units > 16 && element_bytes == 4 ? 64 : 96;
  const int fit = weights / (columns * units / 8 * 2 * static_cast<int>(element_bytes));
  return fit < 1 ? 1 : fit < k_blocks ? fit : k_blocks;
}

// Floats of one sequence among the sums that a warp leaves in shared memory: each unit has one, or
// a float4 of up to four gates. Some more make accesses free of bank conflicts, whether lanes are
// units or sequences.
RNN_FUSED_HD constexpr int sum_pitch(int columns, int units) {
  if (columns > 1) return 4 * units + 4;
  return units % 16 == 8 ? units : units + 8;
}

// The hidden units of a block of a cluster. In blocks of 32 forward, the last weights may be in
// shared memory; float32 has no room there for those of several gates.
constexpr int kClusterUnits[] = {16, 32};
constexpr int kMaxCluster = 16;
RNN_FUSED_HD constexpr bool cluster_holds(Cell cell, int64_t element_bytes, int units) {
  return units == 16 || element_bytes == 2 || gate_count(cell) == 1;
}

// Forward, so many warps of a block divide K among them.
constexpr int kClusterKWarps = 4;
constexpr int kClusterBlock = kClusterKWarps * kRun;  // values of h in a k-block

// What a warp multiplies of a cluster that is as large as can be. Forward, k-blocks of h; backward,
// runs of the gradients of the block's own gates, and octets of h.
RNN_FUSED_HD constexpr int cluster_k_blocks(int units) {
  return kMaxCluster * units / kClusterBlock;
}
RNN_FUSED_HD constexpr int cluster_runs(Cell cell, int units) {
  return (gate_count(cell) * units + kRun - 1) / kRun;
}
RNN_FUSED_HD constexpr int cluster_octets(int units) { return kMaxCluster * units / 8 / kWarps; }

// Values between rows of K in shared memory: 16-byte reads of eight rows, four lanes to a row, then
// meet no bank conflict.
RNN_FUSED_HD constexpr int cluster_pitch(int64_t K, int64_t element_bytes) {
  const int64_t bytes = (K * element_bytes + 127) / 128 * 128 + (element_bytes == 2 ? 64 : 16);
  return static_cast<int>(bytes / element_bytes);
}

// State kept in shared memory, floats per sequence and unit: c, or h of a GRU, in the forward pass;
// dh, and dc of an LSTM, in the backward pass.
RNN_FUSED_HD constexpr int state_count(Cell cell, bool backward) {
  if (backward) return cell == Cell::lstm ? 2 : 1;
  return cell == Cell::lstm || cell == Cell::gru ? 1 : 0;
}

}  // namespace persistent
}  // namespace rnn_fused
