// SPDX-License-Identifier: Apache-2.0
// Embedding gather and its gradient on the CPU; the contract is kernels/embedding.h.
#include "kernels/embedding.h"

#include <cstring>

#include "kernels/run.h"

namespace llmkern::cpu::LLMKERN_ISA {

namespace {

constexpr int64_t kGrainBytes = 1 << 15;  // about what a core copies while another one is being woken

int64_t rows_per_task(int64_t row_bytes) { return kGrainBytes / (row_bytes + 1) + 1; }

template <class T, class Index>
void execute(const EmbeddingForward<T, Index>& a, const Parallel& parallel) {
  if (a.D == 0) return;  // an empty tensor may have no memory at all
  const size_t row_bytes = static_cast<size_t>(a.D) * sizeof(T);
  parallel(a.N, rows_per_task(static_cast<int64_t>(row_bytes)), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      std::memcpy(a.out + n * a.D, a.table + static_cast<int64_t>(a.ids[n]) * a.D, row_bytes);
    }
  });
}

template <class T, class Index>
void backward_columns(const EmbeddingBackward<T, Index>& a, int64_t begin, int64_t end) {
  const int64_t width = end - begin;
  for (int64_t v = 0; v < a.V; ++v) std::memset(a.grad_table + v * a.D + begin, 0, width * sizeof(T));
  for (int64_t n = 0; n < a.N; ++n) {
    const int64_t v = a.ids[n];
    if (v == a.padding_idx) continue;
    const T* from = a.grad_out + n * a.D + begin;
    T* to = a.grad_table + v * a.D + begin;
    for (int64_t d = 0; d < width; ++d) to[d] += from[d];
  }
  if (a.counts == nullptr) return;
  for (int64_t v = 0; v < a.V; ++v) {
    if (a.counts[v] < 2) continue;
    T* row = a.grad_table + v * a.D + begin;
    const T scale = T{1} / static_cast<T>(a.counts[v]);
    for (int64_t d = 0; d < width; ++d) row[d] *= scale;
  }
}

template <class T, class Index>
void execute(const EmbeddingBackward<T, Index>& a, const Parallel& parallel) {
  constexpr int64_t kColumns = 64 / sizeof(T);  // one cache line: no two workers share one
  const int64_t blocks = (a.D + kColumns - 1) / kColumns;
  const int64_t bytes_per_block = (a.N + a.V) * 64;
  const int64_t grain = (kGrainBytes + bytes_per_block) / (bytes_per_block + 1);
  parallel(blocks, grain, [&](int64_t begin, int64_t end) {
    const int64_t last = end * kColumns < a.D ? end * kColumns : a.D;
    backward_columns(a, begin * kColumns, last);
  });
}

}  // namespace

template <class Args>
void run(const Args& args, const Parallel& parallel) {
  execute(args, parallel);
}

template void run(const EmbeddingForward<float, int32_t>&, const Parallel&);
template void run(const EmbeddingForward<float, int64_t>&, const Parallel&);
template void run(const EmbeddingForward<double, int32_t>&, const Parallel&);
template void run(const EmbeddingForward<double, int64_t>&, const Parallel&);
template void run(const EmbeddingBackward<float, int32_t>&, const Parallel&);
template void run(const EmbeddingBackward<float, int64_t>&, const Parallel&);
template void run(const EmbeddingBackward<double, int32_t>&, const Parallel&);
template void run(const EmbeddingBackward<double, int64_t>&, const Parallel&);

}  // namespace llmkern::cpu::LLMKERN_ISA
