// SPDX-License-Identifier: Apache-2.0
// A block's tile of a matrix product: kRows rows of A times 16 columns of B in each of kPlanes planes (an LSTM's
// gates), K walked in chunks that pass through shared memory while earlier ones are multiplied.
//
// The same bits for a row whatever the tile: the sum over K is kChains sums, chain c over the groups of neighbouring k
// whose number is c modulo kChains, each in ascending order; then chain c takes in chain c + kChains / 2, and so on.
// A small tile gives every chain to threads of its own, a large tile several to one thread: that changes no order.
#pragma once

#include "kernels/cuda/async.cuh"
#include "kernels/cuda/matrix.cuh"
#include "kernels/half.h"

namespace llmkern::cuda {

constexpr int kTileThreads = 256;
constexpr int kTileColumns = 16;
constexpr int kTileStages = 4;     // chunks in shared memory at once
constexpr int kSegmentBytes = 16;  // what a thread copies, and what a thread of the fma path reads, at a time

template <class T>
constexpr int kSegment = kSegmentBytes / static_cast<int>(sizeof(T));

// ---- copies ---------------------------------------------------------------------------------------------------------

// The widest copy, at most 16 bytes, that suits the address of a matrix and of all its rows.
inline int copy_width(const void* matrix, int64_t row_bytes) {
  const uint64_t bits = reinterpret_cast<uintptr_t>(matrix) | static_cast<uint64_t>(row_bytes) | kSegmentBytes;
  return static_cast<int>(bits & (~bits + 1));
}

template <int kBytes, class T>
__device__ inline void copy_pieces(T* shared, const T* global, int64_t count) {
  constexpr int kPiece = kBytes / static_cast<int>(sizeof(T));
#pragma unroll
  for (int i = 0; i < kSegment<T>; i += kPiece) async_copy<kBytes>(shared + i, global + i, count > i);
}

// Copies a segment's first `count` elements and fills zeros behind them; none (count <= 0) is fine.
template <class T>
__device__ inline void copy_segment(T* shared, const T* global, int64_t count, int width) {
  if (width == 16) {
    copy_pieces<16>(shared, global, count);
  } else if (width == 8) {
    copy_pieces<8>(shared, global, count);
  } else if constexpr (sizeof(T) <= 4) {
    if (width == 4) {
      copy_pieces<4>(shared, global, count);
    } else if constexpr (sizeof(T) == 2) {
      for (int i = 0; i < kSegment<T>; ++i) shared[i] = count > i ? global[i] : T{};
    }
  }
}

// Rows along K: of every chunk a thread copies the same segments, so their addresses are found once.
template <class T, int kRows, int kChunk>
class RowsAlongK {
 public:
  static constexpr int kStride = kChunk + kSegment<T>;  // an odd number of segments: neighbouring rows share no bank
  static constexpr int kElements = kRows * kStride;

  // row_of(r, wanted) gives the address of row r; one that is not wanted is taken as zeros.
  template <class RowOf>
  __device__ RowsAlongK(int64_t K, int width, const RowOf& row_of) : width_(width) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      bool wanted = false;
      row_[i] = row_of(row(i) < kRows ? row(i) : 0, wanted);
      count_[i] = wanted ? K : 0;
    }
  }

  __device__ void copy(T* tile, int64_t chunk) const {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      if (kRows * kSegments % kTileThreads != 0 && row(i) >= kRows) return;
      const int at = static_cast<int>(threadIdx.x) % kSegments * kSegment<T>;
      const int64_t k = chunk * kChunk + at;
      copy_segment(tile + row(i) * kStride + at, row_[i] + k, count_[i] - k, width_);
    }
  }

 private:
  static constexpr int kSegments = kChunk / kSegment<T>;  // a row's
  static constexpr int kCopies = static_cast<int>(ceil_div(kRows * kSegments, kTileThreads));
  static_assert(kTileThreads % kSegments == 0);

  __device__ static int row(int i) {
    return static_cast<int>(threadIdx.x) / kSegments + i * (kTileThreads / kSegments);
  }

  const T* row_[kCopies];
  int64_t count_[kCopies];
  int width_;
};

// Columns [column, column + 16) of a row-major matrix [K, N]: rows across K, one segment a thread.
template <class T, int kChunk>
class RowsAcrossK {
 public:
  static constexpr int kStride = kTileColumns + kSegment<T>;
  static constexpr int kElements = kChunk * kStride;

  __device__ RowsAcrossK(const T* matrix, int64_t K, int64_t N, int64_t column, int width)
      : first_(matrix + column + at()), K_(K), N_(N), count_(N - column - at()), width_(width) {}

  __device__ void copy(T* tile, int64_t chunk) const {
    const int64_t k = chunk * kChunk + row();
    copy_segment(tile + row() * kStride + at(), first_ + k * N_, k < K_ ? count_ : 0, width_);
  }

