// SPDX-License-Identifier: Apache-2.0
// A kernel's working memory: slots that its thread keeps (kernels/thread_memory.h), and buffers for one call.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <tuple>
#include <utility>

#include "kernels/thread_memory.h"

namespace llmkern::cpu::LLMKERN_ISA {

// A slot that is held, uninitialised, until this is destroyed. Stands for the pointer to its first element.
template <class T>
class Scratch {
 public:
  Scratch() = default;
  Scratch(Slot slot, int64_t count)
      : memory_(static_cast<T*>(hold_thread_memory(slot, static_cast<size_t>(count > 0 ? count : 1) * sizeof(T)))),
        slot_(slot) {}

  operator T*() const& { return memory_; }
  operator T*() && = delete;  // nobody would hold it
  T* get() const { return memory_; }

#ifdef LLMKERN_DEBUG
  ~Scratch() { release(); }
  Scratch(Scratch&& other) noexcept : memory_(std::exchange(other.memory_, nullptr)), slot_(other.slot_) {}
  Scratch& operator=(Scratch&& other) noexcept {
    release();
    memory_ = std::exchange(other.memory_, nullptr);
    slot_ = other.slot_;
    return *this;
  }
#else
  Scratch(Scratch&&) = default;
  Scratch& operator=(Scratch&&) = default;
#endif

 private:
#ifdef LLMKERN_DEBUG
  void release() {
    if (memory_ != nullptr) release_thread_memory(slot_);
  }
#endif

  T* memory_ = nullptr;
  Slot slot_ = Slot::kCount;
};

template <class T>
Scratch<T> scratch(Slot slot, int64_t count) {
  return Scratch<T>(slot, count);
}

// A slot cut into arrays, for `const auto [first, second] = carve<T>(...)`: each is a T*.
template <class T, size_t n>
class Carved {
 public:
  Carved(Slot slot, const int64_t (&sizes)[n]) : memory_(slot, total(sizes)) {
    T* memory = memory_;
    for (size_t i = 0; i < n; memory += whole_lines(sizes[i++])) arrays_[i] = memory;
  }

  T* operator[](size_t i) const { return arrays_[i]; }
  template <size_t i>
  T* get() const {
    return arrays_[i];
  }

 private:
  static int64_t whole_lines(int64_t size) {
    constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
    return (size + kLine - 1) / kLine * kLine;
  }
  static int64_t total(const int64_t (&sizes)[n]) {
    int64_t sum = 0;
    for (int64_t size : sizes) sum += whole_lines(size);
    return sum;
  }

  Scratch<T> memory_;
  std::array<T*, n> arrays_;
};

// Arrays of these sizes, each aligned to a cache line.
template <class T, size_t n>
Carved<T, n> carve(Slot slot, const int64_t (&sizes)[n]) {
  return Carved<T, n>(slot, sizes);
}

// Memory for one call, uninitialised; for sizes that depend on data and may never come again.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : data_(static_cast<T*>(std::malloc(static_cast<size_t>(count + 1) * sizeof(T)))) {
    if (data_ == nullptr) fail_for_working_memory(static_cast<size_t>(count + 1) * sizeof(T));
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

template <class T, size_t n>
struct std::tuple_size<llmkern::cpu::LLMKERN_ISA::Carved<T, n>> : std::integral_constant<size_t, n> {};

template <size_t i, class T, size_t n>
struct std::tuple_element<i, llmkern::cpu::LLMKERN_ISA::Carved<T, n>> {
  using type = T*;
};
