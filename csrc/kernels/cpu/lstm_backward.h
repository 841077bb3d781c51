// SPDX-License-Identifier: Apache-2.0
// The steps of one LSTM layer, backward.
#pragma once

#include "kernels/cpu/lstm_forward.h"

namespace llmkern::cpu::LLMKERN_ISA {

namespace {

// What a backward pass works with beside its arguments: the gates, saved or computed again, and what it leaves for the
// products over all steps. Tokens are rows [first(t) + i] of the schedule.
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
    return by_token ? schedule.first(t) + i : t * B + schedule.row(i);
  }
};

template <class T>
struct Backward {
  const LstmBackward<T>& a;
  const Schedule& schedule;
  const BackwardState<T>& state;
  T* packed;       // [panels of P][4H][kUnits]: the recurrent weights
  T* packed_hr;    // [panels][P][kUnits]
  T* da_tiles[2];  // [B, 4H] in tiles: the gradient of W_hh h of the step before, and of this step
  T* dh_tiles;     // [B, P] in tiles: that of W_hr (o * tanh(c)) of this step
  Pairs<T> cell_products, gate_products;
  double* norm_cell;  // [2, H]: gradients of gain and bias of the cell's layer norm

  // What a worker keeps, for its panels.
  struct Work {
    const Share& share;
    T* dh;      // [B][kUnits]: of one panel
    T* hidden;  // [panels][B][kUnits]: the gradient of o * tanh(c); with layer norm, then that of normalised c
    T* gates;   // [panels][B][kGatesWidth]: da, with layer norm
    Zoneouts<T> zoneouts;

    T* hidden_row(int64_t panel, int64_t i, int64_t B) const {
      return hidden + ((panel - share.begin) * B + i) * kUnits<T>;
    }
    T* gates_row(int64_t panel, int64_t i, int64_t B) const {
      return gates + ((panel - share.begin) * B + i) * kGatesWidth<T>;
    }
  };
  struct Token {
    int64_t t, i, row, saved;  // `saved`: its row of gates, normalized and scales
  };
  // Gradients of a panel of one token on their way from h to the gates.
  struct Unit {
    Vec<T> dc, da_output;
  };

  bool norm() const { return a.variant.norm_gates != nullptr; }
  bool projects() const { return a.variant.weight_hr != nullptr; }
  Token token(int64_t t, int64_t i) const { return {t, i, schedule.row(i), state.saved_row(schedule, a.B, t, i)}; }
  Vec<T> gate(const Token& at, int g, int64_t panel) const {
    return load(state.gates + (at.saved * 4 + g) * a.H + panel * kUnits<T>, units_of<T>(panel, a.H));
  }
  Vec<T> normalized(const Token& at, int which, int g, int64_t panel) const {
    const int64_t rows = state.by_token ? schedule.tokens() : a.steps * a.B;
    return load(state.normalized + ((which * rows + at.saved) * 4 + g) * a.H + panel * kUnits<T>,
                units_of<T>(panel, a.H));
  }

  void run(const Share& share) const;
  Work work(const Share& share) const;
  void pack(const Share& share) const;
  void carry(const Work& work, int64_t panel, int64_t t, const T* above) const;
  void hidden_gradient(const Work& work, int64_t panel, int64_t t) const;
  void unproject(const Work& work, int64_t t) const;
  void run_step(const Work& work, int64_t t, T* after) const;
  void run_normalized_step(const Work& work, int64_t t, T* after) const;
  void normalized_cell(const Work& work, int64_t panel, const Token& at, double* gains) const;
  Vec<T> previous_cell(const Token& at, int64_t panel) const;
  Vec<T> new_cell(const Token& at, int64_t panel, Vec<T> before) const;
  Unit output_gradient(const Token& at, int64_t panel, Vec<T> hidden) const;
  void gate_gradients(const Work& work, const Token& at, int64_t panel, const Unit& unit, Vec<T> (&da)[4]) const;
  void hand_down(const Token& at, int64_t panel, const Vec<T> (&da)[4], T* after) const;
};

