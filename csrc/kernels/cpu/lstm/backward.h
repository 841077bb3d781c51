// SPDX-License-Identifier: Apache-2.0
// The steps of one LSTM layer, backward.
#pragma once

#include "kernels/cpu/lstm/layer_norm.h"
#include "kernels/cpu/lstm/steps.h"
#include "kernels/cpu/lstm/zoneout.h"

namespace llmkern::cpu::LLMKERN_ISA {

namespace {

// What a backward pass works with beside its arguments: the gates, saved or computed again, and what it leaves for the
// products over all steps. Tokens are numbered as by the schedule.
template <class T>
struct BackwardState {
  const T* gates;            // [T, B, 4H], or [tokens, 4H] if they were computed again
  const T* normalized;       // [2, T, B, 4H] or [2, tokens, 4H]
  const Widened<T>* scales;  // [T, B, 4] or [tokens, 4]
  bool by_token;             // computed again
  T* grad_gates;             // [tokens, 4H]: da; may be `gates` itself, if by_token
  T* grad_hidden;            // [tokens, 4H]: the gradient of W_hh h_{t-1}, with layer norm
  T* unprojected;            // [tokens, H]: o * tanh(c), with a projection
  T* grad_projected;         // [tokens, P]: the gradient of W_hr (o * tanh(c))

  int64_t saved_row(const Schedule& schedule, int64_t B, int64_t t, int64_t i) const {
    return by_token ? schedule.token(t, i) : t * B + schedule.row(i);
  }
};

template <class Op>
struct Backward {
  using T = typename Op::Storage;
  using S = Sum<Op>;

  const LstmBackward<T>& a;
  const Schedule& schedule;
  const BackwardState<T>& state;
  Word<Op>* recurrent;    // [panels of P][words of 4 gates][kUnits]: the packed recurrent weights, or null: in place
  Word<Op>* packed_hr;    // [panels][words of P][kUnits]
  Word<Op>* da_tiles[2];  // [B, 4H] in tiles: the gradient of W_hh h of the step before, and of this step
  Word<Op>* dh_tiles;     // [B, P] in tiles: that of W_hr (o * tanh(c)) of this step
  S *grad_h, *grad_c;     // [B, P], [B, H]: the running dh and dc
  Pairs<S> cell_products, gate_products;
  double* norm_cell;  // [2, H]: gradients of gain and bias of the cell's layer norm

  // What a worker keeps, for its panels.
  struct Work {
    const Share& share;
    Carved<S, 3> memory;  // of the next three
    S* dh;                // [B][kUnits]: of one panel
    S* hidden;          // [panels][B][kUnits]: the gradient of o * tanh(c); with layer norm, then that of normalised c
    S* gates;           // [panels][B][kGatesWidth]: da, with layer norm
    Scratch<T> handed;  // [panels, or one][B][kGatesWidth]: the gradient of W_hh h, until all rows have it
    int64_t handed_panel;  // from one panel of it to the next: 0 if there is but one
    Zoneouts<T> zoneouts;

    S* hidden_row(int64_t panel, int64_t i, int64_t B) const {
      return hidden + ((panel - share.begin) * B + i) * kUnits<S>;
    }
    S* gates_row(int64_t panel, int64_t i, int64_t B) const {
      return gates + ((panel - share.begin) * B + i) * kGatesWidth<S>;
    }
    T* handed_row(int64_t panel, int64_t i) const {
      return handed + (panel - share.begin) * handed_panel + i * kGatesWidth<S>;
    }
  };
  struct Token {
    int64_t t, i, row, saved;  // `saved`: its row of gates, normalized and scales
  };
  // Gradients of a panel of one token on their way from h to the gates.
  struct Unit {
    Vec<S> dc, da_output;
  };

