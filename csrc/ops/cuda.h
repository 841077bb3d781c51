// SPDX-License-Identifier: Apache-2.0
// Everything that the CUDA bindings share: device and stream, errors of earlier launches, and the framework's matrix
// product.
//
// tests/simt compiles these bindings a second time, with LLMKERN_SIMT: they then take the place of the CPU's, so that
// torch tensors of the CPU run through them into the emulated kernels.
#pragma once

#ifdef LLMKERN_WITH_CUDA

#include <torch/csrc/stable/accelerator.h>

#include <utility>

#include "kernels/deferred.h"
#include "kernels/half.h"
#include "ops/tensors.h"

#ifdef LLMKERN_SIMT
#define LLMKERN_CUDA_KEY CPU
#else
#define LLMKERN_CUDA_KEY CUDA
#endif

namespace llmkern::ops {

// Makes the tensor's device current for its lifetime. Raises the error of an earlier launch on the device.
class OnCuda {
 public:
  explicit OnCuda(const Tensor& tensor);
  void* stream() const { return stream_; }         // the current one of the device, as cuda::run takes it
  DeferredError* error() const { return error_; }  // where its kernels report to

 private:
#ifndef LLMKERN_SIMT
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  void* stream_;
  DeferredError* error_;
};

// Raises and clears the error of the kernels that have run on the current device.
void raise_deferred_error();

// a [m, k] times b [k, n] by the framework; sums in float32 at least, the result of a's dtype, the given one (a's own
// or float32), or into `out` [m, n], of a's dtype.
Tensor product(const Tensor& a, const Tensor& b);
Tensor product(const Tensor& a, const Tensor& b, ScalarType out_dtype);
void product_into(const Tensor& a, const Tensor& b, Tensor out);

// The values of a vector, ascending, and where each of them was; equal ones in the order they had.
std::pair<Tensor, Tensor> stable_sort(const Tensor& vector);

// [m, n] summed to [n].
inline Tensor sum_rows(const Tensor& matrix, ScalarType out_dtype) {
  constexpr int64_t kRows[] = {0};
  return torch::stable::sum(matrix, kRows, false, out_dtype);
}

inline Tensor transposed(const Tensor& matrix) { return torch::stable::transpose(matrix, 0, 1); }

}  // namespace llmkern::ops

#endif  // LLMKERN_WITH_CUDA
