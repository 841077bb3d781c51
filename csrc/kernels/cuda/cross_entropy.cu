// SPDX-License-Identifier: Apache-2.0
// What linear cross entropy adds to the framework's products on CUDA; the contract is kernels/cross_entropy.h.
#include "kernels/cross_entropy.h"

#include <algorithm>
#include <cmath>

#include "kernels/cuda/common.cuh"
#include "kernels/cuda/deferred.cuh"
#include "kernels/run.h"

namespace llmkern::cuda {

namespace {

constexpr const char* kName = "linear_cross_entropy";
constexpr int64_t kMostBlocks = 1 << 12;  // as many blocks of one warp as fill the largest device
constexpr int kReduceThreads = 1024, kAccumulateThreads = 256;

// A thread takes kPacks packs of 16 bytes of logits at a time: enough loads in flight to hide the memory's latency.
constexpr int kPacks = 4;
template <class W>
constexpr int kLanes = 16 / static_cast<int>(sizeof(W));

// Blocks of kThreads that a multiprocessor must hold at least: registers, of which there are 65536, are dealt so. No
// architecture holds fewer than 16 blocks.
template <class W, int kThreads>
constexpr int kResident = std::min(16, (sizeof(W) == 4 ? 768 : 512) / kThreads);

// Packs lie on 16-byte boundaries of the logits, whatever V is: the first and the last of a row may reach beyond it.
// Their elements outside [0, V) become `absent`.
template <int kCount, class T>
__device__ void load(const T* row, int64_t v, int64_t V, Widened<T> absent, Widened<T> (&x)[kCount]) {
  using Whole = Pack<T, kCount>;
  if (v >= 0 && v + kCount <= V && is_aligned<Whole>(row + v)) {
    const Whole pack = *reinterpret_cast<const Whole*>(row + v);
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = widen(pack.x[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = v + i >= 0 && v + i < V ? widen(row[v + i]) : absent;
  }
}

template <int kCount, class T>
__device__ void store(T* row, int64_t v, int64_t V, const Widened<T> (&x)[kCount]) {
  using Whole = Pack<T, kCount>;
  if (v >= 0 && v + kCount <= V && is_aligned<Whole>(row + v)) {
    Whole pack;
#pragma unroll
    for (int i = 0; i < kCount; ++i) pack.x[i] = narrow<T>(x[i]);
    *reinterpret_cast<Whole*>(row + v) = pack;
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (v + i >= 0 && v + i < V) row[v + i] = narrow<T>(x[i]);
    }
  }
}

// The column of a row's first pack: 0, or below it where the row begins between two boundaries.
template <class W>
__device__ int64_t first_column(const W* row) {
  return -static_cast<int64_t>(reinterpret_cast<uintptr_t>(row) / sizeof(W) % kLanes<W>);
}

// Biased logits of a pack; -inf outside the row.
template <class T>
__device__ void load_logits(const Widened<T>* row, const T* bias, int64_t v, int64_t V,
                            Widened<T> (&x)[kLanes<Widened<T>>]) {
  using W = Widened<T>;
  load(row, v, V, static_cast<W>(-INFINITY), x);
  if (bias == nullptr) return;
  W b[kLanes<W>];
  load(bias, v, V, W{0}, b);
#pragma unroll
  for (int i = 0; i < kLanes<W>; ++i) x[i] += b[i];
}

template <class T>
__device__ void load_weights(const T* class_weight, int64_t v, int64_t V, Widened<T> (&w)[kLanes<Widened<T>>]) {
  using W = Widened<T>;
  if (class_weight != nullptr) {
    load(class_weight, v, V, W{0}, w);
  } else {
#pragma unroll
    for (int i = 0; i < kLanes<W>; ++i) w[i] = 1;
  }
}

template <class T>
__device__ double weight_of(const T* class_weight, int64_t v) {
  return class_weight == nullptr ? 1.0 : static_cast<double>(widen(class_weight[v]));
}

template <class Args>
__device__ double sum_of_weights(const Args& a) {
  return a.class_weight == nullptr ? static_cast<double>(a.V) : *a.sum_class_weight;
}

template <class Args>
__device__ bool in_vocabulary(const Args& a, int64_t y) {
  return y >= 0 && y < a.V;
}

// ---- rows -----------------------------------------------------------------------------------------------------------

// One pass over a row (online softmax: Milakov & Gimelshein 2018): sum = sum_v exp(l_v - maximum), and, where smoothing
// asks for it, distance = sum_v w_v (l_v - anchor). A few neighbours are added in W, these sums in float64. The anchor,
// near the result, keeps the digits that sums of large logits would lose.
template <class W>
struct RowSums {
  W maximum = -INFINITY;
  double sum = 0, distance = 0;

  __device__ void add(const W (&x)[kPacks][kLanes<W>]) {
    W best = maximum;
#pragma unroll
    for (int i = 0; i < kPacks * kLanes<W>; ++i) best = Maximum()(best, x[i / kLanes<W>][i % kLanes<W>]);
    if (best > maximum) {
      sum *= static_cast<double>(exponential(maximum - best));
      maximum = best;
    }
    const W reference = maximum == static_cast<W>(-INFINITY) ? W{0} : maximum;  // -inf - -inf is no number
    W few = 0;
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      W pack = 0;
#pragma unroll
      for (int i = 0; i < kLanes<W>; ++i) pack += exponential(x[p][i] - reference);
      few += pack;
    }
    sum += static_cast<double>(few);
  }

  __device__ void add_distance(const W (&x)[kLanes<W>], const W (&w)[kLanes<W>], W anchor, int64_t v, int64_t V) {
    W few = 0;
#pragma unroll
    for (int i = 0; i < kLanes<W>; ++i) {
      if (v + i >= 0 && v + i < V) few += w[i] * (x[i] - anchor);
    }
    distance += static_cast<double>(few);
  }
};

template <int kThreads, class T>
__device__ RowSums<Widened<T>> sums_of_row(const CrossEntropyRows<T>& a, const Widened<T>* row, bool smooth,
                                           Widened<T> anchor) {
  using W = Widened<T>;
  RowSums<W> sums;
  constexpr int64_t kStep = int64_t{kThreads} * kLanes<W>;
  for (int64_t v = first_column(row) + static_cast<int64_t>(threadIdx.x) * kLanes<W>; v < a.V; v += kPacks * kStep) {
    W x[kPacks][kLanes<W>];
#pragma unroll
    for (int p = 0; p < kPacks; ++p) load_logits(row, a.bias, v + p * kStep, a.V, x[p]);
    sums.add(x);
    if (!smooth) continue;
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      W w[kLanes<W>];
      load_weights(a.class_weight, v + p * kStep, a.V, w);
      sums.add_distance(x[p], w, anchor, v + p * kStep, a.V);
    }
  }
  // A row that has +inf or NaN, or nothing but -inf, has no lse: NaN comes out of exp here as it does on the CPU.
  const W maximum = block_reduce<kThreads>(sums.maximum, Maximum());
  sums.sum = block_reduce<kThreads>(sums.sum * static_cast<double>(exponential(sums.maximum - maximum)), Plus());
  if (smooth) sums.distance = block_reduce<kThreads>(sums.distance, Plus());
  sums.maximum = maximum;
  return sums;
}

// One block a row; blocks stride over rows.
template <int kThreads, class T>
__global__ void __launch_bounds__(kThreads, kResident<Widened<T>, kThreads>) cross_entropy_rows(CrossEntropyRows<T> a) {
  using W = Widened<T>;
  for (int64_t n = blockIdx.x; n < a.N; n += gridDim.x) {
    const W* row = a.logits + n * a.V;
    const int64_t y = a.target[n];
    const bool known = in_vocabulary(a, y), counts = known && y != a.ignore_index;
    W target_logit = 0;
    if (counts) target_logit = row[y] + (a.bias == nullptr ? W{0} : widen(a.bias[y]));
    const bool smooth = counts && a.label_smoothing > 0;
    const W anchor = target_logit - target_logit == 0 ? target_logit : W{0};  // finite, or 0
    const RowSums<W> sums = sums_of_row<kThreads>(a, row, smooth, anchor);
    if (threadIdx.x != 0) continue;
    const double lse = static_cast<double>(sums.maximum) + log(sums.sum);
    a.lse[n] = lse;
    double loss = 0;
    if (counts) {
      loss = (1 - a.label_smoothing) * weight_of(a.class_weight, y) * (lse - static_cast<double>(target_logit));
    } else if (y != a.ignore_index) {
      report(a.error, Mistake::kTarget, a.first_row + n, y, a.V);
      loss = NAN;
    }
    if (smooth) {
      const double all = (lse - static_cast<double>(anchor)) * sum_of_weights(a) - sums.distance;
      loss += a.label_smoothing / static_cast<double>(a.V) * all;
    }
    a.loss[n] = loss;
  }
}

// ---- reduction ------------------------------------------------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(kReduceThreads) cross_entropy_reduce(CrossEntropyReduce<T> a) {
  using W = Widened<T>;
  double total = 0, weight = 0;
  for (int64_t n = threadIdx.x; n < a.N; n += kReduceThreads) {
    const int64_t y = a.target[n];
    const double loss = a.row_loss[n];
    total += loss;
    if (y != a.ignore_index && in_vocabulary(a, y)) weight += weight_of(a.class_weight, y);
    if (a.reduction == Reduction::kNone) a.loss[n] = static_cast<W>(loss);
  }
  total = block_reduce<kReduceThreads>(total, Plus());
  weight = block_reduce<kReduceThreads>(weight, Plus());
  if (threadIdx.x != 0) return;
  *a.total_weight = static_cast<W>(weight);
  if (a.reduction == Reduction::kSum) *a.loss = static_cast<W>(total);
  if (a.reduction == Reduction::kMean) *a.loss = static_cast<W>(total / weight);
}

