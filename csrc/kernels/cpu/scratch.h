// SPDX-License-Identifier: Apache-2.0
// Working memory that a thread keeps: a fresh buffer of some megabytes costs more in page faults than the work in it.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

#include "kernels/pages.h"

namespace llmkern::cpu::LLMKERN_ISA {

// One buffer a purpose and thread, so that a kernel may call another one while it holds its own.
enum class Slot {
  kPackedA,
  kPackedB,
  kSums,
  kTiles,
  kPanel,
  kHidden,
  kCell,
  kProjection,
  kMoments,
  kMasks,
  kKernel,
  kGates,
  kScales,
  kCount
};

// At least `count` elements, aligned to a cache line, uninitialised, valid until this thread asks for the slot again.
template <class T>
T* scratch(Slot slot, int64_t count) {
  struct Buffer {
    void* memory = nullptr;
    size_t bytes = 0;
    ~Buffer() { std::free(memory); }
  };
  static thread_local Buffer buffers[static_cast<int>(Slot::kCount)];
  Buffer& buffer = buffers[static_cast<int>(slot)];
  const size_t wanted = static_cast<size_t>(count > 0 ? count : 1) * sizeof(T);
  if (wanted > buffer.bytes) {
    std::free(buffer.memory);
    const size_t alignment = wanted < kHugePageBytes ? 64 : kHugePageBytes;
    const size_t bytes = (wanted + alignment - 1) / alignment * alignment;
    buffer.memory = std::aligned_alloc(alignment, bytes);
    buffer.bytes = buffer.memory == nullptr ? 0 : bytes;
    if (buffer.memory == nullptr) throw std::bad_alloc();
    advise_huge_pages(buffer.memory, bytes);
  }
  return static_cast<T*>(buffer.memory);
}

// Cuts a slot into arrays of these sizes, each aligned to a cache line.
template <class T, size_t n>
std::array<T*, n> carve(Slot slot, const int64_t (&sizes)[n]) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
  int64_t total = 0;
  for (int64_t size : sizes) total += (size + kLine - 1) / kLine * kLine;
  T* memory = scratch<T>(slot, total);
  std::array<T*, n> arrays;
  for (size_t i = 0; i < n; ++i) {
    arrays[i] = memory;
    memory += (sizes[i] + kLine - 1) / kLine * kLine;
  }
  return arrays;
}

// Memory for one call, uninitialised; for sizes that depend on data and may never come again.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : data_(static_cast<T*>(std::malloc(static_cast<size_t>(count + 1) * sizeof(T)))) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* data() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_;
};

}  // namespace llmkern::cpu::LLMKERN_ISA
