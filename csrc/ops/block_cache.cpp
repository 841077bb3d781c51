// SPDX-License-Identifier: Apache-2.0
#include "ops/block_cache.h"

#include <pthread.h>

#include <cstdlib>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(memory, bytes) static_cast<void>(0)
#define ASAN_UNPOISON_MEMORY_REGION(memory, bytes) static_cast<void>(0)
#endif

namespace llmkern::ops {

namespace {

size_t whole_pages(size_t bytes) { return (bytes + kHugePageBytes - 1) / kHugePageBytes * kHugePageBytes; }

BlockCache* make_cache() {
  pthread_atfork([] { block_cache().before_fork(); }, [] { block_cache().after_fork(); },
                 [] { block_cache().after_fork(); });
  return new BlockCache;
}

// Made when the library is loaded, so that no fork meets it half made.
BlockCache* const kCache = make_cache();

}  // namespace

Block BlockCache::take(size_t bytes) {
  const std::lock_guard lock(mutex_);
  ++requests_;
  Block block;
  if (!reuse(whole_pages(bytes), block)) block = map(whole_pages(bytes));
  free_unwanted();
  // Memory beyond the request belongs to nobody, as idle memory does: AddressSanitizer reports who touches it.
  if (block.memory != nullptr) ASAN_UNPOISON_MEMORY_REGION(block.memory, bytes);
  return block;
}

void BlockCache::free_unwanted() {
  const int64_t patience = kPatience * static_cast<int64_t>(blocks_);
  size_t count = 0;
  while (count < idle_.size() && requests_ - idle_[count].since > patience) ++count;
  free_oldest(count);
}

// The smallest that does; of these the one that came back last, which is the likeliest to be in the processor's cache.
bool BlockCache::reuse(size_t bytes, Block& block) {
  size_t best = idle_.size();
  for (size_t i = 0; i < idle_.size(); ++i) {
    const size_t size = idle_[i].block.bytes;
    if (size < bytes || size / kMostWaste > bytes) continue;
    if (best == idle_.size() || size <= idle_[best].block.bytes) best = i;
  }
  if (best == idle_.size()) return false;
  block = idle_[best].block;
  idle_.erase(idle_.begin() + static_cast<std::ptrdiff_t>(best));
  stats_.idle_bytes -= block.bytes;
  return true;
}

Block BlockCache::map(size_t bytes) {
  idle_.reserve(blocks_ + 1);  // give_back has to succeed
  void* memory = std::aligned_alloc(kHugePageBytes, bytes);
  if (memory == nullptr) {
    free_oldest(idle_.size());
    memory = std::aligned_alloc(kHugePageBytes, bytes);
  }
  if (memory == nullptr) return {nullptr, 0};
  advise_huge_pages(memory, bytes);
  ASAN_POISON_MEMORY_REGION(memory, bytes);
  ++blocks_;
  stats_.held_bytes += bytes;
  stats_.mapped_bytes += bytes;
  return {memory, bytes};
}

void BlockCache::give_back(Block block) noexcept {
  const std::lock_guard lock(mutex_);
  ASAN_POISON_MEMORY_REGION(block.memory, block.bytes);
  idle_.push_back({block, requests_});
  stats_.idle_bytes += block.bytes;
}

void BlockCache::free_oldest(size_t count) {
  for (size_t i = 0; i < count; ++i) {
    const Block block = idle_[i].block;
    ASAN_UNPOISON_MEMORY_REGION(block.memory, block.bytes);
    std::free(block.memory);
    stats_.idle_bytes -= block.bytes;
    stats_.held_bytes -= block.bytes;
  }
  blocks_ -= count;
  idle_.erase(idle_.begin(), idle_.begin() + static_cast<std::ptrdiff_t>(count));
}

void BlockCache::free_idle() {
  const std::lock_guard lock(mutex_);
  free_oldest(idle_.size());
}

BlockCache::Stats BlockCache::stats() {
  const std::lock_guard lock(mutex_);
  return stats_;
}

void BlockCache::before_fork() {
  mutex_.lock();
  free_oldest(idle_.size());
}

void BlockCache::after_fork() { mutex_.unlock(); }

BlockCache& block_cache() { return *kCache; }

}  // namespace llmkern::ops
