// SPDX-License-Identifier: Apache-2.0
// The weights of a recurrence in panels: the words that belong to as many hidden units as a vector has lanes, one k
// after the other.
//
// Memory holds weights row-major, a row a unit and gate. Who multiplies them many times copies them into panels first.
// Who multiplies them once reads them where they lie, transposed square by square: in registers for a row or two, else
// into a block that stays in the first-level cache. Every way sums over k in the same order, hence to the same bits.
#pragma once

#include "kernels/cpu/lstm/quantisation.h"
#include "kernels/cpu/lstm/tiles.h"

namespace llmkern::cpu::LLMKERN_ISA {

namespace {

// A panel that has been packed, as multiply() takes it.
template <class Op, int columns>
struct PackedPanel {
  const Word<Op>* words;

  const Word<Op>* operator()(int64_t k, int64_t) const { return words + k * columns * kLanes<Sum<Op>>; }
};

// ---- panels of rows: [words of K][kUnits]

// panels[panel][word of k][unit] = W[panel * kUnits + unit, k] for a weight [columns, K]; units beyond the columns are
// 0.
template <class Op>
void pack_rows(const typename Op::Storage* weight, int64_t columns, int64_t K, Word<Op>* panels) {
  using S = Sum<Op>;
  const int64_t size = words_of<Op>(K) * kUnits<S>;
  for (int64_t p = 0; p < panels_of<S>(columns); ++p, panels += size) {
    const int64_t n = units_of<S>(p, columns);
    if (n < kUnits<S>) memset(panels, 0, static_cast<size_t>(size) * sizeof(Word<Op>));
    transpose_words<Op>(weight + p * kUnits<S> * K, K, K, kUnits<S>, n, panels);
  }
}

// ---- panels of columns, as the backward pass multiplies by them

// to[word of k][unit] = W[k, panel * kUnits + unit] for `words` words from `first` on of a weight [K, columns].
template <class Op>
void pack_columns(const typename Op::Storage* weight, int64_t columns, int64_t K, int64_t panel, int64_t first,
                  int64_t words, Word<Op>* to) {
  constexpr int64_t kAhead = 16;  // rows: the stride hides the next ones from the machine
  using S = Sum<Op>;
  const int64_t n = units_of<S>(panel, columns);
  const typename Op::Storage* from = weight + panel * kUnits<S>;
  for (int64_t k = first * Op::kTerms; k < (first + words) * Op::kTerms; k += Op::kTerms, to += kUnits<S>) {
    if (n < kUnits<S>) memset(to, 0, kUnits<S> * sizeof(Word<Op>));
    if (k + kAhead * Op::kTerms < K) fetch_line(from + (k + kAhead * Op::kTerms) * columns, n);
    Op::line(from + k * columns, columns, K - k, n, to);
  }
}

// Words of a panel of columns of a weight [4H, columns]; each gate begins with a new word.
template <class Op>
int64_t backward_panel_words(int64_t H) {
  return 4 * words_of<Op>(H) * kUnits<Sum<Op>>;
}

// A panel of columns of a weight [4H, columns] where it lies, as multiply() takes it.
template <class Op>
struct ColumnsInPlace {
  const typename Op::Storage* weight;
  int64_t columns, H, panel;
  Scratch<Word<Op>> block;  // [kBlockWords][kUnits]

  const Word<Op>* operator()(int64_t k, int64_t n) const {
    copy(k, n, block);
    return block;
  }

  // Words [k, k + n) of the panel.
  void copy(int64_t k, int64_t n, Word<Op>* to) const {
    const int64_t of_gate = words_of<Op>(H);
    while (n > 0) {
      const int64_t gate = k / of_gate, first = k % of_gate, count = n < of_gate - first ? n : of_gate - first;
      pack_columns<Op>(weight + gate * H * columns, columns, H, panel, first, count, to);
      k += count, n -= count, to += count * kUnits<Sum<Op>>;
    }
  }
};

// ---- panels of gates, as the forward pass multiplies by them: [words of K][gate][kUnits]

// The weight of a panel's gates: packed, or where it lies.
template <class Op>
struct GatePanel {
  const Word<Op>* packed;              // or null
  const typename Op::Storage* weight;  // the row of the first unit and gate
  int64_t gate_stride;                 // from one gate's rows to the next one's
};

// to[word of k][gate][unit] = W[gate * H + unit, k] for `words` words from `first` on; `to` is 0 beyond the units.
template <class Op>
void pack_gates(const GatePanel<Op>& panel, int64_t K, int64_t first, int64_t words, int64_t units, Word<Op>* to) {
  const int64_t left = K - first * Op::kTerms, terms = words * Op::kTerms < left ? words * Op::kTerms : left;
  for (int64_t gate = 0; gate < 4; ++gate) {
    const auto* rows = panel.weight + gate * panel.gate_stride + first * Op::kTerms;
    transpose_words<Op>(rows, K, terms, kGatesWidth<Sum<Op>>, units, to + gate * kUnits<Sum<Op>>);
  }
}

// A panel of gates where it lies, as multiply() takes it.
template <class Op>
struct GatesInPlace {
  const GatePanel<Op>& panel;
  int64_t K, units;
  Word<Op>* block;  // [kBlockWords][gate][kUnits]

