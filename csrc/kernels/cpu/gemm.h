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
template <class Operand>
constexpr int64_t kPanel = 2 * kLanes<typename Operand::Sum>;
constexpr int64_t kBlockK = 256;                              // words: a panel is 32 KiB with AVX-512
constexpr int64_t kBlockRows = 4096 / kTileRows * kTileRows;  // tiles pass by a panel: 2 bytes a cycle from any cache

template <class Operand>
using Word = typename Operand::Word;
template <class Operand>
using Sum = typename Operand::Sum;

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
template <class Operand>
[[gnu::always_inline]] inline void load_transposed(const typename Operand::Storage* rows, int64_t stride,
                                                   Vec<Word<Operand>> (&columns)[kPartLanes<Word<Operand>>]) {
  const auto parts = [&](int64_t i) { return Operand::parts(rows + i * stride, kPartLanes<Word<Operand>> * stride); };
  load_columns<Word<Operand>>(parts, columns);
}

// to[word of k][n] = rows[n * stride + k] for as many rows as there are lanes, a row of `to` every `width` words:
// transposed in registers.
template <class Operand>
void transpose_words(const typename Operand::Storage* rows, int64_t stride, int64_t K, int64_t width,
                     Word<Operand>* to) {
  constexpr int lanes = kLanes<Word<Operand>>, part = kPartLanes<Word<Operand>>;
  int64_t k = 0;
  for (; k + part * Operand::kTerms <= K; k += part * Operand::kTerms, to += part * width) {
    Vec<Word<Operand>> columns[part];
    load_transposed<Operand>(rows + k, stride, columns);
#pragma GCC unroll 4
    for (int i = 0; i < part; ++i) store(to + i * width, columns[i]);
  }
  for (; k < K; k += Operand::kTerms, to += width) {
    for (int i = 0; i < lanes; ++i) to[i] = Operand::word(rows + i * stride + k, K - k);
  }
}

// The same for fewer rows.
template <class Operand>
void transpose_words(const typename Operand::Storage* rows, int64_t stride, int64_t K, int64_t width, int64_t count,
                     Word<Operand>* to) {
  if (count == kLanes<Word<Operand>>) return transpose_words<Operand>(rows, stride, K, width, to);
  for (int64_t k = 0; k < K; k += Operand::kTerms, to += width) {
    for (int64_t i = 0; i < count; ++i) to[i] = Operand::word(rows + i * stride + k, K - k);
  }
}

