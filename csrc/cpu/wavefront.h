// The forward loops of a stack of layers side by side.
#pragma once

#include <deque>

#include "csrc/cpu/forward.h"

namespace rnn_fused::RNN_FUSED_ISA {

// Every part runs some neighbouring layers, of one direction and equal sequences and with weights
// that are packed, a window of timesteps at a time; the parts above wait for it.
template <class T, Cell kCell>
class Wavefront {
 public:
  Wavefront(const StackParams& stack, const Schedule& schedule, const Host& host)
      : parts_(stack.parts), window_(schedule.window), host_(host), shape_(*stack.layers) {
    for (int64_t l = 0; l < stack.count; ++l) loops_.emplace_back(stack.layers[l], schedule, host);
  }

  void run() {
    std::vector<Progress> done(parts_);  // windows
    parallel_for(host_, parts_, [&](int64_t begin, int64_t end) {
      const int64_t windows = (shape_.T + window_ - 1) / window_;
      for (int64_t w = 0; w < windows; ++w)
        for (int64_t part = begin; part < end; ++part) {
          if (part > 0) done[part - 1].wait_for(w + 1);
          run_part(part, {w * window_, std::min((w + 1) * window_, shape_.T)});
          done[part].advance_to(w + 1);
        }
    });
  }

 private:
  using Loop = Forward<T, kCell>;

  void run_part(int64_t part, Range steps) {
    const int64_t count = static_cast<int64_t>(loops_.size());
    for (int64_t l = count * part / parts_; l < count * (part + 1) / parts_; ++l) {
      Loop& loop = loops_[l];
      for (int64_t s = steps.begin; s < steps.end; ++s)
        loop.step(0, s, {0, shape_.B}, {0, loop.panel_count()}, [] {});
      if (steps.end == shape_.T) loop.write_final_states();  // before another layer writes there
    }
  }

  const int64_t parts_, window_;
  const Host& host_;
  const LayerShape& shape_;
  std::deque<Loop> loops_;  // they do not move
};

}  // namespace rnn_fused::RNN_FUSED_ISA
