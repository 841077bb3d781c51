// SPDX-License-Identifier: Apache-2.0
// Working memory that a thread keeps: a fresh buffer of some megabytes costs more in page faults than the work in it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace llmkern::cpu::LLMKERN_ISA {

// One buffer a purpose and thread, so that a kernel may call another one while it holds its own.
enum class Slot { kPackedA, kPackedB, kSums, kTiles, kHidden, kCell, kKernel, kGates, kCount };

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
  const size_t wanted = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
  if (wanted > buffer.bytes) {
    std::free(buffer.memory);
    buffer.memory = std::aligned_alloc(64, wanted);
    buffer.bytes = buffer.memory == nullptr ? 0 : wanted;
    if (buffer.memory == nullptr) throw std::bad_alloc();
  }
  return static_cast<T*>(buffer.memory);
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
