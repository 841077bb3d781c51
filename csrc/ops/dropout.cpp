// SPDX-License-Identifier: Apache-2.0
// torch.ops.llmkern.mask: schema, checks, allocation, launch. The math is in kernels/mask.h and kernels/dropout.h.
#include "kernels/dropout.h"

#include "ops/cuda.h"
#include "ops/tensors.h"

namespace llmkern::ops {

namespace {

void check_draw(const char* what, const Tensor& seed, double p) {
  check_shape(what, "seed", seed, {});
  check_dtype(what, "seed", seed, ScalarType::Long);
  if (!(p >= 0 && p <= 1)) fail(what, "expected p in [0, 1], got ", p);
}

Purpose valid_purpose(int64_t purpose) {
  constexpr int64_t kLast = static_cast<int64_t>(Purpose::kZoneoutHidden);
  if (purpose < 1 || purpose > kLast) fail("mask", "expected purpose in [1, ", kLast, "], got ", purpose);
  return static_cast<Purpose>(purpose);
}

Tensor empty_mask(const Tensor& seed, int64_t purpose, int64_t rows, int64_t columns, double p) {
  check_draw("mask", seed, p);
  valid_purpose(purpose);
  if (rows < 0 || columns < 0) fail("mask", "expected sizes of at least 0, got [", rows, ", ", columns, "]");
  return empty(seed, {rows, columns}, ScalarType::Bool);
}

Tensor mask_cpu(const Tensor& seed, int64_t purpose, int64_t rows, int64_t columns, double p) {
  const Tensor mask = empty_mask(seed, purpose, rows, columns, p);
  cpu::run(DrawMask{data<int64_t>(seed), mutable_data<bool>(mask), rows, columns, valid_purpose(purpose), p},
           torch_parallel());
  return mask;
}

}  // namespace

#ifndef LLMKERN_SIMT
STABLE_TORCH_LIBRARY_FRAGMENT(llmkern, m) {
  m.def("mask(Tensor seed, int purpose, SymInt rows, SymInt columns, float p) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(llmkern, CPU, m) { m.impl("mask", TORCH_BOX(&mask_cpu)); }
#endif

}  // namespace llmkern::ops