template <class T>
typename Backward<T>::Work Backward<T>::work(const Share& share) const {
  const int64_t size = (share.end - share.begin) * a.B * kUnits<T>;
  const auto [dh, hidden, gates] =
      carve<T>(Slot::kPackedA, {round_up(a.B, kBackwardRows) * kUnits<T>, size, norm() ? 4 * size : 0});
  return {share, dh, hidden, gates, Zoneouts<T>::of(a.variant, a.B, a.H, a.P, share)};
}

template <class T>
void Backward<T>::pack(const Share& share) const {
  const Share mine = projected<T>(share, a.H, a.P);
  for (int64_t p = mine.begin; p < mine.end; ++p) {
    pack_columns_of_panel(a.weight_hh, a.P, 4 * a.H, p, packed + p * 4 * a.H * kUnits<T>);
  }
  for (int64_t p = share.begin; projects() && p < share.end; ++p) {
    pack_columns_of_panel(a.variant.weight_hr, a.H, a.P, p, packed_hr + p * a.P * kUnits<T>);
  }
}

// dh = da W_hh of the step before t, for the rows that ran at t: grad_h_0 is the running dh.
template <class T>
void Backward<T>::carry(const Work& work, int64_t panel, int64_t t, const T* above) const {
  const int64_t active = schedule.active(t), n = units_of<T>(panel, a.P);
  multiply<T, kBackwardRows, 1>(active, a.B, 4 * a.H, above, packed + panel * 4 * a.H * kUnits<T>, work.dh, false);
  for (int64_t i = 0; i < active; ++i) {
    const int64_t row = schedule.row(i);
    T* running = a.grad_h_0 + row * a.P + panel * kUnits<T>;
    Vec<T> dh = load(work.dh + i * kUnits<T>);
    if (work.zoneouts.hidden.any()) dh += load(running, n);
    if (resets(a.variant, t, row, a.B)) dh = Vec<T>{};
    store(running, dh, n);
  }
}

// The gradient of h before zoneout; what zoneout hands past the step stays in the running dh.
template <class T>
void Backward<T>::hidden_gradient(const Work& work, int64_t panel, int64_t t) const {
  const int64_t first = panel * kUnits<T>, n = units_of<T>(panel, a.P);
  for (int64_t i = 0; i < schedule.active(t); ++i) {
    const int64_t row = schedule.row(i), token = t * a.B + row;
    T* running = a.grad_h_0 + row * a.P + first;
    Vec<T> dh = load(running, n);
    if (a.grad_output != nullptr) dh += load(a.grad_output + token * a.P + first, n);
    if (work.zoneouts.hidden.any()) {
      const Vec<T> z = work.zoneouts.hidden.at(i, panel);
      store(running, z * dh, n);
      dh = (1 - z) * dh;
    }
    if (projects()) {
      store(state.grad_projected + (schedule.first(t) + i) * a.P + first, dh, n);
      scatter<kBackwardRows>(dh, n, dh_tiles, i, first, a.B, a.P);
    } else {
      store(work.hidden_row(panel, i, a.B), dh);
    }
  }
}

// From the gradient of h = W_hr r to that of r = o * tanh(c).
template <class T>
void Backward<T>::unproject(const Work& work, int64_t t) const {
  for (int64_t p = work.share.begin; p < work.share.end; ++p) {
    multiply<T, kBackwardRows, 1>(schedule.active(t), a.B, a.P, dh_tiles, packed_hr + p * a.P * kUnits<T>,
                                  work.hidden_row(p, 0, a.B), false);
  }
}

template <class T>
Vec<T> Backward<T>::previous_cell(const Token& at, int64_t panel) const {
  const int64_t before = schedule.time_before(at.t), unit = panel * kUnits<T>;
  if (resets(a.variant, at.t, at.row, a.B)) return Vec<T>{};
  if (at.i >= schedule.active(before)) return load(a.c_0 + at.row * a.H + unit, units_of<T>(panel, a.H));
  return load(a.cells + (before * a.B + at.row) * a.H + unit, units_of<T>(panel, a.H));
}

// The cell before zoneout.
template <class T>
Vec<T> Backward<T>::new_cell(const Token& at, int64_t panel, Vec<T> before) const {
  if (a.variant.zoneout_c > 0) return fma(gate(at, 1, panel), before, gate(at, 0, panel) * gate(at, 2, panel));
  return load(a.cells + (at.t * a.B + at.row) * a.H + panel * kUnits<T>, units_of<T>(panel, a.H));
}

