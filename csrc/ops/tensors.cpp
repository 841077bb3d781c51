// SPDX-License-Identifier: Apache-2.0
#include "ops/tensors.h"

#include <atomic>
#include <iomanip>

#include "ops/block_cache.h"

// From torch 2.11 on; null before. torch/csrc/stable/c/shim.h declares it for libraries that need that version.
extern "C" AOTI_TORCH_EXPORT __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t dimensions, const int64_t* sizes, const int64_t* strides, int64_t storage_offset, int32_t dtype,
    int32_t device_type, int32_t device_index, AtenTensorHandle* made, int32_t layout, const uint8_t* opaque_metadata,
    int64_t opaque_metadata_size, void (*deleter)(void* data, void* context), void* context);

namespace llmkern::ops {

namespace {

// Half of the smallest block. Smaller memory malloc keeps itself.
constexpr int64_t kLeastRecycledBytes = kHugePageBytes / 2;

// 0 where there is no such number.
int64_t bytes_of(const int64_t* sizes, size_t dimensions, int64_t element_size) {
  int64_t bytes = element_size;
  for (size_t d = 0; d < dimensions; ++d) {
    if (__builtin_mul_overflow(bytes, sizes[d], &bytes)) return 0;
  }
  return bytes;
}

// The sizes that a user can lower, by the beginning of an operator's name.
const char* what_to_lower(const std::string& what) {
  constexpr const char* kAdvice[][2] = {
      {"lstm", "the batch size or the number of steps of a call"},
      {"embedding", "the number of ids of a call"},
      {"linear_cross_entropy", "the number of rows (batch size times steps) of a call"},
      {"beam_search", "the batch size or the number of beams"},
      {"multinomial", "the batch size or num_samples"},
  };
  for (const auto& [name, advice] : kAdvice) {
    if (what.starts_with(name)) return advice;
  }
  return "the batch size";
}

// Where a tensor begins in its block: each a few cache lines further than the one before. Arrays that are walked side
// by side must not agree in the last 12 bits of their addresses: a load then waits for a store that has nothing to do
// with it, and lines of all of them compete for one set of the cache. Layer norm took a quarter longer for it.
size_t next_offset() {
  constexpr size_t kLine = 64, kLines = 5, kPlaces = 13;  // 12 * 5 lines: almost a page of 4 KiB
  static std::atomic<size_t> requests{0};
  return requests.fetch_add(1, std::memory_order_relaxed) % kPlaces * kLines * kLine;
}

void give_back(void* data, void* bytes) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(data);  // less far into the block than a huge page
  block_cache().give_back(
      {reinterpret_cast<void*>(at / kHugePageBytes * kHugePageBytes), reinterpret_cast<uintptr_t>(bytes)});
}

}  // namespace

void fail_for_memory(const char* what, const OutOfMemory& error) {
  const double gib = static_cast<double>(error.bytes) / (1 << 30);
  fail<std::runtime_error>(what, "out of memory. Expected ", error.bytes, " bytes (", std::fixed, std::setprecision(2),
                           gib, " GiB) for ", error.purpose, ", got none from the allocator; lower ",
                           what_to_lower(what));
}

void fail_to_make(const int64_t* sizes, size_t dimensions, int64_t element_size) {
  std::string shape;
  for (size_t d = 0; d < dimensions; ++d) shape += (d ? ", " : "") + std::to_string(sizes[d]);
  const int64_t bytes = bytes_of(sizes, dimensions, element_size);
  if (bytes <= 0) fail("tensors", "expected a shape that memory can hold, got [", shape, "]");
  throw OutOfMemory(static_cast<size_t>(bytes), "a tensor of shape [" + shape + "]");
}

// Such a tensor is whole on its device, hence all that a copy may lack is memory.
Tensor contiguous_copy(const Tensor& tensor) {
  try {
    return torch::stable::contiguous(tensor);
  } catch (const std::runtime_error&) {
    fail_to_make(tensor.sizes().data(), static_cast<size_t>(tensor.dim()), tensor.element_size());
  }
}

Tensor empty_recycled(const Tensor& like, std::initializer_list<int64_t> shape, std::optional<ScalarType> dtype) {
  const ScalarType element = dtype.value_or(like.scalar_type());
  const int64_t bytes = bytes_of(shape.begin(), shape.size(), element_bytes(element));
  if (bytes < kLeastRecycledBytes || !like.is_cpu() || torch_from_blob == nullptr) return empty(like, shape, dtype);
  const size_t offset = next_offset();
  const Block block = block_cache().take(offset + static_cast<size_t>(bytes));
  if (block.memory == nullptr) return empty(like, shape, dtype);  // torch says how much it could not get
  std::vector<int64_t> strides(shape.size());
  int64_t count = 1;
  for (size_t d = shape.size(); d-- > 0; count *= shape.begin()[d]) strides[d] = count;
  AtenTensorHandle made;
  // Where this fails the block is lost: nobody knows whether torch has called the deleter.
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_from_blob(static_cast<char*>(block.memory) + offset, static_cast<int64_t>(shape.size()), shape.begin(),
                      strides.data(), 0, torch::stable::detail::to<int32_t>(torch::stable::detail::from(element)),
                      aoti_torch_device_type_cpu(), like.get_device_index(), &made, aoti_torch_layout_strided(),
                      nullptr, 0, &give_back, reinterpret_cast<void*>(block.bytes)));
  return Tensor(made);
}

}  // namespace llmkern::ops
