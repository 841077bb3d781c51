// SPDX-License-Identifier: Apache-2.0
// Linear cross entropy on the CPU; the contract is kernels/cross_entropy.h. Logits, and what is summed over them, are
// of type S, Widened<T>.
#include "kernels/cross_entropy.h"

#include "kernels/cpu/gemm.h"
#include "kernels/run.h"

namespace llmkern::cpu::LLMKERN_ISA {

namespace {

// Elements summed in vectors of S before they go to a float64 total: of numbers below 1, and of any size.
constexpr int64_t kRowBlock = 1024, kShortBlock = 128;

// The sum over [0, V) of f(v, count), a vector whose lanes beyond `count` are zero, in a fixed order.
template <class S, int64_t kBlock = kRowBlock, class F>
double blocked_sum(int64_t V, const F& f) {
  double total = 0;
  for (int64_t block = 0; block < V; block += kBlock) {
    const int64_t end = block + kBlock < V ? block + kBlock : V;
    Vec<S> lanes = {};
    int64_t v = block;
    for (; v + kLanes<S> <= end; v += kLanes<S>) lanes += f(v, static_cast<int64_t>(kLanes<S>));
    total += sum<S>(lanes);
    if (v < end) total += sum<S>(f(v, end - v));
  }
  return total;
}

// The lanes from `count` on become zero.
template <class S>
Vec<S> keep_first(Vec<S> x, int64_t count) {
  if (count == kLanes<S>) return x;
  for (int64_t i = count; i < kLanes<S>; ++i) x[i] = 0;
  return x;
}

template <class T, class S>
S add_bias_and_maximum(int64_t V, const T* bias, S* logits) {
  if (bias != nullptr) {
    for_lanes<S>(0, V,
                 [&](int64_t v, int64_t n) { store(logits + v, load(logits + v, n) + load_wide(bias + v, n), n); });
  }
  Vec<S> best = broadcast(logits[0]);
  int64_t v = 0;
  for (; v + kLanes<S> <= V; v += kLanes<S>) best = max(load(logits + v), best);
  S m = maximum<S>(best);
  for (; v < V; ++v) m = logits[v] > m ? logits[v] : m;
  return m;
}

template <class S>
double log_sum_exp(int64_t V, const S* logits, S m) {
  const double total =
      blocked_sum<S>(V, [&](int64_t v, int64_t n) { return keep_first<S>(exp(load(logits + v, n) - m), n); });
  return m + ::log(total);
}

// A log-sum-exp in two numbers, so that what is near it keeps its digits.
template <class S>
struct LogSumExp {
  S high, low;

  explicit LogSumExp(double lse) : high(static_cast<S>(lse)), low(static_cast<S>(lse - high)) {}
  Vec<S> above(Vec<S> logits) const { return high - logits + low; }
  Vec<S> probabilities(Vec<S> logits) const { return exp(logits - high - low); }
};

template <class T>
double weight_of(const T* class_weight, int64_t v) {
  return class_weight == nullptr ? 1.0 : static_cast<double>(widen(class_weight[v]));
}

template <class T>
Vec<Widened<T>> weights_of(const T* class_weight, int64_t v, int64_t count) {
  return class_weight == nullptr ? broadcast(Widened<T>{1}) : load_wide(class_weight + v, count);
}

template <class T>
double sum_of_weights(int64_t V, const T* class_weight) {
  if (class_weight == nullptr) return static_cast<double>(V);
  return blocked_sum<Widened<T>>(V, [&](int64_t v, int64_t n) { return load_wide(class_weight + v, n); });
}

// What every row shares.
template <class T>
struct Problem {
  using S = Widened<T>;

  const CrossEntropyProblem<T>& a;
  const double smoothing = a.label_smoothing, share = smoothing / static_cast<double>(a.V);
  const double sum_weights = sum_of_weights(a.V, a.class_weight);

  bool counts(int64_t n) const { return a.probabilities != nullptr || a.target[n] != a.ignore_index; }
  double hard_weight(int64_t n) const { return (1 - smoothing) * weight_of(a.class_weight, a.target[n]); }
  Vec<S> weights(int64_t v, int64_t count) const { return weights_of(a.class_weight, v, count); }
  // scale w_v t_nv with given probabilities.
  Vec<S> weighted_targets(int64_t n, int64_t v, int64_t count, double scale = 1) const {
    const Vec<S> p = load(a.probabilities + n * a.V + v, count);
    const Vec<S> t =
        fma(p, broadcast(static_cast<S>(scale * (1 - smoothing))), broadcast(static_cast<S>(scale * share)));
    return keep_first<S>(a.class_weight == nullptr ? t : t * weights(v, count), count);
  }

