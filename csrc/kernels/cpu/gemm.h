// SPDX-License-Identifier: Apache-2.0
// Matrix products, for the shapes and the guarantees that recurrent kernels need.
//
//   C[M, N] = A[M, K] B[K, N]  (+ C)      A and B with any strides, C row-major
//
// A is copied into tiles of up to kTileRows rows, [K, rows] each, and B into panels of kPanel columns, [K, kPanel]
// each, zero-padded at the right edge. A tile times a panel is then one pass over k that reads two streams and keeps
// rows * kPanel / lanes accumulators: 98 % of the FMA rate on Zen 4, where A in place (a stream a row) gave 77 %.
//
// Every element of C is summed over k in the same order (blocks of kBlockK, ascending, one accumulator), whatever the
// tile, the split over threads or the rows beside it. So results are the same bits on any number of threads, and a row
// does not depend on the batch it is in.
#pragma once

#include "kernels/cpu/scratch.h"
#include "kernels/cpu/simd.h"
#include "kernels/parallel.h"

namespace llmkern::cpu::LLMKERN_ISA {

// Registers: rows * 2 accumulators, 2 of B, 1 for a broadcast of A; 32 with AVX-512, 16 otherwise.
constexpr int kTileRows = kVectorBytes == 64 ? 14 : kVectorBytes == 32 ? 6 : 4;
template <class T>
constexpr int64_t kPanel = 2 * kLanes<T>;
constexpr int64_t kBlockK = 256;                              // a panel is 32 KiB with AVX-512
constexpr int64_t kBlockRows = 4096 / kTileRows * kTileRows;  // tiles pass by a panel: 2 bytes a cycle from any cache

template <class T>
struct Matrix {
  const T* data;
  int64_t row_stride, column_stride;

