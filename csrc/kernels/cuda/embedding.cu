// SPDX-License-Identifier: Apache-2.0
// Embedding gather and its gradient on CUDA; the contract is kernels/embedding.h.
#include "kernels/embedding.h"

#include <cmath>

#include "kernels/cuda/common.cuh"
#include "kernels/cuda/deferred.cuh"
#include "kernels/half.h"
#include "kernels/run.h"

namespace llmkern::cuda {

namespace {

constexpr const char* kName = "embedding";
constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 1 << 11;  // fill the largest device more than once
constexpr int kCopies = 4;                // loads of a thread in flight

__device__ inline bool in_table(int64_t id, int64_t V) { return id >= 0 && id < V; }

// A row is D / kCount packs; `lanes` threads, a power of two, share one, so that a block takes kThreads / lanes rows.
struct RowShape {
  int64_t packs;
  int lanes;
};

inline int power_of_two_from(int64_t least, int most) {
  int power = 1;
  while (power < least && power < most) power *= 2;
  return power;
}

// A warp where a row has that much, so that its loads are neighbours; more once every thread has kCopies packs.
inline RowShape row_shape(int64_t packs) {
  const int narrow_row = power_of_two_from(packs, kWarp);
  const int wide_row = power_of_two_from(ceil_div(packs, kCopies), kThreads);
  return {packs, wide_row > narrow_row ? wide_row : narrow_row};
}

// f of the widest pack, as a constant, that divides a row and to which both pointers are aligned.
template <class T, class F>
void with_pack(int64_t D, const void* a, const void* b, const F& f) {
  const uintptr_t misalignment = reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b) |
                                 static_cast<uintptr_t>(D) * static_cast<uintptr_t>(sizeof(T));
  if (misalignment % 16 == 0) {
    f(std::integral_constant<int, 16 / sizeof(T)>());
  } else if (sizeof(T) < 8 && misalignment % 8 == 0) {
    f(std::integral_constant<int, sizeof(T) < 8 ? 8 / sizeof(T) : 1>());
  } else if (sizeof(T) < 4 && misalignment % 4 == 0) {
    f(std::integral_constant<int, sizeof(T) < 4 ? 4 / sizeof(T) : 1>());
  } else {
    f(std::integral_constant<int, 1>());
  }
}

// ---- gather ---------------------------------------------------------------------------------------------------------

template <int kCount, class T, class Index>
__global__ void __launch_bounds__(kThreads, 1) embedding_forward(EmbeddingForward<T, Index> a, RowShape shape) {
  using Whole = Pack<T, kCount>;
  const int rows = kThreads / shape.lanes, lane = static_cast<int>(threadIdx.x) % shape.lanes;
  const int64_t first = int64_t{blockIdx.x} * rows + static_cast<int>(threadIdx.x) / shape.lanes;
  for (int64_t n = first; n < a.N; n += int64_t{gridDim.x} * rows) {
    const int64_t id = a.ids[n];
    const bool known = in_table(id, a.V);
    if (!known && lane == 0) report(a.error, Mistake::kEmbeddingId, n, id, a.V);
    const Whole* from = reinterpret_cast<const Whole*>(a.table) + (known ? id * shape.packs : 0);
    Whole* to = reinterpret_cast<Whole*>(a.out) + n * shape.packs;
    Whole nan;
#pragma unroll
    for (int i = 0; i < kCount; ++i) nan.x[i] = narrow<T>(static_cast<Widened<T>>(NAN));
    for (int64_t c = lane; c < shape.packs; c += int64_t{kCopies} * shape.lanes) {
      Whole packs[kCopies];
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        if (c + i * shape.lanes < shape.packs) packs[i] = known ? from[c + i * shape.lanes] : nan;
      }
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        if (c + i * shape.lanes < shape.packs) to[c + i * shape.lanes] = packs[i];
      }
    }
  }
}

template <class T, class Index>
void execute(const EmbeddingForward<T, Index>& a, void* stream) {
  if (a.N == 0 || a.D == 0) return;
  with_pack<T>(a.D, a.table, a.out, [&](auto count) {
    const RowShape shape = row_shape(a.D / count());
    const unsigned blocks = grid_size(ceil_div(a.N, kThreads / shape.lanes), kMostBlocks);
    launch(kName, embedding_forward<count(), T, Index>, {.grid = blocks, .block = kThreads}, stream, a, shape);
  });
}

// ---- gradient -------------------------------------------------------------------------------------------------------
//
// A run is the positions of one id. Phase 1 sums groups of kSortedGroup positions, each in order: a run inside a group
// goes to the table; what a group has of a longer run goes to the workspace, in slot kHead if the run began in an
// earlier group, in slot kTail if it began in this one and goes on. Phase 2 belongs to the group in which a run began:
// it adds that group's tail and the heads of the following ones. Both are split by sizes alone: the same bits always.

constexpr int kHead = 0, kTail = 1;
constexpr int kBatch = 8;  // rows a thread loads before it adds them
constexpr int kMergeWarps = kThreads / kWarp;
constexpr int64_t kAlone = 4 * kMergeWarps;  // partial sums that one warp adds up without the others

