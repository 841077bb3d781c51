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

// Rows and panels whose gates are computed in one go: the latency of one is hidden by the next.
constexpr int64_t kFinishRows = 16;

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

// A state that the steps carry on: in its tensor, or beside it where that has fewer bits.
template <class T>
class Running {
 public:
  using S = Widened<T>;

  Running(Slot slot, T* state, const T* initial, int64_t count) : state_(state), count_(count) {
    if constexpr (std::is_same_v<S, T>) {
      copy_or_zero(state, initial, count);
      values_ = state;
      return;
    } else {
      values_ = scratch<S>(slot, count);
      if (initial == nullptr) {
        copy_or_zero<S>(values_, nullptr, count);
      } else {
        convert(values_, initial, count);
      }
    }
  }

  S* values() const { return values_; }
  void finish() const {
    if constexpr (!std::is_same_v<S, T>) convert(state_, values_, count_);
  }

 private:
  T* state_;
  S* values_;
  int64_t count_;
};

template <class Op>
struct Forward {
  using T = typename Op::Storage;
  using S = Sum<Op>;

  const LstmForward<T>& a;
  const Schedule& schedule;
  PackedWeights<Op> weights;
  typename Op::Shared* hidden[2];  // [B, H]: h of the step before, and of this step
  S* cell;                         // [B, H]: the running c

  int64_t units(int64_t panel) const {
    return a.H - panel * kUnits<Op> < kUnits<Op> ? a.H - panel * kUnits<Op> : kUnits<Op>;
  }

  void run(const Share& share) const;
  void begin_rows(const Share& share, int64_t step, typename Op::Shared* to) const;
  int64_t multiply_inputs(const Share& share, int64_t step, int64_t steps, Word<Op>* tiles, S* sums) const;
  void finish_row(int64_t panel, int64_t i, int64_t t, const S* from_input, const S* from_hidden,
                  typename Op::Shared* after) const;
};

// h_0 of the rows whose first step this is, the share's units.
template <class Op>
void Forward<Op>::begin_rows(const Share& share, int64_t step, typename Op::Shared* to) const {
  const int64_t t = schedule.time(step), begin = share.begin * kUnits<Op>;
  const int64_t end = share.end * kUnits<Op> < a.H ? share.end * kUnits<Op> : a.H;
  for (int64_t i = schedule.active(schedule.time_before(t)); i < schedule.active(t); ++i) {
    Gates<Op>::share(a.h_0 + schedule.row(i) * a.H + begin, end - begin, i, begin, a.B, a.H, to);
  }
}

// sums[panel][row of a step][kGatesWidth] = W_ih x of these steps, the share's panels; the number of rows.
template <class Op>
int64_t Forward<Op>::multiply_inputs(const Share& share, int64_t step, int64_t steps, Word<Op>* tiles, S* sums) const {
  int64_t rows = 0, row = 0;
  for (int64_t s = step; s < step + steps; ++s) rows += schedule.active(schedule.time(s));
  for (int64_t s = step; s < step + steps; ++s) {
    const int64_t t = schedule.time(s);
    for (int64_t i = 0; i < schedule.active(t); ++i, ++row) {
      Gates<Op>::fill(a.input + (t * a.B + schedule.row(i)) * a.I, row, rows, a.I, tiles);
    }
  }
  for (int64_t p = share.begin; p < share.end; ++p) {
    Gates<Op>::multiply(rows, rows, a.I, tiles, weights.input(p), sums + (p - share.begin) * rows * kGatesWidth<Op>,
                        false);
  }
  return rows;
}

