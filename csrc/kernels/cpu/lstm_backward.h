// SPDX-License-Identifier: Apache-2.0
// The steps of one LSTM layer, backward, and the products over all of them.
#pragma once

#include "kernels/cpu/lstm_forward.h"

namespace llmkern::cpu::LLMKERN_ISA {

namespace {

template <class Op>
struct Backward {
  using T = typename Op::Storage;
  using S = Sum<Op>;

  const LstmBackward<T>& a;
  const Schedule& schedule;
  Word<Op>* packed;       // [panels][words of 4 gates][kUnits]: the recurrent weights
  Word<Op>* da_tiles[2];  // [B, 4H] in tiles: da of the step before, and of this step
  S *grad_h, *grad_c;     // [B, H]: the running dh and dc

  int64_t units(int64_t panel) const {
    return a.H - panel * kUnits<Op> < kUnits<Op> ? a.H - panel * kUnits<Op> : kUnits<Op>;
  }
  // Each gate begins with a new word.
  int64_t gate_words() const { return words_of<Op>(a.H); }
  Word<Op>* panel_weights(int64_t panel) const { return packed + panel * 4 * gate_words() * kUnits<Op>; }

  void pack(int64_t panel) const;
  void run(const Share& share) const;
  void carry(int64_t panel, int64_t t, const Word<Op>* above, S* dh) const;
  void finish_row(int64_t panel, int64_t i, int64_t t, Word<Op>* after) const;
};

template <class Op>
void Backward<Op>::pack(int64_t panel) const {
  const int64_t H = a.H, first = panel * kUnits<Op>, n = units(panel);
  Word<Op>* to = panel_weights(panel);
  if (n < kUnits<Op>) copy_or_zero<Word<Op>>(to, nullptr, 4 * gate_words() * kUnits<Op>);  // units beyond H
  for (int64_t g = 0; g < 4; ++g) {
    for (int64_t k = 0; k < H; k += Op::kTerms, to += kUnits<Op>) {
      Op::line(a.weight_hh + (g * H + k) * H + first, H, H - k, n, to);
    }
  }
}

// dh = da W_hh of the step before t, for the rows that ran at t.
template <class Op>
void Backward<Op>::carry(int64_t panel, int64_t t, const Word<Op>* above, S* dh) const {
  const int64_t active = schedule.active(t);
  multiply<Op, kBackwardRows, 1>(active, a.B, 4 * gate_words(), above, panel_weights(panel), dh, false);
  for (int64_t i = 0; i < active; ++i) {
    store(grad_h + schedule.row(i) * a.H + panel * kUnits<Op>, load(dh + i * kUnits<Op>), units(panel));
  }
}

// From dh and dc of a step to its gate gradients, and dc of the step before.
template <class Op>
void Backward<Op>::finish_row(int64_t panel, int64_t i, int64_t t, Word<Op>* after) const {
  const int64_t H = a.H, first = panel * kUnits<Op>, n = units(panel), row = schedule.row(i), state = row * H + first;
  const int64_t at = t * a.B * H + state, at_gates = (t * a.B + row) * 4 * H + first, before = schedule.time_before(t);
  const Vec<S> c_prev =
      i < schedule.active(before) ? load(a.cells + before * a.B * H + state, n) : load_wide(a.c_0 + state, n);
  Vec<S> gate[4];
  for (int g = 0; g < 4; ++g) gate[g] = load_wide(a.gates + at_gates + g * H, n);
  Vec<S> dh = load(grad_h + state, n);
  if (a.grad_output != nullptr) dh += load_wide(a.grad_output + at, n);
  const Vec<S> tanh_c = tanh(load(a.cells + at, n));
  Vec<S> dc = fma(dh * gate[3], 1 - tanh_c * tanh_c, load(grad_c + state, n));
  if (a.grad_cells != nullptr) dc += load(a.grad_cells + at, n);
  const Vec<S> da[4] = {dc * gate[2] * gate[0] * (1 - gate[0]), dc * c_prev * gate[1] * (1 - gate[1]),
                        dc * gate[0] * (1 - gate[2] * gate[2]), dh * tanh_c * gate[3] * (1 - gate[3])};
  store(grad_c + state, dc * gate[1], n);
  for (int g = 0; g < 4; ++g) {
    T* to = a.grad_gates + (schedule.first(t) + i) * 4 * H + g * H + first;
    store_narrow(to, da[g], n);
    fill_row<Op, kBackwardRows>(to, n, i, g * gate_words() + first / Op::kTerms, a.B, 4 * gate_words(), after);
  }
}

template <class Op>
void Backward<Op>::run(const Share& share) const {
  S* dh = scratch<S>(Slot::kPackedA, round_up(a.B, kBackwardRows) * kUnits<Op>);
  for (int64_t p = share.begin; p < share.end; ++p) pack(p);
  for (int64_t s = schedule.steps(); s >= 0; --s) {  // s = steps: nothing above the last step; s = 0: only dh of h_0
    share.barrier.wait();                            // da is complete, and nobody reads the one before any more
    for (int64_t p = share.begin; p < share.end; ++p) {
      if (s < schedule.steps()) carry(p, schedule.time(s), da_tiles[s % 2], dh);
      if (s == 0) continue;
      const int64_t t = schedule.time(s - 1);
      for (int64_t i = 0; i < schedule.active(t); ++i) finish_row(p, i, t, da_tiles[(s + 1) % 2]);
    }
  }
}

// grad_gates of every token, and the gradients of the initial states.
template <class Op, class T = typename Op::Storage>
void backward_through_time(const LstmBackward<T>& a, const Schedule& schedule, const Parallel& parallel) {
  using S = Sum<Op>;
  const int64_t panels = panels_of<Op>(a.H), states = a.B * a.H;
  const int64_t weights = panels * 4 * words_of<Op>(a.H) * kUnits<Op>;
  const int64_t tiles = round_up(a.B * 4 * words_of<Op>(a.H), kLanes<S>);
  Word<Op>* memory = scratch<Word<Op>>(Slot::kKernel, weights + 2 * tiles);
  const Running<T> grad_h(Slot::kHidden, a.grad_h_0, a.grad_h_n, states);
  const Running<T> grad_c(Slot::kCell, a.grad_c_0, a.grad_c_n, states);
  if (schedule.ragged()) copy_or_zero<Word<Op>>(memory + weights, nullptr, 2 * tiles);
  const Backward<Op> backward = {
      a, schedule, memory, {memory + weights, memory + weights + tiles}, grad_h.values(), grad_c.values()};
  const bool worth_it = schedule.tokens() * a.H * a.H * 8 >= kTeamFlops;
  if (schedule.tokens() > 0) {
    run_team(parallel, panels, worth_it, [&](const Share& share) { backward.run(share); });
  }
  grad_h.finish();
  grad_c.finish();
}

// [tokens, columns] of steps [T, B, columns], at the time of each token or, if `before`, at the one before it; there
// `initial` [B, columns] precedes a row's first step.
template <class T>
void gather(const Schedule& schedule, const T* steps, int64_t B, int64_t columns, bool before, const T* initial,
            T* tokens) {
  for (int64_t t = 0; t < schedule.steps(); ++t) {
    const int64_t from_time = before ? schedule.time_before(t) : t;
    for (int64_t i = 0; i < schedule.active(t); ++i) {
      const int64_t row = schedule.row(i);
      const bool is_first = before && i >= schedule.active(from_time);
      const T* from = is_first ? initial + row * columns : steps + (from_time * B + row) * columns;
      copy_or_zero(tokens + (schedule.first(t) + i) * columns, from, columns);
    }
  }
}

// dx = da W_ih. The gradients of rows of different lengths lie next to one another.
template <class Op, class T = typename Op::Storage>
void input_product(const LstmBackward<T>& a, const Schedule& schedule, const Parallel& parallel) {
  const int64_t H = a.H, I = a.I, N = schedule.tokens();
  const Buffer<T> tokens(schedule.ragged() ? N * I : 0);
  T* to = schedule.ragged() ? tokens.data() : a.grad_input;
  gemm<Op>(N, I, 4 * H, row_major<T>(a.grad_gates, 4 * H), row_major(a.weight_ih, I), to, I, false, parallel);
  if (!schedule.ragged()) return;
  copy_or_zero<T>(a.grad_input, nullptr, a.steps * a.B * I);
  for (int64_t t = 0; t < a.steps; ++t) {
    for (int64_t i = 0; i < schedule.active(t); ++i) {
      copy_or_zero(a.grad_input + (t * a.B + schedule.row(i)) * I, tokens.data() + (schedule.first(t) + i) * I, I);
    }
  }
}

// dW_ih = da^T x, dW_hh = da^T h_{t-1}.
template <class Op, class T = typename Op::Storage>
void weight_products(const LstmBackward<T>& a, const Schedule& schedule, const Parallel& parallel) {
  const int64_t H = a.H, I = a.I, N = schedule.tokens();
  const Matrix<T> da = transposed<T>(a.grad_gates, 4 * H);
  const Buffer<T> x(schedule.ragged() ? N * I : 0), h(N * H);
  if (schedule.ragged()) gather<T>(schedule, a.input, a.B, I, false, nullptr, x.data());
  gather<T>(schedule, a.output, a.B, H, true, a.h_0, h.data());
  const T* inputs = schedule.ragged() ? x.data() : a.input;
  gemm<Op>(4 * H, I, N, da, row_major(inputs, I), a.grad_weight_ih, I, false, parallel);
  gemm<Op>(4 * H, H, N, da, row_major<T>(h.data(), H), a.grad_weight_hh, H, false, parallel);
}

}  // namespace

}  // namespace llmkern::cpu::LLMKERN_ISA
