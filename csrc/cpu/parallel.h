// Threads, as the core sees them. Out of line, for the same reason as host_device.h: the callers
// are compiled once per instruction set.
#pragma once

#include <atomic>

#include "csrc/core/params.h"

namespace rnn_fused {

// The caller's threads. parallel_for runs body(context, begin, end) over disjoint ranges that cover
// [0, n): on as many threads as there are ranges, at the same time, so that ranges may wait for
// each other; or all of [0, n) as one range, where parallelism is nested or there are no more
// threads.
struct Host {
  void (*parallel_for)(int64_t n, void (*body)(void* context, int64_t begin, int64_t end),
                       void* context);
  int threads;
};

// A spinning barrier for the ranges of one parallel_for over [0, parts). Each arrives with the
// number of parts it covers, so that it also works where fewer threads came than were asked for.
class Barrier {
 public:
  explicit Barrier(int64_t parts) : parts_(parts) {}
  void arrive_and_wait(int64_t parts);

 private:
  const int64_t parts_;
  alignas(64) std::atomic<int64_t> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
};

// How far one thread is, for another that comes behind it.
class Progress {
 public:
  void advance_to(int64_t count) { done_.store(count, std::memory_order_release); }
  void wait_for(int64_t count) const;

 private:
  alignas(64) std::atomic<int64_t> done_{0};
};

}  // namespace rnn_fused
