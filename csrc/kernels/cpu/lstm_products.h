// SPDX-License-Identifier: Apache-2.0
// What a backward pass over an LSTM layer does for all steps at once: gates that were not saved, and the gradients of
// the input, weights, biases and gains.
#pragma once

#include "kernels/cpu/lstm_backward.h"

namespace llmkern::cpu::LLMKERN_ISA {

namespace {

// The layer's input and h_{t-1}, one row a token: where they lie if all rows run over all steps, else gathered.
template <class T>
class Tokens {
 public:
  Tokens(const LstmBackward<T>& a, const Schedule& schedule)
      : a_(a),
        schedule_(schedule),
        x_(schedule.ragged() ? schedule.tokens() * a.I : 0),
        h_(gathers_hidden() ? schedule.tokens() * a.P : 0) {
    for (int64_t t = 0; t < a.steps; ++t) {
      for (int64_t i = 0; i < schedule.active(t); ++i) gather(t, i);
    }
  }

  int64_t count() const { return schedule_.tokens(); }
  const T* input() const { return schedule_.ragged() ? x_.data() : a_.input; }

  // Calls f(first token, tokens, h_{t-1} of these).
  template <class F>
  void for_hidden(const F& f) const {
    if (gathers_hidden()) return f(int64_t{0}, count(), static_cast<const T*>(h_.data()));
    f(schedule_.time(0) * a_.B, a_.B, a_.h_0);
    const int64_t others = count() - a_.B;
    if (others > 0) f(a_.reverse ? int64_t{0} : a_.B, others, a_.output + (a_.reverse ? a_.B : 0) * a_.P);
  }

 private:
  bool gathers_hidden() const { return schedule_.ragged() || a_.variant.reset != nullptr; }

  void gather(int64_t t, int64_t i) {
    const int64_t row = schedule_.row(i), token = schedule_.first(t) + i, before = schedule_.time_before(t);
    if (schedule_.ragged()) copy_or_zero(x_.data() + token * a_.I, a_.input + (t * a_.B + row) * a_.I, a_.I);
    if (!gathers_hidden()) return;
    const bool is_first = i >= schedule_.active(before);
    const T* from = is_first ? a_.h_0 + row * a_.P : a_.output + (before * a_.B + row) * a_.P;
    copy_or_zero(h_.data() + token * a_.P, resets(a_.variant, t, row, a_.B) ? nullptr : from, a_.P);
  }

  const LstmBackward<T>& a_;
  const Schedule& schedule_;
  Buffer<T> x_, h_;
};

// Calls f(t, i) for every token; tokens are divided among the threads.
template <class F>
void for_tokens(const Schedule& schedule, int64_t cost, const Parallel& parallel, const F& f) {
  parallel(schedule.steps(), (1 << 15) / (cost + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t i = 0; i < schedule.active(t); ++i) f(t, i);
    }
  });
}

// ---- gates that were not saved

template <class T>
Moments<T> moments_of(const T* x, int64_t n) {
  Vec<T> total = {}, squares = {};
  for_lanes<T>(0, n, [&](int64_t j, int64_t count) { total += load(x + j, count); });
  const T mean = sum<T>(total) / static_cast<T>(n);
  for_lanes<T>(0, n, [&](int64_t j, int64_t count) {
    const Vec<T> d = only<T>(load(x + j, count) - mean, count);
    squares += d * d;
  });
  return {mean, static_cast<T>(1 / std::sqrt(static_cast<double>(sum<T>(squares)) / static_cast<double>(n) + 1e-5))};
}

// (x - mean) * scale in place.
template <class T>
T normalize(T* x, int64_t n) {
  const Moments<T> moments = moments_of(x, n);
  for_lanes<T>(0, n, [&](int64_t j, int64_t count) {
    store(x + j, (load(x + j, count) - moments.mean) * moments.scale, count);
  });
  return moments.scale;
}

template <class T>
struct Recomputation {
  const LstmBackward<T>& a;
  const Schedule& schedule;
  T *gates, *normalized, *scales;  // by token; the last two with layer norm