  int64_t gate_words() const { return words_of<Op>(a.H); }
  int64_t panel_words() const { return backward_panel_words<Op>(a.H); }
  ColumnsInPlace<Op> recurrent_in_place(int64_t panel) const {
    return {a.weight_hh, a.P, a.H, panel, scratch<Word<Op>>(Slot::kLstmColumnsInPlace, kBlockWords<Op, 1> * kUnits<S>)};
  }
  int64_t projection_words() const { return words_of<Op>(a.P) * kUnits<S>; }
  bool norm() const { return a.variant.norm_gates != nullptr; }
  bool projects() const { return a.variant.weight_hr != nullptr; }
  Token token(int64_t t, int64_t i) const { return {t, i, schedule.row(i), state.saved_row(schedule, a.B, t, i)}; }
  Vec<S> gate(const Token& at, int g, int64_t panel) const {
    return load_wide(state.gates + (at.saved * 4 + g) * a.H + panel * kUnits<S>, units_of<S>(panel, a.H));
  }
  Vec<S> normalized(const Token& at, int which, int g, int64_t panel) const {
    const int64_t rows = state.by_token ? schedule.tokens() : a.steps * a.B;
    return load_wide(state.normalized + ((which * rows + at.saved) * 4 + g) * a.H + panel * kUnits<S>,
                     units_of<S>(panel, a.H));
  }

