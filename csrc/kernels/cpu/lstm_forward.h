// SPDX-License-Identifier: Apache-2.0
// The steps of one LSTM layer, forward.
#pragma once

#include "kernels/cpu/lstm_variant.h"

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
  const T* packed;       // [panels][I + P][kGatesWidth]
  T* hidden_tiles[2];    // [B, P] in tiles: h of the step before, and of this step
  const T* packed_hr;    // [panels of P][H][kUnits]
  T* unprojected_tiles;  // [B, H]: o * tanh(c) of this step
  Pairs<T> input_moments, hidden_moments, cell_moments;

  // What a worker keeps, for its panels.
  struct Work {
    const Share& share;
    int64_t together;  // steps whose input products are made at once
    T* input_tiles;    // [together][B, I] in tiles
    T* sums;           // [together][panels][B][kGatesWidth]: gates before activation
    T* products;       // [panels][B][kGatesWidth]: those of h alone, with layer norm
    T* projection;     // [B][kUnits]
    Zoneouts<T> zoneouts;

    int64_t panels() const { return share.end - share.begin; }
    T* row(T* of_panels, int64_t panel, int64_t i, int64_t B) const {
      return of_panels + ((panel - share.begin) * B + i) * kGatesWidth<T>;
    }
  };
  // What the output of a row and panel is made from.
  struct Unit {
    Vec<T> output_gate, cell;
  };

  static int64_t steps_together(int64_t B, int64_t steps) {
    const int64_t most = (kInputRows + B - 1) / B;
    return most < steps ? most : steps;
  }
  bool norm() const { return a.variant.norm_gates != nullptr; }
  bool projects() const { return a.variant.weight_hr != nullptr; }
  const T* panel_weights(int64_t panel) const { return packed + panel * (a.I + a.P) * kGatesWidth<T>; }

  void run(const Share& share) const;
  Work work(const Share& share) const;
  void begin_rows(const Work& work, int64_t step, T* tiles) const;
  void multiply_inputs(const Work& work, int64_t step, int64_t steps) const;
  void normalize_inputs(const Work& work, int64_t step, int64_t steps) const;
  void run_step(const Work& work, int64_t step) const;
  void run_normalized_step(const Work& work, int64_t step) const;
  void normalize_row(const Work& work, int64_t t, int64_t i, T* sums) const;
  void project(const Work& work, int64_t t, T* after) const;
  Unit activate(const Work& work, int64_t panel, int64_t i, int64_t t, const T* sums) const;
  void emit(const Work& work, int64_t panel, int64_t i, int64_t t, Vec<T> hidden, T* after) const;
  void emit_hidden(const Work& work, int64_t panel, int64_t i, int64_t t, Vec<T> hidden, T* after) const;
};

template <class T>
typename Forward<T>::Work Forward<T>::work(const Share& share) const {
  const int64_t together = steps_together(a.B, schedule.steps());
  const int64_t size = (share.end - share.begin) * a.B * kGatesWidth<T>;
  T* tiles = scratch<T>(Slot::kPackedA, together * a.B * a.I);
  const int64_t of_products = norm() ? size : 0, of_projection = projects() ? a.B * kUnits<T> : 0;
  const auto [sums, products, projection] = carve<T>(Slot::kPackedB, {together * size, of_products, of_projection});
  return {share, together, tiles, sums, products, projection, Zoneouts<T>::of(a.variant, a.B, a.H, a.P, share)};
}

// h_0 of the rows whose first step this is, the share's columns.
template <class T>
void Forward<T>::begin_rows(const Work& work, int64_t step, T* tiles) const {
  const Share share = projected<T>(work.share, a.H, a.P);
  const int64_t t = schedule.time(step), begin = share.begin * kUnits<T>;
  const int64_t end = share.end * kUnits<T> < a.P ? share.end * kUnits<T> : a.P;
  for (int64_t i = schedule.active(schedule.time_before(t)); i < schedule.active(t); ++i) {
    const int64_t row = schedule.row(i);
    if (resets(a.variant, t, row, a.B)) {
      clear_row<kForwardRows>(i, begin, end, a.B, a.P, tiles);
    } else {
      fill_row<kForwardRows>(a.h_0 + row * a.P, i, begin, end, a.B, a.P, tiles);
    }
  }
}

