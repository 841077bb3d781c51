// SPDX-License-Identifier: Apache-2.0
// Weights in 8 bits: a scale for every row of a weight, the largest magnitude of the row over 127.
#pragma once

#include "kernels/cpu/scratch.h"
#include "kernels/cpu/storage.h"

namespace llmkern::cpu::LLMKERN_ISA {

namespace {

// The largest magnitude of a row; NaN if there is one that is not finite. As integers, magnitudes of floats are in
// order.
inline float finite_maximum(const float* row, int64_t K) {
  IntVec largest = {};
  for_lanes<float>(0, K, [&](int64_t k, int64_t n) { largest = max(largest, bits_of(load(row + k, n)) & 0x7fffffff); });
  const int32_t bits = maximum<int32_t>(largest);
  return bits_to_float(bits < 0x7f800000 ? static_cast<uint32_t>(bits) : 0x7fffffffu);
}

// w is about scale * q; the scale, which is NaN for a row that is not finite.
inline float quantise_weights(const float* row, int64_t K, int8_t* q) {
  const float scale = finite_maximum(row, K) / 127;
  const bool usable = scale > 0;
  for (int64_t k = 0; k < K; ++k) q[k] = usable ? static_cast<int8_t>(rintf(row[k] / scale)) : 0;
  return scale;
}

// Rows of weights as 8 bits have them, in `to`, for instruction sets that have no product of bytes.
inline const float* round_to_bytes(const float* rows, int64_t count, int64_t K, float* to) {
  const Buffer<int8_t> q(K);
  for (int64_t i = 0; i < count; ++i) {
    const float scale = quantise_weights(rows + i * K, K, q.data());
    for (int64_t k = 0; k < K; ++k) to[i * K + k] = scale * static_cast<float>(q[k]);
  }
  return to;
}

}  // namespace

}  // namespace llmkern::cpu::LLMKERN_ISA