  const T* at(int64_t row, int64_t column) const { return data + row * row_stride + column * column_stride; }
};

template <class T>
Matrix<T> row_major(const T* data, int64_t columns) {
  return {data, columns, 1};
}

template <class T>
Matrix<T> transposed(const T* data, int64_t columns) {
  return {data, 1, columns};
}

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// panel[k, n] = B[k, n] where the columns of B lie in memory one after the other: squares are transposed in registers.
template <class T>
void pack_columns(const Matrix<T>& b, int64_t K, int64_t width, T* panel) {
  constexpr int lanes = kLanes<T>;
  for (int64_t n = 0; n < width; n += lanes) {
    int64_t k = 0;
    for (; n + lanes <= width && k + lanes <= K; k += lanes) {
      Vec<T> square[lanes];
      for (int i = 0; i < lanes; ++i) square[i] = load(b.at(k, n + i));
      transpose<T>(square);
      for (int i = 0; i < lanes; ++i) store(panel + (k + i) * kPanel<T> + n, square[i]);
    }
    const int64_t last = n + lanes < width ? n + lanes : width;
    for (; k < K; ++k) {
      for (int64_t i = n; i < last; ++i) panel[k * kPanel<T> + i] = *b.at(k, i);
    }
  }
}

// panels[(n / kPanel), k, n % kPanel] = B[k, n]; room for round_up(N, kPanel) * K elements. One stride of B is 1.
template <class T>
void pack_panels(const Matrix<T>& b, int64_t K, int64_t N, T* panels) {
  for (int64_t first = 0; first < N; first += kPanel<T>, panels += K * kPanel<T>) {
    const int64_t width = N - first < kPanel<T> ? N - first : kPanel<T>;
    if (width < kPanel<T>) memset(panels, 0, static_cast<size_t>(K * kPanel<T>) * sizeof(T));
    if (b.column_stride != 1) {
      pack_columns(Matrix<T>{b.at(0, first), b.row_stride, b.column_stride}, K, width, panels);
      continue;
    }
    for (int64_t k = 0; k < K; ++k) {
      memcpy(panels + k * kPanel<T>, b.at(k, first), static_cast<size_t>(width) * sizeof(T));
    }
  }
}

// C[rows, kPanel] = tile[K, rows]^T panel[K, kPanel]  (+ C), all of it in registers. No partial store in here: gcc
// would keep the accumulators in memory for it.
template <class T, int rows>
void multiply_whole_tile(int64_t K, const T* tile, const T* panel, T* c, int64_t c_stride, bool accumulate) {
  constexpr int lanes = kLanes<T>;
  Vec<T> left[rows] = {}, right[rows] = {};
  for (int i = 0; i < rows; ++i) {  // C is needed at the end, from far away
    __builtin_prefetch(c + i * c_stride, 1);
    __builtin_prefetch(c + i * c_stride + lanes, 1);
  }
  for (int64_t k = 0; k < K; ++k, tile += rows, panel += kPanel<T>) {
    const Vec<T> b_left = load(panel), b_right = load(panel + lanes);
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
      const Vec<T> x = broadcast(tile[i]);
      left[i] = fma(x, b_left, left[i]);
      right[i] = fma(x, b_right, right[i]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i, c += c_stride) {
    store(c, accumulate ? load(c) + left[i] : left[i]);
    store(c + lanes, accumulate ? load(c + lanes) + right[i] : right[i]);
  }
}

// The same for the first `width` columns.
template <class T, int rows>
void multiply_tile(int64_t K, const T* tile, const T* panel, T* c, int64_t c_stride, int64_t width, bool accumulate) {
  if (width == kPanel<T>) return multiply_whole_tile<T, rows>(K, tile, panel, c, c_stride, accumulate);
  T whole[rows * kPanel<T>];
  multiply_whole_tile<T, rows>(K, tile, panel, whole, kPanel<T>, false);
  for (int i = 0; i < rows; ++i, c += c_stride) {
    for (int64_t n = 0; n < width; ++n) c[n] = accumulate ? c[n] + whole[i * kPanel<T> + n] : whole[i * kPanel<T> + n];
  }
}

template <class T, int rows = kTileRows>
void multiply_last_tile(int64_t M, int64_t K, const T* tile, const T* panel, T* c, int64_t c_stride, int64_t width,
                        bool accumulate) {
  if constexpr (rows > 0) {
    if (M == rows) return multiply_tile<T, rows>(K, tile, panel, c, c_stride, width, accumulate);
    multiply_last_tile<T, rows - 1>(M, K, tile, panel, c, c_stride, width, accumulate);
  }
}

// tiles[m / kTileRows][k][m % kTileRows] = A[m, k]; the last tile is as high as there are rows left. M * K elements.
// A few tiles are filled side by side where the columns of A are contiguous: that reads whole cache lines.
template <class T>
void pack_tiles(const Matrix<T>& a, int64_t M, int64_t K, T* tiles) {
  if (a.column_stride == 1) {
    for (int64_t m = 0; m < M; ++m) {
      const int64_t first = m / kTileRows * kTileRows, rows = M - first < kTileRows ? M - first : kTileRows;
      const T* from = a.at(m, 0);
      T* to = tiles + first * K + m - first;
      for (int64_t k = 0; k < K; ++k) to[k * rows] = from[k];
    }
    return;
  }
  constexpr int64_t kSideBySide = 8 * kTileRows;
  for (int64_t first = 0; first < M; first += kSideBySide) {
    const int64_t last = first + kSideBySide < M ? first + kSideBySide : M;
    for (int64_t k = 0; k < K; ++k) {
      for (int64_t m = first; m < last; m += kTileRows) {
        const int64_t rows = last - m < kTileRows ? last - m : kTileRows;
        T* to = tiles + m * K + k * rows;
        if (rows == kTileRows && a.row_stride == 1) {
          memcpy(to, a.at(m, k), kTileRows * sizeof(T));
        } else {
          for (int64_t i = 0; i < rows; ++i) to[i] = *a.at(m + i, k);
        }
      }
    }
  }
}

// C[M, width] = tiles[M, K] panel[K, kPanel]  (+ C)
template <class T>
void multiply_panel(int64_t M, int64_t K, const T* tiles, const T* panel, T* c, int64_t c_stride, int64_t width,
                    bool accumulate) {
  for (; M >= kTileRows; M -= kTileRows, tiles += kTileRows * K, c += kTileRows * c_stride) {
    multiply_tile<T, kTileRows>(K, tiles, panel, c, c_stride, width, accumulate);
  }
  multiply_last_tile<T>(M, K, tiles, panel, c, c_stride, width, accumulate);
}

template <class T>
void gemm_serial(int64_t M, int64_t N, int64_t K, const Matrix<T>& a, const Matrix<T>& b, T* c, int64_t c_stride,
                 bool accumulate) {
  for (int64_t k = 0; k < K; k += kBlockK) {
    const int64_t depth = K - k < kBlockK ? K - k : kBlockK;
    for (int64_t m = 0; m < M; m += kBlockRows) {
      const int64_t rows = M - m < kBlockRows ? M - m : kBlockRows;
      T* tiles = scratch<T>(Slot::kPackedA, rows * depth);
      pack_tiles(Matrix<T>{a.at(m, k), a.row_stride, a.column_stride}, rows, depth, tiles);
      T* panel = scratch<T>(Slot::kPackedB, depth * kPanel<T>);
      for (int64_t n = 0; n < N; n += kPanel<T>) {
        const int64_t width = N - n < kPanel<T> ? N - n : kPanel<T>;
        pack_panels(Matrix<T>{b.at(k, n), b.row_stride, b.column_stride}, depth, width, panel);
        multiply_panel(rows, depth, tiles, panel, c + m * c_stride + n, c_stride, width, accumulate || k > 0);
      }
    }
  }
}

// C[M, N] = A[M, K] B[K, N]  (+ C)
template <class T>
void gemm(int64_t M, int64_t N, int64_t K, const Matrix<T>& a, const Matrix<T>& b, T* c, int64_t c_stride,
          bool accumulate, const Parallel& parallel) {
  if (M == 0 || N == 0) return;
  if (K == 0 && !accumulate) {
    for (int64_t m = 0; m < M; ++m) memset(c + m * c_stride, 0, static_cast<size_t>(N) * sizeof(T));
  }
  const int64_t panels = (N + kPanel<T> - 1) / kPanel<T>, tiles = (M + kTileRows - 1) / kTileRows;
  // About 20 us of work: less is not worth waking a thread for.
  const int64_t tile_cost = K * kTileRows * kPanel<T> + 1, grain = (int64_t{1} << 20) / tile_cost + 1;
  if (panels >= 2 * parallel.threads() || panels >= tiles) {
    parallel(panels, grain / tiles + 1, [&](int64_t begin, int64_t end) {
      const int64_t first = begin * kPanel<T>, last = end * kPanel<T> < N ? end * kPanel<T> : N;
      gemm_serial(M, last - first, K, a, Matrix<T>{b.at(0, first), b.row_stride, b.column_stride}, c + first, c_stride,
                  accumulate);
    });
  } else {
    parallel(tiles, grain / panels + 1, [&](int64_t begin, int64_t end) {
      const int64_t first = begin * kTileRows, last = end * kTileRows < M ? end * kTileRows : M;
      gemm_serial(last - first, N, K, Matrix<T>{a.at(first, 0), a.row_stride, a.column_stride}, b, c + first * c_stride,
                  c_stride, accumulate);
    });
  }
}

// sums[n] = sum over m of A[m, n]  (+ sums), A [M, N] row-major. Blocks of rows are summed on their own, so that the
// rounding error grows with the block and with the number of blocks, not with M.
template <class T>
void sum_rows(int64_t M, int64_t N, const T* a, T* sums, bool accumulate, const Parallel& parallel) {
  constexpr int64_t kBlock = 64, kColumns = 256;  // columns: whole cache lines of a row, and sums that stay in reach
  parallel((N + kColumns - 1) / kColumns, (1 << 17) / (M * kColumns + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * kColumns; first < N && first < end * kColumns; first += kColumns) {
      const int64_t width = N - first < kColumns ? N - first : kColumns;
      T total[kColumns] = {};
      for (int64_t m = 0; m < M; m += kBlock) {
        T block[kColumns] = {};
        for (int64_t i = m; i < M && i < m + kBlock; ++i) {
          for (int64_t n = 0; n < width; ++n) block[n] += a[i * N + first + n];
        }
        for (int64_t n = 0; n < width; ++n) total[n] += block[n];
      }
      for (int64_t n = 0; n < width; ++n) sums[first + n] = accumulate ? sums[first + n] + total[n] : total[n];
    }
  });
}

}  // namespace llmkern::cpu::LLMKERN_ISA
