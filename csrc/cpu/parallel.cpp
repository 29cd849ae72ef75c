#include "csrc/cpu/parallel.h"

#include <thread>

namespace rnn_fused {

namespace {

constexpr int kSpins = 1000;  // some 10 to 40 us, about the longest step that needs a barrier

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

template <class Done>
void spin_until(const Done& done) {
  for (int spins = 0; !done(); ++spins) {
    if (spins < kSpins)
      pause();
    else
      std::this_thread::yield();  // somebody else needs this core
  }
}

}  // namespace

void Barrier::arrive_and_wait(int64_t parts) {
  const uint32_t phase = phase_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(parts, std::memory_order_acq_rel) + parts == parts_) {
    arrived_.store(0, std::memory_order_relaxed);
    phase_.store(phase + 1, std::memory_order_release);
    return;
  }
  spin_until([&] { return phase_.load(std::memory_order_acquire) != phase; });
}

void Progress::wait_for(int64_t count) const {
  spin_until([&] { return done_.load(std::memory_order_acquire) >= count; });
}

}  // namespace rnn_fused
