// SPDX-License-Identifier: Apache-2.0
// Linear cross entropy on the CPU; the contract is kernels/cross_entropy.h.
#include "kernels/cross_entropy.h"

#include "kernels/cpu/gemm.h"
#include "kernels/run.h"

namespace llmkern::cpu::LLMKERN_ISA {

namespace {

constexpr int64_t kRowBlock = 1024;  // elements summed in vectors of T before they go to a float64 total

// The sum over [0, V) of f(v, count), a vector whose lanes beyond `count` are zero, in a fixed order.
template <class T, class F>
double blocked_sum(int64_t V, const F& f) {
  double total = 0;
  for (int64_t block = 0; block < V; block += kRowBlock) {
    const int64_t end = block + kRowBlock < V ? block + kRowBlock : V;
    Vec<T> lanes = {};
    int64_t v = block;
    for (; v + kLanes<T> <= end; v += kLanes<T>) lanes += f(v, static_cast<int64_t>(kLanes<T>));
    total += sum<T>(lanes);
    if (v < end) total += sum<T>(f(v, end - v));
  }
  return total;
}

// The lanes from `count` on become zero.
template <class T>
Vec<T> keep_first(Vec<T> x, int64_t count) {
  if (count == kLanes<T>) return x;
  for (int64_t i = count; i < kLanes<T>; ++i) x[i] = 0;
  return x;
}

template <class T>
T add_bias_and_maximum(int64_t V, const T* bias, T* logits) {
  if (bias != nullptr) {
    for (int64_t v = 0; v < V; ++v) logits[v] += bias[v];
  }
  Vec<T> best = broadcast(logits[0]);
  int64_t v = 0;
  for (; v + kLanes<T> <= V; v += kLanes<T>) best = max(load(logits + v), best);
  T m = maximum<T>(best);
  for (; v < V; ++v) m = logits[v] > m ? logits[v] : m;
  return m;
}

template <class T>
double log_sum_exp(int64_t V, const T* logits, T m) {
  const double total =
      blocked_sum<T>(V, [&](int64_t v, int64_t n) { return keep_first<T>(exp(load(logits + v, n) - m), n); });
  return m + ::log(total);
}

// sum_v w_v (lse - l_v)
template <class T>
double smooth_loss(int64_t V, const T* logits, const T* class_weight, double lse) {
  return blocked_sum<T>(V, [&](int64_t v, int64_t n) {
    const Vec<T> distance = keep_first<T>(static_cast<T>(lse) - load(logits + v, n), n);
    return class_weight == nullptr ? distance : distance * load(class_weight + v, n);
  });
}

template <class T>
double weight_of(const T* class_weight, int64_t v) {
  return class_weight == nullptr ? 1.0 : static_cast<double>(class_weight[v]);
}

template <class T>
double sum_of_weights(int64_t V, const T* class_weight) {
  if (class_weight == nullptr) return static_cast<double>(V);
  return blocked_sum<T>(V, [&](int64_t v, int64_t n) { return load(class_weight + v, n); });
}

// Calls f(first, rows) with workspace = input[first : first + rows] weight^T, without the bias.
template <class T, class Args, class F>
void for_chunks(const Args& a, const Parallel& parallel, const F& f) {
  for (int64_t first = 0; first < a.N; first += a.chunk_rows) {
    const int64_t rows = a.N - first < a.chunk_rows ? a.N - first : a.chunk_rows;
    gemm<Wide<T>>(rows, a.V, a.D, row_major(a.input + first * a.D, a.D), transposed(a.weight, a.D), a.workspace, a.V,
                  false, parallel);
    f(first, rows);
  }
}

int64_t rows_per_task(int64_t V) { return (1 << 15) / (V + 1) + 1; }

template <class T>
double row_loss(const CrossEntropyForward<T>& a, int64_t n, const T* logits, double lse) {
  const int64_t y = a.target[n];
  if (y == a.ignore_index) return 0;
  double loss = (1 - a.label_smoothing) * weight_of(a.class_weight, y) * (lse - logits[y]);
  if (a.label_smoothing > 0) {
    loss += a.label_smoothing / static_cast<double>(a.V) * smooth_loss(a.V, logits, a.class_weight, lse);
  }
  return loss;
}

// The rows' losses go to `losses` in float64, and are added up one after the other: the same bits on any number of
// threads.
template <class T>
void execute(const CrossEntropyForward<T>& a, const Parallel& parallel) {
  const auto losses = scratch<double>(Slot::kCrossEntropyLosses, a.N);
  for_chunks<T>(a, parallel, [&](int64_t first, int64_t rows) {
    parallel(rows, rows_per_task(a.V), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        T* logits = a.workspace + r * a.V;
        const T m = add_bias_and_maximum(a.V, a.bias, logits);
        const double lse = log_sum_exp(a.V, logits, m);
        a.lse[first + r] = lse;
        losses[first + r] = row_loss(a, first + r, logits, lse);
      }
    });
  });
  double total = 0, total_weight = 0;
  for (int64_t n = 0; n < a.N; ++n) {
    if (a.reduction == Reduction::kNone) a.loss[n] = static_cast<T>(losses[n]);
    if (a.target[n] == a.ignore_index) continue;
    total += losses[n];
    total_weight += weight_of(a.class_weight, a.target[n]);
  }
  *a.total_weight = static_cast<T>(total_weight);
  if (a.reduction == Reduction::kSum) *a.loss = static_cast<T>(total);
  if (a.reduction == Reduction::kMean) *a.loss = static_cast<T>(total / total_weight);
}

