// SPDX-License-Identifier: Apache-2.0
#include "memory.h"

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <deque>
#include <stdexcept>
#include <string>
#include <vector>

#include "block.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, bytes)
#define ASAN_UNPOISON_MEMORY_REGION(address, bytes)
#endif

namespace simt {

namespace {

constexpr size_t kMemoryBytes = size_t{1} << 32, kPage = 4096, kGap = size_t{64} << 10;

uintptr_t memory_base() {
  static const uintptr_t base = [] {
    void* memory =
        mmap(nullptr, kMemoryBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    return reinterpret_cast<uintptr_t>(memory);
  }();
  return base;
}

std::deque<Region> buffers;           // by address
std::vector<Region*> buffer_of_page;  // the last buffer that starts at or before the page
size_t used = kGap;

}  // namespace

bool in_device_memory(uintptr_t address) { return address - memory_base() < kMemoryBytes; }

Region* buffer_at(uintptr_t address) {
  const size_t page = (address - memory_base()) / kPage;
  if (page < buffer_of_page.size()) return buffer_of_page[page];
  return buffers.empty() ? nullptr : &buffers.back();
}

}  // namespace simt

// ---- CUDA's copies: at once, and checked as a kernel's accesses are ----

namespace {

simt::Region& checked(const char* what, const void* pointer, size_t bytes) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  simt::Region* buffer = simt::in_device_memory(address) ? simt::buffer_at(address) : nullptr;
  if (buffer == nullptr || address < buffer->base || address + bytes > buffer->base + buffer->bytes) {
    throw std::runtime_error(std::string("simt: global memory out of bounds: ") + what + " of " +
                             std::to_string(bytes) + " bytes" +
                             (buffer == nullptr ? " outside every buffer" : " leaves " + buffer->name));
  }
  return *buffer;
}

void host_write(const char* what, void* to, size_t bytes) {
  simt::Region& buffer = checked(what, to, bytes);
  if (buffer.constant) throw std::runtime_error(std::string("simt: write to an input: ") + what + " to " + buffer.name);
  buffer.host_write(reinterpret_cast<uintptr_t>(to) - buffer.base, bytes);
}

}  // namespace

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  if (bytes == 0) return cudaSuccess;
  host_write("cudaMemsetAsync", to, bytes);
  std::memset(to, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t) {
  if (bytes == 0) return cudaSuccess;
  if (kind == cudaMemcpyDeviceToDevice) {
    const simt::Region& source = checked("cudaMemcpyAsync", from, bytes);
    if (source.never_written(reinterpret_cast<uintptr_t>(from) - source.base, bytes) >= 0) {
      throw std::runtime_error("simt: uninitialised read: cudaMemcpyAsync from " + source.name);
    }
  }
  if (kind != cudaMemcpyDeviceToHost) host_write("cudaMemcpyAsync", to, bytes);
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}

// ---- for the tests' harness ----

extern "C" {

// A buffer of device memory: a copy of `contents`, or never written where that is null. `constant`: an input.
void* simt_buffer(const char* name, size_t bytes, const void* contents, int constant) {
  using namespace simt;
  const size_t span = (bytes + kGap + kPage) / kPage * kPage;
  if (used + span > kMemoryBytes) return nullptr;
  const uintptr_t base = memory_base() + used;
  void* memory = reinterpret_cast<void*>(base);
  Region& buffer = buffers.emplace_back(std::string("`") + name + "`", Space::kGlobal, base, bytes);
  ASAN_UNPOISON_MEMORY_REGION(memory, bytes);
  ASAN_POISON_MEMORY_REGION(reinterpret_cast<void*>(base + bytes), span - bytes);
  if (contents != nullptr) {
    std::memcpy(memory, contents, bytes);
  } else {
    std::memset(memory, kFill, bytes);
  }
  buffer.forget(contents != nullptr);
  buffer.constant = constant != 0;
  Region* before = buffer_of_page.empty() ? nullptr : buffer_of_page.back();
  buffer_of_page.resize(used / kPage, before);
  used += span;
  buffer_of_page.resize(used / kPage, &buffer);
  return memory;
}

void simt_free_all() {
  simt::buffers.clear();
  simt::buffer_of_page.clear();
  simt::used = simt::kGap;
}

// The offset of the buffer's first byte that nothing has written, or -1.
int64_t simt_never_written(const void* buffer) {
  const simt::Region* region = simt::buffer_at(reinterpret_cast<uintptr_t>(buffer));
  return region->never_written(0, region->bytes);
}

}  // extern "C"
