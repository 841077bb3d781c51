// SPDX-License-Identifier: Apache-2.0
#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {

namespace {

constexpr size_t kGuardBytes = 4096;

// Stacks are kept: a launch of many blocks would spend its time in mmap otherwise.
std::mutex pool_mutex;
std::vector<char*> pool;

char* take_stack() {
  {
    const std::lock_guard lock(pool_mutex);
    if (!pool.empty()) {
      char* stack = pool.back();
      pool.pop_back();
      return stack;
    }
  }
  void* memory = mmap(nullptr, Fiber::kStackBytes + kGuardBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, kGuardBytes, PROT_NONE) != 0) std::abort();
  return static_cast<char*>(memory) + kGuardBytes;
}

}  // namespace

Fiber::~Fiber() {
  if (stack_ == nullptr) return;
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(stack_, kStackBytes);  // a fault abandons a stack as it is
#endif
  const std::lock_guard lock(pool_mutex);
  pool.push_back(stack_);
}

#ifdef SIMT_UCONTEXT

void Fiber::trampoline(unsigned high, unsigned low) {
  Fiber* fiber = reinterpret_cast<Fiber*>(static_cast<uintptr_t>(high) << 32 | low);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &fiber->caller_stack_, &fiber->caller_bytes_);
#endif
  fiber->entry_();
}

void Fiber::start(void (*entry)()) {
  if (stack_ == nullptr) stack_ = take_stack();
  entry_ = entry;
  fake_stack_ = nullptr;
  getcontext(&here_);
  here_.uc_stack.ss_sp = stack_;
  here_.uc_stack.ss_size = kStackBytes;
  const auto self = reinterpret_cast<uintptr_t>(this);
  makecontext(&here_, reinterpret_cast<void (*)()>(&trampoline), 2, static_cast<unsigned>(self >> 32),
              static_cast<unsigned>(self));
}

void Fiber::resume() {
#ifdef __SANITIZE_ADDRESS__
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, stack_, kStackBytes);
#endif
  swapcontext(&caller_, &here_);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

void Fiber::suspend() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&fake_stack_, caller_stack_, caller_bytes_);
#endif
  swapcontext(&here_, &caller_);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake_stack_, &caller_stack_, &caller_bytes_);
#endif
}

#else

// Pushes the registers a call must keep, leaves the stack pointer in *other and continues where *other pointed.
extern "C" void simt_switch(void** other);
asm(R"(
  .text
  .type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq (%rdi), %rax
  movq %rsp, (%rdi)
  movq %rax, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size simt_switch, .-simt_switch
)");

void Fiber::start(void (*entry)()) {
  if (stack_ == nullptr) stack_ = take_stack();
  // As simt_switch leaves a stack: six registers, where to return to; entry finds rsp as if it had been called.
  void** top = reinterpret_cast<void**>(stack_ + kStackBytes) - 1;
  *top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  here_ = top;
}

void Fiber::resume() { simt_switch(&here_); }
void Fiber::suspend() { simt_switch(&here_); }

#endif

}  // namespace simt
