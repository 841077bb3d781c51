// SPDX-License-Identifier: Apache-2.0
// Dropout by masks that are drawn where they are used (kernels/mask.h), never stored.
//
//   out[n, d] = mask[n mod R, d] ? 0 : x[n, d] / (1 - p)      p = 1: everything is 0
//
// mask [R, D], purpose kDropout; x and out [N, D], row-major, contiguous, N a multiple of R. R = N is ordinary dropout
// (Srivastava et al. 2014; of a weight: DropConnect, Wan et al. 2013). R < N repeats the mask: with x [T, B, D] and
// R = B every step of a sequence loses the same elements (Gal & Ghahramani 2016, "locked" in Merity et al. 2017).
//
// The factor 1 / (1 - p) is rounded to Widened<T>, and the product once more to T. The gradient of x is the same kernel
// on the gradient of out.
#pragma once

#include <cstdint>

#include "kernels/half.h"
#include "kernels/mask.h"

namespace llmkern {

// A mask itself, for tests and for whoever wants to see what a kernel draws.
struct DrawMask {
  const int64_t* seed;
  bool* mask;  // [rows, columns]
  int64_t rows, columns;
  Purpose purpose;
  double p;
};

template <class T>
struct Dropout {
  const T* x;
  const int64_t* seed;
  T* out;
  int64_t N, D, R;
  double p;
};

namespace {  // one copy an instruction-set build: the linker must not merge them

template <class T>
LLMKERN_HOST_DEVICE inline Widened<T> dropout_scale(double p) {
  return static_cast<Widened<T>>(p < 1 ? 1 / (1 - p) : 0);
}

}  // namespace

}  // namespace llmkern
