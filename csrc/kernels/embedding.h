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
// Ids must be in [0, V): the CPU binding checks them first (first_out_of_range). The CUDA gather cannot raise; it fills
// the rows of such ids with NaN, which is loud and leaves the context alive.
//
// Why the backward splits D and not V: token counts are Zipf distributed, so ranges of V are never balanced, while
// every column is the same work. Each column is summed by one worker in the order of n, hence the same bits always.
#pragma once

#include <cstdint>

namespace llmkern {

template <class T, class Index>
struct EmbeddingForward {
  const T* table;
  const Index* ids;
  T* out;
  int64_t N, V, D;
};

template <class T, class Index>
struct EmbeddingBackward {
  const T* grad_out;
  const Index* ids;
  const int64_t* counts;  // [V] occurrences of every id, or null
  T* grad_table;          // overwritten whole
  int64_t N, V, D, padding_idx;
};

// The first n with ids[n] outside [0, V), or -1.
template <class Index>
int64_t first_out_of_range(const Index* ids, int64_t N, int64_t V) {
  for (int64_t n = 0; n < N; ++n) {
    if (ids[n] < 0 || ids[n] >= V) return n;
  }
  return -1;
}

}  // namespace llmkern
