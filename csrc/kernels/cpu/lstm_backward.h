// SPDX-License-Identifier: Apache-2.0
// The steps of one LSTM layer, backward, and the products over all of them.
#pragma once

#include "kernels/cpu/lstm_forward.h"

namespace llmkern::cpu::LLMKERN_ISA {

namespace {

template <class T>
int64_t units_of(int64_t columns, int64_t panel) {
  return columns - panel * kUnits<T> < kUnits<T> ? columns - panel * kUnits<T> : kUnits<T>;
}

// A panel of the columns of weight [rows, columns]: [rows][kUnits]; columns beyond the last are 0.
template <class T>
void pack_column_panel(const T* weight, int64_t rows, int64_t columns, int64_t panel, T* to) {
  const int64_t n = units_of<T>(columns, panel);
  const T* from = weight + panel * kUnits<T>;
  for (int64_t k = 0; k < rows; ++k, to += kUnits<T>, from += columns) store(to, load(from, n));
}

template <class T>
struct Backward {
  const LstmBackward<T>& a;
  const Schedule& schedule;
  const T* recurrent;  // [panels][4H][kUnits]: the recurrent weights
  const T* inputs;     // and those of the input, or null: their products are made later, over all steps at once
  T* unpacked;         // where `recurrent` is still to be written, or null
  T* da_tiles[2];      // [B, 4H] in tiles: da of the step before, and of this step

  int64_t units(int64_t panel) const { return units_of<T>(a.H, panel); }

