// SPDX-License-Identifier: Apache-2.0
// Asynchronous copies and mbarriers.
//
// A thread's own copies (cp.async) happen as late as they may, when it waits for them: a kernel that forgets to wait
// reads what was there before. Copies an mbarrier waits for happen at once, but under the name of nobody, so that a
// read which did not wait for the mbarrier is a race.
#include <cstring>
#include <string>

#include "block.h"

namespace simt {

namespace {

void check_alignment(const void* shared, const void* global, size_t bytes, const void* pc) {
  if (((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) & (bytes - 1)) != 0) {
    fault("misaligned access", "copies to or from an address that is no multiple of " + std::to_string(bytes), pc);
  }
}

void perform(const Copy& copy, bool asynchronous) {
  touch(copy.shared, copy.bytes, Access::kWrite, copy.pc, asynchronous);
  if (copy.wanted) {
    touch(copy.global, copy.bytes, Access::kRead, copy.pc);
    std::memcpy(copy.shared, copy.global, copy.bytes);
  } else {
    std::memset(copy.shared, 0, copy.bytes);
  }
}

Mbarrier& find(uint64_t* barrier, const void* pc) {
  touch(barrier, sizeof *barrier, Access::kRead, pc);
  const auto found = current->block->mbarriers.find(barrier);
  if (found == current->block->mbarriers.end())
    fault("uninitialised read", "uses an mbarrier without mbarrier_init", pc);
  return found->second;
}

void finish_phase(Mbarrier& barrier) {
  if (barrier.pending > 0 || barrier.bytes > 0) return;
  ++barrier.phase;
  barrier.pending = barrier.expected;
  ++running->progress;
}

void arrive(Mbarrier& barrier, unsigned bytes) {
  current->block->teach(current->index, barrier.clock);
  barrier.bytes += bytes;
  --barrier.pending;
  finish_phase(barrier);
}

// What asynchronous copies have written so far is known to whoever waits for this barrier.
void publish_copies(Mbarrier& barrier) {
  Block& block = *current->block;
  barrier.clock.resize(block.columns());
  barrier.clock.back() = block.time++;
}

}  // namespace

void async_copy(void* shared, const void* global, size_t bytes, bool wanted) {
  const void* pc = __builtin_return_address(0);
  check_alignment(shared, wanted ? global : nullptr, bytes, pc);
  current->copies.back().push_back({shared, global, bytes, wanted, pc});
}

void async_commit() { current->copies.emplace_back(); }

void async_wait(size_t pending) {
  auto& groups = current->copies;
  while (groups.size() > pending + 1) {  // the open group is not counted
    for (const Copy& copy : groups.front()) perform(copy, false);
    groups.erase(groups.begin());
  }
}

void bulk_copy(void* shared, const void* global, unsigned bytes, uint64_t* barrier) {
  const void* pc = __builtin_return_address(0);
  check_alignment(shared, global, 16, pc);
  if (bytes % 16 != 0) fault("misaligned access", "copies " + std::to_string(bytes) + " bytes, no multiple of 16", pc);
  Mbarrier& counts = find(barrier, pc);
  perform({shared, global, bytes, true, pc}, true);
  publish_copies(counts);
  counts.bytes -= bytes;
  finish_phase(counts);
}

void mbarrier_init(uint64_t* barrier, unsigned arrivals) {
  touch(barrier, sizeof *barrier, Access::kWrite, __builtin_return_address(0));
  current->block->mbarriers[barrier] = {arrivals, arrivals, 0, 0, {}};
}

void mbarrier_arrive(uint64_t* barrier, unsigned expected_bytes) {
  arrive(find(barrier, __builtin_return_address(0)), expected_bytes);
}

void mbarrier_arrive_after_copies(uint64_t* barrier) {
  Mbarrier& counts = find(barrier, __builtin_return_address(0));
  for (const auto& group : current->copies) {
    for (const Copy& copy : group) perform(copy, true);
  }
  current->copies.assign(1, {});
  publish_copies(counts);
  arrive(counts, 0);
}

void mbarrier_wait(uint64_t* barrier, unsigned parity) {
  Mbarrier& counts = find(barrier, __builtin_return_address(0));
  while ((counts.phase & 1) == (parity & 1)) poll("mbarrier_wait");
  current->block->learn(current->index, counts.clock);
}

}  // namespace simt