// From the gradient of o * tanh(c) to what it gives to c and to the output gate before activation.
template <class T>
typename Backward<T>::Unit Backward<T>::output_gradient(const Token& at, int64_t panel, Vec<T> hidden) const {
  const Vec<T> o = gate(at, 3, panel), tanh_c = tanh(new_cell(at, panel, previous_cell(at, panel)));
  if (projects()) {
    store(state.unprojected + (schedule.first(at.t) + at.i) * a.H + panel * kUnits<T>, o * tanh_c,
          units_of<T>(panel, a.H));
  }
  return {hidden * o * (1 - tanh_c * tanh_c), hidden * tanh_c * o * (1 - o)};
}

// da of all four gates, and dc of the step before: grad_c_0 is the running dc.
template <class T>
void Backward<T>::gate_gradients(const Work& work, const Token& at, int64_t panel, const Unit& unit,
                                 Vec<T> (&da)[4]) const {
  const int64_t H = a.H, first = panel * kUnits<T>, n = units_of<T>(panel, H), token = at.t * a.B + at.row;
  const Vec<T> i = gate(at, 0, panel), f = gate(at, 1, panel), g = gate(at, 2, panel),
               before = previous_cell(at, panel);
  T* running = a.grad_c_0 + at.row * H + first;
  Vec<T> kept = load(running, n), past = {};
  if (a.grad_cells != nullptr) kept += load(a.grad_cells + token * H + first, n);
  if (work.zoneouts.cell.any()) {
    const Vec<T> z = work.zoneouts.cell.at(at.i, panel);
    past = z * kept;
    kept = (1 - z) * kept;
  }
  const Vec<T> dc = kept + unit.dc;
  da[0] = dc * g * i * (1 - i);
  da[1] = dc * before * f * (1 - f);
  da[2] = dc * i * (1 - g * g);
  da[3] = unit.da_output;
  store(running, resets(a.variant, at.t, at.row, a.B) ? Vec<T>{} : fma(dc, f, past), n);
  T* to = state.grad_gates + (schedule.first(at.t) + at.i) * 4 * H + first;
  for (int j = 0; j < 4; ++j) store(to + j * H, da[j], n);
}

// The gradient of W_hh h, into the tiles of the step before.
template <class T>
void Backward<T>::hand_down(const Token& at, int64_t panel, const Vec<T> (&da)[4], T* after) const {
  for (int j = 0; j < 4; ++j) {
    scatter<kBackwardRows>(da[j], units_of<T>(panel, a.H), after, at.i, j * a.H + panel * kUnits<T>, a.B, 4 * a.H);
  }
}

template <class T>
void Backward<T>::run_step(const Work& work, int64_t t, T* after) const {
  for (int64_t p = work.share.begin; p < work.share.end; ++p) {
    for (int64_t i = 0; i < schedule.active(t); ++i) {
      const Token at = token(t, i);
      Vec<T> da[4];
      gate_gradients(work, at, p, output_gradient(at, p, load(work.hidden_row(p, i, a.B))), da);
      hand_down(at, p, da, after);
    }
  }
}

// The gradient of the normalised cell takes the place of that of o * tanh(...); da of the output gate goes to its own.
template <class T>
void Backward<T>::normalized_cell(const Work& work, int64_t panel, const Token& at, double* gains) const {
  const int64_t first = panel * kUnits<T>, n = units_of<T>(panel, a.H);
  const Widened<T>* scales = state.scales + at.saved * 4;
  const Vec<T> o = gate(at, 3, panel), gain = load(a.variant.norm_cell + first, n);
  const Vec<T> x[1] = {(new_cell(at, panel, previous_cell(at, panel)) - scales[2]) * scales[3]};
  const Vec<T> tanh_y = tanh(fma(x[0], gain, load(a.variant.norm_cell + a.H + first, n)));
  const Vec<T> hidden = load(work.hidden_row(panel, at.i, a.B)), dy = hidden * o * (1 - tanh_y * tanh_y);
  const Vec<T> dx[1] = {dy * gain};
  if (projects()) store(state.unprojected + (schedule.first(at.t) + at.i) * a.H + first, o * tanh_y, n);
  store(work.hidden_row(panel, at.i, a.B), dx[0]);
  store(work.gates_row(panel, at.i, a.B) + 3 * kUnits<T>, hidden * tanh_y * o * (1 - o));
  put_products<T>(dx, x, n, cell_products.at(panel, at.i));
  for (int64_t u = 0; u < n; ++u) {
    gains[first + u] += static_cast<double>(dy[u] * x[0][u]);
    gains[a.H + first + u] += static_cast<double>(dy[u]);
  }
}