// sums[step][panel][row] = W_ih x of these steps, the share's panels.
template <class T>
void Forward<T>::multiply_inputs(const Work& work, int64_t step, int64_t steps) const {
  for (int64_t s = 0; s < steps; ++s) {
    const int64_t t = schedule.time(step + s);
    for (int64_t i = 0; i < schedule.active(t); ++i) {
      fill_row<kForwardRows>(a.input + (t * a.B + schedule.row(i)) * a.I, i, 0, a.I, a.B, a.I,
                             work.input_tiles + s * a.B * a.I);
    }
  }
  for (int64_t p = work.share.begin; p < work.share.end; ++p) {
    for (int64_t s = 0; s < steps; ++s) {
      T* to = work.row(work.sums + s * work.panels() * a.B * kGatesWidth<T>, p, 0, a.B);
      multiply<T, kForwardRows, 4>(schedule.active(schedule.time(step + s)), a.B, a.I, work.input_tiles + s * a.B * a.I,
                                   panel_weights(p), to, false);
    }
  }
}

// The same products, layer-normalised and with their gains.
template <class T>
void Forward<T>::normalize_inputs(const Work& work, int64_t step, int64_t steps) const {
  const int64_t size = work.panels() * a.B * kGatesWidth<T>;
  for (int64_t p = work.share.begin; p < work.share.end; ++p) {
    for (int64_t s = 0; s < steps; ++s) {
      for (int64_t i = 0; i < schedule.active(schedule.time(step + s)); ++i) {
        put_gate_moments(work.row(work.sums + s * size, p, i, a.B), units_of<T>(p, a.H),
                         input_moments.at(p, s * a.B + i));
      }
    }
  }
  work.share.barrier.wait();
  for (int64_t s = 0; s < steps; ++s) {
    const int64_t t = schedule.time(step + s);
    for (int64_t i = 0; i < schedule.active(t); ++i) {
      const Moments<T> moments = moments_of_row(input_moments, s * a.B + i, a.H, 4);
      const int64_t token = t * a.B + schedule.row(i);
      if (a.scales != nullptr && work.share.begin == 0) a.scales[token * 4] = moments.scale;
      T* saved = a.normalized == nullptr ? nullptr : a.normalized + token * 4 * a.H;
      for (int64_t p = work.share.begin; p < work.share.end; ++p) {
        T* row = work.row(work.sums + s * size, p, i, a.B);
        scale_gates(row, moments, a.variant.norm_gates, p, a.H, static_cast<const T*>(nullptr), saved, row);
      }
    }
  }
}

// From the finished sums of a row and panel to its gates and cell.
template <class T>
typename Forward<T>::Unit Forward<T>::activate(const Work& work, int64_t panel, int64_t i, int64_t t,
                                               const T* sums) const {
  const int64_t H = a.H, first = panel * kUnits<T>, n = units_of<T>(panel, H), row = schedule.row(i);
  const int64_t state = row * H + first, token = t * a.B + row;
  Vec<T> gate[4];
  for (int g = 0; g < 4; ++g) {
    gate[g] = load(sums + g * kUnits<T>);
    if (a.bias_ih != nullptr) gate[g] += load(a.bias_ih + g * H + first, n) + load(a.bias_hh + g * H + first, n);
    gate[g] = g == 2 ? tanh(gate[g]) : sigmoid(gate[g]);
    if (a.gates != nullptr) store(a.gates + (token * 4 + g) * H + first, gate[g], n);
  }
  const Vec<T> before = resets(a.variant, t, row, a.B) ? Vec<T>{} : load(a.c_n + state, n);
  const Vec<T> cell = fma(gate[1], before, gate[0] * gate[2]);
  const Vec<T> kept = work.zoneouts.cell.any() ? mix(work.zoneouts.cell.at(i, panel), before, cell) : cell;
  store(a.c_n + state, kept, n);
  if (a.cells != nullptr) store(a.cells + token * H + first, kept, n);
  return {gate[3], cell};
}

