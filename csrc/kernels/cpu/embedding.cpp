// SPDX-License-Identifier: Apache-2.0
// Embedding gather and its gradient on the CPU; the contract is kernels/embedding.h.
#include "kernels/embedding.h"

#include <cstring>

#include "kernels/cpu/storage.h"
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

// to[0, count) += from[0, count)
template <class T>
void add(Widened<T>* to, const T* from, int64_t count) {
  if constexpr (sizeof(T) == 2) {
    for_lanes<float>(0, count,
                     [&](int64_t d, int64_t n) { store(to + d, load(to + d, n) + load_wide(from + d, n), n); });
  } else {
    for (int64_t d = 0; d < count; ++d) to[d] += from[d];  // the compiler's own vectors have the shorter remainder
  }
}

template <class T, class Index>
void backward_columns(const EmbeddingBackward<T, Index>& a, int64_t begin, int64_t end) {
  const int64_t width = end - begin;
  const auto sums = [&](int64_t v) { return a.sums + v * a.D + begin; };
  for (int64_t v = 0; v < a.V; ++v) std::memset(sums(v), 0, static_cast<size_t>(width) * sizeof(Widened<T>));
  for (int64_t n = 0; n < a.N; ++n) {
    const int64_t v = a.ids[n];
    if (v != a.padding_idx) add(sums(v), a.grad_out + n * a.D + begin, width);
  }
  for (int64_t v = 0; a.counts != nullptr && v < a.V; ++v) {
    if (a.counts[v] < 2) continue;
    const Widened<T> scale = Widened<T>{1} / static_cast<Widened<T>>(a.counts[v]);
    for (int64_t d = 0; d < width; ++d) sums(v)[d] *= scale;
  }
  if constexpr (sizeof(T) == 2) {
    for (int64_t v = 0; v < a.V; ++v) convert(a.grad_table + v * a.D + begin, sums(v), width);
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
template void run(const EmbeddingForward<bfloat16, int32_t>&, const Parallel&);
template void run(const EmbeddingForward<bfloat16, int64_t>&, const Parallel&);
template void run(const EmbeddingForward<float16, int32_t>&, const Parallel&);
template void run(const EmbeddingForward<float16, int64_t>&, const Parallel&);
template void run(const EmbeddingBackward<float, int32_t>&, const Parallel&);
template void run(const EmbeddingBackward<float, int64_t>&, const Parallel&);
template void run(const EmbeddingBackward<double, int32_t>&, const Parallel&);
template void run(const EmbeddingBackward<double, int64_t>&, const Parallel&);
template void run(const EmbeddingBackward<bfloat16, int32_t>&, const Parallel&);
template void run(const EmbeddingBackward<bfloat16, int64_t>&, const Parallel&);
template void run(const EmbeddingBackward<float16, int32_t>&, const Parallel&);
template void run(const EmbeddingBackward<float16, int64_t>&, const Parallel&);

}  // namespace llmkern::cpu::LLMKERN_ISA
