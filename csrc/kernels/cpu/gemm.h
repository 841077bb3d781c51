// SPDX-License-Identifier: Apache-2.0
// Matrix products, for the shapes and the guarantees that recurrent kernels need.
//
//   C[M, N] = A[M, K] B[K, N]  (+ C)      A and B with any strides, C row-major
//
// A is copied into tiles of up to kTileRows rows, [words of K, rows] each, and B into panels of kPanel columns,
// [words of K, kPanel] each, zero-padded at the right edge; an operand (operands.h) says what a word is. A tile times a
// panel is then one pass over k that reads two streams and keeps rows * kPanel / lanes accumulators: 98 % of the FMA
// rate on Zen 4, where A in place (a stream a row) gave 77 %.
//
// Every element of C is summed over k in the same order (blocks of kBlockK words, ascending, one accumulator), whatever
// the tile, the split over threads or the rows beside it. So results are the same bits on any number of threads, and a
// row does not depend on the batch it is in.
#pragma once

#include <type_traits>

#include "kernels/cpu/operands.h"
#include "kernels/cpu/scratch.h"
#include "kernels/parallel.h"

namespace llmkern::cpu::LLMKERN_ISA {

// Registers: rows * 2 accumulators, 2 of B, 1 for a broadcast of A; 32 with AVX-512, 16 otherwise.
constexpr int kTileRows = kVectorBytes == 64 ? 14 : kVectorBytes == 32 ? 6 : 4;
template <class Op>
constexpr int64_t kPanel = 2 * kLanes<typename Op::Sum>;
constexpr int64_t kBlockK = 256;                              // words: a panel is 32 KiB with AVX-512
constexpr int64_t kBlockRows = 4096 / kTileRows * kTileRows;  // tiles pass by a panel: 2 bytes a cycle from any cache

template <class Op>
using Word = typename Op::Word;
template <class Op>
using Sum = typename Op::Sum;

template <class T>
struct Matrix {
  const T* data;
  int64_t row_stride, column_stride;

