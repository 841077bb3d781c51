// SPDX-License-Identifier: Apache-2.0
// The products of a recurrence: rows of the batch in tiles, weights in panels, a tile by a panel in registers.
//
// A panel is as many hidden units as a vector has lanes, with all the columns that belong to them. A step of a panel is
// one register tile: a few rows of the batch by the four gates of its units. What a step leaves is written where the
// next one reads it: in tiles, one k after the other.
#pragma once

#include "kernels/cpu/gemm.h"
#include "kernels/cpu/lstm/quantisation.h"

namespace llmkern::cpu::LLMKERN_ISA {

namespace {

template <class S>
constexpr int64_t kUnits = kLanes<S>;  // hidden units of a panel, for sums of type S
template <class S>
constexpr int64_t kGatesWidth = 4 * kUnits<S>;  // columns of a panel: the four gates of its units

// Registers: rows * 4 accumulators, 4 of W, 1 for a broadcast of h; 32 with AVX-512, 16 otherwise.
constexpr int64_t kForwardRows = kVectorBytes == 64 ? 6 : 2;
// rows accumulators, 1 of W, 1 for a broadcast of da.
constexpr int64_t kBackwardRows = kVectorBytes == 64 ? 14 : 8;

// Of a panel, multiplied by all rows before the next: most of the first-level cache.
constexpr int64_t kPanelBytes = 24 << 10;

// ---- tiles of rows: [rows / kRows][words of K][kRows], the last one as high as there are rows left

template <int64_t kRows>
int64_t tile_height(int64_t row, int64_t M) {
  const int64_t first = row / kRows * kRows;
  return M - first < kRows ? M - first : kRows;
}

// Where the tiles have word k of a row; the next one is tile_height further.
template <int64_t kRows, class Word>
Word* in_tiles(Word* tiles, int64_t row, int64_t k, int64_t M, int64_t words) {
  const int64_t first = row / kRows * kRows;
  return tiles + first * words + k * tile_height<kRows>(row, M) + row - first;
}

// `count` elements into a row of the tiles, from word k on.
template <class Op, int64_t kRows>
void fill_row(const typename Op::Storage* from, int64_t count, int64_t row, int64_t k, int64_t M, int64_t words,
              Word<Op>* tiles) {
  const int64_t height = tile_height<kRows>(row, M);
  Word<Op>* to = in_tiles<kRows>(tiles, row, k, M, words);
  for (int64_t i = 0; i < count; i += Op::kTerms, to += height) *to = Op::word(from + i, count - i);
}

// One vector of a row into the tiles, as its storage rounds it.
template <class Op, int64_t kRows>
void scatter(Vec<Sum<Op>> values, int64_t count, Word<Op>* tiles, int64_t row, int64_t k, int64_t M, int64_t words) {
  typename Op::Storage lane[kUnits<Sum<Op>>];
  store_narrow(lane, values);
  fill_row<Op, kRows>(lane, count, row, k, M, words, tiles);
}

// `count` rows, `stride` apart, of a panel's K elements into the tile of that height, whose words for them begin at
// `to`; rows that there are not read as zero. As a transposed square where one will do: what is too much of a word is
// overwritten by the next ones, as long as there are any.
template <class Op>
void fill_tile(const typename Op::Storage* rows, int64_t stride, int64_t K, int64_t count, int64_t height,
               Word<Op>* to) {
  constexpr int64_t lanes = kLanes<Word<Op>>;
  constexpr int64_t kWorthIt = 4;  // rows
  if (words_of<Op>(K) == lanes && K % Op::kTerms == 0 && height <= lanes && count >= kWorthIt) {
    Vec<Word<Op>> square[lanes];
    for (int64_t i = 0; i < lanes; ++i) square[i] = i < count ? Op::words(rows + i * stride) : Vec<Word<Op>>{};
    transpose<Word<Op>>(square);
    for (int64_t k = 0; k < lanes; ++k) {
      store(to + k * height, square[k], k * height + lanes <= lanes * height ? lanes : height);
    }
    return;
  }
  for (int64_t k = 0; k < K; k += Op::kTerms, to += height) {
    for (int64_t i = 0; i < count; ++i) to[i] = Op::word(rows + i * stride + k, K - k);
  }
}

// ---- products

template <class Op, int rows, int columns, bool half>
void multiply_rows(int64_t height, int64_t K, const Word<Op>* tile, const Word<Op>* panel, Sum<Op>* c,
                   bool accumulate) {
  // The part of the panel that comes next is still in the last-level cache. Fetched ahead, many rows take a tenth less;
  // a row or two wait for memory alone, which streams fastest when nobody asks for a line twice.
  constexpr int64_t ahead = rows > 2 ? kPanelBytes : 0;
  if constexpr (rows > 0) {
    constexpr int64_t width = columns * kLanes<Sum<Op>>;
    if (height == rows) {
      return multiply_whole<Op, rows, columns, ahead, width, half>(K, tile, panel, c, width, accumulate);
    }
    multiply_rows<Op, rows - 1, columns, half>(height, K, tile, panel, c, accumulate);
  }
}

// c[M, columns * lanes] for M rows in tiles, a block of words after the other: the part of the panel that belongs to it
// stays in the first-level cache while the tiles pass by, and no chain of float32 additions is thousands long. The
// order of the sum is that of k, whatever M.
template <class Op, int64_t kRows, int columns, bool half>
void multiply_blocks(int64_t M, int64_t total_rows, int64_t words, const Word<Op>* tiles, const Word<Op>* panel,
                     Sum<Op>* c, bool accumulate) {
  constexpr int64_t width = columns * kLanes<Sum<Op>>, fitting = kPanelBytes / (width * sizeof(Word<Op>));
  constexpr int64_t depth = fitting < kBlockK ? fitting : kBlockK;
  if (words == 0 && !accumulate) memset(c, 0, static_cast<size_t>(M * width) * sizeof(Sum<Op>));
  for (int64_t k = 0; k < words; k += depth) {
    const int64_t n = words - k < depth ? words - k : depth;
    for (int64_t row = 0; row < M; row += kRows) {
      const int64_t height = tile_height<kRows>(row, total_rows);
      multiply_rows<Op, kRows, columns, half>(height, n, tiles + row * words + k * height, panel + k * width,
                                              c + row * width, accumulate || k > 0);
    }
  }
}

// The same for a panel of `units` units, which may need but half of each vector.
template <class Op, int64_t kRows, int columns>
void multiply(int64_t M, int64_t total_rows, int64_t words, const Word<Op>* tiles, const Word<Op>* panel, int64_t units,
              Sum<Op>* c, bool accumulate) {
  constexpr bool kHalves = sizeof(typename HalfOf<Sum<Op>>::type) < kVectorBytes;
  if (kHalves && 2 * units <= kUnits<Sum<Op>>) {
    multiply_blocks<Op, kRows, columns, kHalves>(M, total_rows, words, tiles, panel, c, accumulate);
  } else {
    multiply_blocks<Op, kRows, columns, false>(M, total_rows, words, tiles, panel, c, accumulate);
  }
}

template <class S>
int64_t panels_of(int64_t columns) {
  return (columns + kUnits<S> - 1) / kUnits<S>;
}

template <class S>
int64_t units_of(int64_t panel, int64_t columns) {
  return columns - panel * kUnits<S> < kUnits<S> ? columns - panel * kUnits<S> : kUnits<S>;
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
  // `count` elements of a row, from k on, into what workers share of a step, and the tiles of all that they shared.
  static void share(const Storage* from, int64_t count, int64_t row, int64_t k, int64_t M, int64_t K,
                    Word<Op>* shared) {
    fill_row<Op, kForwardRows>(from, count, row, k / Op::kTerms, M, words_of<Op>(K), shared);
  }
  // The same of the first `count` rows of a tile, kUnits apart.
  static void share_tile(const Storage* rows, int64_t width, int64_t first, int64_t count, int64_t k, int64_t M,
                         int64_t K, Word<Op>* shared) {
    fill_tile<Op>(rows, kUnits<Sum<Op>>, width, count, tile_height<kForwardRows>(first, M),
                  in_tiles<kForwardRows>(shared, first, k / Op::kTerms, M, words_of<Op>(K)));
  }
  static const Word<Op>* tiles(const Word<Op>* shared, int64_t, int64_t) { return shared; }

  // c[M, kGatesWidth] of a panel of `units` units  (+ c); the tiles are those of total_rows.
  static void multiply(int64_t M, int64_t total_rows, int64_t K, const Word<Op>* tiles, const Word<Op>* panel,
                       int64_t units, Sum<Op>* c, bool accumulate) {
    cpu::LLMKERN_ISA::multiply<Op, kForwardRows, 4>(M, total_rows, words_of<Op>(K), tiles, panel, units, c, accumulate);
  }

  // panel[word of k][gate][unit] = W[gate * H + first + unit, k]; units beyond H are 0.
  static void pack(const Storage* weight, int64_t K, int64_t H, int64_t first, bool quantised, Word<Op>* panel) {
    const int64_t units = H - first < kUnits<Sum<Op>> ? H - first : kUnits<Sum<Op>>;
    if (units < kUnits<Sum<Op>>) memset(panel, 0, static_cast<size_t>(panel_words(K)) * sizeof(Word<Op>));
    const Buffer<Storage> rounded(quantised ? units * K : 0);
    for (int64_t gate = 0; gate < 4; ++gate) {
      const Storage* rows = weight + (gate * H + first) * K;
      if constexpr (std::is_same_v<Storage, float>) {
        if (quantised) rows = round_to_bytes(rows, units, K, rounded.data());
      }
      transpose_words<Op>(rows, K, K, kGatesWidth<Sum<Op>>, units, panel + gate * kUnits<Sum<Op>>);
    }
  }
};

// All weights of a layer: the panels of the input, then those of h.
template <class Op>
struct PackedWeights {
  const Word<Op>* words;
  int64_t I, H, P;

  static int64_t size(int64_t I, int64_t H, int64_t P) {
    return panels_of<Sum<Op>>(H) * (Gates<Op>::panel_words(I) + Gates<Op>::panel_words(P));
  }
  const Word<Op>* input(int64_t panel) const { return words + panel * Gates<Op>::panel_words(I); }
  const Word<Op>* hidden(int64_t panel) const {
    return words + panels_of<Sum<Op>>(H) * Gates<Op>::panel_words(I) + panel * Gates<Op>::panel_words(P);
  }
};

}  // namespace

}  // namespace llmkern::cpu::LLMKERN_ISA
