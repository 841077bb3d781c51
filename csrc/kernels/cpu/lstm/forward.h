// SPDX-License-Identifier: Apache-2.0
// The steps of one LSTM layer, forward.
#pragma once

#include "kernels/cpu/lstm/layer_norm.h"
#include "kernels/cpu/lstm/steps.h"
#include "kernels/cpu/lstm/zoneout.h"

namespace llmkern::cpu::LLMKERN_ISA {

namespace {

// Rows of the input whose products are made in one go: enough that reading the weights costs less than using them.
constexpr int64_t kInputRows = 48;

// Rows and panels whose gates are computed in one go: the latency of one is hidden by the next.
constexpr int64_t kFinishRows = 16;

// Multiplications and additions worth waking another thread for.
constexpr int64_t kTeamFlops = 1 << 18;

template <class Op>
struct Forward {
  using T = typename Op::Storage;
  using S = Sum<Op>;
  using Handed = typename Op::Handed;
  using Projection = typename Op::Projection;

  const LstmForward<T>& a;
  const Schedule& schedule;
  LayerWeights<Op> weights;
  Handed* hidden[2];                    // [B, P]: h of the step before, and of this step
  const Word<Projection>* packed_hr;    // [panels of P][words of H][kUnits]
  Word<Projection>* unprojected_tiles;  // [B, H]: o * tanh(c) of this step
  S* cell;                              // [B, H]: the running c
  Pairs<S> input_moments, hidden_moments, cell_moments;

  // What a worker keeps, for its panels.
  struct Work {
    const Share& share;
    int64_t together;               // steps whose input products are made at once
    int64_t group;                  // panels whose products with h are made before their gates
    Scratch<Word<Op>> input_tiles;  // [together * B, I] in tiles
    Carved<S, 3> memory;            // of the next three
    S* inputs;      // [panels][together * B][kGatesWidth]: products of the input, rows in the order of steps
    S* products;    // [panels, or a group][B][kGatesWidth]: those of h
    S* projection;  // [B][kUnits]
    Scratch<Moments<S>> moments;  // [B]: of the cells, with layer norm
    Zoneouts<T> zoneouts;

    S* input_row(int64_t panel, int64_t i, int64_t B) const {
      return inputs + ((panel - share.begin) * together * B + i) * kGatesWidth<S>;
    }
    S* row(int64_t panel, int64_t i, int64_t B) const {
      return products + ((panel - share.begin) * B + i) * kGatesWidth<S>;
    }
  };
  // Hidden units that lie side by side, and the sums of both their biases.
  struct Units {
    int64_t panel, first, count;
    Vec<S> bias[4];
  };
  // What the output of a row and panel is made from.
  struct Unit {
    Vec<S> output_gate, cell;
  };

  static int64_t steps_together(int64_t B, int64_t steps) {
    const int64_t most = (kInputRows + B - 1) / B;
    return most < steps ? most : steps;
  }
  bool norm() const { return a.variant.norm_gates != nullptr; }
  bool projects() const { return a.variant.weight_hr != nullptr; }
  // The place of a step's first row among those of the steps together from `first` on.
  int64_t first_row(int64_t first, int64_t step) const {
    const int64_t t = schedule.time(first), at = schedule.time(step);
    return a.reverse ? schedule.first(t + 1) - schedule.first(at + 1) : schedule.first(at) - schedule.first(t);
  }

  // Where a row's scales are saved, if anywhere, and by this worker.
  S* scales_of(const Work& work, int64_t t, int64_t i) const {
    const bool saves = a.scales != nullptr && work.share.begin == 0;
    return saves ? a.scales + (t * a.B + schedule.row(i)) * 4 : nullptr;
  }

