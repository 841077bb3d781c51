// SPDX-License-Identifier: Apache-2.0
// The LSTM's recurrence on CUDA, one launch a step; the contract is kernels/lstm.h.
//
// A block owns some rows of the batch and 16 hidden units, forward with all four of their gates: it multiplies the
// states of its rows by the weights of its units and goes straight on to the gate functions. Backward is the mirror
// image: the product that yields dh of those units is followed by their gate gradients. What the gate functions read
// is loaded before the product and waits in registers.
#include "kernels/lstm.h"

#include <algorithm>

#include "kernels/cuda/tile.cuh"
#include "kernels/run.h"

namespace llmkern::cuda {

namespace {

__device__ inline float hyperbolic_tangent(float x) { return tanhf(x); }
__device__ inline double hyperbolic_tangent(double x) { return tanh(x); }

// 0 where the exponential overflows.
template <class X>
__device__ X sigmoid(X x) {
  return 1 / (1 + exponential(-x));
}

template <class T>
__device__ Widened<T> value_or_zero(const T* array, int64_t i) {
  return array == nullptr ? 0 : widen(array[i]);
}

// The way of one row through time.
struct Course {
  int64_t length;  // it runs over steps [0, length)
  bool reverse;

  __device__ bool runs(int64_t t) const { return t < length; }
  __device__ int64_t first() const { return reverse ? length - 1 : 0; }
  __device__ int64_t last() const { return reverse ? 0 : length - 1; }
  __device__ int64_t before(int64_t t) const { return reverse ? t + 1 : t - 1; }
  __device__ int64_t after(int64_t t) const { return reverse ? t - 1 : t + 1; }
};

template <class Args>
__device__ Course course_of(const Args& a, int64_t b) {
  return {a.lengths == nullptr ? a.steps : a.lengths[b], a.reverse};
}

// The s-th step of the direction.
template <class Args>
__device__ int64_t time_of(const Args& a, int64_t s) {
  return a.reverse ? a.steps - 1 - s : s;
}

// The block's rows and units: of its kRows by 16 cells every thread has kCells.
template <int kRows>
struct Tile {
  static constexpr int kCells = static_cast<int>(ceil_div(kRows * kTileColumns, kTileThreads));

  int64_t B, H, row, unit;

  __device__ Tile(int64_t batch, int64_t hidden) : B(batch), H(hidden) {
    const int64_t across = ceil_div(H, kTileColumns);
    row = blockIdx.x / across * kRows;
    unit = blockIdx.x % across * kTileColumns;
  }

  __device__ static int cell_row(int i) { return (static_cast<int>(threadIdx.x) + i * kTileThreads) / kTileColumns; }
  __device__ static int cell_column() { return static_cast<int>(threadIdx.x) % kTileColumns; }

  // body(i, b, j) for this thread's cells that exist.
  template <class Body>
  __device__ void for_cells(const Body& body) const {
#pragma unroll
    for (int i = 0; i < kCells; ++i) {
      const int64_t b = row + cell_row(i), j = unit + cell_column();
      if (cell_row(i) < kRows && b < B && j < H) body(i, b, j);
    }
  }

