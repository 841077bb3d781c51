// SPDX-License-Identifier: Apache-2.0
#include "ops/tensors.h"

#include <atomic>

#include "ops/block_cache.h"

// From torch 2.11 on; null before. torch/csrc/stable/c/shim.h declares it for libraries that need that version.
extern "C" AOTI_TORCH_EXPORT __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t dimensions, const int64_t* sizes, const int64_t* strides, int64_t storage_offset, int32_t dtype,
    int32_t device_type, int32_t device_index, AtenTensorHandle* made, int32_t layout, const uint8_t* opaque_metadata,
    int64_t opaque_metadata_size, void (*deleter)(void* data, void* context), void* context);

namespace llmkern::ops {

namespace {

// Half of the smallest block. What is smaller malloc keeps itself.
constexpr int64_t kLeastRecycledBytes = kHugePageBytes / 2;

// 0 where there is no such number.
int64_t bytes_of(std::initializer_list<int64_t> shape, ScalarType dtype) {
  int64_t bytes = element_bytes(dtype);
  for (int64_t size : shape) {
    if (__builtin_mul_overflow(bytes, size, &bytes)) return 0;
  }
  return bytes;
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

Tensor empty_recycled(const Tensor& like, std::initializer_list<int64_t> shape, std::optional<ScalarType> dtype) {
  const ScalarType element = dtype.value_or(like.scalar_type());
  const int64_t bytes = bytes_of(shape, element);
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
