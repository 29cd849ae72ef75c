#include "csrc/cuda/predict.h"

#include <algorithm>

namespace rnn_fused {
namespace {

constexpr double kClock = 1750;  // cycles a microsecond

// Microseconds.
constexpr double kGridBarrier = 1.3;  // h is stored, announced and read: three trips through L2
constexpr double kHandoff = 0.7;      // stored and read, and half a read that comes too early
constexpr double kClusterTrip = 0.2;  // a trip from SM to SM, the poll, and two block barriers
constexpr double kLaunch = 3.5;       // most of it the host's, which enqueues the steps one by one

// Bytes a cycle.
constexpr double kL2OfSm = 64, kL2OfGpu = 3100, kMemory = 1900;
constexpr double kOtherSm = 32;  // to the shared memory of other SMs
constexpr double kShared = 128;
constexpr double kL2Bytes = 50 << 20;  // beyond which weights come from memory

// Multiply-adds a cycle and SM: of mma.sync; and of the library's large products, which are exact
// in float32, whatever the layer may round.
constexpr double kMma16 = 1024, kMmaTf32 = 512, kFma = 128;
constexpr double kLibrary16 = 1200, kLibraryFma = 100;

// A thread's instructions for the gates of one unit and sequence, four warps issue one each a
// cycle; and the time from the first to the last of them where all are on the way at once.
constexpr double kGateInstructions = 120, kGateLatency = 300;

double multiply_adds(DType dtype, Precision precision) {
  if (dtype != DType::f32) return kMma16;
  return precision == Precision::tf32 ? kMmaTf32 : kFma;
}

double library_multiply_adds(DType dtype) {
  if (dtype == DType::f64) return kLibraryFma / 2;
  return dtype == DType::f32 ? kLibraryFma : kLibrary16;
}

double round_up(double n, double multiple) {
  return static_cast<double>(static_cast<int64_t>((n + multiple - 1) / multiple)) * multiple;
}

// In cycles until the end, where they become microseconds.
struct Model {
  const LayerShape& s;
  Precision precision;
  const GpuProperties& gpu;
  const CudaPlan& plan;
  bool backward;
  double B = static_cast<double>(s.B), H = static_cast<double>(s.H);
  double G = gate_count(s.cell);
  double bytes = s.dtype == DType::f64 ? 8 : s.dtype == DType::f32 ? 4 : 2;  // of an element

  // Sequences that are multiplied at a time.
  double sequences() const { return persistent::sequences_of_product(s.dtype, precision); }

  // Products of one block, and its gates.
  double maths(double rows, double outputs, double K) const {
    return round_up(rows, sequences()) * outputs * K / multiply_adds(s.dtype, precision) +
           rows * plan.units * kGateInstructions / 128 + kGateLatency;
  }

  // Of a large block, which reads its weights once for all tiles that it multiplies together; what
  // is not in shared memory it has written once, and from L2, if that has room for all blocks'.
  void add_octets(StepCost& cost, double rows) const {
    const int columns = persistent::columns_of(s.cell, backward);
    const int element = static_cast<int>(bytes);
    const double together = std::min(
        plan.batch_tile, persistent::kMinBatchTile * persistent::large_tiles(columns, element));
    const double passes = round_up(rows, together) / together;
    const double octet = static_cast<double>(persistent::octet_bytes(columns, element));
    const double streamed = plan.streamed_octets * octet;
    const double all = streamed * static_cast<double>(plan.blocks);
    cost.shared += passes * plan.shared_octets * octet / kShared;
    cost.traffic += (passes + 2 / static_cast<double>(s.T)) *
                    std::max(streamed / kL2OfSm, all / (all > kL2Bytes ? kMemory : kL2OfGpu));
  }