  // Whether holds(b) for any row. For every thread of the block.
  template <class Holds>
  __device__ bool any_row(const Holds& holds) const {
    const int r = static_cast<int>(threadIdx.x);
    return __syncthreads_or(r < kRows && row + r < B && holds(row + r)) != 0;
  }
};

// ---- forward

template <class T>
struct CellInputs {
  Widened<T> gate[4], c;
};

template <class T>
__device__ CellInputs<T> load_inputs(const LstmRecurrence<T>& a, int64_t t, int64_t b, int64_t j) {
  CellInputs<T> in{};
  const Course course = course_of(a, b);
  if (!course.runs(t)) return in;
  for (int g = 0; g < 4; ++g) {
    in.gate[g] = a.input_gates[((t * a.B + b) * 4 + g) * a.H + j];
    if (a.bias_ih != nullptr) in.gate[g] += widen(a.bias_ih[g * a.H + j]) + widen(a.bias_hh[g * a.H + j]);
  }
  in.c = t == course.first() ? widen(a.c_0[b * a.H + j]) : a.cells[(course.before(t) * a.B + b) * a.H + j];
  return in;
}

// `in` holds the gates before activation.
template <class T>
__device__ void finish_cell(const LstmRecurrence<T>& a, const CellInputs<T>& in, int64_t t, int64_t b, int64_t j) {
  using X = Widened<T>;
  const Course course = course_of(a, b);
  const int64_t k = (t * a.B + b) * a.H + j, state = b * a.H + j;
  T* gates = a.gates + (t * a.B + b) * 4 * a.H + j;
  if (!course.runs(t)) {
    for (int g = 0; g < 4; ++g) gates[g * a.H] = narrow<T>(0);
    a.cells[k] = 0;
    a.output[k] = narrow<T>(0);
    if (course.length == 0 && t == time_of(a, 0)) {
      a.h_n[state] = a.h_0[state];
      a.c_n[state] = a.c_0[state];
    }
    return;
  }
  X gate[4];
  for (int g = 0; g < 4; ++g) {
    gate[g] = g == 2 ? hyperbolic_tangent(in.gate[g]) : sigmoid(in.gate[g]);
    gates[g * a.H] = narrow<T>(gate[g]);
  }
  const X c = multiply_add(gate[1], in.c, gate[0] * gate[2]);
  const T h = narrow<T>(gate[3] * hyperbolic_tangent(c));
  a.cells[k] = c;
  a.output[k] = h;
  if (t == course.last()) {
    a.h_n[state] = h;
    a.c_n[state] = narrow<T>(c);
  }
}

struct Widths {
  int states, weights;  // of copies, in bytes
};

template <class T, int kRows>
__global__ void __launch_bounds__(kTileThreads, 1) lstm_forward_step(LstmRecurrence<T> a, int64_t s, Widths widths) {
  using Product = FourPlaneProduct<T, kRows>;
  const Tile<kRows> tile(a.B, a.H);
  const int64_t t = time_of(a, s);

  const typename Product::A states(a.H, widths.states, [&](int r, bool& wanted) {
    const int64_t b = tile.row + r;
    if (b >= a.B) return a.h_0;
    const Course course = course_of(a, b);
    wanted = course.runs(t);
    return t == course.first() || !wanted ? a.h_0 + b * a.H : a.output + (course.before(t) * a.B + b) * a.H;
  });
  const typename Product::B weights(a.H, widths.weights, [&](int r, bool& wanted) {
    const int64_t j = tile.unit + r % kTileColumns;
    wanted = j < a.H;
    return a.weight_hh + (wanted ? (r / kTileColumns * a.H + j) * a.H : 0);
  });
  const bool any = a.lengths == nullptr || tile.any_row([&](int64_t b) { return course_of(a, b).runs(t); });
  const int64_t chunks = any ? ceil_div(a.H, Product::kChunk) : 0;
  Pipeline<T, Product> pipeline(states, weights, chunks);
  CellInputs<T> in[tile.kCells];
  tile.for_cells([&](int i, int64_t b, int64_t j) { in[i] = load_inputs(a, t, b, j); });

  const Widened<T>* sums = pipeline.multiply();
  tile.for_cells([&](int i, int64_t b, int64_t j) {
    for (int g = 0; g < 4; ++g) {
      in[i].gate[g] += product_at<Product>(sums, g, tile.cell_row(i), tile.cell_column());
    }
    finish_cell(a, in[i], t, b, j);
  });
}

// ---- backward

template <class T>
struct CellSaved {
  Widened<T> gate[4], c, c_before, dh, dc;  // dh without what comes from the next step
};

template <class T>
__device__ CellSaved<T> load_saved(const LstmRecurrenceBackward<T>& a, int64_t t, int64_t b, int64_t j) {
  CellSaved<T> in{};
  const Course course = course_of(a, b);
  if (!course.runs(t)) return in;
  const int64_t k = (t * a.B + b) * a.H + j, state = b * a.H + j;
  for (int g = 0; g < 4; ++g) in.gate[g] = widen(a.gates[((t * a.B + b) * 4 + g) * a.H + j]);
  in.c = a.cells[k];
  in.c_before = t == course.first() ? widen(a.c_0[state]) : a.cells[(course.before(t) * a.B + b) * a.H + j];
  in.dh = value_or_zero(a.grad_output, k);
  if (t == course.last()) {
    in.dh += value_or_zero(a.grad_h_n, state);
    in.dc = value_or_zero(a.grad_c_n, state);
  } else {
    in.dc = a.grad_cell[state];
  }
  return in;
}

template <class T>
__device__ void finish_cell(const LstmRecurrenceBackward<T>& a, const CellSaved<T>& in, int64_t t, int64_t b,
                            int64_t j) {
  using X = Widened<T>;
  T* grad_gates = a.grad_gates + (t * a.B + b) * 4 * a.H + j;
  if (!course_of(a, b).runs(t)) {
    for (int g = 0; g < 4; ++g) grad_gates[g * a.H] = narrow<T>(0);
    return;
  }
  const auto& gate = in.gate;
  const X tanh_c = hyperbolic_tangent(in.c);
  const X dc = multiply_add(in.dh * gate[3], 1 - tanh_c * tanh_c, in.dc);
  const X da[4] = {dc * gate[2] * gate[0] * (1 - gate[0]), dc * in.c_before * gate[1] * (1 - gate[1]),
                   dc * gate[0] * (1 - gate[2] * gate[2]), in.dh * tanh_c * gate[3] * (1 - gate[3])};
  for (int g = 0; g < 4; ++g) grad_gates[g * a.H] = narrow<T>(da[g]);
  a.grad_cell[b * a.H + j] = dc * gate[1];
}

// Before the first step: the gradients of the initial states.
template <class T>
__device__ void finish_row(const LstmRecurrenceBackward<T>& a, Widened<T> dh, int64_t b, int64_t j) {
  const int64_t state = b * a.H + j;
  const bool ran = course_of(a, b).length > 0;
  a.grad_h_0[state] = narrow<T>(ran ? dh : value_or_zero(a.grad_h_n, state));
  a.grad_c_0[state] = narrow<T>(ran ? a.grad_cell[state] : value_or_zero(a.grad_c_n, state));
}

// s = -1 is what lies before the first step.
template <class T, int kRows>
__global__ void __launch_bounds__(kTileThreads, 1)
    lstm_backward_step(LstmRecurrenceBackward<T> a, int64_t s, Widths widths) {
  using Product = OnePlaneProduct<T, kRows>;
  const Tile<kRows> tile(a.B, a.H);
  const int64_t t = time_of(a, s), K = 4 * a.H;
  // The step whose gate gradients make this step's dh; rows that have none are taken as zeros.
  const auto source = [&](int64_t b) {
    const Course course = course_of(a, b);
    return s < 0 ? course.first() : course.after(t);
  };
  const auto has_source = [&](int64_t b) {
    return s < 0 ? course_of(a, b).length > 0 : s < a.steps - 1 && course_of(a, b).runs(source(b));
  };

  const typename Product::A gates(K, widths.states, [&](int r, bool& wanted) -> const T* {
    const int64_t b = tile.row + r;
    wanted = b < a.B && has_source(b);
    return a.grad_gates + (wanted ? (source(b) * a.B + b) * K : 0);
  });
  const typename Product::B weights(a.weight_hh, K, a.H, tile.unit, widths.weights);
  const int64_t chunks = tile.any_row(has_source) ? ceil_div(K, Product::kChunk) : 0;
  Pipeline<T, Product> pipeline(gates, weights, chunks);
  CellSaved<T> in[tile.kCells] = {};
  if (s >= 0) tile.for_cells([&](int i, int64_t b, int64_t j) { in[i] = load_saved(a, t, b, j); });

  const Widened<T>* sums = pipeline.multiply();
  tile.for_cells([&](int i, int64_t b, int64_t j) {
    in[i].dh += product_at<Product>(sums, 0, tile.cell_row(i), tile.cell_column());
    if (s < 0) {
      finish_row(a, in[i].dh, b, j);
    } else {
      finish_cell(a, in[i], t, b, j);
    }
  });
}

// ---- launching

constexpr const char* kOperation = "lstm";

// Rows of a tile, the smallest first. Matrices have 16 rows at least; doubles of 64 would not fit the registers.
template <class T>
constexpr int kSmallestTile = sizeof(T) == 2 ? 16 : 4;
template <class T>
constexpr int kLargestTile = sizeof(T) == 8 ? 32 : 64;

constexpr int next_tile(int rows) { return rows < 16 ? 16 : 2 * rows; }

// Larger tiles read the weights less often: the largest that leaves no multiprocessor without a block, and that is not
// twice what the batch needs.
template <class T>
int rows_of_tile(int64_t B, int64_t H) {
  const int64_t processors = device_attribute(kOperation, cudaDevAttrMultiProcessorCount);
  int rows = kSmallestTile<T>;
  for (int next = next_tile(rows); next <= kLargestTile<T> && B > rows; next = next_tile(next)) {
    if (ceil_div(B, next) * ceil_div(H, kTileColumns) < processors) break;
    rows = next;
  }
  return rows;
}

// call(rows), rows as a std::integral_constant.
template <class T, int kRows = kSmallestTile<T>, class Call>
void with_rows(int rows, const Call& call) {
  if (rows == kRows) return call(std::integral_constant<int, kRows>());
  if constexpr (next_tile(kRows) <= kLargestTile<T>) with_rows<T, next_tile(kRows)>(rows, call);
}

template <class T, class Product>
LaunchShape shape_of(int64_t B, int64_t H) {
  const int64_t blocks = ceil_div(B, Product::kRows) * ceil_div(H, kTileColumns);
  return {.grid = static_cast<unsigned>(blocks), .block = kTileThreads, .shared_bytes = kTileBytes<T, Product>};
}

template <class T>
void execute(const LstmRecurrence<T>& a, void* stream) {
  if (a.B == 0) return;
  const int64_t row_bytes = a.H * static_cast<int64_t>(sizeof(T));
  const Widths widths = {std::min(copy_width(a.h_0, row_bytes), copy_width(a.output, row_bytes)),
                         copy_width(a.weight_hh, row_bytes)};
  with_rows<T>(rows_of_tile<T>(a.B, a.H), [&](auto rows) {
    const LaunchShape shape = shape_of<T, FourPlaneProduct<T, rows>>(a.B, a.H);
    for (int64_t s = 0; s < a.steps; ++s) {
      launch(kOperation, lstm_forward_step<T, rows>, shape, stream, a, s, widths);
    }
  });
}

template <class T>
void execute(const LstmRecurrenceBackward<T>& a, void* stream) {
  if (a.B == 0) return;
  const int64_t row_bytes = a.H * static_cast<int64_t>(sizeof(T));
  const Widths widths = {copy_width(a.grad_gates, 4 * row_bytes), copy_width(a.weight_hh, row_bytes)};
  with_rows<T>(rows_of_tile<T>(a.B, a.H), [&](auto rows) {
    const LaunchShape shape = shape_of<T, OnePlaneProduct<T, rows>>(a.B, a.H);
    for (int64_t s = a.steps - 1; s >= -1; --s) {
      launch(kOperation, lstm_backward_step<T, rows>, shape, stream, a, s, widths);
    }
  });
}

constexpr int kCopyThreads = 256;

// One element a thread; blocks stride over the elements.
template <class T>
__global__ void __launch_bounds__(kCopyThreads) lstm_previous(LstmPrevious<T> a) {
  const int64_t step = a.B * a.H, count = a.steps * step;
  for (int64_t i = int64_t{blockIdx.x} * kCopyThreads + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * kCopyThreads) {
    const int64_t t = i / step, at = i % step, length = a.lengths == nullptr ? a.steps : a.lengths[at / a.H];
    const bool is_first = t == (a.reverse ? length - 1 : 0);
    const T h = is_first ? a.h_0[at] : t < length ? a.output[i + (a.reverse ? step : -step)] : narrow<T>(0);
    a.previous[i] = length == 0 ? narrow<T>(0) : h;
  }
}

template <class T>
void execute(const LstmPrevious<T>& a, void* stream) {
  if (a.B == 0) return;
  const int64_t blocks = ceil_div(a.steps * a.B * a.H, kCopyThreads);
  launch(kOperation, lstm_previous<T>, {.grid = grid_size(blocks), .block = kCopyThreads}, stream, a);
}

}  // namespace

template <class Args>
void run(const Args& args, void* stream) {
  execute(args, stream);
}

template void run(const LstmRecurrence<float>&, void*);
template void run(const LstmRecurrence<double>&, void*);
template void run(const LstmRecurrence<bfloat16>&, void*);
template void run(const LstmRecurrence<float16>&, void*);
template void run(const LstmRecurrenceBackward<float>&, void*);
template void run(const LstmRecurrenceBackward<double>&, void*);
template void run(const LstmRecurrenceBackward<bfloat16>&, void*);
template void run(const LstmRecurrenceBackward<float16>&, void*);
template void run(const LstmPrevious<float>&, void*);
template void run(const LstmPrevious<double>&, void*);
template void run(const LstmPrevious<bfloat16>&, void*);
template void run(const LstmPrevious<float16>&, void*);

}  // namespace llmkern::cuda
