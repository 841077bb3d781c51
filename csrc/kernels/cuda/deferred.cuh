// SPDX-License-Identifier: Apache-2.0
// The device's side of kernels/deferred.h.
#pragma once

#include "kernels/cuda/common.cuh"
#include "kernels/deferred.h"

namespace llmkern::cuda {

// Describes a mistake unless one is described already; the host may read it as soon as `complete` is set.
__device__ inline void report(DeferredError* error, Mistake mistake, int64_t position, int64_t value, int64_t limit) {
  if (atomicCAS(&error->mistake, static_cast<int32_t>(Mistake::kNone), static_cast<int32_t>(mistake)) != 0) return;
  error->position = position;
  error->value = value;
  error->limit = limit;
  __threadfence_system();
  *static_cast<volatile int32_t*>(&error->complete) = 1;
}

}  // namespace llmkern::cuda
