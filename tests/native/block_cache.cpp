// SPDX-License-Identifier: Apache-2.0
// The cache of large blocks by itself; built by tests/ops/test_recycled_memory.py, which names a case.
#include "ops/block_cache.h"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>

using llmkern::kHugePageBytes;
using namespace llmkern::ops;

namespace {

constexpr size_t kMiB = size_t{1} << 20;

#define EXPECT(condition)                                        \
  if (!(condition)) {                                            \
    std::printf("line %d: expected %s\n", __LINE__, #condition); \
    std::exit(1);                                                \
  }

void blocks_come_back() {
  BlockCache cache;
  const Block a = cache.take(5 * kMiB), b = cache.take(5 * kMiB);
  EXPECT(a.memory != b.memory && a.bytes == 6 * kMiB);
  EXPECT(reinterpret_cast<uintptr_t>(a.memory) % kHugePageBytes == 0);
  cache.give_back(a);
  cache.give_back(b);
  EXPECT(cache.take(5 * kMiB).memory == b.memory);  // the last one, which is the warmest
  EXPECT(cache.take(5 * kMiB).memory == a.memory);
  EXPECT(cache.stats().mapped_bytes == 12 * kMiB && cache.stats().idle_bytes == 0);
}

void waste_is_bounded() {
  BlockCache cache;
  const Block large = cache.take(32 * kMiB), fitting = cache.take(18 * kMiB);
  cache.give_back(large);
  const Block small = cache.take(15 * kMiB);  // rounded to 16, half of 32
  EXPECT(small.memory == large.memory && small.bytes == 32 * kMiB);
  cache.give_back(small);
  EXPECT(cache.take(14 * kMiB).bytes == 14 * kMiB);  // less than half
  EXPECT(cache.take(33 * kMiB).bytes == 34 * kMiB);  // more than all
  cache.give_back(fitting);
  EXPECT(cache.take(17 * kMiB).memory == fitting.memory);  // the smallest that does
}

void old_blocks_go() {
  BlockCache cache;
  cache.give_back(cache.take(64 * kMiB));
  cache.give_back(cache.take(8 * kMiB));
  EXPECT(cache.stats().held_bytes == 72 * kMiB);
  for (int64_t i = 1; i < 2 * BlockCache::kPatience; ++i) cache.give_back(cache.take(8 * kMiB));
  EXPECT(cache.stats().held_bytes == 72 * kMiB);
  for (int i = 0; i < 2; ++i) cache.give_back(cache.take(8 * kMiB));
  EXPECT(cache.stats().held_bytes == 8 * kMiB && cache.stats().mapped_bytes == 72 * kMiB);
}

// A loop over cells takes a block at every step before it gives any back.
void many_blocks_are_kept() {
  BlockCache cache;
  Block blocks[300];
  for (int round = 0; round < 3; ++round) {
    for (Block& block : blocks) block = cache.take(2 * kMiB);
    for (Block& block : blocks) cache.give_back(block);
  }
  EXPECT(cache.stats().mapped_bytes == 300 * 2 * kMiB);
}

void idle_blocks_are_freed() {
  BlockCache cache;
  const Block kept = cache.take(4 * kMiB);
  cache.give_back(cache.take(20 * kMiB));
  cache.free_idle();
  EXPECT(cache.stats().held_bytes == 4 * kMiB && cache.stats().idle_bytes == 0);
  std::memset(kept.memory, 1, 4 * kMiB);
  cache.give_back(kept);
  EXPECT(cache.take(4 * kMiB).memory == kept.memory);
}

void no_memory() {
  BlockCache cache;
  cache.give_back(cache.take(4 * kMiB));
  EXPECT(cache.take(size_t{1} << 60).memory == nullptr);
  EXPECT(cache.stats().held_bytes == 0);  // what was idle was freed for it
  EXPECT(cache.take(4 * kMiB).memory != nullptr);
}

// Each writes its name all over what it takes, and still finds it there.
void threads_share_it() {
  std::thread threads[4];
  for (int t = 0; t < 4; ++t) {
    threads[t] = std::thread([t] {
      for (int i = 0; i < 200; ++i) {
        const size_t bytes = (1 + (i + t) % 3) * 2 * kMiB;
        const Block block = block_cache().take(bytes);
        auto* at = static_cast<volatile char*>(block.memory);
        for (size_t b = 0; b < bytes; b += 4096) at[b] = static_cast<char>(t);
        for (size_t b = 0; b < bytes; b += 4096) EXPECT(at[b] == t);
        std::thread([block] { block_cache().give_back(block); }).join();
        if (i % 50 == 0) block_cache().free_idle();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT(block_cache().stats().idle_bytes == block_cache().stats().held_bytes);
}

// Another thread holds the lock most of the time; a child that inherits it would wait for ever.
void forks() {
  const Block block = block_cache().take(2 * kMiB);
  *static_cast<char*>(block.memory) = 7;
  std::atomic<bool> stop = false;
  std::thread busy([&stop] {
    while (!stop) block_cache().stats();
  });
  for (int i = 0; i < 200; ++i) {
    block_cache().give_back(block_cache().take(4 * kMiB));
    const pid_t child = fork();
    if (child == 0) {
      alarm(20);
      const bool fresh = block_cache().stats().held_bytes == block.bytes;
      const bool same = *static_cast<char*>(block.memory) == 7;
      block_cache().give_back(block);
      const bool reused = block_cache().take(2 * kMiB).memory == block.memory;
      _exit(fresh && same && reused ? 0 : 1);
    }
    int status = -1;
    waitpid(child, &status, 0);
    EXPECT(status == 0);
  }
  stop = true;
  busy.join();
}

char read(const void* memory, size_t at) { return static_cast<const volatile char*>(memory)[at]; }

// What AddressSanitizer has to report.
void read_after_giving_back() {
  const Block block = block_cache().take(4 * kMiB);
  std::memset(block.memory, 0, 4 * kMiB);
  block_cache().give_back(block);
  read(block.memory, 100);
}

void read_behind_the_end() {
  const Block block = block_cache().take(3 * kMiB);
  read(block.memory, 3 * kMiB);
}

struct Case {
  const char* name;
  void (*run)();
};

constexpr Case kCases[] = {{"blocks_come_back", blocks_come_back},
                           {"waste_is_bounded", waste_is_bounded},
                           {"old_blocks_go", old_blocks_go},
                           {"many_blocks_are_kept", many_blocks_are_kept},
                           {"idle_blocks_are_freed", idle_blocks_are_freed},
                           {"no_memory", no_memory},
                           {"threads_share_it", threads_share_it},
                           {"forks", forks},
                           {"read_after_giving_back", read_after_giving_back},
                           {"read_behind_the_end", read_behind_the_end}};

}  // namespace

int main(int count, char** arguments) {
  for (const Case& wanted : kCases) {
    if (count != 2 || std::strcmp(arguments[1], wanted.name) != 0) continue;
    wanted.run();
    return 0;
  }
  return 2;
}
