// SPDX-License-Identifier: Apache-2.0
// What the checkers remember about memory: for every granule whether it was written, by whom last, and who read it
// since.
//
// Two accesses of different threads, one of them a write and not both atomic, race unless the program orders them.
// Order has three levels, and every record carries what each needs:
//   - between launches, and between blocks at a grid or cluster barrier: by tick, a counter that only grows. A block
//     stamps its accesses with its current tick and gets a new one at each barrier;
//   - in a block, across __syncthreads: a record older than the block's epoch is ordered;
//   - in a block, inside an epoch (__syncwarp, named barriers, mbarriers): by vector clocks (Block::known).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace simt {

struct Block;
struct Thread;

enum class Access { kRead, kWrite, kAtomic, kAtomicRead };
enum class Space { kGlobal, kShared };

struct WriteRecord {
  uint32_t tick, clock, block, pc;
  uint16_t thread;
  bool atomic;
};

// Readers of one block are a set, warps x lanes. Readers of several blocks are told apart by cluster only.
struct ReadRecord {
  uint32_t tick, clock, block, pc, warps, lanes;
  bool atomic;
};
constexpr uint32_t kManyBlocks = 0xffffffffu, kManyInCluster = 0x80000000u;

struct Cell {
  WriteRecord write;  // tick 0: never written
  ReadRecord read;    // tick 0: not read
};

constexpr uint32_t kHostTick = 1;  // written before any kernel ran

class Region {
 public:
  Region(std::string name, Space space, uintptr_t base, size_t bytes, Block* owner = nullptr)
      : name(std::move(name)), space(space), base(base), bytes(bytes), owner(owner) {}

  void forget(bool written);  // all of it becomes never written, or written by the host
  void host_write(size_t offset, size_t count);
  // The offset of the first byte from `offset` on that was never written, or -1.
  int64_t never_written(size_t offset, size_t count) const;
  // Records the access by the current thread, as asynchronous copies' own if `asynchronous`; reports what is wrong.
  void access(size_t offset, size_t count, Access access, const void* pc, bool asynchronous);
  // The owner of this shared memory returns: reports if another block may still read it.
  void retire();

  std::string name;
  Space space;
  uintptr_t base;
  size_t bytes;
  Block* owner;           // of shared memory
  bool constant = false;  // an input: known to be written, and not to be written again
  uint32_t generation = 0;

 private:
  void split(size_t offset, size_t count);
  [[noreturn]] void race(const Cell& cell, size_t offset, size_t count, Access access, bool with_write,
                         const void* pc) const;

  // Granules of 2^shift bytes: as large as every access so far allowed, because records are bigger than data.
  unsigned shift_ = 4;
  bool written_ = false;
  std::vector<Cell> cells_;  // empty: nothing happened since forget()
};

// A memory access of the current thread, from a compiler's hook or from the runtime; does nothing on the host's behalf.
void touch(const void* address, size_t bytes, Access access, const void* pc, bool asynchronous = false);

}  // namespace simt