  double loss(int64_t n, const S* logits, double lse) const;
  double total_weight() const;
  template <class F>
  void for_chunks(S* workspace, const Parallel& parallel, const F& f) const;
  void gradient(int64_t n, double scale, double lse, const T* bias, const S* logits, T* to) const;
};

template <class T>
double Problem<T>::loss(int64_t n, const S* logits, double lse) const {
  const LogSumExp<S> level(lse);
  if (a.probabilities != nullptr) {
    return blocked_sum<S, kShortBlock>(a.V, [&](int64_t v, int64_t count) {
      return keep_first<S>(level.above(load(logits + v, count)) * weighted_targets(n, v, count), count);
    });
  }
  if (!counts(n)) return 0;
  double loss = hard_weight(n) * (lse - logits[a.target[n]]);
  if (smoothing > 0) {
    loss += share * blocked_sum<S, kShortBlock>(a.V, [&](int64_t v, int64_t count) {
              return keep_first<S>(level.above(load(logits + v, count)) * weights(v, count), count);
            });
  }
  return loss;
}

template <class T>
double Problem<T>::total_weight() const {
  if (a.probabilities != nullptr) return static_cast<double>(a.N);
  double total = 0;
  for (int64_t n = 0; n < a.N; ++n) total += counts(n) ? weight_of(a.class_weight, a.target[n]) : 0;
  return total;
}

// Calls f(first, rows) with workspace = input[first : first + rows] weight^T, without the bias.
template <class T>
template <class F>
void Problem<T>::for_chunks(S* workspace, const Parallel& parallel, const F& f) const {
  for (int64_t first = 0; first < a.N; first += a.chunk_rows) {
    const int64_t rows = a.N - first < a.chunk_rows ? a.N - first : a.chunk_rows;
    with_operand<T>([&](auto op) {
      gemm<decltype(op)>(rows, a.V, a.D, row_major(a.input + first * a.D, a.D), transposed(a.weight, a.D), workspace,
                         a.V, false, parallel);
    });
    f(first, rows);
  }
}

// to[v] = dl_nv with s_n = scale; `to` may be `logits`.
template <class T>
void Problem<T>::gradient(int64_t n, double scale, double lse, const T* bias, const S* logits, T* to) const {
  if (!counts(n)) {
    memset(to, 0, static_cast<size_t>(a.V) * sizeof(T));
    return;
  }
  const LogSumExp<S> level(lse);
  const auto biased = [&](int64_t v, int64_t count) {
    const Vec<S> l = load(logits + v, count);
    return bias == nullptr ? l : l + load_wide(bias + v, count);
  };
  if (a.probabilities != nullptr) {
    const double all = blocked_sum<S>(a.V, [&](int64_t v, int64_t count) { return weighted_targets(n, v, count); });
    const Vec<S> probability_scale = broadcast(static_cast<S>(scale * all));
    for_lanes<S>(0, a.V, [&](int64_t v, int64_t count) {
      const Vec<S> target = weighted_targets(n, v, count, scale);
      store_narrow(to + v, fma(level.probabilities(biased(v, count)), probability_scale, -target), count);
    });
    return;
  }
  const double hard = hard_weight(n);
  const Vec<S> probability_scale = broadcast(static_cast<S>(scale * (hard + share * sum_weights)));
  const S soft_scale = static_cast<S>(scale * share);
  const auto without_target = [&](int64_t v, int64_t count) {
    return fma(level.probabilities(biased(v, count)), probability_scale, -soft_scale * weights(v, count));
  };
  const int64_t y = a.target[n];
  const S of_target = without_target(y, 1)[0] - static_cast<S>(scale * hard);
  for_lanes<S>(0, a.V, [&](int64_t v, int64_t count) { store_narrow(to + v, without_target(v, count), count); });
  store_narrow(to + y, broadcast(of_target), 1);
}

int64_t rows_per_task(int64_t V) { return (1 << 15) / (V + 1) + 1; }

// The rows' losses go to `losses` in float64, and are added up one after the other: the same bits on any number of
// threads.
template <class T>
void execute(const CrossEntropyForward<T>& a, const Parallel& parallel) {
  using S = Widened<T>;
  const Problem<T> problem{a.problem};
  const int64_t N = a.problem.N, D = a.problem.D, V = a.problem.V;
  const auto losses = scratch<double>(Slot::kCrossEntropyLosses, N);
  const double total_weight = problem.total_weight();
  const double scale = a.problem.reduction == Reduction::kMean ? 1 / total_weight : 1;
  problem.for_chunks(a.workspace, parallel, [&](int64_t first, int64_t rows) {
    parallel(rows, rows_per_task(V), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        S* logits = a.workspace + r * V;
        const S m = add_bias_and_maximum(V, a.problem.bias, logits);
        const double lse = log_sum_exp(V, logits, m);
        a.lse[first + r] = lse;
        losses[first + r] = problem.loss(first + r, logits, lse);
        if (a.input_gradient != nullptr) problem.gradient(first + r, scale, lse, nullptr, logits, a.gradient + r * V);
      }
    });
    if (a.input_gradient == nullptr) return;
    with_operand<T>([&](auto op) {
      gemm<decltype(op)>(rows, D, V, row_major(a.gradient, V), row_major(a.problem.weight, D),
                         a.input_gradient + first * D, D, false, parallel);
    });
  });
  double total = 0;
  for (int64_t n = 0; n < N; ++n) {
    if (a.problem.reduction == Reduction::kNone) a.loss[n] = static_cast<S>(losses[n]);
    total += losses[n];
  }
  *a.total_weight = static_cast<S>(total_weight);
  if (a.problem.reduction == Reduction::kSum) *a.loss = static_cast<S>(total);
  if (a.problem.reduction == Reduction::kMean) *a.loss = static_cast<S>(total / total_weight);
}