  const Word<Op>* operator()(int64_t k, int64_t n) const {
    pack_gates(panel, K, k, n, units, block);
    return block;
  }
};

// c[rows, kGatesWidth] of one tile of so many rows by a whole panel where it lies  (+ c): each weight is multiplied as
// soon as it has been read. For more than two rows the registers do not suffice.
template <class Op, int rows>
void multiply_gates_in_registers(int64_t K, const Word<Op>* tile, const GatePanel<Op>& panel, Sum<Op>* c,
                                 bool accumulate) {
  using S = Sum<Op>;
  constexpr int64_t lanes = kLanes<S>, width = kGatesWidth<S>, depth = kBlockWords<Op, 4>;
  const int64_t words = words_of<Op>(K);
  const auto add = [&](const Vec<Word<Op>>& weights, int64_t k, int gate, Vec<S>(&sums)[rows][4]) {
#pragma GCC unroll 4
    for (int i = 0; i < rows; ++i) {
      sums[i][gate] = Op::multiply_add(broadcast(tile[k * rows + i]), weights, sums[i][gate]);
    }
  };
  constexpr int64_t line = 64 / static_cast<int64_t>(Op::kTerms * sizeof(typename Op::Storage)), part = kPartLanes<S>;
  const auto add_part = [&](int64_t k, int gate, Vec<S>(&sums)[rows][4]) {
    Vec<Word<Op>> columns[part];
    load_transposed<Op>(panel.weight + gate * panel.gate_stride + k * Op::kTerms, K, columns);
#pragma GCC unroll 4
    for (int j = 0; j < part; ++j) add(columns[j], k + j, gate, sums);
  };
  for (int64_t first = 0; first < words; first += depth) {
    const int64_t last = words - first < depth ? words : first + depth;
    Vec<S> sums[rows][4] = {};
    int64_t k = first;
    // Of one gate as much as a cache line holds, then of the next one: rows whose distance is a power of two meet in
    // few places of the first-level cache, and would be gone before their lines are wanted again.
    for (; k + line <= last && (k + line) * Op::kTerms <= K; k += line) {
#pragma GCC unroll 4
      for (int gate = 0; gate < 4; ++gate) {
#pragma GCC unroll 8
        for (int64_t at = k; at < k + line; at += part) add_part(at, gate, sums);
      }
    }
    for (; k + part <= last && (k + part) * Op::kTerms <= K; k += part) {
#pragma GCC unroll 4
      for (int gate = 0; gate < 4; ++gate) add_part(k, gate, sums);
    }
    for (; k < last; ++k) {
      for (int gate = 0; gate < 4; ++gate) {
        const auto* from = panel.weight + gate * panel.gate_stride + k * Op::kTerms;
        Vec<Word<Op>> weights;
        for (int unit = 0; unit < lanes; ++unit) weights[unit] = Op::word(from + unit * K, K - k * Op::kTerms);
        add(weights, k, gate, sums);
      }
    }
    for (int i = 0; i < rows; ++i) {
      for (int gate = 0; gate < 4; ++gate) {
        S* to = c + i * width + gate * lanes;
        store(to, accumulate || first > 0 ? load(to) + sums[i][gate] : sums[i][gate]);
      }
    }
  }
  if (words == 0 && !accumulate) memset(c, 0, static_cast<size_t>(rows * width) * sizeof(S));
}

// ---- the product that makes gates: rows of K elements by a weight [4H, K]

template <class Op>
struct Gates {
  using Storage = typename Op::Storage;

  static int64_t tile_words(int64_t M, int64_t K) { return M * words_of<Op>(K); }
  static int64_t panel_words(int64_t K) { return words_of<Op>(K) * kGatesWidth<Sum<Op>>; }

