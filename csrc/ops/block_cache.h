// SPDX-License-Identifier: Apache-2.0
// Large memory that is used again. malloc maps a large block anew for every training step, and the system then clears
// and maps it page by page, which takes longer than the arithmetic in it; memory that it does not map anew may lie in
// small pages. Here blocks are kept, in large pages, from one step to the next. Knows no torch: tensors.cpp hands it
// out.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

#include "kernels/pages.h"

namespace llmkern::ops {

struct Block {
  void* memory;  // kHugePageBytes-aligned
  size_t bytes;  // a multiple of kHugePageBytes
};

class BlockCache {
 public:
  // A block serves requests of at least half its size, so that sequences of all lengths share few blocks.
  static constexpr size_t kMostWaste = 2;
  // A block that so many requests for each block there is have not wanted is freed: after a change of shapes the old
  // ones go.
  static constexpr int64_t kPatience = 32;

  struct Stats {
    size_t held_bytes;    // in use or idle
    size_t idle_bytes;    // kept for the next request
    size_t mapped_bytes;  // ever asked of the system: the same before and after a step that takes no fresh memory
  };

  // At least that much, uninitialised; null memory where the system has no more.
  Block take(size_t bytes);

  // On any thread. `block` comes from take.
  void give_back(Block block) noexcept;

  void free_idle();

  Stats stats();

  // Around fork(): the child finds the lock free, and no idle blocks. The first to write to a shared one would
  // have to copy it, in small pages.
  void before_fork();
  void after_fork();

 private:
  struct Idle {
    Block block;
    int64_t since;
  };

  bool reuse(size_t bytes, Block& block);
  Block map(size_t bytes);
  void free_unwanted();
  void free_oldest(size_t count);

  std::mutex mutex_;
  std::vector<Idle> idle_;  // in the order in which they came back
  size_t blocks_ = 0;       // in use or idle
  int64_t requests_ = 0;
  Stats stats_ = {};
};

// That of the process. It is never destroyed: tensors may outlive everything else.
BlockCache& block_cache();

}  // namespace llmkern::ops
