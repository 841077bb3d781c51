// SPDX-License-Identifier: Apache-2.0
// Linear layer and cross entropy in one, by chunks of rows: the [N, V] logits never exist as a whole.
//
//   l_n = W x_n + b                        logits of row n, [V]
//   lse_n = log sum_v exp(l_nv)
//   loss_n = sum_v w_v t_nv (lse_n - l_nv)
//
// with w the class weights (1 when null) and t the targets, smoothed by e (Szegedy et al. 2016): t_nv = (1 - e) p_nv +
// e / V. p is either given, [N, V], or 1 for the class target[n] and 0 elsewhere; then
//
//   loss_n = (1 - e) w_y (lse_n - l_ny) + (e / V) sum_v w_v (lse_n - l_nv),   y = target[n]
//
// and rows whose target is ignore_index have loss 0 and no gradient. Reduction: kNone gives loss_n; kSum the sum; kMean
// the sum over total_weight, which is N for given probabilities and the sum of w_y over the rows that count for classes
// (0 / 0 = NaN when there is none, as in torch).
//
//   dl_nv = s_n (A_n exp(l_nv - lse_n) - w_v t_nv),   A_n = sum_v w_v t_nv
//   dp_nv = s_n (1 - e) w_v (lse_n - l_nv)
//
// with s_n the gradient of the result with respect to loss_n; then dx = dl W, dW = dl^T x, db = sum of dl. Only what is
// wanted of these is computed. Where dx alone is, the forward pass, which has the logits at hand, makes it for an
// upstream gradient of 1.
//
// x [N, D], weight [V, D], bias and class_weight [V], target and lse [N]. Saved: lse and total_weight; the backward
// pass computes each chunk of logits again, because storing them costs more memory than the whole model. lse is float64
// in every mode: rounded to float32, one of 1e4 would be off by up to 5e-4, and with it every probability of the row.
// Targets must be in [0, V) or ignore_index; the CPU binding checks it. On CUDA the products are the framework's, a
// chunk at a time, and targets are classes; the structs at the end are what is left. There a target out of range is
// reported (kernels/deferred.h), its row has loss NaN and no gradient. T may be 16 bit: then logits, losses, given
// probabilities and sums are float32 (Widened<T>), and dl is rounded before it is multiplied.
#pragma once

#include <cstdint>

#include "kernels/deferred.h"
#include "kernels/half.h"

namespace llmkern {

enum class Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };

// What is asked, in both directions. `target` or `probabilities` is null.
template <class T>
struct CrossEntropyProblem {
  const T *input, *weight, *bias, *class_weight;
  const int64_t* target;
  const Widened<T>* probabilities;
  int64_t N, D, V, chunk_rows, ignore_index;
  double label_smoothing;
  Reduction reduction;
};

template <class T>
struct CrossEntropyForward {
  CrossEntropyProblem<T> problem;
  Widened<T>* workspace;       // [chunk_rows, V]
  T* gradient;                 // [chunk_rows, V], which may be the workspace itself; used with input_gradient
  Widened<T>* loss;            // [N] for kNone, else [1]
  double* lse;                 // [N]
  Widened<T>* total_weight;    // [1]
  Widened<T>* input_gradient;  // [N, D]: dx for an upstream gradient of 1, or null
};

template <class T>
struct CrossEntropyBackward {
  CrossEntropyProblem<T> problem;
  const Widened<T>* grad_loss;  // [N] for kNone, else [1]
  const double* lse;
  const Widened<T>* total_weight;
  Widened<T>* workspace;  // [chunk_rows, V]
  T* gradient;            // [chunk_rows, V], which may be the workspace itself
  // Each of these may be null.
  T* grad_input;                   // [N, D]
  Widened<T>* grad_weight;         // [V, D]
  Widened<T>* grad_bias;           // [V]
  Widened<T>* grad_probabilities;  // [N, V]
};

// Logits alone, W x + b: what a decoder chooses from. A row's do not depend on the rows beside it. On the CPU.
template <class T>
struct LinearLogits {
  const T *input, *weight, *bias;  // [N, D], [V, D], [V] or null
  Widened<T>* logits;              // [N, V]
  int64_t N, D, V;
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