  void run(const Share& share) const;
  Work work(const Share& share) const;
  void pack(const Share& share) const;
  void carry(const Work& work, int64_t panel, int64_t t, const Word<Op>* above) const;
  Vec<S> hidden_gradient(const Work& work, const Token& at, int64_t panel) const;
  void project(const Work& work, int64_t panel, int64_t t) const;
  void unproject(const Work& work, int64_t t) const;
  void finish(const Work& work, int64_t panel, int64_t t, Word<Op>* after) const;
  void run_normalized_step(const Work& work, int64_t t, Word<Op>* after) const;
  void normalized_cell(const Work& work, int64_t panel, const Token& at, Vec<S> (&gains)[2]) const;
  Vec<S> previous_cell(const Token& at, int64_t panel) const;
  Vec<S> new_cell(const Token& at, int64_t panel, Vec<S> before) const;
  Unit output_gradient(const Token& at, int64_t panel, Vec<S> hidden) const;
  void gate_gradients(const Work& work, const Token& at, int64_t panel, const Unit& unit, Vec<S> (&da)[4]) const;
  void hand_down(int64_t panel, int64_t first, int64_t count, const T* rows, Word<Op>* after) const;
  void fetch(int64_t panel, int64_t t, int64_t i) const;
};

template <class Op>
typename Backward<Op>::Work Backward<Op>::work(const Share& share) const {
  const int64_t size = (share.end - share.begin) * schedule.rows() * kUnits<S>;
  const int64_t of_gates = norm() ? 4 * size : 0, of_panel = schedule.rows() * kGatesWidth<S>;
  auto memory = carve<S>(Slot::kLstmGradStep, {round_up(schedule.rows(), kBackwardRows) * kUnits<S>, size, of_gates});
  S *dh = memory[0], *hidden = memory[1], *gates = memory[2];
  return {share,
          std::move(memory),
          dh,
          hidden,
          gates,
          scratch<T>(Slot::kLstmHanded, norm() ? of_gates : of_panel),
          norm() ? of_panel : 0,
          Zoneouts<T>::of(a.variant, schedule.rows(), a.H, a.P, share)};
}

template <class Op>
void Backward<Op>::pack(const Share& share) const {
  const Share mine = projected<S>(share, a.H, a.P);
  for (int64_t p = mine.begin; recurrent != nullptr && p < mine.end; ++p) {
    recurrent_in_place(p).copy(0, 4 * gate_words(), recurrent + p * panel_words());
  }
  for (int64_t p = share.begin; projects() && p < share.end; ++p) {
    pack_columns<Op>(a.variant.weight_hr, a.H, a.P, p, 0, words_of<Op>(a.P), packed_hr + p * projection_words());
  }
}

// dh = da W_hh of the step before t, for the rows that ran at t.
template <class Op>
void Backward<Op>::carry(const Work& work, int64_t panel, int64_t t, const Word<Op>* above) const {
  const int64_t active = schedule.active(t), n = units_of<S>(panel, a.P);
  const auto by = [&](const auto& weights) {
    multiply<Op, kBackwardRows, 1>(active, schedule.rows(), 4 * gate_words(), above, weights, n, work.dh, false);
  };
  if (recurrent != nullptr) {
    by(PackedPanel<Op, 1>{recurrent + panel * panel_words()});
  } else {
    by(recurrent_in_place(panel));
  }
  for (int64_t i = 0; i < active; ++i) {
    const int64_t row = schedule.row(i);
    S* running = grad_h + row * a.P + panel * kUnits<S>;
    Vec<S> dh = load(work.dh + i * kUnits<S>);
    if (work.zoneouts.hidden.any()) dh += load(running, n);
    if (resets(a.variant, t, row, a.B)) dh = Vec<S>{};
    store(running, dh, n);
  }
}

// The gradient of h before zoneout; what zoneout hands past the step stays in the running dh.
template <class Op>
[[gnu::always_inline]] inline Vec<Sum<Op>> Backward<Op>::hidden_gradient(const Work& work, const Token& at,
                                                                         int64_t panel) const {
  const int64_t first = panel * kUnits<S>, n = units_of<S>(panel, a.P);
  S* running = grad_h + at.row * a.P + first;
  Vec<S> dh = load(running, n);
  if (a.grad_output != nullptr) dh += load_wide(a.grad_output + (at.t * a.B + at.row) * a.P + first, n);
  if (!work.zoneouts.hidden.any()) return dh;
  const Vec<S> z = work.zoneouts.hidden.at(at.i, panel);
  store(running, z * dh, n);
  return (1 - z) * dh;
}

// The gradient of a panel of W_hr (o * tanh(c)).
template <class Op>
void Backward<Op>::project(const Work& work, int64_t panel, int64_t t) const {
  const int64_t first = panel * kUnits<S>, n = units_of<S>(panel, a.P);
  for (int64_t i = 0; i < schedule.active(t); ++i) {
    const Vec<S> dh = hidden_gradient(work, token(t, i), panel);
    store_narrow(state.grad_projected + schedule.token(t, i) * a.P + first, dh, n);
    scatter<Op, kBackwardRows>(dh, n, dh_tiles, i, first / Op::kTerms, schedule.rows(), words_of<Op>(a.P));
  }
}

// From the gradient of h = W_hr r to that of r = o * tanh(c).
template <class Op>
void Backward<Op>::unproject(const Work& work, int64_t t) const {
  for (int64_t p = work.share.begin; p < work.share.end; ++p) {
    multiply<Op, kBackwardRows, 1>(schedule.active(t), schedule.rows(), words_of<Op>(a.P), dh_tiles,
                                   PackedPanel<Op, 1>{packed_hr + p * projection_words()}, units_of<S>(p, a.H),
                                   work.hidden_row(p, 0, schedule.rows()), false);
  }
}

template <class Op>
[[gnu::always_inline]] inline Vec<Sum<Op>> Backward<Op>::previous_cell(const Token& at, int64_t panel) const {
  const int64_t before = schedule.time_before(at.t), unit = panel * kUnits<S>;
  if (resets(a.variant, at.t, at.row, a.B)) return Vec<S>{};
  if (at.i >= schedule.active(before)) return load_wide(a.c_0 + at.row * a.H + unit, units_of<S>(panel, a.H));
  return load(a.cells + (before * a.B + at.row) * a.H + unit, units_of<S>(panel, a.H));
}

// The cell before zoneout.
template <class Op>
[[gnu::always_inline]] inline Vec<Sum<Op>> Backward<Op>::new_cell(const Token& at, int64_t panel, Vec<S> before) const {
  if (a.variant.zoneout_c > 0) return fma(gate(at, 1, panel), before, gate(at, 0, panel) * gate(at, 2, panel));
  return load(a.cells + (at.t * a.B + at.row) * a.H + panel * kUnits<S>, units_of<S>(panel, a.H));
}

// From the gradient of o * tanh(c) to what it gives to c and to the output gate before activation.
template <class Op>
[[gnu::always_inline]] inline typename Backward<Op>::Unit Backward<Op>::output_gradient(const Token& at, int64_t panel,
                                                                                        Vec<S> hidden) const {
  const Vec<S> o = gate(at, 3, panel), tanh_c = tanh(new_cell(at, panel, previous_cell(at, panel)));
  if (projects()) {
    store_narrow(state.unprojected + schedule.token(at.t, at.i) * a.H + panel * kUnits<S>, o * tanh_c,
                 units_of<S>(panel, a.H));
  }
  return {hidden * o * (1 - tanh_c * tanh_c), hidden * tanh_c * o * (1 - o)};
}

// da of all four gates, and dc of the step before.
template <class Op>
[[gnu::always_inline]] inline void Backward<Op>::gate_gradients(const Work& work, const Token& at, int64_t panel,
                                                                const Unit& unit, Vec<S> (&da)[4]) const {
  const int64_t H = a.H, first = panel * kUnits<S>, n = units_of<S>(panel, H), token = at.t * a.B + at.row;
  const Vec<S> i = gate(at, 0, panel), f = gate(at, 1, panel), g = gate(at, 2, panel),
               before = previous_cell(at, panel);
  S* running = grad_c + at.row * H + first;
  Vec<S> kept = load(running, n), past = {};
  if (a.grad_cells != nullptr) kept += load(a.grad_cells + token * H + first, n);
  if (work.zoneouts.cell.any()) {
    const Vec<S> z = work.zoneouts.cell.at(at.i, panel);
    past = z * kept;
    kept = (1 - z) * kept;
  }
  const Vec<S> dc = kept + unit.dc;
  da[0] = dc * g * i * (1 - i);
  da[1] = dc * before * f * (1 - f);
  da[2] = dc * i * (1 - g * g);
  da[3] = unit.da_output;
  store(running, resets(a.variant, at.t, at.row, a.B) ? Vec<S>{} : fma(dc, f, past), n);
  T* to = state.grad_gates + schedule.token(at.t, at.i) * 4 * H + first;
  for (int j = 0; j < 4; ++j) store_narrow(to + j * H, da[j], n);
}

// The gradient of W_hh h of a panel, the rows of one tile, into the tiles of the step before.
template <class Op>
void Backward<Op>::hand_down(int64_t panel, int64_t first, int64_t count, const T* rows, Word<Op>* after) const {
  const int64_t height = tile_height<kBackwardRows>(first, schedule.rows()), n = units_of<S>(panel, a.H);
  for (int j = 0; j < 4; ++j) {
    const int64_t word = j * gate_words() + panel * kUnits<S> / Op::kTerms;
    fill_tile<Op>(rows + j * kUnits<S>, kGatesWidth<S>, n, count, height,
                  in_tiles<kBackwardRows>(after, first, word, schedule.rows(), 4 * gate_words()));
  }
}

// Rows are far apart in memory: what one will read of a panel is asked for while others are worked on, by its last
// unit, as the first one's line came with the panel before. Inlined by order: to gcc a function that only prefetches
// has no effect, and a call of it is dropped.
template <class Op>
[[gnu::always_inline]] inline void Backward<Op>::fetch(int64_t panel, int64_t t, int64_t i) const {
  if (i >= schedule.active(t)) return;
  const int64_t last = panel * kUnits<S> + units_of<S>(panel, a.H) - 1, before = schedule.time_before(t);
  const Token at = token(t, i);
  if (a.grad_output != nullptr) __builtin_prefetch(a.grad_output + (t * a.B + at.row) * a.P + last);
  for (int g = 0; g < 4; ++g) __builtin_prefetch(state.gates + (at.saved * 4 + g) * a.H + last);
  __builtin_prefetch(a.cells + (t * a.B + at.row) * a.H + last);
  if (i < schedule.active(before)) __builtin_prefetch(a.cells + (before * a.B + at.row) * a.H + last);
}

// A panel's part of a step, after the product that makes dh.
template <class Op>
void Backward<Op>::finish(const Work& work, int64_t panel, int64_t t, Word<Op>* after) const {
  const int64_t active = schedule.active(t);
  for (int64_t first = 0; first < active; first += kBackwardRows) {
    const int64_t count = active - first < kBackwardRows ? active - first : kBackwardRows;
    T handed[kBackwardRows * kGatesWidth<S>];
    for (int64_t i = first; i < first + count; ++i) {
      fetch(panel, t, i + kFetchAhead);
      const Token at = token(t, i);
      const Vec<S> hidden =
          projects() ? load(work.hidden_row(panel, i, schedule.rows())) : hidden_gradient(work, at, panel);
      Vec<S> da[4];
      gate_gradients(work, at, panel, output_gradient(at, panel, hidden), da);
      for (int j = 0; j < 4; ++j) store_narrow(handed + (i - first) * kGatesWidth<S> + j * kUnits<S>, da[j]);
    }
    hand_down(panel, first, count, handed, after);
  }
}

// The gradient of the normalised cell takes the place of that of o * tanh(...); da of the output gate goes to its own.
template <class Op>
[[gnu::always_inline]] inline void Backward<Op>::normalized_cell(const Work& work, int64_t panel, const Token& at,
                                                                 Vec<S> (&gains)[2]) const {
  const int64_t first = panel * kUnits<S>, n = units_of<S>(panel, a.H);
  const S* scales = state.scales + at.saved * 4;
  const Vec<S> o = gate(at, 3, panel), gain = load_wide(a.variant.norm_cell + first, n);
  const Vec<S> x[1] = {(new_cell(at, panel, previous_cell(at, panel)) - scales[2]) * scales[3]};
  const Vec<S> tanh_y = tanh(fma(x[0], gain, load_wide(a.variant.norm_cell + a.H + first, n)));
  const Vec<S> hidden = load(work.hidden_row(panel, at.i, schedule.rows())), dy = hidden * o * (1 - tanh_y * tanh_y);
  const Vec<S> dx[1] = {dy * gain};
  if (projects()) store_narrow(state.unprojected + schedule.token(at.t, at.i) * a.H + first, o * tanh_y, n);
  store(work.hidden_row(panel, at.i, schedule.rows()), dx[0]);
  store(work.gates_row(panel, at.i, schedule.rows()) + 3 * kUnits<S>, hidden * tanh_y * o * (1 - o));
  put_products<S>(dx, x, n, cell_products.at(panel, at.i));
  gains[0] += dy * x[0];
  gains[1] += dy;
}

// With layer norm everybody waits for the sums of all panels twice: of the cells, and of the gates.
template <class Op>
void Backward<Op>::run_normalized_step(const Work& work, int64_t t, Word<Op>* after) const {
  const int64_t active = schedule.active(t);
  for (int64_t p = work.share.begin; p < work.share.end; ++p) {
    Vec<S> gains[2] = {};
    for (int64_t i = 0; i < active; ++i) {
      fetch(p, t, i + kFetchAhead);
      const Token at = token(t, i);
      if (!projects()) store(work.hidden_row(p, i, schedule.rows()), hidden_gradient(work, at, p));
      normalized_cell(work, p, at, gains);
    }
    for (int64_t u = 0; u < units_of<S>(p, a.H); ++u) {
      for (int k = 0; k < 2; ++k) norm_cell[k * a.H + p * kUnits<S> + u] += static_cast<double>(gains[k][u]);
    }
  }
  work.share.barrier.wait();
  for (int64_t i = 0; i < active; ++i) {
    const Token at = token(t, i);
    const S* scales = state.scales + at.saved * 4;
    const NormGradient<S> cell = norm_gradient_of_row(cell_products, i, a.H, 1, scales[3]);
    for (int64_t p = work.share.begin; p < work.share.end; ++p) {
      const int64_t first = p * kUnits<S>, n = units_of<S>(p, a.H);
      const Vec<S> x = (new_cell(at, p, previous_cell(at, p)) - scales[2]) * scales[3];
      S* gates = work.gates_row(p, i, schedule.rows());
      Vec<S> da[4], normal[4];
      gate_gradients(work, at, p,
                     {cell.of(load(work.hidden_row(p, i, schedule.rows())), x), load(gates + 3 * kUnits<S>)}, da);
      for (int g = 0; g < 4; ++g) {
        da[g] *= load_wide(a.variant.norm_gates + (4 + g) * a.H + first, n);
        normal[g] = normalized(at, 1, g, p);
        store(gates + g * kUnits<S>, da[g]);
      }
      put_products<S>(da, normal, n, gate_products.at(p, i));
    }
  }
  work.share.barrier.wait();
  for (int64_t i = 0; i < active; ++i) {
    const Token at = token(t, i);
    const NormGradient<S> row = norm_gradient_of_row(gate_products, i, a.H, 4, state.scales[at.saved * 4 + 1]);
    for (int64_t p = work.share.begin; p < work.share.end; ++p) {
      const S* gates = work.gates_row(p, i, schedule.rows());
      T* to = state.grad_hidden + schedule.token(t, i) * 4 * a.H + p * kUnits<S>;
      for (int g = 0; g < 4; ++g) {
        const Vec<S> da = row.of(load(gates + g * kUnits<S>), normalized(at, 1, g, p));
        store_narrow(to + g * a.H, da, units_of<S>(p, a.H));
        store_narrow(work.handed_row(p, i) + g * kUnits<S>, da);
      }
    }
  }
  for (int64_t p = work.share.begin; p < work.share.end; ++p) {
    for (int64_t first = 0; first < active; first += kBackwardRows) {
      const int64_t count = active - first < kBackwardRows ? active - first : kBackwardRows;
      hand_down(p, first, count, work.handed_row(p, first), after);
    }
  }
}

template <class Op>
void Backward<Op>::run(const Share& share) const {
  const Work mine = work(share);
  const Share outputs = projected<S>(share, a.H, a.P);
  pack(share);
  for (int64_t s = schedule.steps(); s >= 0; --s) {  // s = steps: nothing above the last step; s = 0: only dh of h_0
    share.barrier.wait();                            // da is complete, and nobody reads the one before any more
    const int64_t t = s > 0 ? schedule.time(s - 1) : -1;
    if (s > 0) mine.zoneouts.draw(schedule, a.B, t);
    for (int64_t p = outputs.begin; p < outputs.end; ++p) {
      if (s < schedule.steps()) carry(mine, p, schedule.time(s), da_tiles[s % 2]);
      if (s > 0 && projects()) project(mine, p, t);
      if (s > 0 && !norm() && !projects()) finish(mine, p, t, da_tiles[(s + 1) % 2]);
    }
    if (s == 0) break;
    if (projects()) {
      share.barrier.wait();  // dh is complete
      unproject(mine, t);
    }
    if (norm()) run_normalized_step(mine, t, da_tiles[(s + 1) % 2]);
    for (int64_t p = share.begin; p < share.end && projects() && !norm(); ++p)
      finish(mine, p, t, da_tiles[(s + 1) % 2]);
  }
}

}  // namespace

}  // namespace llmkern::cpu::LLMKERN_ISA
