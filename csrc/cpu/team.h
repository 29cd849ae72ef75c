// Runs a loop's steps on the caller's threads, as the schedule divides them.
#pragma once

#include "csrc/cpu/amx.h"
#include "csrc/cpu/cpu.h"

namespace rnn_fused::RNN_FUSED_ISA {

// In this thread alone where the work does not repay waking the others.
template <class Body>
void parallel_for(const Host& host, int64_t n, const Body& body, bool worth_it = true) {
  const auto call = [](void* context, int64_t begin, int64_t end) {
    const TileScope scope;
    (*static_cast<const Body*>(context))(begin, end);
  };
  void* const context = const_cast<void*>(static_cast<const void*>(&body));
  if (n == 1 || host.threads == 1 || !worth_it)
    call(context, 0, n);
  else
    host.parallel_for(n, call, context);
}

// The same for packing so many weights.
inline bool worth_packing_together(double weights) { return weights >= kWeightsToRepayThreads; }

// As many parts as threads, unless the work does not repay waking them.
inline int64_t parts_of(const Host& host, double multiply_adds) {
  return multiply_adds < kWorkToRepayThreads ? 1 : host.threads;
}

// loop.pack(direction, panels) rearranges weights; loop.step(direction, s, rows, panels, sync)
// computes step s and calls sync() once, to wait for the others that work on the same sequences.
template <class Loop>
void run_team(const LayerShape& shape, Range steps, const Schedule& schedule, const Host& host,
              int64_t panels, Loop& loop) {
  if (schedule.unit_parts > 1) {
    // Every part owns some hidden units of all directions and sequences, in lockstep.
    Barrier barrier(schedule.unit_parts);
    parallel_for(host, schedule.unit_parts, [&](int64_t begin, int64_t end) {
      const Range own = {panels * begin / schedule.unit_parts, panels * end / schedule.unit_parts};
      const auto sync = [&] { barrier.arrive_and_wait(end - begin); };
      for (int d = 0; d < shape.directions; ++d) loop.pack(d, own);
      for (int64_t s = steps.begin; s < steps.end; ++s)
        for (int d = 0; d < shape.directions; ++d) loop.step(d, s, {0, shape.B}, own, sync);
    });
    return;
  }
  if (schedule.pack)
    parallel_for(
        host, shape.directions * panels,
        [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i)
            loop.pack(static_cast<int>(i / panels), {i % panels, i % panels + 1});
        },
        worth_packing_together(static_cast<double>(gate_count(shape.cell)) * shape.H * shape.P *
                               shape.directions));
  // Every part owns some sequences of one direction.
  const auto sync = [] {};
  parallel_for(host, shape.directions * schedule.row_parts, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task)
      for (int64_t s = steps.begin; s < steps.end; ++s)
        loop.step(static_cast<int>(task / schedule.row_parts), s, schedule.rows[task], {0, panels},
                  sync);
  });
}

}  // namespace rnn_fused::RNN_FUSED_ISA