 private:
  static constexpr int kSegments = kTileColumns / kSegment<T>;
  static_assert(kChunk * kSegments == kTileThreads);

  __device__ static int row() { return static_cast<int>(threadIdx.x) / kSegments; }
  __device__ static int at() { return static_cast<int>(threadIdx.x) % kSegments * kSegment<T>; }

  const T* first_;
  int64_t K_, N_, count_;
  int width_;
};

// ---- sums -----------------------------------------------------------------------------------------------------------

// x[0] + ... + x[N - 1], always in the order told above.
template <int N, class X>
__device__ inline X sum_of_chains(X* x) {
  if constexpr (N == 1) {
    return x[0];
  } else {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) x[i] += x[i + N / 2];
    return sum_of_chains<N / 2>(x);
  }
}

// A block's sums, laid out for the threads that use them: [slices][planes][rows][16].
template <class Product>
__device__ inline typename Product::Sum product_at(const typename Product::Sum* sums, int plane, int row, int column) {
  typename Product::Sum x[Product::kSlices];
#pragma unroll
  for (int slice = 0; slice < Product::kSlices; ++slice) x[slice] = sums[Product::index(slice, plane, row, column)];
  return sum_of_chains<Product::kSlices>(x);
}

// ---- products -------------------------------------------------------------------------------------------------------
//
// kSlices sets of threads divide the groups of a chunk, kOwn = kChains / kSlices chains to a thread.

template <class T, int kRowsOfTile, int kPlanesOfTile, int kChainsOfTile, int kSlicesOfTile>
struct ProductShape {
  using Sum = Widened<T>;
  static constexpr int kRows = kRowsOfTile, kPlanes = kPlanesOfTile, kChains = kChainsOfTile, kSlices = kSlicesOfTile;
  static constexpr int kOwn = kChains / kSlices;
  static_assert(kOwn * kSlices == kChains);
  static constexpr int kSums = kSlices * kPlanes * kRows * kTileColumns;

  __device__ static int index(int slice, int plane, int row, int column) {
    return ((slice * kPlanes + plane) * kRows + row) * kTileColumns + column;
  }
};

// A thread's sums, its chains taken together: that of its row r and column or plane p goes to index(r, p).
template <class T, int kOwn, int kOf, class Index>
__device__ void store_chains(T* sums, const T (&sum)[kOwn][kOf][4], const Index& index) {
#pragma unroll
  for (int r = 0; r < kOf; ++r) {
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      T x[kOwn];
#pragma unroll
      for (int c = 0; c < kOwn; ++c) x[c] = sum[c][r][p];
      sums[index(r, p)] = sum_of_chains<kOwn>(x);
    }
  }
}

constexpr int rows_a_thread(int rows) { return rows < 16 ? 1 : 4; }

// B has its rows along K, [4 * 16, K]: the four planes. By fma: a thread has one column of every plane.
template <class T, int kRows>
struct FourPlanes : ProductShape<T, kRows, 4, 4, 16 * rows_a_thread(kRows) / kRows> {
  using Shape = ProductShape<T, kRows, 4, 4, 16 * rows_a_thread(kRows) / kRows>;
  using Shape::kOwn, Shape::kSlices;
  static constexpr int kChunk = 128 / static_cast<int>(sizeof(T));
  using A = RowsAlongK<T, kRows, kChunk>;
  using B = RowsAlongK<T, 4 * kTileColumns, kChunk>;

  // A warp has 4 rows (of each thread's) by 8 columns.
  static constexpr int kOf = rows_a_thread(kRows), kTeam = kTileThreads / kSlices;
  const int slice = static_cast<int>(threadIdx.x) / kTeam;
  const int column = lane_index() % 8 + warp_index() % 2 * 8;
  const int row = lane_index() / 8 + static_cast<int>(threadIdx.x) % kTeam / 64 * 4;
  T sum[kOwn][kOf][4] = {};

  __device__ void multiply(const T* a, const T* b) {
    using Loaded = Pack<T, kSegment<T>>;
#pragma unroll
    for (int i = 0; i < kChunk / kSegment<T> / kSlices; ++i) {
      const int k = (slice + i * kSlices) * kSegment<T>;
      Loaded x[kOf], y[4];
#pragma unroll
      for (int r = 0; r < kOf; ++r) {
        x[r] = *reinterpret_cast<const Loaded*>(a + (row + r * (kRows / kOf)) * A::kStride + k);
      }
#pragma unroll
      for (int p = 0; p < 4; ++p) {
        y[p] = *reinterpret_cast<const Loaded*>(b + (p * kTileColumns + column) * B::kStride + k);
      }
#pragma unroll
      for (int e = 0; e < kSegment<T>; ++e) {
#pragma unroll
        for (int r = 0; r < kOf; ++r) {
#pragma unroll
          for (int p = 0; p < 4; ++p) {
            sum[i % kOwn][r][p] = multiply_add(x[r].x[e], y[p].x[e], sum[i % kOwn][r][p]);
          }
        }
      }
    }
  }

