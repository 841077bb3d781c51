// SPDX-License-Identifier: Apache-2.0
// A CUDA thread as a fiber: a stack of its own, switched to and from in a few nanoseconds.
//
// On x86-64 the switch is a dozen instructions. Elsewhere, and under AddressSanitizer (so that both are tested), it is
// swapcontext, which asks the kernel for the signal mask every time.
#pragma once

#include <cstddef>

#if !defined(__x86_64__) || defined(__SANITIZE_ADDRESS__)
#define SIMT_UCONTEXT
#include <ucontext.h>
#endif

namespace simt {

class Fiber {
 public:
  static constexpr size_t kStackBytes = size_t{256} << 10;  // touched pages alone cost memory

  Fiber() = default;
  Fiber(const Fiber&) = delete;
  ~Fiber();

  // The next resume() calls entry(), which must end in suspend() for good.
  void start(void (*entry)());
  // Runs the fiber on the calling OS thread until it suspends. A fiber stays with one OS thread while it lives.
  void resume();
  void suspend();

  bool on_stack(const void* address) const {
    return static_cast<size_t>(static_cast<const char*>(address) - stack_) < kStackBytes;
  }

 private:
  char* stack_ = nullptr;
#ifdef SIMT_UCONTEXT
  static void trampoline(unsigned high, unsigned low);
  ucontext_t here_, caller_;
  void (*entry_)() = nullptr;
  void* fake_stack_ = nullptr;  // AddressSanitizer's bookkeeping
  const void* caller_stack_ = nullptr;
  size_t caller_bytes_ = 0;
#else
  void* here_ = nullptr;  // the stack pointer of whoever does not run
#endif
};

}  // namespace simt
