// SPDX-License-Identifier: Apache-2.0
// Atomics and fences. Atomics are relaxed; after a fence they order blocks: what came before __threadfence and an
// atomic (or volatile) write comes before what follows an atomic (or volatile) read of the same address.
#include <algorithm>
#include <cstring>

#include "block.h"

namespace simt {

void thread_fence() { current->fenced = true; }

void release_at(const void* address) {
  if (running->blocks() == 1) return;
  Block& block = *current->block;
  auto& released = running->released[reinterpret_cast<uintptr_t>(address)];
  for (const auto& [other, tick] : block.acquired) released[other] = std::max(released[other], tick);
  released[block.linear] = block.stamp;
  block.stamp = ++ticks;  // what follows is not released
}

void acquire_at(const void* address) {
  const auto released = running->released.find(reinterpret_cast<uintptr_t>(address));
  if (released == running->released.end()) return;
  auto& acquired = current->block->acquired;
  for (const auto& [other, tick] : released->second) acquired[other] = std::max(acquired[other], tick);
}

uint64_t atomic(void* address, size_t bytes, uint64_t operand, uint64_t compare, Update update) {
  spin();
  acquire_at(address);
  if (current->fenced) release_at(address);
  touch(address, bytes, Access::kAtomic, __builtin_return_address(0));
  uint64_t old = 0;
  std::memcpy(&old, address, bytes);
  const uint64_t value = update(old, operand, compare);
  std::memcpy(address, &value, bytes);
  return old;
}

unsigned load_acquire(const unsigned* flag) {
  spin();
  acquire_at(flag);
  touch(flag, sizeof *flag, Access::kAtomicRead, __builtin_return_address(0));
  return *flag;
}

void add_release(unsigned* flag, unsigned value) {
  acquire_at(flag);  // a read-modify-write continues what earlier ones released
  release_at(flag);
  touch(flag, sizeof *flag, Access::kAtomic, __builtin_return_address(0));
  *flag += value;
}

}  // namespace simt
