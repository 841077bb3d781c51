// SPDX-License-Identifier: Apache-2.0
// One LSTM layer on the CPU; the contract is kernels/lstm.h.
//
// A team of workers (team.h) stays for the whole sequence. Each owns some panels of hidden units and with them the
// columns of the weights that make these units' gates, so that its share of the weights stays in its own cache. A step
// of a panel is one register tile: a few rows of the batch by the four gates of as many units as a vector has. It ends
// in the gate functions, which write h where the next step reads it: in tiles, one k after the other. Workers meet once
// a step, when h is complete. Backward is the mirror image: the product that makes dh of a panel is followed by the
// gate gradients of the same units.
#include "kernels/lstm.h"

#include "kernels/cpu/gemm.h"
#include "kernels/cpu/team.h"
#include "kernels/run.h"

namespace llmkern::cpu::LLMKERN_ISA {

namespace {

template <class T>
constexpr int64_t kUnits = kLanes<T>;  // hidden units of a panel
template <class T>
constexpr int64_t kGatesWidth = 4 * kUnits<T>;  // columns of a panel: the four gates of its units

// Registers: rows * 4 accumulators, 4 of W, 1 for a broadcast of h; 32 with AVX-512, 16 otherwise.
constexpr int64_t kForwardRows = kVectorBytes == 64 ? 6 : 2;
// rows accumulators, 1 of W, 1 for a broadcast of da.
constexpr int64_t kBackwardRows = kVectorBytes == 64 ? 14 : 8;

// Rows of the input whose products are made in one go: enough that reading the weights costs less than using them.
constexpr int64_t kInputRows = 48;

// Of a panel, multiplied by all rows before the next: most of the first-level cache.
constexpr int64_t kPanelBytes = 24 << 10;

// Multiplications and additions worth waking another thread for.
constexpr int64_t kTeamFlops = 1 << 18;

// ---- tiles of rows: [rows / kRows][K][kRows], the last one as high as there are rows left

template <int64_t kRows>
int64_t tile_height(int64_t row, int64_t M) {
  const int64_t first = row / kRows * kRows;
  return M - first < kRows ? M - first : kRows;
}

// Where the tiles have element (row, k); the next k is tile_height further.
template <int64_t kRows, class T>
T* in_tiles(T* tiles, int64_t row, int64_t k, int64_t M, int64_t K) {
  const int64_t first = row / kRows * kRows;
  return tiles + first * K + k * tile_height<kRows>(row, M) + row - first;
}

// Columns [begin, end) of one of M rows of K into the tiles.
template <int64_t kRows, class T>
void fill_row(const T* from, int64_t row, int64_t begin, int64_t end, int64_t M, int64_t K, T* tiles) {
  const int64_t height = tile_height<kRows>(row, M);
  T* to = in_tiles<kRows>(tiles, row, begin, M, K);
  for (int64_t k = begin; k < end; ++k, to += height) *to = from[k];
}

// One vector of a row into the tiles.
template <int64_t kRows, class T>
void scatter(Vec<T> values, int64_t count, T* tiles, int64_t row, int64_t k, int64_t M, int64_t K) {
  T lane[kLanes<T>];
  store(lane, values);
  const int64_t height = tile_height<kRows>(row, M);
  T* to = in_tiles<kRows>(tiles, row, k, M, K);
  for (int64_t i = 0; i < count; ++i, to += height) *to = lane[i];
}

// ---- products

// c[rows, columns * lanes] = tile[K, rows]^T panel[K, columns * lanes]  (+ c). The part of the panel that comes next is
// still in the last-level cache: fetched ahead, a step takes a tenth less.
template <class T, int rows, int columns>
void multiply_whole(int64_t K, const T* tile, const T* panel, T* c, bool accumulate) {
  constexpr int lanes = kLanes<T>;
  Vec<T> sums[rows][columns] = {};
  for (int64_t k = 0; k < K; ++k, tile += rows, panel += columns * lanes) {
    Vec<T> b[columns];
#pragma GCC unroll 4
    for (int j = 0; j < columns; ++j) {
      b[j] = load(panel + j * lanes);
      __builtin_prefetch(panel + j * lanes + kPanelBytes / sizeof(T), 0, 2);
    }
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
      const Vec<T> x = broadcast(tile[i]);
#pragma GCC unroll 4
      for (int j = 0; j < columns; ++j) sums[i][j] = fma(x, b[j], sums[i][j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < columns; ++j, c += lanes) store(c, accumulate ? load(c) + sums[i][j] : sums[i][j]);
  }
}

template <class T, int rows, int columns>
void multiply_rows(int64_t height, int64_t K, const T* tile, const T* panel, T* c, bool accumulate) {
  if constexpr (rows > 0) {
    if (height == rows) return multiply_whole<T, rows, columns>(K, tile, panel, c, accumulate);
    multiply_rows<T, rows - 1, columns>(height, K, tile, panel, c, accumulate);
  }
}

// c[M, columns * lanes] for M rows in tiles, a block of k after the other: the part of the panel that belongs to it
// stays in the first-level cache while the tiles pass by, and no chain of float32 additions is thousands long. The
// order of the sum is that of k, whatever M.
template <class T, int64_t kRows, int columns>
void multiply(int64_t M, int64_t total_rows, int64_t K, const T* tiles, const T* panel, T* c, bool accumulate) {
  constexpr int64_t width = columns * kLanes<T>, fitting = kPanelBytes / (width * static_cast<int64_t>(sizeof(T)));
  constexpr int64_t depth = fitting < kBlockK ? fitting : kBlockK;
  for (int64_t k = 0; k < K; k += depth) {
    const int64_t n = K - k < depth ? K - k : depth;
    for (int64_t row = 0; row < M; row += kRows) {
      const int64_t height = tile_height<kRows>(row, total_rows);
      multiply_rows<T, kRows, columns>(height, n, tiles + row * K + k * height, panel + k * width, c + row * width,
                                       accumulate || k > 0);
    }
  }
}

// ---- weights

// panel[k][gate][unit] = W[gate * H + first + unit, k] for a weight [4H, K]; units beyond H are 0.
template <class T>
void pack_gates(const T* weight, int64_t K, int64_t H, int64_t first, T* panel) {
  const int64_t units = H - first < kUnits<T> ? H - first : kUnits<T>;
  constexpr int lanes = kLanes<T>;
  if (units < kUnits<T>) memset(panel, 0, static_cast<size_t>(K * kGatesWidth<T>) * sizeof(T));
  for (int64_t gate = 0; gate < 4; ++gate) {
    const T* rows = weight + (gate * H + first) * K;
    T* to = panel + gate * kUnits<T>;
    int64_t k = 0;
    for (; units == kUnits<T> && k + lanes <= K; k += lanes) {
      Vec<T> square[lanes];
      for (int i = 0; i < lanes; ++i) square[i] = load(rows + i * K + k);
      transpose<T>(square);
      for (int i = 0; i < lanes; ++i) store(to + (k + i) * kGatesWidth<T>, square[i]);
    }
    for (; k < K; ++k) {
      for (int64_t i = 0; i < units; ++i) to[k * kGatesWidth<T> + i] = rows[i * K + k];
    }
  }
}

// [I + H, kGatesWidth]: the input's weights, then the recurrent ones.
template <class T>
void pack_panel(const T* weight_ih, const T* weight_hh, int64_t I, int64_t H, int64_t panel, T* to) {
  pack_gates(weight_ih, I, H, panel * kUnits<T>, to);
  pack_gates(weight_hh, H, H, panel * kUnits<T>, to + I * kGatesWidth<T>);
}

template <class T>
int64_t panels_of(int64_t H) {
  return (H + kUnits<T> - 1) / kUnits<T>;
}

template <class T>
void execute(const LstmPack<T>& a, const Parallel& parallel) {
  const int64_t size = (a.I + a.H) * kGatesWidth<T>;
  T* panels = a.packed + kLstmPackHeader<T>;
  a.packed[0] = kVectorBytes;
  parallel(panels_of<T>(a.H), (1 << 15) / size + 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) pack_panel(a.weight_ih, a.weight_hh, a.I, a.H, p, panels + p * size);
  });
}

// ---- the sequence

// Which rows run at which step. Rows are taken in the order of their lengths, the longest first, so that those of a
// step are the first ones; tokens beyond a row's length cost nothing.
class Schedule {
 public:
  Schedule(int64_t steps, int64_t B, const int64_t* lengths, bool reverse)
      : steps_(steps), B_(B), reverse_(reverse), order_(B), first_(steps + 1) {
    for (int64_t t = 0; t <= steps; ++t) first_[t] = lengths == nullptr ? t * B : 0;
    if (lengths == nullptr) {
      for (int64_t row = 0; row < B; ++row) order_[row] = row;
    } else {
      sort(lengths);
    }
  }