template <class T>
__device__ Widened<T>* partial(void* workspace, int64_t group, int slot, int64_t D) {
  return static_cast<Widened<T>*>(workspace) + (group * 2 + slot) * D;
}

template <int kCount, class W>
__device__ void store_partial(W* to, const W (&sum)[kCount]) {
  constexpr int kStored = kCount * sizeof(W) <= 16 ? kCount : 16 / static_cast<int>(sizeof(W));
#pragma unroll
  for (int i = 0; i < kCount; i += kStored) {
    Pack<W, kStored> pack;
#pragma unroll
    for (int k = 0; k < kStored; ++k) pack.x[k] = sum[i + k];
    *reinterpret_cast<Pack<W, kStored>*>(to + i) = pack;
  }
}

template <int kCount, class T>
__device__ void store_row(T* to, const Widened<T> (&sum)[kCount], int64_t count) {
  Pack<T, kCount> pack;
#pragma unroll
  for (int k = 0; k < kCount; ++k) pack.x[k] = narrow<T>(sum[k] / static_cast<Widened<T>>(count));
  *reinterpret_cast<Pack<T, kCount>*>(to) = pack;
}

// Column c, in packs, of one group.
template <int kCount, class T, class Index>
__device__ void sum_group(const EmbeddingBackwardSorted<T, Index>& a, int64_t group, int64_t c, int64_t packs) {
  using W = Widened<T>;
  const Pack<T, kCount>* grad = reinterpret_cast<const Pack<T, kCount>*>(a.grad_out);
  const int64_t begin = group * kSortedGroup, end = begin + kSortedGroup < a.N ? begin + kSortedGroup : a.N;
  const bool continued = begin > 0 && a.sorted_ids[begin - 1] == a.sorted_ids[begin];
  int64_t run_begin = begin;
  W sum[kCount] = {};
  for (int64_t batch = begin; batch < end; batch += kBatch) {
    Pack<T, kCount> rows[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (batch + j < end) rows[j] = grad[a.order[batch + j] * packs + c];
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int64_t i = batch + j;
      if (i >= end) break;
#pragma unroll
      for (int k = 0; k < kCount; ++k) sum[k] += widen(rows[j].x[k]);
      const int64_t id = a.sorted_ids[i];
      const bool ends = i + 1 == a.N || a.sorted_ids[i + 1] != id;
      if (!ends && i + 1 < end) continue;
      const bool began_before = continued && run_begin == begin;
      if (!in_table(id, a.V)) {
        if (!began_before && c == 0) report(a.error, Mistake::kEmbeddingId, a.order[run_begin], id, a.V);
      } else if (id != a.padding_idx) {
        if (began_before || !ends) {
          store_partial(partial<T>(a.workspace, group, began_before ? kHead : kTail, a.D) + c * kCount, sum);
        } else {
          store_row(a.grad_table + id * a.D + c * kCount, sum, a.scale_by_frequency ? i + 1 - run_begin : 1);
        }
      }
#pragma unroll
      for (int k = 0; k < kCount; ++k) sum[k] = 0;
      run_begin = i + 1;
    }
  }
}

// A block takes kThreads / lanes groups and `lanes` packs of their columns.
template <int kCount, class T, class Index>
__global__ void __launch_bounds__(kThreads, 1)
    embedding_sum_groups(EmbeddingBackwardSorted<T, Index> a, RowShape shape, int64_t groups, int64_t tiles) {
  const int together = kThreads / shape.lanes, lane = static_cast<int>(threadIdx.x) % shape.lanes;
  const int64_t tasks = ceil_div(groups, together) * tiles;
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const int64_t group = task / tiles * together + static_cast<int>(threadIdx.x) / shape.lanes;
    const int64_t c = task % tiles * shape.lanes + lane;
    if (group < groups && c < shape.packs) sum_group<kCount>(a, group, c, shape.packs);
  }
}

// A run that crosses the end of the group in which it began. end == 0: the group has none.
struct CrossingRun {
  int64_t begin, end;
};

template <class T, class Index>
__device__ CrossingRun crossing_run(const EmbeddingBackwardSorted<T, Index>& a, int64_t group) {
  const int64_t first = group * kSortedGroup, boundary = first + kSortedGroup;
  if (boundary >= a.N) return {0, 0};
  const int64_t id = a.sorted_ids[boundary];
  if (a.sorted_ids[boundary - 1] != id || !in_table(id, a.V) || id == a.padding_idx) return {0, 0};
  if (first > 0 && a.sorted_ids[first - 1] == id) return {0, 0};
  int64_t begin = boundary - 1;
  while (begin > first && a.sorted_ids[begin - 1] == id) --begin;
  int64_t inside = boundary, step = kSortedGroup;  // steps double, as most runs are short; then halves
  while (inside + step < a.N && a.sorted_ids[inside + step] == id) {
    inside += step;
    step *= 2;
  }
  int64_t end = inside + step < a.N ? inside + step : a.N;
  while (end - inside > 1) {
    const int64_t middle = inside + (end - inside) / 2;
    (a.sorted_ids[middle] == id ? inside : end) = middle;
  }
  return {begin, end};
}

