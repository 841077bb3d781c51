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
// Targets must be in [0, V) or ignore_index; the CPU binding checks it. On CUDA the products are the framework's, a
// chunk at a time; the structs at the end are what is left. There a target out of range is reported
// (kernels/deferred.h), its row has loss NaN and no gradient. T may be 16 bit: then logits, losses and weights' sums
// are float32 (Widened<T>).
#pragma once

#include <cstdint>

#include "kernels/deferred.h"
#include "kernels/half.h"

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

// How a pass over the rows is cut: as many as fit into `budget` bytes, and enough that a pass over the weights is worth
// it.
struct ChunkPlan {
  int64_t budget, least_rows;

  int64_t rows(int64_t N, int64_t V, int64_t element_bytes) const {
    const int64_t fitting = budget / (V * element_bytes + 1);
    const int64_t wanted = fitting > least_rows ? fitting : least_rows;
    return wanted < N ? wanted : N;
  }
};
constexpr ChunkPlan kCpuChunks = {int64_t{16} << 20, 64};     // stays in the last-level cache
constexpr ChunkPlan kCudaChunks = {int64_t{256} << 20, 512};  // fills the device

// CUDA: lse and loss of a chunk of rows from their logits W x, without bias. The row of target[n] is `first_row` + n.
template <class T>
struct CrossEntropyRows {
  const Widened<T>* logits;        // [N, V]
  const T *bias, *class_weight;    // [V] or null
  const int64_t* target;           // [N]
  double* loss;                    // [N]
  double* lse;                     // [N]
  const double* sum_class_weight;  // [1]: sum_v w_v; read only with class weights and label smoothing
  int64_t N, V, first_row, ignore_index;
  double label_smoothing;
  DeferredError* error;
};

// CUDA: the reduction, always in the same order, by one block.
template <class T>
struct CrossEntropyReduce {
  const double* row_loss;  // [N]
  const T* class_weight;   // [V] or null
  const int64_t* target;   // [N]
  Widened<T>* loss;        // [N] for kNone, else [1]
  Widened<T>* total_weight;
  int64_t N, V, ignore_index;
  Reduction reduction;
};

// CUDA: dl of a chunk of rows. `gradient` may be `logits` itself where the types agree.
template <class T>
struct CrossEntropyLogitsBackward {
  const Widened<T>* grad_loss;     // kNone: [N] of these rows, else [1]
  const Widened<T>* total_weight;  // [1], of the whole; read for kMean
  const Widened<T>* logits;        // [N, V], without bias
  const T *bias, *class_weight;    // [V] or null
  const int64_t* target;           // [N]
  const double* lse;               // [N]
  const double* sum_class_weight;  // [1], as above
  T* gradient;                     // [N, V]
  int64_t N, V, ignore_index;
  double label_smoothing;
  Reduction reduction;
};

// CUDA: sum += x, what a chunk adds to a gradient; T is float or double.
template <class T>
struct Accumulate {
  T* sum;      // [count]
  const T* x;  // [count]
  int64_t count;
};

}  // namespace llmkern