// From the products of a row and panel to its gates, cell and output.
template <class Op>
void Forward<Op>::finish_row(int64_t panel, int64_t i, int64_t t, const S* from_input, const S* from_hidden,
                             typename Op::Shared* after) const {
  const int64_t H = a.H, first = panel * kUnits<Op>, n = units(panel);
  const int64_t row = schedule.row(i), state = row * H + first, at = (t * a.B + row) * H + first;
  Vec<S> gate[4];
  for (int g = 0; g < 4; ++g) {
    gate[g] = load(from_input + g * kUnits<Op>) + load(from_hidden + g * kUnits<Op>);
    if (a.bias_ih != nullptr) {
      gate[g] += load_wide(a.bias_ih + g * H + first, n) + load_wide(a.bias_hh + g * H + first, n);
    }
    gate[g] = g == 2 ? tanh(gate[g]) : sigmoid(gate[g]);
    if (a.gates != nullptr) store_narrow(a.gates + ((t * a.B + row) * 4 + g) * H + first, gate[g], n);
  }
  const Vec<S> c = fma(gate[1], load(cell + state, n), gate[0] * gate[2]), h = gate[3] * tanh(c);
  store(cell + state, c, n);
  if (a.cells != nullptr) store(a.cells + at, c, n);
  store_narrow(a.output + at, h, n);
  if (i >= schedule.active(schedule.time_after(t))) store_narrow(a.h_n + state, h, n);  // its last step
  T rounded[kUnits<Op>];
  store_narrow(rounded, h);
  Gates<Op>::share(rounded, n, i, first, a.B, H, after);
}

template <class Op>
void Forward<Op>::run(const Share& share) const {
  const int64_t panels = share.end - share.begin, steps = schedule.steps();
  const int64_t most = (kInputRows + a.B - 1) / a.B, together = most < steps ? most : steps;
  Word<Op>* input_tiles = scratch<Word<Op>>(Slot::kPackedA, Gates<Op>::tile_words(together * a.B, a.I));
  const int64_t group = kFinishRows / a.B + 1;  // panels whose gates follow their products
  S* from_inputs = scratch<S>(Slot::kPackedB, (together * panels + group) * a.B * kGatesWidth<Op>);
  S* from_hidden = from_inputs + together * panels * a.B * kGatesWidth<Op>;
  int64_t rows = 0, row = 0;  // of the steps whose inputs are multiplied; the first of this step
  for (int64_t step = 0; step < steps; ++step) {
    const int64_t left = steps - step, t = schedule.time(step), active = schedule.active(t);
    if (step % together == 0) {
      rows = multiply_inputs(share, step, left < together ? left : together, input_tiles, from_inputs);
      row = 0;
    }
    typename Op::Shared *before = hidden[step % 2], *after = hidden[(step + 1) % 2];
    begin_rows(share, step, before);
    share.barrier.wait();  // h is complete, and nobody reads the one before any more
    const Word<Op>* tiles = Gates<Op>::tiles(before, active, a.P);
    for (int64_t first = share.begin; first < share.end; first += group) {
      const int64_t last = first + group < share.end ? first + group : share.end;
      for (int64_t p = first; p < last; ++p) {
        Gates<Op>::multiply(active, a.B, a.P, tiles, weights.hidden(p),
                            from_hidden + (p - first) * a.B * kGatesWidth<Op>, false);
      }
      for (int64_t p = first; p < last; ++p) {
        for (int64_t i = 0; i < active; ++i) {
          finish_row(p, i, t, from_inputs + ((p - share.begin) * rows + row + i) * kGatesWidth<Op>,
                     from_hidden + ((p - first) * a.B + i) * kGatesWidth<Op>, after);
        }
      }
    }
    row += active;
  }
}

// What beyond a row's length nobody writes.
template <class T>
void clear(const LstmForward<T>& a) {
  const int64_t count = a.steps * a.B * a.H;
  copy_or_zero<T>(a.output, nullptr, count);
  if (a.cells != nullptr) copy_or_zero<Widened<T>>(a.cells, nullptr, count);
  if (a.gates != nullptr) copy_or_zero<T>(a.gates, nullptr, 4 * count);
}

}  // namespace

}  // namespace llmkern::cpu::LLMKERN_ISA