// The sum of partials first, first + stride, ... below `count` of a run that began in `group`.
template <class T>
__device__ Widened<T> sum_partials(void* workspace, int64_t group, int64_t D, int64_t d, int64_t first, int64_t stride,
                                   int64_t count) {
  Widened<T> sum = 0;
  for (int64_t i = first; i < count; i += kBatch * stride) {
    Widened<T> x[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int64_t p = i + j * stride;
      x[j] = p < count ? partial<T>(workspace, group + p, p == 0 ? kTail : kHead, D)[d] : Widened<T>{0};
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) sum += x[j];
  }
  return sum;
}

// A block takes 32 groups, one a lane, and 32 columns. Short runs are dealt out to its warps; a long one has them all,
// each adding every kMergeWarps-th partial sum. 32 groups have at most one long run: it leaves the 32 behind.
template <class T, class Index>
__device__ void merge_groups(const EmbeddingBackwardSorted<T, Index>& a, int64_t first_group, int64_t d) {
  using W = Widened<T>;
  __shared__ W of_warp[kMergeWarps][kWarp];
  const int lane = lane_index(), warp = warp_index();
  const CrossingRun mine = crossing_run(a, first_group + lane);
  int owner = 0;  // counts the short runs
  for (unsigned left = __ballot_sync(kAllLanes, mine.end > 0); left != 0; left &= left - 1) {
    const int from = __ffs(static_cast<int>(left)) - 1;
    const int64_t begin = __shfl_sync(kAllLanes, mine.begin, from), end = __shfl_sync(kAllLanes, mine.end, from);
    const int64_t group = first_group + from, count = (end - 1) / kSortedGroup - group + 1;
    const bool alone = count <= kAlone;
    if (alone && owner++ % kMergeWarps != warp) continue;
    W sum = 0;
    if (d < a.D) sum = sum_partials<T>(a.workspace, group, a.D, d, alone ? 0 : warp, alone ? 1 : kMergeWarps, count);
    if (!alone) {
      __syncthreads();  // of_warp may still be read for the task before
      of_warp[warp][lane] = sum;
      __syncthreads();
      if (warp != 0) continue;
      for (int w = 1; w < kMergeWarps; ++w) sum += of_warp[w][lane];
    }
    const W occurrences = static_cast<W>(a.scale_by_frequency ? end - begin : 1);
    if (d < a.D) a.grad_table[a.sorted_ids[begin] * a.D + d] = narrow<T>(sum / occurrences);
  }
}

template <class T, class Index>
__global__ void __launch_bounds__(kThreads, 1)
    embedding_merge_groups(EmbeddingBackwardSorted<T, Index> a, int64_t groups, int64_t tiles) {
  const int64_t tasks = ceil_div(groups, kWarp) * tiles;
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    merge_groups(a, task / tiles * kWarp, task % tiles * kWarp + lane_index());
  }
}

template <class T, class Index>
void execute(const EmbeddingBackwardSorted<T, Index>& a, void* stream) {
  if (a.N == 0 || a.D == 0) return;
  const int64_t groups = ceil_div(a.N, kSortedGroup);
  with_pack<T>(a.D, a.grad_out, a.grad_table, [&](auto count) {
    const RowShape shape = {a.D / count(), power_of_two_from(a.D / count(), kThreads / 2)};
    const int64_t tiles = ceil_div(shape.packs, shape.lanes);
    const unsigned blocks = grid_size(ceil_div(groups, kThreads / shape.lanes) * tiles, kMostBlocks);
    launch(kName, embedding_sum_groups<count(), T, Index>, {.grid = blocks, .block = kThreads}, stream, a, shape,
           groups, tiles);
  });
  if (groups == 1) return;
  const int64_t tiles = ceil_div(a.D, kWarp);
  launch(kName, embedding_merge_groups<T, Index>,
         {.grid = grid_size(ceil_div(groups, kWarp) * tiles, kMostBlocks), .block = kThreads}, stream, a, groups,
         tiles);
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
template void run(const EmbeddingForward<bfloat16, int32_t>&, void*);
template void run(const EmbeddingForward<bfloat16, int64_t>&, void*);
template void run(const EmbeddingForward<float16, int32_t>&, void*);
template void run(const EmbeddingForward<float16, int64_t>&, void*);
template void run(const EmbeddingBackwardSorted<float, int32_t>&, void*);
template void run(const EmbeddingBackwardSorted<float, int64_t>&, void*);
template void run(const EmbeddingBackwardSorted<double, int32_t>&, void*);
template void run(const EmbeddingBackwardSorted<double, int64_t>&, void*);
template void run(const EmbeddingBackwardSorted<bfloat16, int32_t>&, void*);
template void run(const EmbeddingBackwardSorted<bfloat16, int64_t>&, void*);
template void run(const EmbeddingBackwardSorted<float16, int32_t>&, void*);
template void run(const EmbeddingBackwardSorted<float16, int64_t>&, void*);

}  // namespace llmkern::cuda