  int64_t steps() const { return steps_; }
  int64_t tokens() const { return first_[steps_]; }
  bool ragged() const { return tokens() != steps_ * B_; }
  int64_t time(int64_t step) const { return reverse_ ? steps_ - 1 - step : step; }
  int64_t row(int64_t i) const { return order_[i]; }
  // Rows [0, active) run at time t, and none outside of the sequence; their tokens are first + [0, active) of all.
  int64_t first(int64_t t) const { return first_[t]; }
  int64_t active(int64_t t) const { return t < 0 || t >= steps_ ? 0 : first(t + 1) - first(t); }
  int64_t time_before(int64_t t) const { return reverse_ ? t + 1 : t - 1; }
  int64_t time_after(int64_t t) const { return reverse_ ? t - 1 : t + 1; }

 private:
  // A counting sort: rows longer than t are those that run at t, and end where the rows of length t begin.
  void sort(const int64_t* lengths) {
    Buffer<int64_t> longer(steps_ + 1);
    for (int64_t t = 0; t <= steps_; ++t) longer[t] = 0;
    for (int64_t row = 0; row < B_; ++row) {
      if (lengths[row] > 0) ++longer[lengths[row] - 1];
    }
    for (int64_t t = steps_ - 1; t >= 0; --t) longer[t] += longer[t + 1];
    for (int64_t t = 0; t < steps_; ++t) first_[t + 1] = first_[t] + longer[t];
    for (int64_t row = 0; row < B_; ++row) order_[longer[lengths[row]]++] = row;
  }