  bool norm() const { return a.variant.norm_gates != nullptr; }
  void run(const Tokens<T>& tokens, const Parallel& parallel) const;
  void add_normalized(int64_t token) const;
  void activate(int64_t token) const;
  void measure_cell(int64_t t, int64_t i) const;
};

template <class T>
void Recomputation<T>::run(const Tokens<T>& tokens, const Parallel& parallel) const {
  const int64_t width = 4 * a.H, N = tokens.count();
  T* inputs = norm() ? normalized : gates;
  T* hidden = norm() ? normalized + N * width : gates;
  gemm(N, width, a.I, row_major(tokens.input(), a.I), transposed(a.weight_ih, a.I), inputs, width, false, parallel);
  tokens.for_hidden([&](int64_t first, int64_t count, const T* h) {
    gemm(count, width, a.P, row_major(h, a.P), transposed(a.weight_hh, a.P), hidden + first * width, width, !norm(),
         parallel);
  });
  for_tokens(schedule, a.B * width, parallel, [&](int64_t t, int64_t i) {
    const int64_t token = schedule.first(t) + i;
    if (norm()) add_normalized(token);
    activate(token);
    if (norm()) measure_cell(t, i);
  });
}

template <class T>
void Recomputation<T>::add_normalized(int64_t token) const {
  const int64_t width = 4 * a.H;
  T *inputs = normalized + token * width, *hidden = normalized + (schedule.tokens() + token) * width;
  scales[token * 4] = normalize(inputs, width);
  scales[token * 4 + 1] = normalize(hidden, width);
  for_lanes<T>(0, width, [&](int64_t j, int64_t n) {
    const Vec<T> of_inputs = load(inputs + j, n) * load(a.variant.norm_gates + j, n);
    store(gates + token * width + j, fma(load(hidden + j, n), load(a.variant.norm_gates + width + j, n), of_inputs), n);
  });
}

template <class T>
void Recomputation<T>::activate(int64_t token) const {
  for (int g = 0; g < 4; ++g) {
    T* row = gates + (token * 4 + g) * a.H;
    for_lanes<T>(0, a.H, [&](int64_t j, int64_t n) {
      Vec<T> sums = load(row + j, n);
      if (a.bias_ih != nullptr) sums += load(a.bias_ih + g * a.H + j, n) + load(a.bias_hh + g * a.H + j, n);
      store(row + j, g == 2 ? tanh(sums) : sigmoid(sums), n);
    });
  }
}

template <class T>
void Recomputation<T>::measure_cell(int64_t t, int64_t i) const {
  const int64_t row = schedule.row(i), token = schedule.first(t) + i, before = schedule.time_before(t), H = a.H;
  const T* from = i < schedule.active(before) ? a.cells + (before * a.B + row) * H : a.c_0 + row * H;
  const bool reset = resets(a.variant, t, row, a.B);
  const T* gate = gates + token * 4 * H;
  T* cell = scratch<T>(Slot::kPackedA, H);
  for_lanes<T>(0, H, [&](int64_t j, int64_t n) {
    const Vec<T> c_prev = reset ? Vec<T>{} : load(from + j, n);
    store(cell + j, fma(load(gate + H + j, n), c_prev, load(gate + j, n) * load(gate + 2 * H + j, n)), n);
  });
  const Moments<T> moments = moments_of(cell, H);
  scales[token * 4 + 2] = moments.mean;
  scales[token * 4 + 3] = moments.scale;
}

// ---- gradients

// Gradients of the gains of both products, sums over tokens of da times what was normalised.
template <class T>
void gain_gradients(const LstmBackward<T>& a, const Schedule& schedule, const BackwardState<T>& state,
                    const Parallel& parallel) {
  const int64_t width = 4 * a.H, rows = state.by_token ? schedule.tokens() : a.steps * a.B;
  parallel((width + kLanes<T> - 1) / kLanes<T>, (1 << 15) / (2 * rows + 1) + 1, [&](int64_t begin, int64_t end) {
    for_lanes<T>(begin * kLanes<T>, end * kLanes<T> < width ? end * kLanes<T> : width, [&](int64_t j, int64_t n) {
      double sums[2][kLanes<T>] = {};
      for (int64_t t = 0; t < schedule.steps(); ++t) {
        Vec<T> step[2] = {};
        for (int64_t i = 0; i < schedule.active(t); ++i) {
          const Vec<T> da = load(state.grad_gates + (schedule.first(t) + i) * width + j, n);
          const int64_t saved = state.saved_row(schedule, a.B, t, i);
          for (int k = 0; k < 2; ++k) step[k] += da * load(state.normalized + (k * rows + saved) * width + j, n);
        }
        for (int u = 0; u < kLanes<T>; ++u) sums[0][u] += step[0][u], sums[1][u] += step[1][u];
      }
      for (int64_t u = 0; u < n; ++u) {
        a.grad_norm_gates[j + u] = static_cast<T>(sums[0][u]);
        a.grad_norm_gates[width + j + u] = static_cast<T>(sums[1][u]);
      }
    });
  });
}