// One row of logits becomes its gradient, in place.
template <class T>
void row_gradient(const CrossEntropyBackward<T>& a, int64_t n, double sum_weights, T* logits) {
  const int64_t y = a.target[n];
  if (y == a.ignore_index) {
    memset(logits, 0, static_cast<size_t>(a.V) * sizeof(T));
    return;
  }
  double scale = a.reduction == Reduction::kNone ? a.grad_loss[n] : a.grad_loss[0];
  if (a.reduction == Reduction::kMean) scale /= static_cast<double>(*a.total_weight);
  const double hard = (1 - a.label_smoothing) * weight_of(a.class_weight, y);
  const double soft = a.label_smoothing / static_cast<double>(a.V);
  const T probability_scale = static_cast<T>(scale * (hard + soft * sum_weights));
  const T soft_scale = static_cast<T>(scale * soft);
  const T lse_high = static_cast<T>(a.lse[n]), lse_low = static_cast<T>(a.lse[n] - lse_high);
  for_lanes<T>(0, a.V, [&](int64_t v, int64_t count) {
    Vec<T> l = load(logits + v, count);
    if (a.bias != nullptr) l += load(a.bias + v, count);
    const Vec<T> weights = a.class_weight == nullptr ? broadcast(T{1}) : load(a.class_weight + v, count);
    store(logits + v, fma(exp(l - lse_high - lse_low), broadcast(probability_scale), -soft_scale * weights), count);
  });
  logits[y] -= static_cast<T>(scale * hard);
}

template <class T>
void execute(const CrossEntropyBackward<T>& a, const Parallel& parallel) {
  const double sum_weights = sum_of_weights(a.V, a.class_weight);
  if (a.N == 0) {
    memset(a.grad_weight, 0, static_cast<size_t>(a.V * a.D) * sizeof(T));
    if (a.grad_bias != nullptr) memset(a.grad_bias, 0, static_cast<size_t>(a.V) * sizeof(T));
  }
  for_chunks<T>(a, parallel, [&](int64_t first, int64_t rows) {
    parallel(rows, rows_per_task(a.V), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) row_gradient(a, first + r, sum_weights, a.workspace + r * a.V);
    });
    const bool more = first > 0;
    gemm<Wide<T>>(rows, a.D, a.V, row_major(a.workspace, a.V), row_major(a.weight, a.D), a.grad_input + first * a.D,
                  a.D, false, parallel);
    gemm<Wide<T>>(a.V, a.D, rows, transposed(a.workspace, a.V), row_major(a.input + first * a.D, a.D), a.grad_weight,
                  a.D, more, parallel);
    if (a.grad_bias != nullptr) sum_rows(rows, a.V, a.workspace, a.grad_bias, more, parallel);
  });
}

}  // namespace

template <class Args>
void run(const Args& args, const Parallel& parallel) {
  execute(args, parallel);
}

template void run(const CrossEntropyForward<float>&, const Parallel&);
template void run(const CrossEntropyForward<double>&, const Parallel&);
template void run(const CrossEntropyBackward<float>&, const Parallel&);
template void run(const CrossEntropyBackward<double>&, const Parallel&);

}  // namespace llmkern::cpu::LLMKERN_ISA
