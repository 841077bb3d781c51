// SPDX-License-Identifier: Apache-2.0
// The products of a recurrence: rows of the batch in tiles, weights in panels (panels.h), a tile by a panel in
// registers.
//
// A panel is as many hidden units as a vector has lanes, with all the columns that belong to them. A step of a panel is
// one register tile: a few rows of the batch by the four gates of its units. What a step leaves is written where the
// next one reads it: in tiles, one k after the other.
#pragma once

#include "kernels/cpu/gemm.h"

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
template <class Operand, int64_t kRows>
void fill_row(const typename Operand::Storage* from, int64_t count, int64_t row, int64_t k, int64_t M, int64_t words,
              Word<Operand>* tiles) {
  const int64_t height = tile_height<kRows>(row, M);
  Word<Operand>* to = in_tiles<kRows>(tiles, row, k, M, words);
  for (int64_t i = 0; i < count; i += Operand::kTerms, to += height) *to = Operand::word(from + i, count - i);
}

// One vector of a row into the tiles, as its storage rounds it.
template <class Operand, int64_t kRows>
void scatter(Vec<Sum<Operand>> values, int64_t count, Word<Operand>* tiles, int64_t row, int64_t k, int64_t M,
             int64_t words) {
  typename Operand::Storage lane[kUnits<Sum<Operand>>];
  store_narrow(lane, values);
  fill_row<Operand, kRows>(lane, count, row, k, M, words, tiles);
}

// `count` rows, `stride` apart, of a panel's K elements into the tile of that height, whose words for them begin at
// `to`; rows that there are not read as zero. As a transposed square where one will do: what is too much of a word is
// overwritten by the next ones, as long as there are any.
template <class Operand>
void fill_tile(const typename Operand::Storage* rows, int64_t stride, int64_t K, int64_t count, int64_t height,
               Word<Operand>* to) {
  constexpr int64_t lanes = kLanes<Word<Operand>>;
  constexpr int64_t kWorthIt = 4;  // rows
  if (words_of<Operand>(K) == lanes && K % Operand::kTerms == 0 && height <= lanes && count >= kWorthIt) {
    Vec<Word<Operand>> square[lanes];
    for (int64_t i = 0; i < lanes; ++i)
      square[i] = i < count ? Operand::words(rows + i * stride) : Vec<Word<Operand>>{};
    transpose<Word<Operand>>(square);
    for (int64_t k = 0; k < lanes; ++k) {
      store(to + k * height, square[k], k * height + lanes <= lanes * height ? lanes : height);
    }
    return;
  }
  for (int64_t k = 0; k < K; k += Operand::kTerms, to += height) {
    for (int64_t i = 0; i < count; ++i) to[i] = Operand::word(rows + i * stride + k, K - k);
  }
}

// ---- products

template <class Operand, int rows, int columns, bool half>
void multiply_rows(int64_t height, int64_t K, const Word<Operand>* tile, const Word<Operand>* panel, Sum<Operand>* c,
                   bool accumulate) {
  // The part of the panel that comes next is still in the last-level cache. Fetched ahead, many rows take a tenth less;
  // a row or two wait for memory alone, which streams fastest when nobody asks for a line twice.
  constexpr int64_t ahead = rows > 2 ? kPanelBytes : 0;
  if constexpr (rows > 0) {
    constexpr int64_t width = columns * kLanes<Sum<Operand>>;
    if (height == rows) {
      return multiply_whole<Operand, rows, columns, ahead, width, half>(K, tile, panel, c, width, accumulate);
    }
    multiply_rows<Operand, rows - 1, columns, half>(height, K, tile, panel, c, accumulate);
  }
}

// Words of a panel that are multiplied by all rows before the next ones: as many as fit, and as few as keep the sums as
// accurate as torch's, which adds over several accumulators.
constexpr int64_t kLongestChain = 128;
template <class Operand, int columns>
constexpr int64_t kBlockWords = [] {
  constexpr int64_t fitting = kPanelBytes / static_cast<int64_t>(columns * kVectorBytes);
  return fitting < kLongestChain ? fitting : kLongestChain;
}();

// c[M, columns * lanes] for M rows in tiles, a block of words after the other: the part of the panel that belongs to
// it, block(k, n) for n words from k on, stays in the first-level cache while the tiles pass by, and no chain of
// float32 additions is thousands long. The order of the sum is that of k, whatever M.
template <class Operand, int64_t kRows, int columns, bool half, class Block>
void multiply_blocks(int64_t M, int64_t total_rows, int64_t words, const Word<Operand>* tiles, const Block& block,
                     Sum<Operand>* c, bool accumulate) {
  constexpr int64_t width = columns * kLanes<Sum<Operand>>, depth = kBlockWords<Operand, columns>;
  if (words == 0 && !accumulate) memset(c, 0, static_cast<size_t>(M * width) * sizeof(Sum<Operand>));
  for (int64_t k = 0; k < words; k += depth) {
    const int64_t n = words - k < depth ? words - k : depth;
    const Word<Operand>* const panel = block(k, n);
    for (int64_t row = 0; row < M; row += kRows) {
      const int64_t height = tile_height<kRows>(row, total_rows);
      multiply_rows<Operand, kRows, columns, half>(height, n, tiles + row * words + k * height, panel, c + row * width,
                                                   accumulate || k > 0);
    }
  }
}

// The same for a panel of `units` units, which may need but half of each vector.
template <class Operand, int64_t kRows, int columns, class Block>
void multiply(int64_t M, int64_t total_rows, int64_t words, const Word<Operand>* tiles, const Block& block,
              int64_t units, Sum<Operand>* c, bool accumulate) {
  constexpr bool kHalves = sizeof(typename HalfOf<Sum<Operand>>::type) < kVectorBytes;
  if (kHalves && 2 * units <= kUnits<Sum<Operand>>) {
    multiply_blocks<Operand, kRows, columns, kHalves>(M, total_rows, words, tiles, block, c, accumulate);
  } else {
    multiply_blocks<Operand, kRows, columns, false>(M, total_rows, words, tiles, block, c, accumulate);
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

}  // namespace

}  // namespace llmkern::cpu::LLMKERN_ISA