  void run(const Share& share) const;
  void carry(int64_t panel, int64_t t, const T* above, T* dh) const;
  void carry_to_input(int64_t panel, int64_t t, const T* above, T* dx) const;
  void finish_row(int64_t panel, int64_t i, int64_t t, T* after) const;
};

// dh = da W_hh of the step before t, for the rows that ran at t: grad_h_0 is the running dh.
template <class T>
void Backward<T>::carry(int64_t panel, int64_t t, const T* above, T* dh) const {
  const int64_t active = schedule.active(t);
  multiply<T, kBackwardRows, 1>(active, a.B, 4 * a.H, above, recurrent + panel * 4 * a.H * kUnits<T>, dh, false);
  for (int64_t i = 0; i < active; ++i) {
    store(a.grad_h_0 + schedule.row(i) * a.H + panel * kUnits<T>, load(dh + i * kUnits<T>), units(panel));
  }
}

// dx = da W_ih of the step t.
template <class T>
void Backward<T>::carry_to_input(int64_t panel, int64_t t, const T* above, T* dx) const {
  const int64_t active = schedule.active(t), n = units_of<T>(a.I, panel);
  multiply<T, kBackwardRows, 1>(active, a.B, 4 * a.H, above, inputs + panel * 4 * a.H * kUnits<T>, dx, false);
  for (int64_t i = 0; i < active; ++i) {
    store(a.grad_input + (t * a.B + schedule.row(i)) * a.I + panel * kUnits<T>, load(dx + i * kUnits<T>), n);
  }
}

// From dh and dc of a step to its gate gradients, and dc of the step before: grad_c_0 is the running dc.
template <class T>
void Backward<T>::finish_row(int64_t panel, int64_t i, int64_t t, T* after) const {
  const int64_t H = a.H, first = panel * kUnits<T>, n = units(panel), row = schedule.row(i), state = row * H + first;
  const int64_t at = t * a.B * H + state, at_gates = (t * a.B + row) * 4 * H + first, before = schedule.time_before(t);
  const T* c_prev = i < schedule.active(before) ? a.cells + before * a.B * H + state : a.c_0 + state;
  Vec<T> gate[4];
  for (int g = 0; g < 4; ++g) gate[g] = load(a.gates + at_gates + g * H, n);
  Vec<T> dh = load(a.grad_h_0 + state, n);
  if (a.grad_output != nullptr) dh += load(a.grad_output + at, n);
  const Vec<T> tanh_c = tanh(load(a.cells + at, n));
  Vec<T> dc = fma(dh * gate[3], 1 - tanh_c * tanh_c, load(a.grad_c_0 + state, n));
  if (a.grad_cells != nullptr) dc += load(a.grad_cells + at, n);
  const Vec<T> da[4] = {dc * gate[2] * gate[0] * (1 - gate[0]), dc * load(c_prev, n) * gate[1] * (1 - gate[1]),
                        dc * gate[0] * (1 - gate[2] * gate[2]), dh * tanh_c * gate[3] * (1 - gate[3])};
  store(a.grad_c_0 + state, dc * gate[1], n);
  for (int g = 0; g < 4; ++g) {
    store(a.grad_gates + (schedule.first(t) + i) * 4 * H + g * H + first, da[g], n);
    scatter<kBackwardRows>(da[g], n, after, i, g * H + first, a.B, 4 * H);
  }
}

template <class T>
void Backward<T>::run(const Share& share) const {
  T* dh = scratch<T>(Slot::kPackedA, round_up(a.B, kBackwardRows) * kUnits<T>);
  const int64_t panels = panels_of<T>(a.H), input_panels = inputs == nullptr ? 0 : panels_of<T>(a.I);
  const int64_t first_input = input_panels * share.begin / panels, last_input = input_panels * share.end / panels;
  for (int64_t p = share.begin; unpacked != nullptr && p < share.end; ++p) {
    pack_column_panel(a.weight_hh, 4 * a.H, a.H, p, unpacked + p * 4 * a.H * kUnits<T>);
  }
  for (int64_t s = schedule.steps(); s >= 0; --s) {  // s = steps: nothing above the last step; s = 0: only dh of h_0
    share.barrier.wait();                            // da is complete, and nobody reads the one before any more
    for (int64_t p = share.begin; p < share.end; ++p) {
      if (s < schedule.steps()) carry(p, schedule.time(s), da_tiles[s % 2], dh);
      if (s == 0) continue;
      const int64_t t = schedule.time(s - 1);
      for (int64_t i = 0; i < schedule.active(t); ++i) finish_row(p, i, t, da_tiles[(s + 1) % 2]);
    }
    for (int64_t p = first_input; s < schedule.steps() && p < last_input; ++p) {
      carry_to_input(p, schedule.time(s), da_tiles[s % 2], dh);
    }
  }
}

// Whether the weights are there in the order of this instruction set; those of the input serve whole steps alone.
template <class T>
bool has_panels(const LstmBackward<T>& a, const Schedule& schedule) {
  return a.packed != nullptr && a.packed[0] == kVectorBytes && !schedule.ragged();
}

// grad_gates of every token, and the gradients of the initial states; with packed weights that of the input too.
template <class T>
void backward_through_time(const LstmBackward<T>& a, const Schedule& schedule, const Parallel& parallel) {
  copy_or_zero(a.grad_h_0, a.grad_h_n, a.B * a.H);
  copy_or_zero(a.grad_c_0, a.grad_c_n, a.B * a.H);
  if (schedule.tokens() == 0) return;
  const bool is_packed = has_panels(a, schedule);
  const int64_t panels = panels_of<T>(a.H), weights = panels * 4 * a.H * kUnits<T>;
  const int64_t tiles = round_up(a.B * 4 * a.H, kLanes<T>);
  T* memory = scratch<T>(Slot::kKernel, 2 * tiles + (is_packed ? 0 : weights));
  if (schedule.ragged()) copy_or_zero<T>(memory, nullptr, 2 * tiles);
  T* unpacked = is_packed ? nullptr : memory + 2 * tiles;
  const T* recurrent = is_packed ? a.packed + kLstmPackHeader<T> : unpacked;
  const T* inputs = is_packed ? recurrent + weights : nullptr;
  const Backward<T> backward = {a, schedule, recurrent, inputs, unpacked, {memory, memory + tiles}};
  const bool worth_it = schedule.tokens() * a.H * (a.H + (is_packed ? a.I : 0)) * 8 >= kTeamFlops;
  run_team(parallel, panels, worth_it, [&](const Share& share) { backward.run(share); });
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

// The products over all tokens of rows of different lengths: over copies without the gaps.
template <class T>
void ragged_products(const LstmBackward<T>& a, const Schedule& schedule, const Parallel& parallel) {
  const int64_t H = a.H, I = a.I, N = schedule.tokens();
  const Buffer<T> x(N * I), h(N * H), grad_x(N * I);
  gather<T>(schedule, a.input, a.B, I, false, nullptr, x.data());
  gather<T>(schedule, a.output, a.B, H, true, a.h_0, h.data());
  gemm(4 * H, I, N, transposed(a.grad_gates, 4 * H), row_major(x.data(), I), a.grad_weight_ih, I, false, parallel);
  gemm(4 * H, H, N, transposed(a.grad_gates, 4 * H), row_major(h.data(), H), a.grad_weight_hh, H, false, parallel);
  gemm(N, I, 4 * H, row_major(a.grad_gates, 4 * H), row_major(a.weight_ih, I), grad_x.data(), I, false, parallel);
  copy_or_zero<T>(a.grad_input, nullptr, a.steps * a.B * I);
  for (int64_t t = 0; t < a.steps; ++t) {
    for (int64_t i = 0; i < schedule.active(t); ++i) {
      copy_or_zero(a.grad_input + (t * a.B + schedule.row(i)) * I, grad_x.data() + (schedule.first(t) + i) * I, I);
    }
  }
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
// copy.
template <class T>
void stacked_products(const LstmWeightGradients<T>& a, const Parallel& parallel) {
  const int64_t H = a.H, width = 4 * H + a.I + a.P;
  for (int64_t first = 0, last = 0; first < a.steps; first = last) {
    int64_t N = 0;
    while (last < a.steps && N < kTogether) N += a.rows[last++];
    T* const gates = scratch<T>(Slot::kKernel, N * width);
    T* const x = stack_rows(a.grad_gates, a.rows, first, last, 4 * H, gates);
    T* const h = stack_rows(a.input, a.rows, first, last, a.I, x);
    stack_rows(a.previous, a.rows, first, last, a.P, h);
    gemm(4 * H, a.I, N, transposed(gates, 4 * H), row_major(x, a.I), a.grad_weight_ih, a.I, first > 0, parallel);
    gemm(4 * H, a.P, N, transposed(gates, 4 * H), row_major(h, a.P), a.grad_weight_hh, a.P, first > 0, parallel);
    sum_rows(N, 4 * H, gates, a.grad_bias, first > 0, parallel);
  }
}

template <class T>
void whole_products(const LstmBackward<T>& a, const Schedule& schedule, const Parallel& parallel) {
  const int64_t H = a.H, B = a.B, rows = a.steps * B;
  if (!has_panels(a, schedule)) {
    gemm(rows, a.I, 4 * H, row_major(a.grad_gates, 4 * H), row_major(a.weight_ih, a.I), a.grad_input, a.I, false,
         parallel);
  }
  if (a.grad_weight_ih == nullptr) return;
  gemm(4 * H, a.I, rows, transposed(a.grad_gates, 4 * H), row_major(a.input, a.I), a.grad_weight_ih, a.I, false,
       parallel);
  // h_{t-1} is h_0 for the first step that ran and the output of the neighbouring step for the others.
  const T* first = a.grad_gates + schedule.time(0) * B * 4 * H;
  const T* others = a.grad_gates + (a.reverse ? 0 : B) * 4 * H;
  const T* h_prev = a.output + (a.reverse ? B : 0) * H;
  gemm(4 * H, H, B, transposed(first, 4 * H), row_major(a.h_0, H), a.grad_weight_hh, H, false, parallel);
  if (a.steps > 1) {
    gemm(4 * H, H, rows - B, transposed(others, 4 * H), row_major(h_prev, H), a.grad_weight_hh, H, true, parallel);
  }
}

}  // namespace

}  // namespace llmkern::cpu::LLMKERN_ISA
