// SPDX-License-Identifier: Apache-2.0
// Dropout on CUDA; the contract is kernels/dropout.h.
//
// Four threads share a group of 16 columns: each draws one of its counters, which are elements 4 apart, and after two
// exchanges each has 4 neighbours to work on.
#include "kernels/dropout.h"

#include "kernels/cuda/common.cuh"
#include "kernels/run.h"

namespace llmkern::cuda {

namespace {

constexpr const char* kName = "dropout";
constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 1 << 11;  // fill the largest device more than once
constexpr int kQuarter = 4;               // columns of a thread
static_assert(kQuarter * kQuarter == kMaskGroup);

// Calls f(row, column, bits) for every quarter of a group of a mask [rows, columns]: bit i is column + i, which may be
// beyond the last column. A row of blocks, along x, does it once.
template <class F>
__device__ void for_quarters(const Mask& mask, int64_t rows, int64_t columns, const F& f) {
  const int64_t of_row = mask_groups(columns), quarters = kQuarter * rows * of_row;
  const int quarter = static_cast<int>(threadIdx.x) % kQuarter;
  for (int64_t first = int64_t{blockIdx.x} * kThreads; first < quarters; first += int64_t{gridDim.x} * kThreads) {
    const int64_t group = (first + threadIdx.x) / kQuarter;
    uint32_t bits = mask_quarter(mask, group, quarter);
    bits |= __shfl_xor_sync(kAllLanes, bits, 1);
    bits |= __shfl_xor_sync(kAllLanes, bits, 2);
    const int64_t row = group / of_row, column = group % of_row * kMaskGroup + kQuarter * quarter;
    if (row < rows) f(row, column, bits >> (kQuarter * quarter));
  }
}

unsigned blocks_for(int64_t rows, int64_t columns) {
  return grid_size(ceil_div(kQuarter * rows * mask_groups(columns), kThreads), kMostBlocks);
}

__global__ void __launch_bounds__(kThreads) draw_mask(DrawMask a) {
  for_quarters(make_mask(*a.seed, a.purpose, a.p), a.rows, a.columns, [&](int64_t row, int64_t column, uint32_t bits) {
    for (int i = 0; i < kQuarter && column + i < a.columns; ++i) {
      a.mask[row * a.columns + column + i] = (bits >> i & 1) != 0;
    }
  });
}

void execute(const DrawMask& a, void* stream) {
  if (a.rows == 0 || a.columns == 0) return;
  launch(kName, draw_mask, {.grid = blocks_for(a.rows, a.columns), .block = kThreads}, stream, a);
}

// The rows that share a mask row are R apart; the blocks along y take them in turn.
template <int kCount, class T>
__global__ void __launch_bounds__(kThreads) drop(Dropout<T> a) {
  using Whole = Pack<T, kCount>;
  const Widened<T> scale = dropout_scale<T>(a.p);
  for_quarters(make_mask(*a.seed, Purpose::kDropout, a.p), a.R, a.D, [&](int64_t row, int64_t column, uint32_t bits) {
    for (int64_t n = row + blockIdx.y * a.R; n < a.N; n += gridDim.y * a.R) {
#pragma unroll
      for (int i = 0; i < kQuarter; i += kCount) {
        if (column + i >= a.D) break;
        const int64_t at = n * a.D + column + i;
        Whole pack = *reinterpret_cast<const Whole*>(a.x + at);
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
          pack.x[k] = narrow<T>((bits >> (i + k) & 1) != 0 ? Widened<T>{0} : widen(pack.x[k]) * scale);
        }
        *reinterpret_cast<Whole*>(a.out + at) = pack;
      }
    }
  });
}

template <class T>
void execute(const Dropout<T>& a, void* stream) {
  if (a.N == 0 || a.D == 0) return;
  constexpr int kMost = sizeof(T) == 8 ? 2 : kQuarter;
  const unsigned blocks = blocks_for(a.R, a.D);
  const unsigned repeats = grid_size(a.N / a.R, ceil_div(kMostBlocks, blocks));
  const LaunchShape shape = {.grid = dim3(blocks, repeats), .block = kThreads};
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(a.x) | reinterpret_cast<uintptr_t>(a.out);
  const bool whole = addresses % (kMost * sizeof(T)) == 0 && a.D % kMost == 0;
  launch(kName, whole ? drop<kMost, T> : drop<1, T>, shape, stream, a);
}

}  // namespace

template <class Args>
void run(const Args& args, void* stream) {
  execute(args, stream);
}

template void run(const DrawMask&, void*);
template void run(const Dropout<float>&, void*);
template void run(const Dropout<double>&, void*);
template void run(const Dropout<bfloat16>&, void*);
template void run(const Dropout<float16>&, void*);

}  // namespace llmkern::cuda