// dp of a row, from its logits without the bias.
template <class T>
void probability_gradient(const Problem<T>& problem, double scale, double lse, const Widened<T>* logits,
                          Widened<T>* to) {
  using S = Widened<T>;
  const LogSumExp<S> level(lse);
  const S factor = static_cast<S>(scale * (1 - problem.smoothing));
  for_lanes<S>(0, problem.a.V, [&](int64_t v, int64_t count) {
    Vec<S> l = load(logits + v, count);
    if (problem.a.bias != nullptr) l += load_wide(problem.a.bias + v, count);
    store(to + v, factor * level.above(l) * problem.weights(v, count), count);
  });
}

template <class T>
double scale_of(const CrossEntropyBackward<T>& a, int64_t n) {
  if (a.problem.reduction == Reduction::kNone) return a.grad_loss[n];
  return a.problem.reduction == Reduction::kMean ? *a.grad_loss / static_cast<double>(*a.total_weight) : *a.grad_loss;
}

template <class T>
void execute(const CrossEntropyBackward<T>& a, const Parallel& parallel) {
  using S = Widened<T>;
  const Problem<T> problem{a.problem};
  const int64_t D = a.problem.D, V = a.problem.V;
  const bool of_logits = a.grad_input != nullptr || a.grad_weight != nullptr || a.grad_bias != nullptr;
  if (a.problem.N == 0) {
    if (a.grad_weight != nullptr) memset(a.grad_weight, 0, static_cast<size_t>(V * D) * sizeof(S));
    if (a.grad_bias != nullptr) memset(a.grad_bias, 0, static_cast<size_t>(V) * sizeof(S));
  }
  problem.for_chunks(a.workspace, parallel, [&](int64_t first, int64_t rows) {
    parallel(rows, rows_per_task(V), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const int64_t n = first + r;
        const S* logits = a.workspace + r * V;
        const double scale = scale_of(a, n), lse = a.lse[n];
        if (a.grad_probabilities != nullptr) {
          probability_gradient(problem, scale, lse, logits, a.grad_probabilities + n * V);
        }
        if (of_logits) problem.gradient(n, scale, lse, a.problem.bias, logits, a.gradient + r * V);
      }
    });
    const bool more = first > 0;
    with_operand<T>([&](auto op) {
      using Op = decltype(op);
      if (a.grad_input != nullptr) {
        gemm<Op>(rows, D, V, row_major(a.gradient, V), row_major(a.problem.weight, D), a.grad_input + first * D, D,
                 false, parallel);
      }
      if (a.grad_weight != nullptr) {
        gemm<Op>(V, D, rows, transposed(a.gradient, V), row_major(a.problem.input + first * D, D), a.grad_weight, D,
                 more, parallel);
      }
    });
    if (a.grad_bias != nullptr) sum_rows(rows, V, a.gradient, a.grad_bias, more, parallel);
  });
}

template <class T>
void execute(const LinearLogits<T>& a, const Parallel& parallel) {
  using S = Widened<T>;
  with_operand<T>([&](auto op) {
    gemm<decltype(op)>(a.N, a.V, a.D, row_major(a.input, a.D), transposed(a.weight, a.D), a.logits, a.V, false,
                       parallel);
  });
  for (int64_t n = 0; a.bias != nullptr && n < a.N; ++n) {
    S* row = a.logits + n * a.V;
    for_lanes<S>(0, a.V, [&](int64_t v, int64_t count) {
      store(row + v, load(row + v, count) + load_wide(a.bias + v, count), count);
    });
  }
}

}  // namespace

template <class Args>
void run(const Args& args, const Parallel& parallel) {
  execute(args, parallel);
}

template void run(const CrossEntropyForward<float>&, const Parallel&);
template void run(const CrossEntropyForward<double>&, const Parallel&);
template void run(const CrossEntropyForward<bfloat16>&, const Parallel&);
template void run(const CrossEntropyForward<float16>&, const Parallel&);
template void run(const CrossEntropyBackward<float>&, const Parallel&);
template void run(const CrossEntropyBackward<double>&, const Parallel&);
template void run(const CrossEntropyBackward<bfloat16>&, const Parallel&);
template void run(const CrossEntropyBackward<float16>&, const Parallel&);
template void run(const LinearLogits<float>&, const Parallel&);
template void run(const LinearLogits<double>&, const Parallel&);
template void run(const LinearLogits<bfloat16>&, const Parallel&);
template void run(const LinearLogits<float16>&, const Parallel&);

}  // namespace llmkern::cpu::LLMKERN_ISA
