// Switching between fibers, with the sanitizers told of it. For scheduler.cpp alone, which is
// compiled without them: the build says by RNN_FUSED_EMULATION_TSAN or _ASAN what the kernels have.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#ifndef __x86_64__
#include <ucontext.h>
#endif
#ifdef RNN_FUSED_EMULATION_TSAN
#include <sanitizer/tsan_interface.h>
#endif
#ifdef RNN_FUSED_EMULATION_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace rnn_fused::emulation {

constexpr size_t kTsanFibers = 8000;  // TSan itself stops at 8,128

// ---------------------------------------------------------------------------------------------
// Registers and stack
// ---------------------------------------------------------------------------------------------

#ifdef __x86_64__

// swapcontext would make two system calls for signal masks: ten times the time of everything else.
extern "C" __attribute__((visibility("hidden"))) void rnn_fused_switch_stack(void** from, void* to);
asm(R"(
.text
.globl rnn_fused_switch_stack
.hidden rnn_fused_switch_stack
.type rnn_fused_switch_stack, @function
rnn_fused_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size rnn_fused_switch_stack, .-rnn_fused_switch_stack
)");

class Registers {
 public:
  void prepare(void* stack, size_t bytes, void (*entry)()) {
    // As if `entry` had been called by nobody: six saved registers, its address, a return address.
    void** frame = reinterpret_cast<void**>(static_cast<char*>(stack) + bytes) - 8;
    for (int i = 0; i < 8; ++i) frame[i] = nullptr;
    frame[6] = reinterpret_cast<void*>(entry);
    stack_ = frame;
  }
  void switch_to(Registers& to) { rnn_fused_switch_stack(&stack_, to.stack_); }

 private:
  void* stack_ = nullptr;
};

#else

class Registers {
 public:
  void prepare(void* stack, size_t bytes, void (*entry)()) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = bytes;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
  }
  void switch_to(Registers& to) { swapcontext(&context_, &to.context_); }

 private:
  ucontext_t context_;
};

#endif

// ---------------------------------------------------------------------------------------------
// The same, with what the sanitizers need to know
// ---------------------------------------------------------------------------------------------

// TSan takes about a millisecond to make one of its fibers, so they are kept from launch to launch,
// one for each slot. What a fiber did in the last launch is ordered before the next one anyway.
inline void*& tsan_fiber(size_t slot) {
  static std::vector<void*> fibers(kTsanFibers);
  return fibers[slot % kTsanFibers];
}

class Context {
 public:
  // The context of the calling thread itself.
  Context() {
#ifdef RNN_FUSED_EMULATION_TSAN
    tsan_ = __tsan_get_current_fiber();
#endif
  }

  // A context that runs `entry` when it is first switched to; entry calls started() first. No two
  // live contexts have the same slot.
  Context(void* stack, size_t bytes, void (*entry)(), [[maybe_unused]] size_t slot,
          [[maybe_unused]] const char* name)
      : stack_(stack), bytes_(bytes) {
    registers_.prepare(stack, bytes, entry);
#ifdef RNN_FUSED_EMULATION_TSAN
    void*& fiber = tsan_fiber(slot);
    if (!fiber) fiber = __tsan_create_fiber(0);
    __tsan_set_fiber_name(fiber, name);
    tsan_ = fiber;
#endif
  }

  Context(const Context&) = delete;

  // A context that will not be switched to again, although it has not come to its end. What it did
  // is ordered before what `main`, the caller, does next.
  void abandon([[maybe_unused]] size_t slot, [[maybe_unused]] Context& main) {
#ifdef RNN_FUSED_EMULATION_TSAN
    __tsan_switch_to_fiber(tsan_, __tsan_switch_to_fiber_no_sync);
    __tsan_switch_to_fiber(main.tsan_, 0);
    __tsan_destroy_fiber(tsan_);
    tsan_fiber(slot) = nullptr;
#endif
#ifdef RNN_FUSED_EMULATION_ASAN
    // Its frames have left marks, which the next owner of the memory must not meet.
    ASAN_UNPOISON_MEMORY_REGION(stack_, bytes_);
#endif
  }

  // `from` is the first to have switched: where its stack lies is known only now.
  void started([[maybe_unused]] Context& from) {
#ifdef RNN_FUSED_EMULATION_ASAN
    const void* stack = nullptr;
    size_t bytes = 0;
    __sanitizer_finish_switch_fiber(nullptr, &stack, &bytes);
    if (!from.stack_) {
      from.stack_ = const_cast<void*>(stack);
      from.bytes_ = bytes;
    }
#endif
  }

  // Goes on with `to`, and returns when something switches back; never where `last`.
  void switch_to(Context& to, [[maybe_unused]] bool last) {
#ifdef RNN_FUSED_EMULATION_ASAN
    __sanitizer_start_switch_fiber(last ? nullptr : &asan_, to.stack_, to.bytes_);
#endif
#ifdef RNN_FUSED_EMULATION_TSAN
    // A switch is no order between threads: else every race would be hidden.
    __tsan_switch_to_fiber(to.tsan_, __tsan_switch_to_fiber_no_sync);
#endif
    registers_.switch_to(to.registers_);
#ifdef RNN_FUSED_EMULATION_ASAN
    __sanitizer_finish_switch_fiber(asan_, nullptr, nullptr);
#endif
  }

 private:
  Registers registers_;
  [[maybe_unused]] void* stack_ = nullptr;
  [[maybe_unused]] size_t bytes_ = 0;
  [[maybe_unused]] void* tsan_ = nullptr;
  [[maybe_unused]] void* asan_ = nullptr;
};

// What a thread did before release() is ordered before what another does after acquire().
inline void release([[maybe_unused]] void* sync) {
#ifdef RNN_FUSED_EMULATION_TSAN
  __tsan_release(sync);
#endif
}

inline void acquire([[maybe_unused]] void* sync) {
#ifdef RNN_FUSED_EMULATION_TSAN
  __tsan_acquire(sync);
#endif
}

#ifdef RNN_FUSED_EMULATION_TSAN
extern "C" void AnnotateIgnoreReadsBegin(const char*, int);
extern "C" void AnnotateIgnoreReadsEnd(const char*, int);
extern "C" void AnnotateIgnoreWritesBegin(const char*, int);
extern "C" void AnnotateIgnoreWritesEnd(const char*, int);
#endif

// Hides from TSan what the scheduler does in a kernel thread's name by malloc, memset and the like,
// which report their accesses even where the code is not instrumented. Slow.
class Unseen {
 public:
  Unseen() {
#ifdef RNN_FUSED_EMULATION_TSAN
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
#endif
  }
  ~Unseen() {
#ifdef RNN_FUSED_EMULATION_TSAN
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
#endif
  }
};

}  // namespace rnn_fused::emulation