// ---- gradient -------------------------------------------------------------------------------------------------------

template <class T>
struct RowGradient {
  using W = Widened<T>;
  W probability_scale, soft_scale, hard, lse_high, lse_low;

  __device__ RowGradient(const CrossEntropyLogitsBackward<T>& a, int64_t n, int64_t y) {
    double scale = static_cast<double>(a.grad_loss[a.reduction == Reduction::kNone ? n : 0]);
    if (a.reduction == Reduction::kMean) scale /= static_cast<double>(*a.total_weight);
    const double hard_weight = (1 - a.label_smoothing) * weight_of(a.class_weight, y);
    const double soft = a.label_smoothing / static_cast<double>(a.V);
    const double all = a.label_smoothing > 0 ? hard_weight + soft * sum_of_weights(a) : hard_weight;
    probability_scale = static_cast<W>(scale * all);
    soft_scale = static_cast<W>(scale * soft);
    hard = static_cast<W>(scale * hard_weight);
    lse_high = static_cast<W>(a.lse[n]);
    lse_low = static_cast<W>(a.lse[n] - static_cast<double>(lse_high));
  }

  __device__ W operator()(W logit, W weight, bool is_target) const {
    const W g = multiply_add(exponential(logit - lse_high - lse_low), probability_scale, -soft_scale * weight);
    return is_target ? g - hard : g;
  }
};