  void run(const Share& share) const;
  Work work(const Share& share) const;
  void begin_rows(const Work& work, int64_t step, Handed* to) const;
  void multiply_inputs(const Work& work, int64_t step, int64_t steps) const;
  void normalize_inputs(const Work& work, int64_t step, int64_t steps) const;
  void run_step(const Work& work, int64_t step) const;
  void run_normalized_step(const Work& work, int64_t step) const;
  void normalize_row(const Work& work, int64_t t, int64_t i, int64_t input_row) const;
  void finish_normalized(const Work& work, int64_t panel, int64_t t, Handed* after) const;
  void project(const Work& work, int64_t t, Handed* after) const;
  void fetch(int64_t panel, int64_t t, int64_t i) const;
  Units units(int64_t panel) const;
  Unit activate(const Work& work, const Units& units, int64_t i, int64_t t, const S* sums, const S* more) const;
  void finish(const Work& work, int64_t panel, int64_t t, const S* inputs, const S* products, Handed* after) const;
  void emit(const Work& work, int64_t panel, int64_t t, int64_t i, const Vec<S>* outputs, Handed* after) const;
  void emit_unprojected(int64_t panel, int64_t first, int64_t count, const Vec<S>* outputs) const;
  void emit_hidden(const Work& work, int64_t panel, int64_t t, int64_t first, int64_t count, const Vec<S>* outputs,
                   Handed* after) const;
  Vec<S> zone_out(const Work& work, int64_t panel, int64_t t, int64_t i, Vec<S> h) const;
};

template <class Op>
typename Forward<Op>::Work Forward<Op>::work(const Share& share) const {
  const int64_t together = steps_together(schedule.rows(), schedule.steps()), panels = share.end - share.begin;
  const int64_t group = kFinishRows / schedule.rows() + 1, size = schedule.rows() * kGatesWidth<S>;
  auto tiles = scratch<Word<Op>>(Slot::kLstmInputTiles, Gates<Op>::tile_words(together * schedule.rows(), a.I));
  auto memory = carve<S>(Slot::kLstmProducts,
                         {together * panels * size, (norm() ? panels : group) * size, projects() ? size : 0});
  S *inputs = memory[0], *products = memory[1], *projection = memory[2];
  return {share,
          together,
          group,
          std::move(tiles),
          std::move(memory),
          inputs,
          products,
          projection,
          scratch<Moments<S>>(Slot::kLstmCellMoments, norm() ? schedule.rows() : 0),
          Zoneouts<T>::of(a.variant, schedule.rows(), a.H, a.P, share)};
}

// h_0 of the rows whose first step this is, the share's columns.
template <class Op>
void Forward<Op>::begin_rows(const Work& work, int64_t step, Handed* to) const {
  const Share share = projected<S>(work.share, a.H, a.P);
  const int64_t t = schedule.time(step);
  const T zeros[kUnits<S>] = {};
  for (int64_t i = schedule.active(schedule.time_before(t)); i < schedule.active(t); ++i) {
    const int64_t row = schedule.row(i);
    const bool reset = resets(a.variant, t, row, a.B);
    for (int64_t p = share.begin; p < share.end; ++p) {
      const T* from = reset ? zeros : a.h_0 + row * a.P + p * kUnits<S>;
      Gates<Op>::hand_over(from, units_of<S>(p, a.P), i, p * kUnits<S>, schedule.rows(), a.P, to);
    }
  }
}

// inputs = W_ih x of these steps, the share's panels.
template <class Op>
void Forward<Op>::multiply_inputs(const Work& work, int64_t step, int64_t steps) const {
  const int64_t rows = first_row(step, step + steps - 1) + schedule.active(schedule.time(step + steps - 1));
  for (int64_t s = step; s < step + steps; ++s) {
    const int64_t t = schedule.time(s), first = first_row(step, s);
    for (int64_t i = 0; i < schedule.active(t); ++i) {
      Gates<Op>::fill(a.input + (t * a.B + schedule.row(i)) * a.I, first + i, rows, a.I, work.input_tiles);
    }
  }
  for (int64_t p = work.share.begin; p < work.share.end; ++p) {
    Gates<Op>::multiply(rows, rows, a.I, work.input_tiles, weights.input(p), units_of<S>(p, a.H),
                        work.input_row(p, 0, schedule.rows()), false);
  }
}

// The same products, layer-normalised and with their gains.
template <class Op>
void Forward<Op>::normalize_inputs(const Work& work, int64_t step, int64_t steps) const {
  const int64_t rows = first_row(step, step + steps - 1) + schedule.active(schedule.time(step + steps - 1));
  for (int64_t p = work.share.begin; p < work.share.end; ++p) {
    for (int64_t i = 0; i < rows; ++i) {
      put_gate_moments(work.input_row(p, i, schedule.rows()), units_of<S>(p, a.H), input_moments.at(p, i));
    }
  }
  work.share.barrier.wait();
  for (int64_t s = step; s < step + steps; ++s) {
    const int64_t t = schedule.time(s), first = first_row(step, s);
    for (int64_t i = 0; i < schedule.active(t); ++i) {
      const Moments<S> moments = moments_of_row(input_moments, first + i, a.H, 4);
      const int64_t token = t * a.B + schedule.row(i);
      if (a.scales != nullptr && work.share.begin == 0) a.scales[token * 4] = moments.scale;
      T* saved = a.normalized == nullptr ? nullptr : a.normalized + token * 4 * a.H;
      for (int64_t p = work.share.begin; p < work.share.end; ++p) {
        S* row = work.input_row(p, first + i, schedule.rows());
        scale_gates(row, moments, a.variant.norm_gates, p, a.H, static_cast<const S*>(nullptr), saved, row);
      }
    }
  }
}

// Rows are far apart in memory: where one will write a panel is asked for while others are worked on, by its last unit,
// as the first one's line came with the panel before. Inlined by order: to gcc a function that only prefetches has no
// effect, and a call of it is dropped.
template <class Op>
[[gnu::always_inline]] inline void Forward<Op>::fetch(int64_t panel, int64_t t, int64_t i) const {
  if (i >= schedule.active(t)) return;
  const int64_t last = panel * kUnits<S> + units_of<S>(panel, a.H) - 1, token = t * a.B + schedule.row(i);
  for (int g = 0; g < 4 && a.gates != nullptr; ++g) __builtin_prefetch(a.gates + (token * 4 + g) * a.H + last, 1);
  if (a.cells != nullptr) __builtin_prefetch(a.cells + token * a.H + last, 1);
}

template <class Op>
typename Forward<Op>::Units Forward<Op>::units(int64_t panel) const {
  Units units = {panel, panel * kUnits<S>, units_of<S>(panel, a.H), {}};
  for (int g = 0; g < 4 && a.bias_ih != nullptr; ++g) {
    const int64_t at = g * a.H + units.first;
    units.bias[g] = load_wide(a.bias_ih + at, units.count) + load_wide(a.bias_hh + at, units.count);
  }
  return units;
}

// From the sums of a row and panel  (+ more)  to its gates and cell. Inlined by order: what does not change from row to
// row is then looked at once, and the latency of one row's functions is hidden by the next one's.
template <class Op>
[[gnu::always_inline]] inline typename Forward<Op>::Unit Forward<Op>::activate(const Work& work, const Units& units,
                                                                               int64_t i, int64_t t, const S* sums,
                                                                               const S* more) const {
  const int64_t H = a.H, n = units.count, row = schedule.row(i), token = t * a.B + row;
  Vec<S> gate[4];
#pragma GCC unroll 4
  for (int g = 0; g < 4; ++g) {
    gate[g] = load(sums + g * kUnits<S>);
    if (more != nullptr) gate[g] += load(more + g * kUnits<S>);
    gate[g] += units.bias[g];
    gate[g] = g == 2 ? tanh(gate[g]) : sigmoid(gate[g]);
    if (a.gates != nullptr) store_narrow(a.gates + (token * 4 + g) * H + units.first, gate[g], n);
  }
  S* running = cell + row * H + units.first;
  const Vec<S> before = resets(a.variant, t, row, a.B) ? Vec<S>{} : load(running, n);
  const Vec<S> c = fma(gate[1], before, gate[0] * gate[2]);
  const Vec<S> kept = work.zoneouts.cell.any() ? mix(work.zoneouts.cell.at(i, units.panel), before, c) : c;
  store(running, kept, n);
  if (a.cells != nullptr) store(a.cells + token * H + units.first, kept, n);
  return {gate[3], c};
}

// A panel's part of a step, after its products.
template <class Op>
void Forward<Op>::finish(const Work& work, int64_t panel, int64_t t, const S* inputs, const S* products,
                         Handed* after) const {
  const Units those = units(panel);
  const int64_t active = schedule.active(t);
  Vec<S> outputs[kForwardRows];
  for (int64_t i = 0; i < active; ++i, inputs += kGatesWidth<S>, products += kGatesWidth<S>) {
    fetch(panel, t, i + kFetchAhead);
    const Unit unit = activate(work, those, i, t, inputs, products);
    outputs[i % kForwardRows] = unit.output_gate * tanh(unit.cell);
    emit(work, panel, t, i, outputs, after);
  }
}

// o * tanh(c) of a row and panel is outputs[i % kForwardRows]: with the last row of a tile, all of them go on.
template <class Op>
[[gnu::always_inline]] inline void Forward<Op>::emit(const Work& work, int64_t panel, int64_t t, int64_t i,
                                                     const Vec<S>* outputs, Handed* after) const {
  const int64_t first = i / kForwardRows * kForwardRows, count = i + 1 - first;
  if (count < kForwardRows && i + 1 < schedule.active(t)) return;
  if (projects()) {
    emit_unprojected(panel, first, count, outputs);
  } else {
    emit_hidden(work, panel, t, first, count, outputs, after);
  }
}

template <class Op>
void Forward<Op>::emit_unprojected(int64_t panel, int64_t first, int64_t count, const Vec<S>* outputs) const {
  typename Projection::Storage rows[kForwardRows * kUnits<S>];
  for (int64_t i = 0; i < count; ++i) store_narrow(rows + i * kUnits<S>, outputs[i]);
  const int64_t words = words_of<Projection>(a.H), word = panel * kUnits<S> / Projection::kTerms;
  fill_tile<Projection>(rows, kUnits<S>, units_of<S>(panel, a.H), count,
                        tile_height<kForwardRows>(first, schedule.rows()),
                        in_tiles<kForwardRows>(unprojected_tiles, first, word, schedule.rows(), words));
}

// A panel of h of the rows of one tile: to the output, and to what the next step reads.
template <class Op>
void Forward<Op>::emit_hidden(const Work& work, int64_t panel, int64_t t, int64_t first, int64_t count,
                              const Vec<S>* outputs, Handed* after) const {
  const int64_t P = a.P, column = panel * kUnits<S>, n = units_of<S>(panel, P), next = schedule.time_after(t);
  const int64_t go_on = schedule.active(next) - first;
  T carried[kForwardRows * kUnits<S>];
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = schedule.row(first + i);
    const Vec<S> h = zone_out(work, panel, t, first + i, outputs[i]);
    store_narrow(a.output + (t * a.B + row) * P + column, h, n);
    if (i >= go_on) {
      store_narrow(a.h_n + row * P + column, h, n);  // its last step
    } else {
      store_narrow(carried + i * kUnits<S>, resets(a.variant, next, row, a.B) ? Vec<S>{} : h);
    }
  }
  if (go_on > 0)
    Gates<Op>::hand_over_tile(carried, n, first, go_on < count ? go_on : count, column, schedule.rows(), P, after);
}

// h, or what zoneout keeps of the step before.
template <class Op>
[[gnu::always_inline]] inline Vec<Sum<Op>> Forward<Op>::zone_out(const Work& work, int64_t panel, int64_t t, int64_t i,
                                                                 Vec<S> h) const {
  if (!work.zoneouts.hidden.any()) return h;
  const int64_t before = schedule.time_before(t), row = schedule.row(i);
  const T* from = i < schedule.active(before) ? a.output + (before * a.B + row) * a.P : a.h_0 + row * a.P;
  const bool reset = resets(a.variant, t, row, a.B);
  const Vec<S> kept = reset ? Vec<S>{} : load_wide(from + panel * kUnits<S>, units_of<S>(panel, a.P));
  return mix(work.zoneouts.hidden.at(i, panel), kept, h);
}

template <class Op>
void Forward<Op>::run_step(const Work& work, int64_t step) const {
  const int64_t t = schedule.time(step), active = schedule.active(t), size = schedule.rows() * kGatesWidth<S>;
  const int64_t input_row = first_row(step / work.together * work.together, step);
  const auto tiles = Gates<Op>::tiles(hidden[step % 2], active, a.P);
  for (int64_t first = work.share.begin; first < work.share.end; first += work.group) {
    const int64_t last = first + work.group < work.share.end ? first + work.group : work.share.end;
    for (int64_t p = first; p < last; ++p) {
      Gates<Op>::multiply(active, schedule.rows(), a.P, tiles, weights.hidden(p), units_of<S>(p, a.H),
                          work.products + (p - first) * size, false);
    }
    for (int64_t p = first; p < last; ++p) {
      finish(work, p, t, work.input_row(p, input_row, schedule.rows()), work.products + (p - first) * size,
             hidden[(step + 1) % 2]);
    }
  }
}

// With layer norm everybody waits for the moments of all panels twice: of the gates, and of the cells.
template <class Op>
void Forward<Op>::run_normalized_step(const Work& work, int64_t step) const {
  const int64_t t = schedule.time(step), active = schedule.active(t);
  const int64_t input_row = first_row(step / work.together * work.together, step);
  const auto tiles = Gates<Op>::tiles(hidden[step % 2], active, a.P);
  for (int64_t p = work.share.begin; p < work.share.end; ++p) {
    S* of_panel = work.row(p, 0, schedule.rows());
    Gates<Op>::multiply(active, schedule.rows(), a.P, tiles, weights.hidden(p), units_of<S>(p, a.H), of_panel, false);
    for (int64_t i = 0; i < active; ++i) {
      put_gate_moments(of_panel + i * kGatesWidth<S>, units_of<S>(p, a.H), hidden_moments.at(p, i));
    }
  }
  work.share.barrier.wait();
  for (int64_t i = 0; i < active; ++i) normalize_row(work, t, i, input_row + i);
  work.share.barrier.wait();
  for (int64_t i = 0; i < active; ++i) {
    work.moments[i] = moments_of_row(cell_moments, i, a.H, 1);
    if (S* scales = scales_of(work, t, i)) scales[2] = work.moments[i].mean, scales[3] = work.moments[i].scale;
  }
  for (int64_t p = work.share.begin; p < work.share.end; ++p) finish_normalized(work, p, t, hidden[(step + 1) % 2]);
}

// Gates and cell of a row whose products with h are finished; output gate and cell take the products' place. A row at a
// time: so much is written of it that what follows it in memory is best written next.
template <class Op>
void Forward<Op>::normalize_row(const Work& work, int64_t t, int64_t i, int64_t input_row) const {
  const Moments<S> moments = moments_of_row(hidden_moments, i, a.H, 4);
  const int64_t token = t * a.B + schedule.row(i);
  if (S* scales = scales_of(work, t, i)) scales[1] = moments.scale;
  T* saved = a.normalized == nullptr ? nullptr : a.normalized + (a.steps * a.B + token) * 4 * a.H;
  for (int64_t p = work.share.begin; p < work.share.end; ++p) {
    S *row = work.row(p, i, schedule.rows()), *inputs = work.input_row(p, input_row, schedule.rows());
    scale_gates<T>(row, moments, a.variant.norm_gates + 4 * a.H, p, a.H, inputs, saved, inputs);
    const Unit unit = activate(work, units(p), i, t, inputs, nullptr);
    store(row, unit.output_gate);
    store(row + kUnits<S>, unit.cell);
    const Vec<S> cells[1] = {unit.cell};
    put_moments<S>(cells, units_of<S>(p, a.H), cell_moments.at(p, i));
  }
}

// The rest of a panel's step, once all cells are there.
template <class Op>
void Forward<Op>::finish_normalized(const Work& work, int64_t panel, int64_t t, Handed* after) const {
  const int64_t n = units_of<S>(panel, a.H);
  const T* of_panel = a.variant.norm_cell + panel * kUnits<S>;
  const Vec<S> gain = load_wide(of_panel, n), offset = load_wide(of_panel + a.H, n);
  Vec<S> outputs[kForwardRows];
  for (int64_t i = 0; i < schedule.active(t); ++i) {
    const S* unit = work.row(panel, i, schedule.rows());
    const Vec<S> normalized = (load(unit + kUnits<S>) - work.moments[i].mean) * work.moments[i].scale;
    outputs[i % kForwardRows] = load(unit) * tanh(fma(normalized, gain, offset));
    emit(work, panel, t, i, outputs, after);
  }
}

// h = W_hr (o * tanh(c)), the share's panels of h.
template <class Op>
void Forward<Op>::project(const Work& work, int64_t t, Handed* after) const {
  const Share share = projected<S>(work.share, a.H, a.P);
  const int64_t active = schedule.active(t), words = words_of<Projection>(a.H);
  for (int64_t p = share.begin; p < share.end; ++p) {
    multiply<Projection, kForwardRows, 1>(active, schedule.rows(), words, unprojected_tiles,
                                          PackedPanel<Projection, 1>{packed_hr + p * words * kUnits<S>},
                                          units_of<S>(p, a.P), work.projection, false);
    for (int64_t first = 0; first < active; first += kForwardRows) {
      const int64_t count = active - first < kForwardRows ? active - first : kForwardRows;
      Vec<S> outputs[kForwardRows];
      for (int64_t i = 0; i < count; ++i) outputs[i] = load(work.projection + (first + i) * kUnits<S>);
      emit_hidden(work, p, t, first, count, outputs, after);
    }
  }
}

template <class Op>
void Forward<Op>::run(const Share& share) const {
  const Work mine = work(share);
  for (int64_t step = 0; step < schedule.steps(); ++step) {
    const int64_t left = schedule.steps() - step, steps = left < mine.together ? left : mine.together;
    if (step % mine.together == 0) {
      multiply_inputs(mine, step, steps);
      if (norm()) normalize_inputs(mine, step, steps);
    }
    begin_rows(mine, step, hidden[step % 2]);
    mine.zoneouts.draw(schedule, a.B, schedule.time(step));
    share.barrier.wait();  // h is complete, and nobody reads the one before any more
    norm() ? run_normalized_step(mine, step) : run_step(mine, step);
    if (!projects()) continue;
    share.barrier.wait();  // o * tanh(c) is complete
    project(mine, schedule.time(step), hidden[(step + 1) % 2]);
  }
}

// Zeroes everything beyond a row's length.
template <class T>
void clear(const LstmForward<T>& a) {
  const int64_t tokens = a.steps * a.B, count = tokens * a.H;
  copy_or_zero<T>(a.output, nullptr, tokens * a.P);
  if (a.cells != nullptr) copy_or_zero<Widened<T>>(a.cells, nullptr, count);
  if (a.gates != nullptr) copy_or_zero<T>(a.gates, nullptr, 4 * count);
  if (a.normalized != nullptr) copy_or_zero<T>(a.normalized, nullptr, 8 * count);
  if (a.scales != nullptr) copy_or_zero<Widened<T>>(a.scales, nullptr, 4 * tokens);
}

}  // namespace

}  // namespace llmkern::cpu::LLMKERN_ISA
