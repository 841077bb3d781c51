// SPDX-License-Identifier: Apache-2.0
// The products of a recurrence: rows of the batch in tiles, weights in panels, a tile by a panel in registers.
//
// A panel is as many hidden units as a vector has lanes, with all the columns that belong to them. A step of a panel is
// one register tile: a few rows of the batch by the four gates of its units. What a step leaves is written where the
// next one reads it: in tiles, one k after the other.
#pragma once

#include "kernels/cpu/gemm.h"

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

// Of a panel, multiplied by all rows before the next: most of the first-level cache.
constexpr int64_t kPanelBytes = 24 << 10;

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

// [I + P, kGatesWidth]: the input's weights, then the recurrent ones.
template <class T>
void pack_panel(const T* weight_ih, const T* weight_hh, int64_t I, int64_t H, int64_t P, int64_t panel, T* to) {
  pack_gates(weight_ih, I, H, panel * kUnits<T>, to);
  pack_gates(weight_hh, P, H, panel * kUnits<T>, to + I * kGatesWidth<T>);
}

template <class T>
int64_t panels_of(int64_t H) {
  return (H + kUnits<T> - 1) / kUnits<T>;
}

}  // namespace

}  // namespace llmkern::cpu::LLMKERN_ISA