template <class T>
void Forward<T>::emit(const Work& work, int64_t panel, int64_t i, int64_t t, Vec<T> hidden, T* after) const {
  if (!projects()) return emit_hidden(work, panel, i, t, hidden, after);
  scatter<kForwardRows>(hidden, units_of<T>(panel, a.H), unprojected_tiles, i, panel * kUnits<T>, a.B, a.H);
}

// A panel of h of this step: to the output, and to the tiles of the next step.
template <class T>
void Forward<T>::emit_hidden(const Work& work, int64_t panel, int64_t i, int64_t t, Vec<T> hidden, T* after) const {
  const int64_t P = a.P, first = panel * kUnits<T>, n = units_of<T>(panel, P), row = schedule.row(i);
  const int64_t token = t * a.B + row, before = schedule.time_before(t), next = schedule.time_after(t);
  if (work.zoneouts.hidden.any()) {
    const T* from = i < schedule.active(before) ? a.output + (before * a.B + row) * P : a.h_0 + row * P;
    const Vec<T> h_prev = resets(a.variant, t, row, a.B) ? Vec<T>{} : load(from + first, n);
    hidden = mix(work.zoneouts.hidden.at(i, panel), h_prev, hidden);
  }
  store(a.output + token * P + first, hidden, n);
  if (i >= schedule.active(next)) return store(a.h_n + row * P + first, hidden, n);  // its last step
  const Vec<T> carried = resets(a.variant, next, row, a.B) ? Vec<T>{} : hidden;
  scatter<kForwardRows>(carried, n, after, i, first, a.B, P);
}

template <class T>
void Forward<T>::run_step(const Work& work, int64_t step) const {
  const int64_t t = schedule.time(step), active = schedule.active(t);
  T *before = hidden_tiles[step % 2], *after = hidden_tiles[(step + 1) % 2];
  T* sums = work.sums + step % work.together * work.panels() * a.B * kGatesWidth<T>;
  for (int64_t p = work.share.begin; p < work.share.end; ++p) {
    T* of_panel = work.row(sums, p, 0, a.B);
    multiply<T, kForwardRows, 4>(active, a.B, a.P, before, panel_weights(p) + a.I * kGatesWidth<T>, of_panel, true);
    for (int64_t i = 0; i < active; ++i) {
      const Unit unit = activate(work, p, i, t, of_panel + i * kGatesWidth<T>);
      emit(work, p, i, t, unit.output_gate * tanh(unit.cell), after);
    }
  }
}

// With layer norm everybody waits for the moments of all panels twice: of the gates, and of the cells.
template <class T>
void Forward<T>::run_normalized_step(const Work& work, int64_t step) const {
  const int64_t t = schedule.time(step), active = schedule.active(t);
  T *before = hidden_tiles[step % 2], *after = hidden_tiles[(step + 1) % 2];
  T* sums = work.sums + step % work.together * work.panels() * a.B * kGatesWidth<T>;
  for (int64_t p = work.share.begin; p < work.share.end; ++p) {
    T* of_panel = work.row(work.products, p, 0, a.B);
    multiply<T, kForwardRows, 4>(active, a.B, a.P, before, panel_weights(p) + a.I * kGatesWidth<T>, of_panel, false);
    for (int64_t i = 0; i < active; ++i) {
      put_gate_moments(of_panel + i * kGatesWidth<T>, units_of<T>(p, a.H), hidden_moments.at(p, i));
    }
  }
  work.share.barrier.wait();
  for (int64_t i = 0; i < active; ++i) normalize_row(work, t, i, sums);
  work.share.barrier.wait();
  for (int64_t i = 0; i < active; ++i) {
    const Moments<T> moments = moments_of_row(cell_moments, i, a.H, 1);
    T* scales = a.scales == nullptr ? nullptr : a.scales + (t * a.B + schedule.row(i)) * 4;
    if (scales != nullptr && work.share.begin == 0) scales[2] = moments.mean, scales[3] = moments.scale;
    for (int64_t p = work.share.begin; p < work.share.end; ++p) {
      const T *unit = work.row(work.products, p, i, a.B), *gain = a.variant.norm_cell + p * kUnits<T>;
      const int64_t n = units_of<T>(p, a.H);
      const Vec<T> normalized = (load(unit + kUnits<T>) - moments.mean) * moments.scale;
      emit(work, p, i, t, load(unit) * tanh(fma(normalized, load(gain, n), load(gain + a.H, n))), after);
    }
  }
}