  // The sums that so many warps leave in shared memory and the gates read, and the weights there.
  double sums(double rows, double warps, double gates, int units) const {
    return 2 * warps * rows * persistent::sum_pitch(static_cast<int>(gates), units) * 4;
  }
  double weights(double rows, double k_block) const {
    return (plan.k_blocks - plan.register_blocks) * k_block * G * plan.units * bytes *
           (round_up(rows, sequences()) / sequences());
  }

  StepCost persistent() const {
    const double columns = persistent::columns_of(s.cell, backward);
    const double groups = persistent::groups_of(s.cell, backward);
    const double rows = static_cast<double>(plan.slice);
    const double read = groups * rows * H * bytes / plan.cluster;  // by every block
    StepCost cost;
    cost.waits = (plan.family == Family::handoff ? kHandoff : kGridBarrier) * kClock;
    cost.traffic = std::max(read / kL2OfSm, read * static_cast<double>(plan.blocks) / kL2OfGpu);
    cost.shared = sums(rows, persistent::kWarps, columns, plan.units * plan.cluster) / kShared;
    if (plan.units == persistent::kLargeUnits)
      add_octets(cost, rows);
    else
      cost.shared += weights(rows, persistent::kKBlock) / kShared;
    if (plan.cluster > 1) {
      cost.waits += kClusterTrip * kClock * (round_up(rows, plan.batch_tile) / plan.batch_tile);
      cost.traffic += rows * plan.units * plan.cluster * 4 / kOtherSm;
    }
    cost.maths = maths(rows, columns * plan.units, groups * H);
    return times(cost, plan.launches);
  }

  StepCost cluster() const {
    const double rows = static_cast<double>(plan.slice);
    const double units = plan.units, others = plan.cluster - 1;
    StepCost cost;
    cost.waits = kClusterTrip * kClock;
    if (backward) {
      cost.traffic = rows * H * 4 / kOtherSm;
      cost.shared =
          (persistent::kWarps * rows * G * units * bytes + rows * units * plan.cluster * 4) /
          kShared;
      cost.maths = maths(rows, H, G * units);
    } else {
      cost.traffic = rows * units * bytes * others / kOtherSm;
      const double readers = double{persistent::kWarps} / persistent::kClusterKWarps;
      cost.shared =
          (readers * rows * H * bytes + sums(rows, persistent::kClusterKWarps, G, plan.units) +
           weights(rows, persistent::kClusterBlock)) /
          kShared;
      cost.maths = maths(rows, G * units, H);
    }
    const int64_t clusters = plan.blocks / plan.cluster;
    const int64_t room = resident_clusters(gpu, plan.cluster);
    return times(cost, static_cast<double>((clusters + room - 1) / room));
  }

  // The product reads all weights and the pointwise kernel the gates; both are large enough to take
  // the whole GPU, or small enough to cost but their launches.
  StepCost stepwise() const {
    const double weights = G * H * static_cast<double>(s.P) * bytes;
    const double values = B * H * (backward ? 4 * G : 2 * G) * bytes;
    StepCost cost;
    cost.waits = (s.projected() ? 3 : 2) * kLaunch * kClock;
    cost.traffic = (weights + values) / (weights > kL2Bytes ? kMemory : kL2OfGpu);
    cost.maths =
        B * G * H * static_cast<double>(s.P) / (library_multiply_adds(s.dtype) * gpu.sm_count);
    return times(cost, s.directions);
  }

  static StepCost times(const StepCost& cost, double n) {
    return {n * cost.waits / kClock, n * cost.traffic / kClock, n * cost.shared / kClock,
            n * cost.maths / kClock};
  }
};

}  // namespace

StepCost predict_step(const LayerShape& shape, Precision precision, const GpuProperties& gpu,
                      const CudaPlan& plan, bool backward) {
  const Model model = {shape, precision, gpu, plan, backward};
  switch (plan.family) {
    case Family::persistent:
    case Family::handoff:
    case Family::split: return model.persistent();
    case Family::cluster: return model.cluster();
    case Family::stepwise: break;
  }
  return model.stepwise();
}

}  // namespace rnn_fused
