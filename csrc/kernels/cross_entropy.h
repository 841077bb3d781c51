// SPDX-License-Identifier: Apache-2.0
// Linear layer and cross entropy in one, by chunks of rows: the [N, V] logits never exist as a whole.
//
//   l_n = W x_n + b                        logits of row n, [V]
//   lse_n = log sum_v exp(l_nv)
//   loss_n = (1 - e) w_y (lse_n - l_ny) + (e / V) sum_v w_v (lse_n - l_nv)
//
// with y = target[n], e the label smoothing (Szegedy et al. 2016) and w the class weights (1 when null). Rows whose
// target is ignore_index have loss 0 and no gradient. Reduction: kNone gives loss_n; kSum the sum; kMean the sum over
// total_weight = sum of w_y over the rows that count (0 / 0 = NaN when none does, as in torch).
//
//   dl_nv = s_n (A_n exp(l_nv - lse_n) - (1 - e) w_y [v = y] - (e / V) w_v),   A_n = (1 - e) w_y + (e / V) sum_v w_v
//
// with s_n the gradient of the result with respect to loss_n; then dx = dl W, dW = dl^T x, db = sum of dl.
//
// x [N, D], weight [V, D], bias and class_weight [V], target and lse [N]. Saved: lse and total_weight; the backward
// pass computes each chunk of logits again, because storing them costs more memory than the whole model. lse is float64
// in every mode: rounded to float32, one of 1e4 would be off by up to 5e-4, and with it every probability of the row.
// Targets must be in [0, V) or ignore_index; the binding checks it.
#pragma once

#include <cstdint>

namespace llmkern {

enum class Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };

template <class T>
struct CrossEntropyForward {
  const T *input, *weight, *bias, *class_weight;
  const int64_t* target;
  T* workspace;     // [chunk_rows, V]
  T* loss;          // [N] for kNone, else [1]
  double* lse;      // [N]
  T* total_weight;  // [1]
  int64_t N, D, V, chunk_rows, ignore_index;
  double label_smoothing;
  Reduction reduction;
};

template <class T>
struct CrossEntropyBackward {
  const T* grad_loss;  // [N] for kNone, else [1]
  const T *input, *weight, *bias, *class_weight;
  const int64_t* target;
  const double* lse;
  const T* total_weight;
  T* workspace;    // [chunk_rows, V]
  T* grad_input;   // [N, D]
  T* grad_weight;  // [V, D]
  T* grad_bias;    // [V] or null
  int64_t N, D, V, chunk_rows, ignore_index;
  double label_smoothing;
  Reduction reduction;
};

// Rows a chunk: the chunk stays in the last-level cache, yet has enough rows that a pass over the weights is worth it.
inline int64_t cross_entropy_chunk_rows(int64_t N, int64_t V, int64_t element_bytes) {
  constexpr int64_t kBudget = int64_t{16} << 20, kLeastRows = 64;
  const int64_t fitting = kBudget / (V * element_bytes + 1);
  const int64_t rows = fitting > kLeastRows ? fitting : kLeastRows;
  return rows < N ? rows : N;
}

}  // namespace llmkern