  int64_t steps_, B_;
  bool reverse_;
  Buffer<int64_t> order_, first_;
};

template <class T>
void copy_or_zero(T* to, const T* from, int64_t count) {
  if (count == 0) return;  // an empty tensor may have no memory at all
  if (from != nullptr) {
    memcpy(to, from, static_cast<size_t>(count) * sizeof(T));
  } else {
    memset(to, 0, static_cast<size_t>(count) * sizeof(T));
  }
}

// ---- forward

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

template <class T>
void execute(const LstmForward<T>& a, const Parallel& parallel) {
  const Schedule schedule(a.steps, a.B, a.lengths, a.reverse);
  copy_or_zero(a.h_n, a.h_0, a.B * a.H);  // of rows without a step
  copy_or_zero(a.c_n, a.c_0, a.B * a.H);
  if (schedule.ragged()) clear(a);
  if (schedule.tokens() == 0) return;
  const bool is_packed = a.packed != nullptr && a.packed[0] == kVectorBytes;
  const int64_t packed_elements = is_packed ? 0 : lstm_packed_elements<T>(a.I, a.H);
  const int64_t tiles = round_up(a.B * a.H, kLanes<T>);
  T* memory = scratch<T>(Slot::kKernel, packed_elements + 2 * tiles);
  if (!is_packed) execute(LstmPack<T>{a.weight_ih, a.weight_hh, memory, a.I, a.H}, parallel);
  T* hidden = memory + packed_elements;
  if (schedule.ragged()) copy_or_zero<T>(hidden, nullptr, 2 * tiles);  // tiles are multiplied whole
  const T* panels = (is_packed ? a.packed : memory) + kLstmPackHeader<T>;
  const Forward<T> forward = {a, schedule, panels, {hidden, hidden + tiles}};
  const bool worth_it = schedule.tokens() * a.H * (a.I + a.H) * 8 >= kTeamFlops;
  run_team(parallel, panels_of<T>(a.H), worth_it, [&](const Share& share) { forward.run(share); });
}

// ---- backward

template <class T>
struct Backward {
  const LstmBackward<T>& a;
  const Schedule& schedule;
  T* packed;       // [panels][4H][kUnits]: the recurrent weights
  T* da_tiles[2];  // [B, 4H] in tiles: da of the step before, and of this step

