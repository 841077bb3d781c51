// SPDX-License-Identifier: Apache-2.0
// Embedding gather and its gradient.
//
//   forward    out[n, :]        = table[ids[n], :]
//   backward   grad_table[v, :] = scale[v] * sum of grad_out[n, :] over n with ids[n] == v, in the order of n
//              scale[v] = 1, or 1 / (number of n with ids[n] == v) when counts are given;
//              the row padding_idx gets no gradient (padding_idx < 0: every row does)
//
// table [V, D], ids [N], out and grad_out [N, D], grad_table [V, D]; row-major, contiguous.
//
// Ids must be in [0, V): the CPU binding checks them first (first_out_of_range). The CUDA kernels report the first
// other one (kernels/deferred.h); the gather fills its row with NaN, the backward leaves it out.
//
// Why the CPU's backward splits D and not V: token counts are Zipf distributed, so ranges of V are never balanced,
// while every column is the same work. Each column is summed by one worker in the order of n, hence the same bits
// always. On CUDA the ids come sorted, with the order that sorted them, and sums of long runs are split at fixed
// places: the same bits on every run, though not those of the CPU. Sums are taken in float32 at least, scaled there and
// rounded to T once.
#pragma once

#include <cstdint>

#include "kernels/deferred.h"
#include "kernels/half.h"

namespace llmkern {

template <class T, class Index>
struct EmbeddingForward {
  const T* table;
  const Index* ids;
  T* out;
  int64_t N, V, D;
  DeferredError* error = nullptr;  // CUDA only
};

template <class T, class Index>
struct EmbeddingBackward {
  const T* grad_out;
  const Index* ids;
  const int64_t* counts;  // [V] occurrences of every id, or null
  Widened<T>* sums;       // [V, D]: grad_table itself where T is float or double, else memory to work in
  T* grad_table;          // overwritten whole
  int64_t N, V, D, padding_idx;
};

// CUDA: grad_table is zero before; only rows of ids that occur are written.
template <class T, class Index>
struct EmbeddingBackwardSorted {
  const T* grad_out;
  const Index* sorted_ids;  // [N], ascending
  const int64_t* order;     // [N]: sorted_ids[i] == ids[order[i]], equal ids in the order of n
  T* grad_table;
  void* workspace;  // embedding_workspace_bytes(N, D)
  int64_t N, V, D, padding_idx;
  bool scale_by_frequency;
  DeferredError* error;
};

// Sums of runs that cross a boundary between two groups of kSortedGroup sorted ids: at most two a group.
constexpr int64_t kSortedGroup = 32;
inline int64_t embedding_workspace_bytes(int64_t N, int64_t D) {
  return (N + kSortedGroup - 1) / kSortedGroup * 2 * D * static_cast<int64_t>(sizeof(double));
}

// The first n with ids[n] outside [0, V), or -1.
template <class Index>
int64_t first_out_of_range(const Index* ids, int64_t N, int64_t V) {
  for (int64_t n = 0; n < N; ++n) {
    if (ids[n] < 0 || ids[n] >= V) return n;
  }
  return -1;
}

}  // namespace llmkern