// A block takes tiles of kThreads * kPacks packs of a row; a thread reads all of its packs before it writes one, and
// writes only what it has read: gradient may be logits.
template <int kThreads, class T>
__device__ void gradient_of_tile(const CrossEntropyLogitsBackward<T>& a, int64_t n, int64_t tile) {
  using W = Widened<T>;
  constexpr int64_t kStep = int64_t{kThreads} * kLanes<W>;
  const W* row = a.logits + n * a.V;
  T* gradient = a.gradient + n * a.V;
  const int64_t y = a.target[n];
  const int64_t v = first_column(row) + tile * kPacks * kStep + static_cast<int64_t>(threadIdx.x) * kLanes<W>;
  W x[kPacks][kLanes<W>] = {};
  if (y != a.ignore_index && in_vocabulary(a, y)) {
    const RowGradient<T> row_gradient(a, n, y);
#pragma unroll
    for (int p = 0; p < kPacks; ++p) load_logits(row, a.bias, v + p * kStep, a.V, x[p]);
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      W w[kLanes<W>];
      load_weights(a.class_weight, v + p * kStep, a.V, w);
#pragma unroll
      for (int i = 0; i < kLanes<W>; ++i) x[p][i] = row_gradient(x[p][i], w[i], v + p * kStep + i == y);
    }
  }
#pragma unroll
  for (int p = 0; p < kPacks; ++p) store(gradient, v + p * kStep, a.V, x[p]);
}

template <class W>
int64_t tiles_of_row(int64_t V, int threads) {
  return ceil_div(V + kLanes<W> - 1, int64_t{threads} * kPacks * kLanes<W>);
}

