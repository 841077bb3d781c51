// SPDX-License-Identifier: Apache-2.0
// What a backward pass over an LSTM layer does for all steps at once: gates that were not saved, and the gradients of
// the input, weights, biases and gains.
#pragma once

#include "kernels/cpu/lstm/backward.h"

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

  // Calls f(first token, tokens, h_{t-1} of these) until all had their turn.
  template <class F>
  void for_hidden(const F& f) const {
    if (gathers_hidden()) return f(int64_t{0}, count(), static_cast<const T*>(h_.data()));
    f(schedule_.time(0) * a_.B, a_.B, a_.h_0);
    const int64_t others = count() - a_.B;
    if (others > 0) f(a_.reverse ? int64_t{0} : a_.B, others, a_.output + (a_.reverse ? a_.B : 0) * a_.P);
  }

 private:
  // One product over all of them is rounded once. Where neither weights nor gates are wanted nobody reads them.
  bool gathers_hidden() const {
    if (a_.grad_weight_hh == nullptr && a_.gates != nullptr) return false;
    return schedule_.ragged() || a_.variant.reset != nullptr || !std::is_same_v<T, Widened<T>>;
  }

  void gather(int64_t t, int64_t i) {
    const int64_t row = schedule_.row(i), token = schedule_.token(t, i), before = schedule_.time_before(t);
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

template <class S>
Moments<S> moments_of(const S* x, int64_t n) {
  Vec<S> total = {}, squares = {};
  for_lanes<S>(0, n, [&](int64_t j, int64_t count) { total += load(x + j, count); });
  const S mean = sum<S>(total) / static_cast<S>(n);
  for_lanes<S>(0, n, [&](int64_t j, int64_t count) {
    const Vec<S> d = only<S>(load(x + j, count) - mean, count);
    squares += d * d;
  });
  return {mean, static_cast<S>(1 / std::sqrt(static_cast<double>(sum<S>(squares)) / static_cast<double>(n) + 1e-5))};
}

// (x - mean) * scale in place.
template <class S>
S normalize(S* x, int64_t n) {
  const Moments<S> moments = moments_of(x, n);
  for_lanes<S>(0, n, [&](int64_t j, int64_t count) {
    store(x + j, (load(x + j, count) - moments.mean) * moments.scale, count);
  });
  return moments.scale;
}

template <class Op>
struct Recomputation {
  using T = typename Op::Storage;
  using S = Sum<Op>;

  const LstmBackward<T>& a;
  const Schedule& schedule;
  T *gates, *normalized;  // by token; these with layer norm
  S* scales;

  bool norm() const { return a.variant.norm_gates != nullptr; }
  void run(const Tokens<T>& tokens, const Parallel& parallel) const;
  void multiply_hidden(const Tokens<T>& tokens, int64_t begin, int64_t end, S* sums, const Parallel& parallel) const;
  void normalize_sums(int64_t token, S* inputs, S* hidden) const;
  void activate(int64_t token, const S* sums) const;
  void measure_cell(int64_t t, int64_t i) const;
};

// Some steps after the others: sums are wider than gates.
template <class Op>
void Recomputation<Op>::run(const Tokens<T>& tokens, const Parallel& parallel) const {
  constexpr int64_t kRows = 1024;
  const int64_t width = 4 * a.H;
  for (int64_t from = 0, to; from < a.steps; from = to) {
    for (to = from + 1; to < a.steps && schedule.first(to + 1) - schedule.first(from) <= kRows; ++to) continue;
    const int64_t begin = schedule.first(from), end = schedule.first(to), count = end - begin;
    const auto sums = scratch<S>(Slot::kLstmRecomputation, count * width * (norm() ? 2 : 1));
    S* inputs = sums;
    S* hidden = norm() ? inputs + count * width : inputs;
    gemm<Op>(count, width, a.I, row_major(tokens.input() + begin * a.I, a.I), transposed(a.weight_ih, a.I), inputs,
             width, false, parallel);
    multiply_hidden(tokens, begin, end, hidden, parallel);
    parallel(to - from, (1 << 15) / (a.B * width + 1) + 1, [&](int64_t first, int64_t last) {
      for (int64_t t = from + first; t < from + last; ++t) {
        for (int64_t i = 0; i < schedule.active(t); ++i) {
          const int64_t token = schedule.token(t, i), row = (token - begin) * width;
          if (norm()) normalize_sums(token, inputs + row, hidden + row);
          activate(token, inputs + row);
          if (norm()) measure_cell(t, i);
        }
      }
    });
  }
}

// sums [end - begin, 4H] of these tokens: W_hh h_{t-1}, with layer norm; else added to what is there.
template <class Op>
void Recomputation<Op>::multiply_hidden(const Tokens<T>& tokens, int64_t begin, int64_t end, S* sums,
                                        const Parallel& parallel) const {
  const int64_t width = 4 * a.H;
  tokens.for_hidden([&](int64_t first, int64_t count, const T* h) {
    const int64_t from = first > begin ? first : begin, to = first + count < end ? first + count : end;
    if (from >= to) return;
    gemm<Op>(to - from, width, a.P, row_major(h + (from - first) * a.P, a.P), transposed(a.weight_hh, a.P),
             sums + (from - begin) * width, width, !norm(), parallel);
  });
}

template <class Op>
void Recomputation<Op>::normalize_sums(int64_t token, S* inputs, S* hidden) const {
  const int64_t width = 4 * a.H;
  scales[token * 4] = normalize(inputs, width);
  scales[token * 4 + 1] = normalize(hidden, width);
  convert(normalized + token * width, inputs, width);
  convert(normalized + (schedule.tokens() + token) * width, hidden, width);
  for_lanes<S>(0, width, [&](int64_t j, int64_t n) {
    const Vec<S> of_inputs = load(inputs + j, n) * load_wide(a.variant.norm_gates + j, n);
    store(inputs + j, fma(load(hidden + j, n), load_wide(a.variant.norm_gates + width + j, n), of_inputs), n);
  });
}

template <class Op>
void Recomputation<Op>::activate(int64_t token, const S* sums) const {
  for (int g = 0; g < 4; ++g) {
    T* row = gates + (token * 4 + g) * a.H;
    for_lanes<S>(0, a.H, [&](int64_t j, int64_t n) {
      Vec<S> x = load(sums + g * a.H + j, n);
      if (a.bias_ih != nullptr) x += load_wide(a.bias_ih + g * a.H + j, n) + load_wide(a.bias_hh + g * a.H + j, n);
      store_narrow(row + j, g == 2 ? tanh(x) : sigmoid(x), n);
    });
  }
}

template <class Op>
void Recomputation<Op>::measure_cell(int64_t t, int64_t i) const {
  const int64_t row = schedule.row(i), token = schedule.token(t, i), before = schedule.time_before(t), H = a.H;
  const bool reset = resets(a.variant, t, row, a.B), is_first = i >= schedule.active(before);
  const T* gate = gates + token * 4 * H;
  const auto cell = scratch<S>(Slot::kLstmNewCell, H);
  for_lanes<S>(0, H, [&](int64_t j, int64_t n) {
    Vec<S> c_prev = {};
    if (!reset) c_prev = is_first ? load_wide(a.c_0 + row * H + j, n) : load(a.cells + (before * a.B + row) * H + j, n);
    store(cell + j, fma(load_wide(gate + H + j, n), c_prev, load_wide(gate + j, n) * load_wide(gate + 2 * H + j, n)),
          n);
  });
  const Moments<S> moments = moments_of(cell.get(), H);
  scales[token * 4 + 2] = moments.mean;
  scales[token * 4 + 3] = moments.scale;
}

// ---- gradients

// Gradients of the gains of both products, sums over tokens of da times what was normalised.
template <class T>
void gain_gradients(const LstmBackward<T>& a, const Schedule& schedule, const BackwardState<T>& state,
                    const Parallel& parallel) {
  using S = Widened<T>;
  const int64_t width = 4 * a.H, rows = state.by_token ? schedule.tokens() : a.steps * a.B;
  // Rows are far apart in memory: of each, some lines that lie side by side.
  constexpr int64_t kVectors = 4, kColumns = kVectors * kLanes<S>;
  parallel((width + kColumns - 1) / kColumns, (1 << 15) / (2 * rows * kVectors + 1) + 1,
           [&](int64_t begin, int64_t end) {
             for (int64_t first = begin * kColumns; first < end * kColumns && first < width; first += kColumns) {
               const int64_t last = first + kColumns < width ? first + kColumns : width;
               double sums[2][kColumns] = {};
               for (int64_t t = 0; t < schedule.steps(); ++t) {
                 Vec<S> step[2][kVectors] = {};
                 for (int64_t i = 0; i < schedule.active(t); ++i) {
                   const T* da = state.grad_gates + schedule.token(t, i) * width;
                   const T* x = state.normalized + state.saved_row(schedule, a.B, t, i) * width;
                   for_lanes<S>(first, last, [&](int64_t j, int64_t n) {
                     const Vec<S> d = load_wide(da + j, n);
                     for (int k = 0; k < 2; ++k) {
                       step[k][(j - first) / kLanes<S>] += d * load_wide(x + k * rows * width + j, n);
                     }
                   });
                 }
                 for (int k = 0; k < 2; ++k) {
                   for (int64_t u = 0; u < kColumns; ++u) sums[k][u] += step[k][u / kLanes<S>][u % kLanes<S>];
                 }
               }
               for (int64_t j = first; j < last; ++j) {
                 for (int k = 0; k < 2; ++k)
                   a.grad_norm_gates[k * width + j] = narrow<T>(static_cast<S>(sums[k][j - first]));
               }
             }
           });
}

// da becomes the gradient of W_ih x, in place.
template <class T>
void normalized_input_gradients(const LstmBackward<T>& a, const Schedule& schedule, const BackwardState<T>& state,
                                const Parallel& parallel) {
  using S = Widened<T>;
  const int64_t width = 4 * a.H;
  for_tokens(schedule, a.B * width, parallel, [&](int64_t t, int64_t i) {
    T* da = state.grad_gates + schedule.token(t, i) * width;
    const int64_t saved = state.saved_row(schedule, a.B, t, i);
    const T* x = state.normalized + saved * width;
    Vec<S> total = {}, products = {};
    for_lanes<S>(0, width, [&](int64_t j, int64_t n) {
      const Vec<S> d = load_wide(da + j, n) * load_wide(a.variant.norm_gates + j, n);
      total += d;
      products += d * load_wide(x + j, n);
    });
    const S elements = static_cast<S>(width);
    const NormGradient<S> row = {state.scales[saved * 4], sum<S>(total) / elements, sum<S>(products) / elements};
    for_lanes<S>(0, width, [&](int64_t j, int64_t n) {
      const Vec<S> d = load_wide(da + j, n) * load_wide(a.variant.norm_gates + j, n);
      store_narrow(da + j, row.of(d, load_wide(x + j, n)), n);
    });
  });
}

// Rows of tokens to their places in [T, B, I]; 0 beyond a row's length.
template <class T>
void spread(const Schedule& schedule, const T* tokens, int64_t B, int64_t I, T* steps) {
  copy_or_zero<T>(steps, nullptr, schedule.steps() * B * I);
  for (int64_t t = 0; t < schedule.steps(); ++t) {
    for (int64_t i = 0; i < schedule.active(t); ++i) {
      copy_or_zero(steps + (t * B + schedule.row(i)) * I, tokens + schedule.token(t, i) * I, I);
    }
  }
}

template <class Op, class T = typename Op::Storage>
void input_gradient(const LstmBackward<T>& a, const Schedule& schedule, const T* da, const Parallel& parallel) {
  const Buffer<T> of_tokens(schedule.ragged() ? schedule.tokens() * a.I : 0);
  T* to = schedule.ragged() ? of_tokens.data() : a.grad_input;
  gemm<Op>(schedule.tokens(), a.I, 4 * a.H, row_major(da, 4 * a.H), row_major(a.weight_ih, a.I), to, a.I, false,
           parallel);
  if (schedule.ragged()) spread(schedule, to, a.B, a.I, a.grad_input);
}

// Tokens whose copies are multiplied in one go: as many as a product goes over before it needs its result again, twice.
constexpr int64_t kTogether = 2 * kBlockK;

// The rows of steps [first, last), one under the other.
template <class T>
T* stack_rows(const T* const* steps, const int64_t* rows, int64_t first, int64_t last, int64_t columns, T* to) {
  for (int64_t s = first; s < last; to += rows[s++] * columns) copy_or_zero(to, steps[s], rows[s] * columns);
  return to;
}

// The products of some steps at a time: all of them would need fresh memory, whose first touch costs more than the
// copy. But a sum of 16 bits is rounded once.
template <class Op, class T = typename Op::Storage>
void stacked_products(const LstmWeightGradients<T>& a, const Parallel& parallel) {
  constexpr bool kExact = std::is_same_v<T, Sum<Op>>;
  const int64_t width = 4 * a.H;
  for (int64_t first = 0, last = 0; first < a.steps; first = last) {
    int64_t N = 0;
    while (last < a.steps && (!kExact || N < kTogether)) N += a.rows[last++];
    const auto stacked = scratch<T>(Slot::kLstmStackedSteps, N * (width + a.I + a.P));
    T* const da = stacked;
    T* const x = stack_rows(a.grad_gates, a.rows, first, last, width, da);
    T* const h = stack_rows(a.input, a.rows, first, last, a.I, x);
    stack_rows(a.previous, a.rows, first, last, a.P, h);
    gemm<Op>(width, a.I, N, transposed(da, width), row_major(x, a.I), a.grad_weight_ih, a.I, first > 0, parallel);
    gemm<Op>(width, a.P, N, transposed(da, width), row_major(h, a.P), a.grad_weight_hh, a.P, first > 0, parallel);
    sum_rows(N, width, da, a.grad_bias, first > 0, parallel);
  }
}

template <class Op, class T = typename Op::Storage>
void weight_gradients(const LstmBackward<T>& a, const Tokens<T>& tokens, const BackwardState<T>& state, const T* da,
                      const T* da_hidden, const Parallel& parallel) {
  const int64_t width = 4 * a.H, N = tokens.count();
  gemm<Op>(width, a.I, N, transposed(da, width), row_major(tokens.input(), a.I), a.grad_weight_ih, a.I, false,
           parallel);
  bool accumulate = false;
  tokens.for_hidden([&](int64_t first, int64_t count, const T* h) {
    gemm<Op>(width, a.P, count, transposed(da_hidden + first * width, width), row_major(h, a.P), a.grad_weight_hh, a.P,
             accumulate, parallel);
    accumulate = true;
  });
  if (a.variant.weight_hr != nullptr) {
    gemm<Op>(a.P, a.H, N, transposed(state.grad_projected, a.P), row_major(state.unprojected, a.H), a.grad_weight_hr,
             a.H, false, parallel);
  }
}

}  // namespace

}  // namespace llmkern::cpu::LLMKERN_ISA