  const T* at(int64_t row, int64_t column) const { return data + row * row_stride + column * column_stride; }
  Matrix from(int64_t row, int64_t column) const { return {at(row, column), row_stride, column_stride}; }
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

// ---- copies

// columns[k] = word k of as many rows as there are lanes, a row a lane, for as many words as a part of a vector has.
template <class Op>
[[gnu::always_inline]] inline void load_transposed(const typename Op::Storage* rows, int64_t stride,
                                                   Vec<Word<Op>> (&columns)[kPartLanes<Word<Op>>]) {
  const auto parts = [&](int64_t i) { return Op::parts(rows + i * stride, kPartLanes<Word<Op>> * stride); };
  load_columns<Word<Op>>(parts, columns);
}

// to[word of k][n] = rows[n * stride + k] for as many rows as there are lanes, a row of `to` every `width` words:
// transposed in registers.
template <class Op>
void transpose_words(const typename Op::Storage* rows, int64_t stride, int64_t K, int64_t width, Word<Op>* to) {
  constexpr int lanes = kLanes<Word<Op>>, part = kPartLanes<Word<Op>>;
  int64_t k = 0;
  for (; k + part * Op::kTerms <= K; k += part * Op::kTerms, to += part * width) {
    Vec<Word<Op>> columns[part];
    load_transposed<Op>(rows + k, stride, columns);
#pragma GCC unroll 4
    for (int i = 0; i < part; ++i) store(to + i * width, columns[i]);
  }
  for (; k < K; k += Op::kTerms, to += width) {
    for (int i = 0; i < lanes; ++i) to[i] = Op::word(rows + i * stride + k, K - k);
  }
}

// The same for fewer rows.
template <class Op>
void transpose_words(const typename Op::Storage* rows, int64_t stride, int64_t K, int64_t width, int64_t count,
                     Word<Op>* to) {
  if (count == kLanes<Word<Op>>) return transpose_words<Op>(rows, stride, K, width, to);
  for (int64_t k = 0; k < K; k += Op::kTerms, to += width) {
    for (int64_t i = 0; i < count; ++i) to[i] = Op::word(rows + i * stride + k, K - k);
  }
}

// panels[(n / kPanel), word of k, n % kPanel] = B[k, n]; room for round_up(N, kPanel) * words of K. One stride of B
// is 1.
template <class Op>
void pack_panels(const Matrix<typename Op::Storage>& b, int64_t K, int64_t N, Word<Op>* panels) {
  const int64_t size = words_of<Op>(K) * kPanel<Op>;
  for (int64_t first = 0; first < N; first += kPanel<Op>, panels += size) {
    const int64_t width = N - first < kPanel<Op> ? N - first : kPanel<Op>;
    if (width < kPanel<Op>) memset(panels, 0, static_cast<size_t>(size) * sizeof(Word<Op>));
    if (b.column_stride != 1) {
      for_lanes<Word<Op>>(0, width, [&](int64_t n, int64_t count) {
        transpose_words<Op>(b.at(0, first + n), b.column_stride, K, kPanel<Op>, count, panels + n);
      });
      continue;
    }
    Word<Op>* to = panels;
    for (int64_t k = 0; k < K; k += Op::kTerms, to += kPanel<Op>) {
      Op::line(b.at(k, first), b.row_stride, K - k, width, to);
    }
  }
}

// Asks for memory that a stride of kilobytes hides from the machine. Inlined by order: to gcc a function that only
// prefetches has no effect, and a call of it is dropped.
template <class T>
[[gnu::always_inline]] inline void fetch_line(const T* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(from + i);
}

// tile[word of k][i] = rows[i * stride + k] for kTileRows rows. Of a transposed square, which may be larger, what is
// too much of a word is overwritten by the next one.
template <class Op>
void pack_whole_tile(const typename Op::Storage* rows, int64_t stride, int64_t K, Word<Op>* tile) {
  constexpr int lanes = kLanes<Word<Op>>;
  int64_t k = 0;
  if constexpr (kTileRows <= lanes) {
    for (; k + lanes * Op::kTerms <= K; k += lanes * Op::kTerms, tile += lanes * kTileRows) {
      Vec<Word<Op>> square[lanes];
      for (int i = 0; i < lanes; ++i) square[i] = Op::words(rows + (i < kTileRows ? i : 0) * stride + k);
      transpose<Word<Op>>(square);
      for (int i = 0; i + 1 < lanes; ++i) store(tile + i * kTileRows, square[i]);
      store(tile + (lanes - 1) * kTileRows, square[lanes - 1], kTileRows);
    }
  }
  for (; k < K; k += Op::kTerms, tile += kTileRows) {
    for (int i = 0; i < kTileRows; ++i) tile[i] = Op::word(rows + i * stride + k, K - k);
  }
}

// tiles[m / kTileRows][word of k][m % kTileRows] = A[m, k]; the last tile is as high as there are rows left. A few
// tiles are filled side by side where the columns of A are contiguous: that reads whole cache lines. One stride of A
// is 1.
template <class Op>
void pack_tiles(const Matrix<typename Op::Storage>& a, int64_t M, int64_t K, Word<Op>* tiles) {
  const int64_t words = words_of<Op>(K);
  if (a.column_stride == 1) {
    int64_t m = 0;
    for (; m + kTileRows <= M; m += kTileRows) pack_whole_tile<Op>(a.at(m, 0), a.row_stride, K, tiles + m * words);
    for (; m < M; ++m) {
      const int64_t first = m / kTileRows * kTileRows, rows = M - first;
      const typename Op::Storage* from = a.at(m, 0);
      Word<Op>* to = tiles + first * words + m - first;
      for (int64_t k = 0; k < words; ++k) to[k * rows] = Op::word(from + k * Op::kTerms, K - k * Op::kTerms);
    }
    return;
  }
  constexpr int64_t kSideBySide = 8 * kTileRows, kAhead = 8;
  Word<Op> line[kSideBySide];
  for (int64_t first = 0; first < M; first += kSideBySide) {
    const int64_t last = first + kSideBySide < M ? first + kSideBySide : M;
    for (int64_t k = 0; k < words; ++k) {
      if (k + kAhead < words) fetch_line(a.at(first, (k + kAhead) * Op::kTerms), last - first);
      Op::line(a.at(first, k * Op::kTerms), a.column_stride, K - k * Op::kTerms, last - first, line);
      for (int64_t m = first; m < last; m += kTileRows) {
        const int64_t rows = last - m < kTileRows ? last - m : kTileRows;
        Word<Op>* to = tiles + m * words + k * rows;
        if (rows == kTileRows) {
          memcpy(to, line + m - first, kTileRows * sizeof(Word<Op>));
        } else {
          memcpy(to, line + m - first, static_cast<size_t>(rows) * sizeof(Word<Op>));
        }
      }
    }
  }
}

// ---- a tile by a panel

// C[rows, columns * lanes] = tile[K, rows]^T panel[K, columns * lanes]  (+ C) for K words, all of it in registers. No
// partial store in here: gcc would keep the accumulators in memory for it. `ahead`: that many bytes further on lies
// what of the panel is wanted next, and is fetched. `width` is that of the whole panel. `half`: only the first half of
// each vector of columns is multiplied; the other one is 0.
template <class Op, int rows, int columns, int64_t ahead, int64_t width = columns * kLanes<Word<Op>>, bool half = false>
void multiply_whole(int64_t K, const Word<Op>* tile, const Word<Op>* panel, Sum<Op>* c, int64_t c_stride,
                    bool accumulate) {
  using Words = std::conditional_t<half, typename HalfOf<Word<Op>>::type, Vec<Word<Op>>>;
  using Sums = std::conditional_t<half, typename HalfOf<Sum<Op>>::type, Vec<Sum<Op>>>;
  constexpr int lanes = kLanes<Word<Op>>;
  Sums sums[rows][columns] = {};
  for (int64_t k = 0; k < K; ++k, tile += rows, panel += width) {
    Words b[columns];
#pragma GCC unroll 4
    for (int j = 0; j < columns; ++j) {
      memcpy(&b[j], panel + j * lanes, sizeof b[j]);
      if constexpr (ahead > 0) __builtin_prefetch(reinterpret_cast<const char*>(panel + j * lanes) + ahead, 0, 2);
    }
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
      const Words x = tile[i] - Words{};  // broadcast
#pragma GCC unroll 4
      for (int j = 0; j < columns; ++j) sums[i][j] = Op::multiply_add(x, b[j], sums[i][j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i, c += c_stride) {
#pragma GCC unroll 4
    for (int j = 0; j < columns; ++j) {
      Sums before = {};
      if (accumulate) memcpy(&before, c + j * lanes, sizeof before);
      const Sums total = accumulate ? before + sums[i][j] : sums[i][j];
      if constexpr (sizeof total < kVectorBytes) store(c + j * lanes, Vec<Sum<Op>>{});
      memcpy(c + j * lanes, &total, sizeof total);
    }
  }
}

// The same for the first `width` columns.
template <class Op, int rows>
void multiply_tile(int64_t K, const Word<Op>* tile, const Word<Op>* panel, Sum<Op>* c, int64_t c_stride, int64_t width,
                   bool accumulate) {
  constexpr int64_t lanes = kLanes<Sum<Op>>;
  if (width == kPanel<Op>) {
    for (int i = 0; i < rows; ++i) {  // C is needed at the end, from far away
      __builtin_prefetch(c + i * c_stride, 1);
      __builtin_prefetch(c + i * c_stride + lanes, 1);
    }
    return multiply_whole<Op, rows, 2, 0>(K, tile, panel, c, c_stride, accumulate);
  }
  Sum<Op> whole[rows * kPanel<Op>];  // no partial store in there
  if (width <= lanes / 2) {
    multiply_whole<Op, rows, 1, 0, kPanel<Op>, true>(K, tile, panel, whole, kPanel<Op>, false);
  } else if (width <= lanes) {
    multiply_whole<Op, rows, 1, 0, kPanel<Op>>(K, tile, panel, whole, kPanel<Op>, false);
  } else {
    multiply_whole<Op, rows, 2, 0>(K, tile, panel, whole, kPanel<Op>, false);
  }
  for (int i = 0; i < rows; ++i, c += c_stride) {
    for_lanes<Sum<Op>>(0, width, [&](int64_t n, int64_t count) {
      const Vec<Sum<Op>> sums = load(whole + i * kPanel<Op> + n);
      store(c + n, accumulate ? load(c + n, count) + sums : sums, count);
    });
  }
}

template <class Op, int rows = kTileRows>
void multiply_last_tile(int64_t M, int64_t K, const Word<Op>* tile, const Word<Op>* panel, Sum<Op>* c, int64_t c_stride,
                        int64_t width, bool accumulate) {
  if constexpr (rows > 0) {
    if (M == rows) return multiply_tile<Op, rows>(K, tile, panel, c, c_stride, width, accumulate);
    multiply_last_tile<Op, rows - 1>(M, K, tile, panel, c, c_stride, width, accumulate);
  }
}

// C[M, width] = tiles[M, K] panel[K, kPanel]  (+ C) for K words
template <class Op>
void multiply_panel(int64_t M, int64_t K, const Word<Op>* tiles, const Word<Op>* panel, Sum<Op>* c, int64_t c_stride,
                    int64_t width, bool accumulate) {
  for (; M >= kTileRows; M -= kTileRows, tiles += kTileRows * K, c += kTileRows * c_stride) {
    multiply_tile<Op, kTileRows>(K, tiles, panel, c, c_stride, width, accumulate);
  }
  multiply_last_tile<Op>(M, K, tiles, panel, c, c_stride, width, accumulate);
}

// ---- whole products

template <class Op>
void gemm_serial(int64_t M, int64_t N, int64_t K, const Matrix<typename Op::Storage>& a,
                 const Matrix<typename Op::Storage>& b, Sum<Op>* c, int64_t c_stride, bool accumulate) {
  constexpr int64_t kDepth = kBlockK * Op::kTerms;
  for (int64_t k = 0; k < K; k += kDepth) {
    const int64_t depth = K - k < kDepth ? K - k : kDepth, words = words_of<Op>(depth);
    for (int64_t m = 0; m < M; m += kBlockRows) {
      const int64_t rows = M - m < kBlockRows ? M - m : kBlockRows;
      const auto tiles = scratch<Word<Op>>(Slot::kGemmTiles, rows * words);
      pack_tiles<Op>(a.from(m, k), rows, depth, tiles);
      const auto panel = scratch<Word<Op>>(Slot::kGemmPanel, words * kPanel<Op>);
      for (int64_t n = 0; n < N; n += kPanel<Op>) {
        const int64_t width = N - n < kPanel<Op> ? N - n : kPanel<Op>;
        pack_panels<Op>(b.from(k, n), depth, width, panel);
        multiply_panel<Op>(rows, words, tiles, panel, c + m * c_stride + n, c_stride, width, accumulate || k > 0);
      }
    }
  }
}

// Into a C of fewer bits than the sums: some rows of these are kept until the last block of k, then rounded once.
template <class Op, class C>
void gemm_rounded(int64_t M, int64_t N, int64_t K, const Matrix<typename Op::Storage>& a,
                  const Matrix<typename Op::Storage>& b, C* c, int64_t c_stride) {
  for (int64_t m = 0; m < M; m += kBlockRows) {
    const int64_t rows = M - m < kBlockRows ? M - m : kBlockRows;
    const auto sums = scratch<Sum<Op>>(Slot::kGemmSums, rows * N);
    gemm_serial<Op>(rows, N, K, a.from(m, 0), b, sums.get(), N, false);
    for (int64_t i = 0; i < rows; ++i) convert(c + (m + i) * c_stride, sums + i * N, N);
  }
}

// C[M, N] = A[M, K] B[K, N]  (+ C, where C has the type of the sums)
template <class Op, class C>
void gemm(int64_t M, int64_t N, int64_t K, const Matrix<typename Op::Storage>& a, const Matrix<typename Op::Storage>& b,
          C* c, int64_t c_stride, bool accumulate, const Parallel& parallel) {
  const auto serial = [=](int64_t rows, int64_t columns, const auto& left, const auto& right, C* to) {
    if constexpr (std::is_same_v<C, Sum<Op>>) {
      gemm_serial<Op>(rows, columns, K, left, right, to, c_stride, accumulate);
    } else {
      gemm_rounded<Op>(rows, columns, K, left, right, to, c_stride);
    }
  };
  if (M == 0 || N == 0) return;
  if (K == 0 && !accumulate) {
    for (int64_t m = 0; m < M; ++m) memset(c + m * c_stride, 0, static_cast<size_t>(N) * sizeof(C));
  }
  if (K == 0) return;
  const int64_t panels = (N + kPanel<Op> - 1) / kPanel<Op>, tiles = (M + kTileRows - 1) / kTileRows;
  // About 20 us of work: less is not worth waking a thread for.
  const int64_t tile_cost = words_of<Op>(K) * kTileRows * kPanel<Op>, grain = (int64_t{1} << 20) / tile_cost + 1;
  // The columns or the rows are divided, whatever leaves the busiest thread less to multiply.
  const int64_t threads = parallel.threads(), most_panels = (panels + threads - 1) / threads;
  const int64_t most_tiles = (tiles + threads - 1) / threads;
  if (most_panels * kPanel<Op> * M <= most_tiles * kTileRows * N) {
    parallel(panels, grain / tiles + 1, [&](int64_t begin, int64_t end) {
      const int64_t first = begin * kPanel<Op>, last = end * kPanel<Op> < N ? end * kPanel<Op> : N;
      serial(M, last - first, a, b.from(0, first), c + first);
    });
  } else {
    parallel(tiles, grain / panels + 1, [&](int64_t begin, int64_t end) {
      const int64_t first = begin * kTileRows, last = end * kTileRows < M ? end * kTileRows : M;
      serial(last - first, N, a.from(first, 0), b, c + first * c_stride);
    });
  }
}

// sums[n] = sum over m of A[m, n]  (+ sums), A [M, N] row-major. Blocks of rows are summed on their own, so that the
// rounding error grows with the block and with the number of blocks, not with M.
template <class T, class C>
void sum_rows(int64_t M, int64_t N, const T* a, C* sums, bool accumulate, const Parallel& parallel) {
  using S = Widened<T>;
  constexpr int64_t kBlock = 64, kColumns = 256;  // columns: whole cache lines of a row, and sums that stay in reach
  parallel((N + kColumns - 1) / kColumns, (1 << 17) / (M * kColumns + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * kColumns; first < N && first < end * kColumns; first += kColumns) {
      const int64_t width = N - first < kColumns ? N - first : kColumns;
      S total[kColumns] = {};
      for (int64_t m = 0; m < M; m += kBlock) {
        S block[kColumns] = {};
        for (int64_t i = m; i < M && i < m + kBlock; ++i) {
          const T* row = a + i * N + first;
          for_lanes<S>(0, width, [&](int64_t n, int64_t count) {
            store(block + n, load(block + n) + load_wide(row + n, count));
          });
        }
        for (int64_t n = 0; n < width; ++n) total[n] += block[n];
      }
      for (int64_t n = 0; accumulate && n < width; ++n) total[n] = widen(sums[first + n]) + total[n];
      convert(sums + first, total, width);
    }
  });
}

}  // namespace llmkern::cpu::LLMKERN_ISA