// Gates and cell of a row whose products with h are finished; output gate and cell take the products' place.
template <class T>
void Forward<T>::normalize_row(const Work& work, int64_t t, int64_t i, T* sums) const {
  const Moments<T> moments = moments_of_row(hidden_moments, i, a.H, 4);
  const int64_t token = t * a.B + schedule.row(i);
  if (a.scales != nullptr && work.share.begin == 0) a.scales[token * 4 + 1] = moments.scale;
  T* saved = a.normalized == nullptr ? nullptr : a.normalized + (a.steps * a.B + token) * 4 * a.H;
  for (int64_t p = work.share.begin; p < work.share.end; ++p) {
    T *row = work.row(work.products, p, i, a.B), *inputs = work.row(sums, p, i, a.B);
    scale_gates(row, moments, a.variant.norm_gates + 4 * a.H, p, a.H, inputs, saved, inputs);
    const Unit unit = activate(work, p, i, t, inputs);
    store(row, unit.output_gate);
    store(row + kUnits<T>, unit.cell);
    const Vec<T> cells[1] = {unit.cell};
    put_moments<T>(cells, units_of<T>(p, a.H), cell_moments.at(p, i));
  }
}

// h = W_hr (o * tanh(c)), the share's panels of h.
template <class T>
void Forward<T>::project(const Work& work, int64_t t, T* after) const {
  const Share share = projected<T>(work.share, a.H, a.P);
  const int64_t active = schedule.active(t);
  for (int64_t p = share.begin; p < share.end; ++p) {
    multiply<T, kForwardRows, 1>(active, a.B, a.H, unprojected_tiles, packed_hr + p * a.H * kUnits<T>, work.projection,
                                 false);
    for (int64_t i = 0; i < active; ++i) emit_hidden(work, p, i, t, load(work.projection + i * kUnits<T>), after);
  }
}

template <class T>
void Forward<T>::run(const Share& share) const {
  const Work mine = work(share);
  for (int64_t step = 0; step < schedule.steps(); ++step) {
    const int64_t left = schedule.steps() - step, steps = left < mine.together ? left : mine.together;
    if (step % mine.together == 0) {
      multiply_inputs(mine, step, steps);
      if (norm()) normalize_inputs(mine, step, steps);
    }
    begin_rows(mine, step, hidden_tiles[step % 2]);
    mine.zoneouts.draw(schedule, a.B, schedule.time(step));
    share.barrier.wait();  // h is complete, and nobody reads the one before any more
    norm() ? run_normalized_step(mine, step) : run_step(mine, step);
    if (!projects()) continue;
    share.barrier.wait();  // o * tanh(c) is complete
    project(mine, schedule.time(step), hidden_tiles[(step + 1) % 2]);
  }
}

// What beyond a row's length nobody writes.
template <class T>
void clear(const LstmForward<T>& a) {
  const int64_t tokens = a.steps * a.B, count = tokens * a.H;
  copy_or_zero<T>(a.output, nullptr, tokens * a.P);
  if (a.cells != nullptr) copy_or_zero<T>(a.cells, nullptr, count);
  if (a.gates != nullptr) copy_or_zero<T>(a.gates, nullptr, 4 * count);
  if (a.normalized != nullptr) copy_or_zero<T>(a.normalized, nullptr, 8 * count);
  if (a.scales != nullptr) copy_or_zero<T>(a.scales, nullptr, 4 * tokens);
}

}  // namespace

}  // namespace llmkern::cpu::LLMKERN_ISA
