// SPDX-License-Identifier: Apache-2.0
// The steps of one LSTM layer, forward.
#pragma once

#include "kernels/cpu/schedule.h"
#include "kernels/cpu/team.h"
#include "kernels/cpu/tiles.h"
#include "kernels/lstm.h"

namespace llmkern::cpu::LLMKERN_ISA {

namespace {

// Rows of the input whose products are made in one go: enough that reading the weights costs less than using them.
constexpr int64_t kInputRows = 48;

// Multiplications and additions worth waking another thread for.
constexpr int64_t kTeamFlops = 1 << 18;

template <class T>
void copy_or_zero(T* to, const T* from, int64_t count) {
  if (count == 0) return;  // an empty tensor may have no memory at all
  if (from != nullptr) {
    memcpy(to, from, static_cast<size_t>(count) * sizeof(T));
  } else {
    memset(to, 0, static_cast<size_t>(count) * sizeof(T));
  }
}

template <class T>
struct Forward {
  const LstmForward<T>& a;
  const Schedule& schedule;
  const T* packed;     // [panels][I + H][kGatesWidth]
  T* hidden_tiles[2];  // [B, H] in tiles: h of the step before, and of this step

  int64_t units(int64_t panel) const {
    return a.H - panel * kUnits<T> < kUnits<T> ? a.H - panel * kUnits<T> : kUnits<T>;
  }
  const T* panel_weights(int64_t panel) const { return packed + panel * (a.I + a.H) * kGatesWidth<T>; }

  void run(const Share& share) const;
  void begin_rows(const Share& share, int64_t step, T* tiles) const;
  void multiply_inputs(const Share& share, int64_t step, int64_t steps, T* input_tiles, T* sums) const;
  void finish_row(int64_t panel, int64_t i, int64_t t, const T* sums, T* after) const;
};

// h_0 of the rows whose first step this is, the share's units.
template <class T>
void Forward<T>::begin_rows(const Share& share, int64_t step, T* tiles) const {
  const int64_t t = schedule.time(step), begin = share.begin * kUnits<T>;
  const int64_t end = share.end * kUnits<T> < a.H ? share.end * kUnits<T> : a.H;
  for (int64_t i = schedule.active(schedule.time_before(t)); i < schedule.active(t); ++i) {
    fill_row<kForwardRows>(a.h_0 + schedule.row(i) * a.H, i, begin, end, a.B, a.H, tiles);
  }
}

// sums[step][panel][row][kGatesWidth] = W_ih x of these steps, the share's panels.
template <class T>
void Forward<T>::multiply_inputs(const Share& share, int64_t step, int64_t steps, T* input_tiles, T* sums) const {
  const int64_t panels = share.end - share.begin;
  for (int64_t s = 0; s < steps; ++s) {
    const int64_t t = schedule.time(step + s);
    for (int64_t i = 0; i < schedule.active(t); ++i) {
      fill_row<kForwardRows>(a.input + (t * a.B + schedule.row(i)) * a.I, i, 0, a.I, a.B, a.I,
                             input_tiles + s * a.B * a.I);
    }
  }
  for (int64_t p = share.begin; p < share.end; ++p) {
    for (int64_t s = 0; s < steps; ++s) {
      T* to = sums + (s * panels + p - share.begin) * a.B * kGatesWidth<T>;
      multiply<T, kForwardRows, 4>(schedule.active(schedule.time(step + s)), a.B, a.I, input_tiles + s * a.B * a.I,
                                   panel_weights(p), to, false);
    }
  }
}

// From the finished sums of a row and panel to its gates, cell and output.
template <class T>
void Forward<T>::finish_row(int64_t panel, int64_t i, int64_t t, const T* sums, T* after) const {
  const int64_t H = a.H, first = panel * kUnits<T>, n = units(panel);
  const int64_t row = schedule.row(i), state = row * H + first, at = (t * a.B + row) * H + first;
  Vec<T> gate[4];
  for (int g = 0; g < 4; ++g) {
    gate[g] = load(sums + g * kUnits<T>);
    if (a.bias_ih != nullptr) gate[g] += load(a.bias_ih + g * H + first, n) + load(a.bias_hh + g * H + first, n);
    gate[g] = g == 2 ? tanh(gate[g]) : sigmoid(gate[g]);
    if (a.gates != nullptr) store(a.gates + ((t * a.B + row) * 4 + g) * H + first, gate[g], n);
  }
  const Vec<T> cell = fma(gate[1], load(a.c_n + state, n), gate[0] * gate[2]), hidden = gate[3] * tanh(cell);
  store(a.c_n + state, cell, n);
  if (a.cells != nullptr) store(a.cells + at, cell, n);
  store(a.output + at, hidden, n);
  if (i >= schedule.active(schedule.time_after(t))) store(a.h_n + state, hidden, n);  // its last step
  scatter<kForwardRows>(hidden, n, after, i, first, a.B, H);
}

template <class T>
void Forward<T>::run(const Share& share) const {
  const int64_t panels = share.end - share.begin, steps = schedule.steps();
  const int64_t most = (kInputRows + a.B - 1) / a.B, together = most < steps ? most : steps;
  T* input_tiles = scratch<T>(Slot::kPackedA, together * a.B * a.I);
  T* sums = scratch<T>(Slot::kPackedB, together * panels * a.B * kGatesWidth<T>);
  for (int64_t step = 0; step < steps; ++step) {
    const int64_t left = steps - step, t = schedule.time(step);
    if (step % together == 0) multiply_inputs(share, step, left < together ? left : together, input_tiles, sums);
    T *before = hidden_tiles[step % 2], *after = hidden_tiles[(step + 1) % 2];
    begin_rows(share, step, before);
    share.barrier.wait();  // h is complete, and nobody reads the one before any more
    for (int64_t p = share.begin; p < share.end; ++p) {
      T* of_panel = sums + (step % together * panels + p - share.begin) * a.B * kGatesWidth<T>;
      multiply<T, kForwardRows, 4>(schedule.active(t), a.B, a.H, before, panel_weights(p) + a.I * kGatesWidth<T>,
                                   of_panel, true);
      for (int64_t i = 0; i < schedule.active(t); ++i) finish_row(p, i, t, of_panel + i * kGatesWidth<T>, after);
    }
  }
}

// What beyond a row's length nobody writes.
template <class T>
void clear(const LstmForward<T>& a) {
  const int64_t count = a.steps * a.B * a.H;
  copy_or_zero<T>(a.output, nullptr, count);
  if (a.cells != nullptr) copy_or_zero<T>(a.cells, nullptr, count);
  if (a.gates != nullptr) copy_or_zero<T>(a.gates, nullptr, 4 * count);
}

}  // namespace

}  // namespace llmkern::cpu::LLMKERN_ISA