  __device__ void store(T* sums) const {
    store_chains<T>(sums, sum, [&](int r, int p) { return Shape::index(slice, p, row + r * (kRows / kOf), column); });
  }
};

// B is [K, 16]: one plane. By fma: a thread has four neighbouring columns.
template <class T, int kRows>
struct OnePlane : ProductShape<T, kRows, 1, 16, 64 * rows_a_thread(kRows) / kRows> {
  using Shape = ProductShape<T, kRows, 1, 16, 64 * rows_a_thread(kRows) / kRows>;
  using Shape::kOwn, Shape::kSlices;
  static constexpr int kChunk = 256 / static_cast<int>(sizeof(T));
  using A = RowsAlongK<T, kRows, kChunk>;
  using B = RowsAcrossK<T, kChunk>;

  static constexpr int kOf = rows_a_thread(kRows), kTeam = kTileThreads / kSlices;
  const int slice = static_cast<int>(threadIdx.x) / kTeam;
  const int column = static_cast<int>(threadIdx.x) % 4 * 4;
  const int row = static_cast<int>(threadIdx.x) % kTeam / 4;
  T sum[kOwn][kOf][4] = {};

  __device__ void multiply(const T* a, const T* b) {
    using Loaded = Pack<T, kSegment<T>>;
#pragma unroll
    for (int i = 0; i < kChunk / kSegment<T> / kSlices; ++i) {
      const int k = (slice + i * kSlices) * kSegment<T>;
      Loaded x[kOf];
#pragma unroll
      for (int r = 0; r < kOf; ++r) {
        x[r] = *reinterpret_cast<const Loaded*>(a + (row + r * (kRows / kOf)) * A::kStride + k);
      }
#pragma unroll
      for (int e = 0; e < kSegment<T>; ++e) {
        Loaded y[4 / kSegment<T>];
#pragma unroll
        for (int p = 0; p < 4; p += kSegment<T>) {
          y[p / kSegment<T>] = *reinterpret_cast<const Loaded*>(b + (k + e) * B::kStride + column + p);
        }
#pragma unroll
        for (int r = 0; r < kOf; ++r) {
#pragma unroll
          for (int p = 0; p < 4; ++p) {
            sum[i % kOwn][r][p] = multiply_add(x[r].x[e], y[p / kSegment<T>].x[p % kSegment<T>], sum[i % kOwn][r][p]);
          }
        }
      }
    }
  }

  __device__ void store(T* sums) const {
    store_chains<T>(sums, sum,
                    [&](int r, int p) { return Shape::index(slice, 0, row + r * (kRows / kOf), column + p); });
  }
};

// ---- products by tensor cores ---------------------------------------------------------------------------------------

// A lane's four sums (kernels/cuda/matrix.cuh) of a matrix [16, 8] whose corner is (row, column).
template <class Shape, int kOwn, int kTiles>
__device__ inline void store_fragment(float* sums, const float (&d)[kOwn][kTiles][4], int tile, int slice, int plane,
                                      int row, int column) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float x[kOwn];
#pragma unroll
    for (int c = 0; c < kOwn; ++c) x[c] = d[c][tile][i];
    sums[Shape::index(slice, plane, row + lane_index() / 4 + i / 2 * 8, column + lane_index() % 4 * 2 + i % 2)] =
        sum_of_chains<kOwn>(x);
  }
}

// The address this lane gives for A's fragment [16, 16] at (row, k).
template <class A, class T>
__device__ inline const T* fragment_of_rows(const T* a, int row, int k) {
  return a + (row + lane_index() % 16) * A::kStride + k + lane_index() / 16 * 8;
}

// A warp has 16 rows by 8 columns of every plane.
template <class T, int kRows>
struct FourPlanesByMatrices : ProductShape<T, kRows, 4, 4, 64 / kRows> {
  using Shape = ProductShape<T, kRows, 4, 4, 64 / kRows>;
  using Shape::kOwn, Shape::kSlices;
  static constexpr int kChunk = 64;
  using A = RowsAlongK<T, kRows, kChunk>;
  using B = RowsAlongK<T, 4 * kTileColumns, kChunk>;

  const int column = warp_index() % 2 * 8;
  const int row = warp_index() / 2 % (kRows / 16) * 16;
  const int slice = warp_index() / (kRows / 8);
  float sum[kOwn][4][4] = {};