// panels[(n / kPanel), word of k, n % kPanel] = B[k, n]; room for round_up(N, kPanel) * words of K. One stride of B
// is 1.
template <class Operand>
void pack_panels(const Matrix<typename Operand::Storage>& b, int64_t K, int64_t N, Word<Operand>* panels) {
  const int64_t size = words_of<Operand>(K) * kPanel<Operand>;
  for (int64_t first = 0; first < N; first += kPanel<Operand>, panels += size) {
    const int64_t width = N - first < kPanel<Operand> ? N - first : kPanel<Operand>;
    if (width < kPanel<Operand>) memset(panels, 0, static_cast<size_t>(size) * sizeof(Word<Operand>));
    if (b.column_stride != 1) {
      for_lanes<Word<Operand>>(0, width, [&](int64_t n, int64_t count) {
        transpose_words<Operand>(b.at(0, first + n), b.column_stride, K, kPanel<Operand>, count, panels + n);
      });
      continue;
    }
    Word<Operand>* to = panels;
    for (int64_t k = 0; k < K; k += Operand::kTerms, to += kPanel<Operand>) {
      Operand::line(b.at(k, first), b.row_stride, K - k, width, to);
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
template <class Operand>
void pack_whole_tile(const typename Operand::Storage* rows, int64_t stride, int64_t K, Word<Operand>* tile) {
  constexpr int lanes = kLanes<Word<Operand>>;
  int64_t k = 0;
  if constexpr (kTileRows <= lanes) {
    for (; k + lanes * Operand::kTerms <= K; k += lanes * Operand::kTerms, tile += lanes * kTileRows) {
      Vec<Word<Operand>> square[lanes];
      for (int i = 0; i < lanes; ++i) square[i] = Operand::words(rows + (i < kTileRows ? i : 0) * stride + k);
      transpose<Word<Operand>>(square);
      for (int i = 0; i + 1 < lanes; ++i) store(tile + i * kTileRows, square[i]);
      store(tile + (lanes - 1) * kTileRows, square[lanes - 1], kTileRows);
    }
  }
  for (; k < K; k += Operand::kTerms, tile += kTileRows) {
    for (int i = 0; i < kTileRows; ++i) tile[i] = Operand::word(rows + i * stride + k, K - k);
  }
}

// tiles[m / kTileRows][word of k][m % kTileRows] = A[m, k]; the last tile is as high as there are rows left. A few
// tiles are filled side by side where the columns of A are contiguous: that reads whole cache lines. One stride of A
// is 1.
template <class Operand>
void pack_tiles(const Matrix<typename Operand::Storage>& a, int64_t M, int64_t K, Word<Operand>* tiles) {
  const int64_t words = words_of<Operand>(K);
  if (a.column_stride == 1) {
    int64_t m = 0;
    for (; m + kTileRows <= M; m += kTileRows) pack_whole_tile<Operand>(a.at(m, 0), a.row_stride, K, tiles + m * words);
    for (; m < M; ++m) {
      const int64_t first = m / kTileRows * kTileRows, rows = M - first;
      const typename Operand::Storage* from = a.at(m, 0);
      Word<Operand>* to = tiles + first * words + m - first;
      for (int64_t k = 0; k < words; ++k)
        to[k * rows] = Operand::word(from + k * Operand::kTerms, K - k * Operand::kTerms);
    }
    return;
  }
  constexpr int64_t kSideBySide = 8 * kTileRows, kAhead = 8;
  Word<Operand> line[kSideBySide];
  for (int64_t first = 0; first < M; first += kSideBySide) {
    const int64_t last = first + kSideBySide < M ? first + kSideBySide : M;
    for (int64_t k = 0; k < words; ++k) {
      if (k + kAhead < words) fetch_line(a.at(first, (k + kAhead) * Operand::kTerms), last - first);
      Operand::line(a.at(first, k * Operand::kTerms), a.column_stride, K - k * Operand::kTerms, last - first, line);
      for (int64_t m = first; m < last; m += kTileRows) {
        const int64_t rows = last - m < kTileRows ? last - m : kTileRows;
        Word<Operand>* to = tiles + m * words + k * rows;
        if (rows == kTileRows) {
          memcpy(to, line + m - first, kTileRows * sizeof(Word<Operand>));
        } else {
          memcpy(to, line + m - first, static_cast<size_t>(rows) * sizeof(Word<Operand>));
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
template <class Operand, int rows, int columns, int64_t ahead, int64_t width = columns * kLanes<Word<Operand>>,
          bool half = false>
void multiply_whole(int64_t K, const Word<Operand>* tile, const Word<Operand>* panel, Sum<Operand>* c, int64_t c_stride,
                    bool accumulate) {
  using Words = std::conditional_t<half, typename HalfOf<Word<Operand>>::type, Vec<Word<Operand>>>;
  using Sums = std::conditional_t<half, typename HalfOf<Sum<Operand>>::type, Vec<Sum<Operand>>>;
  constexpr int lanes = kLanes<Word<Operand>>;
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
      for (int j = 0; j < columns; ++j) sums[i][j] = Operand::multiply_add(x, b[j], sums[i][j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i, c += c_stride) {
#pragma GCC unroll 4
    for (int j = 0; j < columns; ++j) {
      Sums before = {};
      if (accumulate) memcpy(&before, c + j * lanes, sizeof before);
      const Sums total = accumulate ? before + sums[i][j] : sums[i][j];
      if constexpr (sizeof total < kVectorBytes) store(c + j * lanes, Vec<Sum<Operand>>{});
      memcpy(c + j * lanes, &total, sizeof total);
    }
  }
}

// The same for the first `width` columns.
template <class Operand, int rows>
void multiply_tile(int64_t K, const Word<Operand>* tile, const Word<Operand>* panel, Sum<Operand>* c, int64_t c_stride,
                   int64_t width, bool accumulate) {
  constexpr int64_t lanes = kLanes<Sum<Operand>>;
  if (width == kPanel<Operand>) {
    for (int i = 0; i < rows; ++i) {  // C is needed at the end, from far away
      __builtin_prefetch(c + i * c_stride, 1);
      __builtin_prefetch(c + i * c_stride + lanes, 1);
    }
    return multiply_whole<Operand, rows, 2, 0>(K, tile, panel, c, c_stride, accumulate);
  }
  Sum<Operand> whole[rows * kPanel<Operand>];  // no partial store in there
  if (width <= lanes / 2) {
    multiply_whole<Operand, rows, 1, 0, kPanel<Operand>, true>(K, tile, panel, whole, kPanel<Operand>, false);
  } else if (width <= lanes) {
    multiply_whole<Operand, rows, 1, 0, kPanel<Operand>>(K, tile, panel, whole, kPanel<Operand>, false);
  } else {
    multiply_whole<Operand, rows, 2, 0>(K, tile, panel, whole, kPanel<Operand>, false);
  }
  for (int i = 0; i < rows; ++i, c += c_stride) {
    for_lanes<Sum<Operand>>(0, width, [&](int64_t n, int64_t count) {
      const Vec<Sum<Operand>> sums = load(whole + i * kPanel<Operand> + n);
      store(c + n, accumulate ? load(c + n, count) + sums : sums, count);
    });
  }
}

template <class Operand, int rows = kTileRows>
void multiply_last_tile(int64_t M, int64_t K, const Word<Operand>* tile, const Word<Operand>* panel, Sum<Operand>* c,
                        int64_t c_stride, int64_t width, bool accumulate) {
  if constexpr (rows > 0) {
    if (M == rows) return multiply_tile<Operand, rows>(K, tile, panel, c, c_stride, width, accumulate);
    multiply_last_tile<Operand, rows - 1>(M, K, tile, panel, c, c_stride, width, accumulate);
  }
}

// C[M, width] = tiles[M, K] panel[K, kPanel]  (+ C) for K words
template <class Operand>
void multiply_panel(int64_t M, int64_t K, const Word<Operand>* tiles, const Word<Operand>* panel, Sum<Operand>* c,
                    int64_t c_stride, int64_t width, bool accumulate) {
  for (; M >= kTileRows; M -= kTileRows, tiles += kTileRows * K, c += kTileRows * c_stride) {
    multiply_tile<Operand, kTileRows>(K, tiles, panel, c, c_stride, width, accumulate);
  }
  multiply_last_tile<Operand>(M, K, tiles, panel, c, c_stride, width, accumulate);
}

// ---- whole products

template <class Operand>
void gemm_serial(int64_t M, int64_t N, int64_t K, const Matrix<typename Operand::Storage>& a,
                 const Matrix<typename Operand::Storage>& b, Sum<Operand>* c, int64_t c_stride, bool accumulate) {
  constexpr int64_t kDepth = kBlockK * Operand::kTerms;
  for (int64_t k = 0; k < K; k += kDepth) {
    const int64_t depth = K - k < kDepth ? K - k : kDepth, words = words_of<Operand>(depth);
    for (int64_t m = 0; m < M; m += kBlockRows) {
      const int64_t rows = M - m < kBlockRows ? M - m : kBlockRows;
      const auto tiles = scratch<Word<Operand>>(Slot::kGemmTiles, rows * words);
      pack_tiles<Operand>(a.from(m, k), rows, depth, tiles);
      const auto panel = scratch<Word<Operand>>(Slot::kGemmPanel, words * kPanel<Operand>);
      for (int64_t n = 0; n < N; n += kPanel<Operand>) {
        const int64_t width = N - n < kPanel<Operand> ? N - n : kPanel<Operand>;
        pack_panels<Operand>(b.from(k, n), depth, width, panel);
        multiply_panel<Operand>(rows, words, tiles, panel, c + m * c_stride + n, c_stride, width, accumulate || k > 0);
      }
    }
  }
}

// Into a C of fewer bits than the sums: some rows of these are kept until the last block of k, then rounded once.
template <class Operand, class C>
void gemm_rounded(int64_t M, int64_t N, int64_t K, const Matrix<typename Operand::Storage>& a,
                  const Matrix<typename Operand::Storage>& b, C* c, int64_t c_stride) {
  for (int64_t m = 0; m < M; m += kBlockRows) {
    const int64_t rows = M - m < kBlockRows ? M - m : kBlockRows;
    const auto sums = scratch<Sum<Operand>>(Slot::kGemmSums, rows * N);
    gemm_serial<Operand>(rows, N, K, a.from(m, 0), b, sums.get(), N, false);
    for (int64_t i = 0; i < rows; ++i) convert(c + (m + i) * c_stride, sums + i * N, N);
  }
}

// C[M, N] = A[M, K] B[K, N]  (+ C, where C has the type of the sums)
template <class Operand, class C>
void gemm(int64_t M, int64_t N, int64_t K, const Matrix<typename Operand::Storage>& a,
          const Matrix<typename Operand::Storage>& b, C* c, int64_t c_stride, bool accumulate,
          const Parallel& parallel) {
  const auto serial = [=](int64_t rows, int64_t columns, const auto& left, const auto& right, C* to) {
    if constexpr (std::is_same_v<C, Sum<Operand>>) {
      gemm_serial<Operand>(rows, columns, K, left, right, to, c_stride, accumulate);
    } else {
      gemm_rounded<Operand>(rows, columns, K, left, right, to, c_stride);
    }
  };
  if (M == 0 || N == 0) return;
  if (K == 0 && !accumulate) {
    for (int64_t m = 0; m < M; ++m) memset(c + m * c_stride, 0, static_cast<size_t>(N) * sizeof(C));
  }
  if (K == 0) return;
  const int64_t panels = (N + kPanel<Operand> - 1) / kPanel<Operand>, tiles = (M + kTileRows - 1) / kTileRows;
  // About 20 us of work: less is not worth waking a thread for.
  const int64_t tile_cost = words_of<Operand>(K) * kTileRows * kPanel<Operand>,
                grain = (int64_t{1} << 20) / tile_cost + 1;
  // The columns or the rows are divided, whatever leaves the busiest thread less to multiply.
  const int64_t threads = parallel.threads(), most_panels = (panels + threads - 1) / threads;
  const int64_t most_tiles = (tiles + threads - 1) / threads;
  if (most_panels * kPanel<Operand> * M <= most_tiles * kTileRows * N) {
    parallel(panels, grain / tiles + 1, [&](int64_t begin, int64_t end) {
      const int64_t first = begin * kPanel<Operand>, last = end * kPanel<Operand> < N ? end * kPanel<Operand> : N;
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