// da becomes the gradient of W_ih x, in place.
template <class T>
void normalized_input_gradients(const LstmBackward<T>& a, const Schedule& schedule, const BackwardState<T>& state,
                                const Parallel& parallel) {
  const int64_t width = 4 * a.H;
  for_tokens(schedule, a.B * width, parallel, [&](int64_t t, int64_t i) {
    T* da = state.grad_gates + (schedule.first(t) + i) * width;
    const int64_t saved = state.saved_row(schedule, a.B, t, i);
    const T* x = state.normalized + saved * width;
    Vec<T> total = {}, products = {};
    for_lanes<T>(0, width, [&](int64_t j, int64_t n) {
      const Vec<T> d = load(da + j, n) * load(a.variant.norm_gates + j, n);
      total += d;
      products += d * load(x + j, n);
    });
    const T elements = static_cast<T>(width);
    const NormGradient<T> row = {state.scales[saved * 4], sum<T>(total) / elements, sum<T>(products) / elements};
    for_lanes<T>(0, width, [&](int64_t j, int64_t n) {
      const Vec<T> d = load(da + j, n) * load(a.variant.norm_gates + j, n);
      store(da + j, row.of(d, load(x + j, n)), n);
    });
  });
}

// Rows of tokens to their places in [T, B, I]; 0 beyond a row's length.
template <class T>
void spread(const Schedule& schedule, const T* tokens, int64_t B, int64_t I, T* steps) {
  copy_or_zero<T>(steps, nullptr, schedule.steps() * B * I);
  for (int64_t t = 0; t < schedule.steps(); ++t) {
    for (int64_t i = 0; i < schedule.active(t); ++i) {
      copy_or_zero(steps + (t * B + schedule.row(i)) * I, tokens + (schedule.first(t) + i) * I, I);
    }
  }
}

template <class T>
void input_gradient(const LstmBackward<T>& a, const Schedule& schedule, const T* da, const Parallel& parallel) {
  const Buffer<T> of_tokens(schedule.ragged() ? schedule.tokens() * a.I : 0);
  T* to = schedule.ragged() ? of_tokens.data() : a.grad_input;
  gemm(schedule.tokens(), a.I, 4 * a.H, row_major(da, 4 * a.H), row_major(a.weight_ih, a.I), to, a.I, false, parallel);
  if (schedule.ragged()) spread(schedule, to, a.B, a.I, a.grad_input);
}

template <class T>
void weight_gradients(const LstmBackward<T>& a, const Tokens<T>& tokens, const BackwardState<T>& state, const T* da,
                      const T* da_hidden, const Parallel& parallel) {
  const int64_t width = 4 * a.H, N = tokens.count();
  gemm(width, a.I, N, transposed(da, width), row_major(tokens.input(), a.I), a.grad_weight_ih, a.I, false, parallel);
  bool accumulate = false;
  tokens.for_hidden([&](int64_t first, int64_t count, const T* h) {
    gemm(width, a.P, count, transposed(da_hidden + first * width, width), row_major(h, a.P), a.grad_weight_hh, a.P,
         accumulate, parallel);
    accumulate = true;
  });
  if (a.variant.weight_hr != nullptr) {
    gemm(a.P, a.H, N, transposed(state.grad_projected, a.P), row_major(state.unprojected, a.H), a.grad_weight_hr, a.H,
         false, parallel);
  }
}

}  // namespace

}  // namespace llmkern::cpu::LLMKERN_ISA