  __device__ void multiply(const T* a, const T* b) {
    const int matrix = lane_index() / 8;  // of the four a lane's address is for: two planes by two halves of k
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int k = (slice + i * kSlices) * 16;
      uint32_t x[4];
      load_matrices(x, fragment_of_rows<A>(a, row, k));
#pragma unroll
      for (int p = 0; p < 4; p += 2) {
        const int of_b = (p + matrix / 2) * kTileColumns + column + lane_index() % 8;
        uint32_t y[4];
        load_matrices(y, b + of_b * B::kStride + k + matrix % 2 * 8);
        matrix_multiply<T>(sum[i][p], x, {y[0], y[1]});
        matrix_multiply<T>(sum[i][p + 1], x, {y[2], y[3]});
      }
    }
  }

  __device__ void store(float* sums) const {
#pragma unroll
    for (int p = 0; p < 4; ++p) store_fragment<Shape>(sums, sum, p, slice, p, row, column);
  }
};

// A warp has 16 rows by 16 columns.
template <class T, int kRows>
struct OnePlaneByMatrices : ProductShape<T, kRows, 1, 8, 128 / kRows> {
  using Shape = ProductShape<T, kRows, 1, 8, 128 / kRows>;
  using Shape::kOwn, Shape::kSlices;
  static constexpr int kChunk = 128;
  using A = RowsAlongK<T, kRows, kChunk>;
  using B = RowsAcrossK<T, kChunk>;

  const int row = warp_index() % (kRows / 16) * 16;
  const int slice = warp_index() / (kRows / 16);
  float sum[kOwn][2][4] = {};

  __device__ void multiply(const T* a, const T* b) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int k = (slice + i * kSlices) * 16;
      uint32_t x[4], y[4];  // y: two halves of columns by two halves of k
      load_matrices(x, fragment_of_rows<A>(a, row, k));
      load_matrices<true>(y, b + (k + lane_index() % 16) * B::kStride + lane_index() / 16 * 8);
      matrix_multiply<T>(sum[i][0], x, {y[0], y[1]});
      matrix_multiply<T>(sum[i][1], x, {y[2], y[3]});
    }
  }

  __device__ void store(float* sums) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) store_fragment<Shape>(sums, sum, half, slice, 0, row, half * 8);
  }
};

template <class T, int kRows>
using FourPlaneProduct = std::conditional_t<sizeof(T) == 2, FourPlanesByMatrices<T, kRows>, FourPlanes<T, kRows>>;
template <class T, int kRows>
using OnePlaneProduct = std::conditional_t<sizeof(T) == 2, OnePlaneByMatrices<T, kRows>, OnePlane<T, kRows>>;

// ---- the pipeline ---------------------------------------------------------------------------------------------------

template <class T, class Product>
constexpr size_t kTileBytes = kTileStages * (Product::A::kElements + Product::B::kElements) * sizeof(T);

// A block's product of A and B: chunks of both pass through its dynamic shared memory, kTileBytes, which then holds the
// sums. For every thread of the block.
template <class T, class Product>
class Pipeline {
 public:
  using A = typename Product::A;
  using B = typename Product::B;
  static_assert(Product::kSums * sizeof(Widened<T>) <= kTileBytes<T, Product>);

  __device__ Pipeline(const A& a, const B& b, int64_t chunks) : a_(a), b_(b), chunks_(chunks) {
#pragma unroll
    for (int chunk = 0; chunk < kTileStages - 1; ++chunk) {
      if (chunk < chunks_) copy(chunk);
      async_commit();
    }
  }

  // The sums, for product_at.
  __device__ const Widened<T>* multiply() {
    Product product;
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
      async_wait<kTileStages - 2>();
      __syncthreads();  // this chunk has come for all, and the one before it has been read by all
      const int64_t next = chunk + kTileStages - 1;
      if (next < chunks_) copy(next);
      async_commit();
      product.multiply(a_stage(chunk), b_stage(chunk));
    }
    async_wait<0>();
    __syncthreads();  // the stages become the sums' memory
    Widened<T>* sums = shared_memory<Widened<T>>();
    product.store(sums);
    __syncthreads();
    return sums;
  }

 private:
  __device__ static T* a_stage(int64_t chunk) {
    return shared_memory<T>() + static_cast<int>(chunk % kTileStages) * A::kElements;
  }
  __device__ static T* b_stage(int64_t chunk) {
    constexpr int kFirst = kTileStages * A::kElements;
    return shared_memory<T>() + kFirst + static_cast<int>(chunk % kTileStages) * B::kElements;
  }
  __device__ void copy(int64_t chunk) const {
    a_.copy(a_stage(chunk), chunk);
    b_.copy(b_stage(chunk), chunk);
  }

  const A& a_;
  const B& b_;
  int64_t chunks_;
};

}  // namespace llmkern::cuda
