// SPDX-License-Identifier: Apache-2.0
// torch.ops.llmkern.dropout and mask: schema, checks, allocation, launch. The math is in kernels/dropout.h and mask.h.
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

DrawMask mask_arguments(const Tensor& seed, const Tensor& mask, int64_t purpose, double p) {
  return {.seed = data<int64_t>(seed),
          .mask = mutable_data<bool>(mask),
          .rows = mask.size(0),
          .columns = mask.size(1),
          .purpose = valid_purpose(purpose),
          .p = p};
}

Tensor mask_cpu(const Tensor& seed, int64_t purpose, int64_t rows, int64_t columns, double p) {
  const Tensor mask = empty_mask(seed, purpose, rows, columns, p);
  cpu::run(mask_arguments(seed, mask, purpose, p), torch_parallel());
  return mask;
}

// The sizes of kernels/dropout.h, from x as rows of its last dimension.
struct Sizes {
  int64_t N, D, R;
};

Sizes check_dropout(const Tensor& x, const Tensor& seed, double p, int64_t period) {
  check_draw("dropout", seed, p);
  const int64_t D = x.dim() > 0 ? x.size(x.dim() - 1) : 1;
  if (x.numel() == 0) return {0, D, 0};
  if (period <= 0 || period % D != 0 || x.numel() % period != 0) {
    fail("dropout", "expected a period that is a multiple of the last dimension and divides x, got ", period,
         " for shape ", shape_text(x));
  }
  return {x.numel() / D, D, period / D};
}

template <class T>
Dropout<T> dropout_arguments(const Tensor& x, const Tensor& seed, const Tensor& out, const Sizes& n, double p) {
  return {
      .x = data<T>(x), .seed = data<int64_t>(seed), .out = mutable_data<T>(out), .N = n.N, .D = n.D, .R = n.R, .p = p};
}

Tensor dropout_cpu(const Tensor& x_any, const Tensor& seed, double p, int64_t period) {
  const Sizes n = check_dropout(x_any, seed, p, period);
  const Tensor x = row_major(x_any), out = empty_as(x);
  for_storage_dtype("dropout", "x", x, [&](auto value) {
    using T = decltype(value);
    cpu::run(dropout_arguments<T>(x, seed, out, n, p), torch_parallel());
  });
  return out;
}

#ifdef LLMKERN_WITH_CUDA
Tensor mask_cuda(const Tensor& seed, int64_t purpose, int64_t rows, int64_t columns, double p) {
  const Tensor mask = empty_mask(seed, purpose, rows, columns, p);
  const OnCuda cuda(seed);
  cuda::run(mask_arguments(seed, mask, purpose, p), cuda.stream());
  return mask;
}

Tensor dropout_cuda(const Tensor& x_any, const Tensor& seed, double p, int64_t period) {
  const Sizes n = check_dropout(x_any, seed, p, period);
  const OnCuda cuda(x_any);
  const Tensor x = row_major(x_any), out = empty_as(x);
  for_storage_dtype("dropout", "x", x, [&](auto value) {
    using T = decltype(value);
    cuda::run(dropout_arguments<T>(x, seed, out, n, p), cuda.stream());
  });
  return out;
}
#endif

}  // namespace

#ifndef LLMKERN_SIMT
STABLE_TORCH_LIBRARY_FRAGMENT(llmkern, m) {
  m.def("mask(Tensor seed, int purpose, SymInt rows, SymInt columns, float p) -> Tensor");
  m.def("dropout(Tensor x, Tensor seed, float p, SymInt period) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(llmkern, CPU, m) {
  LLMKERN_OPERATOR(m, "mask", &mask_cpu);
  LLMKERN_OPERATOR(m, "dropout", &dropout_cpu);
}
#endif

#ifdef LLMKERN_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(llmkern, LLMKERN_CUDA_KEY, m) {
  LLMKERN_OPERATOR(m, "mask", &mask_cuda);
  LLMKERN_OPERATOR(m, "dropout", &dropout_cuda);
}
#endif

}  // namespace llmkern::ops