  // A row of M into the tiles.
  static void fill(const Storage* from, int64_t row, int64_t M, int64_t K, Word<Op>* tiles) {
    fill_row<Op, kForwardRows>(from, K, row, 0, M, words_of<Op>(K), tiles);
  }
  // `count` elements of a row, from k on, into what workers hand one another for a step, and the tiles of all of it.
  static void hand_over(const Storage* from, int64_t count, int64_t row, int64_t k, int64_t M, int64_t K,
                        Word<Op>* handed) {
    fill_row<Op, kForwardRows>(from, count, row, k / Op::kTerms, M, words_of<Op>(K), handed);
  }
  // The same of the first `count` rows of a tile, kUnits apart.
  static void hand_over_tile(const Storage* rows, int64_t width, int64_t first, int64_t count, int64_t k, int64_t M,
                             int64_t K, Word<Op>* handed) {
    fill_tile<Op>(rows, kUnits<Sum<Op>>, width, count, tile_height<kForwardRows>(first, M),
                  in_tiles<kForwardRows>(handed, first, k / Op::kTerms, M, words_of<Op>(K)));
  }
  static const Word<Op>* tiles(const Word<Op>* handed, int64_t, int64_t) { return handed; }

  // c[M, kGatesWidth] of a panel of `units` units  (+ c); the tiles are those of total_rows.
  static void multiply(int64_t M, int64_t total_rows, int64_t K, const Word<Op>* tiles, const GatePanel<Op>& panel,
                       int64_t units, Sum<Op>* c, bool accumulate) {
    const auto by = [&](const auto& block) {
      cpu::LLMKERN_ISA::multiply<Op, kForwardRows, 4>(M, total_rows, words_of<Op>(K), tiles, block, units, c,
                                                      accumulate);
    };
    if (panel.packed != nullptr) return by(PackedPanel<Op, 4>{panel.packed});
    if (units == kUnits<Sum<Op>>) {
      if (total_rows == 1) return multiply_gates_in_registers<Op, 1>(K, tiles, panel, c, accumulate);
      if (total_rows == 2) return multiply_gates_in_registers<Op, 2>(K, tiles, panel, c, accumulate);
    }
    constexpr int64_t kWords = kBlockWords<Op, 4> * kGatesWidth<Sum<Op>>;
    const auto block = scratch<Word<Op>>(Slot::kLstmGatesInPlace, kWords);
    if (units < kUnits<Sum<Op>>) memset(block, 0, kWords * sizeof(Word<Op>));
    by(GatesInPlace<Op>{panel, K, units, block});
  }

  // The panel of `units` units, packed; units that there are not are 0.
  static void pack(const GatePanel<Op>& panel, int64_t K, int64_t units, bool quantised, Word<Op>* to) {
    if (units < kUnits<Sum<Op>>) memset(to, 0, static_cast<size_t>(panel_words(K)) * sizeof(Word<Op>));
    if constexpr (std::is_same_v<Storage, float>) {
      if (quantised) {
        const Buffer<float> rounded(4 * units * K);
        for (int64_t gate = 0; gate < 4; ++gate) {
          round_to_bytes(panel.weight + gate * panel.gate_stride, units, K, rounded.data() + gate * units * K);
        }
        return pack_gates<Op>({nullptr, rounded.data(), units * K}, K, 0, words_of<Op>(K), units, to);
      }
    }
    pack_gates(panel, K, 0, words_of<Op>(K), units, to);
  }
};

// All weights of a layer: packed, the panels of the input and then those of h; or, where `words` is null, where they
// lie.
template <class Op>
struct LayerWeights {
  const Word<Op>* words;
  const typename Op::Storage *weight_ih, *weight_hh;
  int64_t I, H, P;

  static int64_t size(int64_t I, int64_t H, int64_t P) {
    return panels_of<Sum<Op>>(H) * (Gates<Op>::panel_words(I) + Gates<Op>::panel_words(P));
  }
  GatePanel<Op> input(int64_t panel) const {
    return panel_of(weight_ih, I, panel, words, panel * Gates<Op>::panel_words(I));
  }
  GatePanel<Op> hidden(int64_t panel) const {
    const int64_t inputs = panels_of<Sum<Op>>(H) * Gates<Op>::panel_words(I);
    return panel_of(weight_hh, P, panel, words, inputs + panel * Gates<Op>::panel_words(P));
  }

 private:
  GatePanel<Op> panel_of(const typename Op::Storage* weight, int64_t K, int64_t panel, const Word<Op>* packed,
                         int64_t at) const {
    if (packed != nullptr) return {packed + at, nullptr, 0};
    return {nullptr, weight + panel * kUnits<Sum<Op>> * K, H * K};
  }
};

}  // namespace

}  // namespace llmkern::cpu::LLMKERN_ISA