// With layer norm everybody waits for the sums of all panels twice: of the cells, and of the gates.
template <class T>
void Backward<T>::run_normalized_step(const Work& work, int64_t t, T* after) const {
  const int64_t active = schedule.active(t);
  for (int64_t p = work.share.begin; p < work.share.end; ++p) {
    for (int64_t i = 0; i < active; ++i) normalized_cell(work, p, token(t, i), norm_cell);
  }
  work.share.barrier.wait();
  for (int64_t i = 0; i < active; ++i) {
    const Token at = token(t, i);
    const Widened<T>* scales = state.scales + at.saved * 4;
    const NormGradient<T> cell = norm_gradient_of_row(cell_products, i, a.H, 1, scales[3]);
    for (int64_t p = work.share.begin; p < work.share.end; ++p) {
      const int64_t first = p * kUnits<T>, n = units_of<T>(p, a.H);
      const Vec<T> x = (new_cell(at, p, previous_cell(at, p)) - scales[2]) * scales[3];
      T* gates = work.gates_row(p, i, a.B);
      Vec<T> da[4], normal[4];
      gate_gradients(work, at, p, {cell.of(load(work.hidden_row(p, i, a.B)), x), load(gates + 3 * kUnits<T>)}, da);
      for (int g = 0; g < 4; ++g) {
        da[g] *= load(a.variant.norm_gates + (4 + g) * a.H + first, n);
        normal[g] = normalized(at, 1, g, p);
        store(gates + g * kUnits<T>, da[g]);
      }
      put_products<T>(da, normal, n, gate_products.at(p, i));
    }
  }
  work.share.barrier.wait();
  for (int64_t i = 0; i < active; ++i) {
    const Token at = token(t, i);
    const NormGradient<T> row = norm_gradient_of_row(gate_products, i, a.H, 4, state.scales[at.saved * 4 + 1]);
    for (int64_t p = work.share.begin; p < work.share.end; ++p) {
      const T* gates = work.gates_row(p, i, a.B);
      T* to = state.grad_hidden + (schedule.first(t) + i) * 4 * a.H + p * kUnits<T>;
      Vec<T> da[4];
      for (int g = 0; g < 4; ++g) {
        da[g] = row.of(load(gates + g * kUnits<T>), normalized(at, 1, g, p));
        store(to + g * a.H, da[g], units_of<T>(p, a.H));
      }
      hand_down(at, p, da, after);
    }
  }
}

template <class T>
void Backward<T>::run(const Share& share) const {
  const Work mine = work(share);
  const Share outputs = projected<T>(share, a.H, a.P);
  pack(share);
  for (int64_t s = schedule.steps(); s >= 0; --s) {  // s = steps: nothing above the last step; s = 0: only dh of h_0
    share.barrier.wait();                            // da is complete, and nobody reads the one before any more
    const int64_t t = s > 0 ? schedule.time(s - 1) : -1;
    if (s > 0) mine.zoneouts.draw(schedule, a.B, t);
    for (int64_t p = outputs.begin; p < outputs.end; ++p) {
      if (s < schedule.steps()) carry(mine, p, schedule.time(s), da_tiles[s % 2]);
      if (s > 0) hidden_gradient(mine, p, t);
    }
    if (s == 0) break;
    if (projects()) {
      share.barrier.wait();  // dh is complete
      unproject(mine, t);
    }
    norm() ? run_normalized_step(mine, t, da_tiles[(s + 1) % 2]) : run_step(mine, t, da_tiles[(s + 1) % 2]);
  }
}

}  // namespace

}  // namespace llmkern::cpu::LLMKERN_ISA