template <int kThreads, class T>
__global__ void __launch_bounds__(kThreads, kResident<Widened<T>, kThreads>)
    cross_entropy_logits_backward(CrossEntropyLogitsBackward<T> a, int64_t tiles) {
  for (int64_t i = blockIdx.x; i < a.N * tiles; i += gridDim.x) gradient_of_tile<kThreads>(a, i / tiles, i % tiles);
}

// ---- sums over chunks -----------------------------------------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(kAccumulateThreads) accumulate(Accumulate<T> a) {
  using Whole = Pack<T, kLanes<T>>;
  const bool aligned = is_aligned<Whole>(a.sum) && is_aligned<Whole>(a.x);
  const int64_t thread = int64_t{blockIdx.x} * kAccumulateThreads + threadIdx.x;
  const int64_t threads = int64_t{gridDim.x} * kAccumulateThreads;
  const int64_t packs = aligned ? a.count / kLanes<T> : 0;
  for (int64_t i = thread; i < packs; i += threads) {
    Whole sum = reinterpret_cast<const Whole*>(a.sum)[i];
    const Whole x = reinterpret_cast<const Whole*>(a.x)[i];
#pragma unroll
    for (int k = 0; k < kLanes<T>; ++k) sum.x[k] += x.x[k];
    reinterpret_cast<Whole*>(a.sum)[i] = sum;
  }
  for (int64_t i = packs * kLanes<T> + thread; i < a.count; i += threads) a.sum[i] += a.x[i];
}

// ---- launches -------------------------------------------------------------------------------------------------------

// f of the threads a block should have, as a constant: a warp for short rows, and no more than a row keeps busy.
template <class F>
void with_threads(int64_t V, const F& f) {
  if (V <= 256) {
    f(std::integral_constant<int, kWarp>());
  } else if (V <= 4096) {
    f(std::integral_constant<int, 128>());
  } else {
    f(std::integral_constant<int, 256>());
  }
}

template <class T>
void execute(const CrossEntropyRows<T>& a, void* stream) {
  if (a.N == 0) return;
  with_threads(a.V, [&](auto threads) {
    launch(kName, cross_entropy_rows<threads(), T>, {.grid = grid_size(a.N, kMostBlocks), .block = threads()}, stream,
           a);
  });
}

template <class T>
void execute(const CrossEntropyReduce<T>& a, void* stream) {
  launch(kName, cross_entropy_reduce<T>, {.grid = 1, .block = kReduceThreads}, stream, a);
}

template <class T>
void execute(const CrossEntropyLogitsBackward<T>& a, void* stream) {
  if (a.N == 0) return;
  with_threads(a.V, [&](auto threads) {
    const int64_t tiles = tiles_of_row<Widened<T>>(a.V, threads());
    launch(kName, cross_entropy_logits_backward<threads(), T>,
           {.grid = grid_size(a.N * tiles, kMostBlocks), .block = threads()}, stream, a, tiles);
  });
}

template <class T>
void execute(const Accumulate<T>& a, void* stream) {
  if (a.count == 0) return;
  const int64_t blocks = ceil_div(a.count, int64_t{kAccumulateThreads} * kLanes<T>);
  launch(kName, accumulate<T>, {.grid = grid_size(blocks, kMostBlocks), .block = kAccumulateThreads}, stream, a);
}

}  // namespace

template <class Args>
void run(const Args& args, void* stream) {
  execute(args, stream);
}

template void run(const CrossEntropyRows<float>&, void*);
template void run(const CrossEntropyRows<double>&, void*);
template void run(const CrossEntropyRows<bfloat16>&, void*);
template void run(const CrossEntropyRows<float16>&, void*);
template void run(const CrossEntropyReduce<float>&, void*);
template void run(const CrossEntropyReduce<double>&, void*);
template void run(const CrossEntropyReduce<bfloat16>&, void*);
template void run(const CrossEntropyReduce<float16>&, void*);
template void run(const CrossEntropyLogitsBackward<float>&, void*);
template void run(const CrossEntropyLogitsBackward<double>&, void*);
template void run(const CrossEntropyLogitsBackward<bfloat16>&, void*);
template void run(const CrossEntropyLogitsBackward<float16>&, void*);
template void run(const Accumulate<float>&, void*);
template void run(const Accumulate<double>&, void*);

}  // namespace llmkern::cuda