  int64_t units(int64_t panel) const {
    return a.H - panel * kUnits<T> < kUnits<T> ? a.H - panel * kUnits<T> : kUnits<T>;
  }

  void pack(int64_t panel) const;
  void run(const Share& share) const;
  void carry(int64_t panel, int64_t t, const T* above, T* dh) const;
  void finish_row(int64_t panel, int64_t i, int64_t t, T* after) const;
};

template <class T>
void Backward<T>::pack(int64_t panel) const {
  const int64_t n = units(panel);
  T* to = packed + panel * 4 * a.H * kUnits<T>;
  for (int64_t k = 0; k < 4 * a.H; ++k, to += kUnits<T>) {
    store(to, load(a.weight_hh + k * a.H + panel * kUnits<T>, n));  // units beyond H are 0
  }
}

// dh = da W_hh of the step before t, for the rows that ran at t: grad_h_0 is the running dh.
template <class T>
void Backward<T>::carry(int64_t panel, int64_t t, const T* above, T* dh) const {
  const int64_t active = schedule.active(t);
  multiply<T, kBackwardRows, 1>(active, a.B, 4 * a.H, above, packed + panel * 4 * a.H * kUnits<T>, dh, false);
  for (int64_t i = 0; i < active; ++i) {
    store(a.grad_h_0 + schedule.row(i) * a.H + panel * kUnits<T>, load(dh + i * kUnits<T>), units(panel));
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
  const Vec<T> dc = fma(dh * gate[3], 1 - tanh_c * tanh_c, load(a.grad_c_0 + state, n));
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
template <class T>
void backward_through_time(const LstmBackward<T>& a, const Schedule& schedule, const Parallel& parallel) {
  copy_or_zero(a.grad_h_0, a.grad_h_n, a.B * a.H);
  copy_or_zero(a.grad_c_0, a.grad_c_n, a.B * a.H);
  if (schedule.tokens() == 0) return;
  const int64_t panels = panels_of<T>(a.H), weights = panels * 4 * a.H * kUnits<T>;
  const int64_t tiles = round_up(a.B * 4 * a.H, kLanes<T>);
  T* memory = scratch<T>(Slot::kKernel, weights + 2 * tiles);
  if (schedule.ragged()) copy_or_zero<T>(memory + weights, nullptr, 2 * tiles);
  const Backward<T> backward = {a, schedule, memory, {memory + weights, memory + weights + tiles}};
  const bool worth_it = schedule.tokens() * a.H * a.H * 8 >= kTeamFlops;
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

template <class T>
void whole_products(const LstmBackward<T>& a, const Schedule& schedule, const Parallel& parallel) {
  const int64_t H = a.H, B = a.B, rows = a.steps * B;
  gemm(rows, a.I, 4 * H, row_major(a.grad_gates, 4 * H), row_major(a.weight_ih, a.I), a.grad_input, a.I, false,
       parallel);
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

template <class T>
void execute(const LstmBackward<T>& a, const Parallel& parallel) {
  const Schedule schedule(a.steps, a.B, a.lengths, a.reverse);
  backward_through_time(a, schedule, parallel);
  if (schedule.ragged()) {
    ragged_products(a, schedule, parallel);
  } else {
    whole_products(a, schedule, parallel);
  }
  sum_rows(schedule.tokens(), 4 * a.H, a.grad_gates, a.grad_bias, false, parallel);
}

}  // namespace

template <class Args>
void run(const Args& args, const Parallel& parallel) {
  execute(args, parallel);
}

template void run(const LstmPack<float>&, const Parallel&);
template void run(const LstmPack<double>&, const Parallel&);
template void run(const LstmForward<float>&, const Parallel&);
template void run(const LstmForward<double>&, const Parallel&);
template void run(const LstmBackward<float>&, const Parallel&);
template void run(const LstmBackward<double>&, const Parallel&);

}  // namespace llmkern::cpu::LLMKERN_ISA
