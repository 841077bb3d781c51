// SPDX-License-Identifier: Apache-2.0
// How a CUDA kernel says that its input was wrong: a launch cannot throw, and a trap would kill the context.
//
// Every device has one DeferredError in pinned host memory that it can write to. A kernel that meets an id, target or
// setting out of range describes the first one there (kernels/cuda/deferred.cuh), gives the row a harmless result, and
// goes on. The next call of the library on that device raises it as a Python exception and clears it; so does
// llmkern.ops.raise_deferred_errors, which waits first. Nobody synchronises for it.
#pragma once

#include <cstdint>

namespace llmkern {

enum class Mistake : int32_t {
  kNone = 0,
  kEmbeddingId = 1,    // ids[position] = value is outside [0, limit)
  kTarget = 2,         // target[position] = value is outside [0, limit) and not ignore_index
  kSampleSetting = 3,  // settings[position] has its column `limit` out of range; value holds the bits of the float64
};

struct DeferredError {
  int32_t mistake;   // a Mistake; claimed by the first thread that reports
  int32_t complete;  // 1 once the fields below are there
  int64_t position, value, limit;
};

namespace cuda {
// The current device's. Throws std::runtime_error when there is no memory for it.
DeferredError* deferred_error();
}  // namespace cuda

}  // namespace llmkern
