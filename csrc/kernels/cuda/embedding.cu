// SPDX-License-Identifier: Apache-2.0
// Embedding gather on CUDA; the contract is kernels/embedding.h.
#include <cmath>

#include "kernels/cuda/common.cuh"
#include "kernels/embedding.h"
#include "kernels/run.h"

namespace llmkern::cuda {

namespace {

constexpr int kThreads = 256;

// One block copies one row at a time, one element a thread; blocks stride over rows.
template <class T, class Index>
__global__ void __launch_bounds__(kThreads) embedding_forward(EmbeddingForward<T, Index> a) {
  for (int64_t n = blockIdx.x; n < a.N; n += gridDim.x) {
    const int64_t id = a.ids[n];
    const bool known = id >= 0 && id < a.V;
    for (int64_t d = threadIdx.x; d < a.D; d += kThreads) {
      a.out[n * a.D + d] = known ? a.table[id * a.D + d] : static_cast<T>(NAN);
    }
  }
}

template <class T, class Index>
void execute(const EmbeddingForward<T, Index>& a, void* stream) {
  if (a.N == 0 || a.D == 0) return;
  launch("embedding", embedding_forward<T, Index>, {.grid = grid_size(a.N), .block = kThreads}, stream, a);
}

}  // namespace

template <class Args>
void run(const Args& args, void* stream) {
  execute(args, stream);
}

template void run(const EmbeddingForward<float, int32_t>&, void*);
template void run(const EmbeddingForward<float, int64_t>&, void*);
template void run(const EmbeddingForward<double, int32_t>&, void*);
template void run(const EmbeddingForward<double, int64_t>&, void*);

}  // namespace llmkern::cuda
