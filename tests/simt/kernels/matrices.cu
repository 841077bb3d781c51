// SPDX-License-Identifier: Apache-2.0
// The tensor cores' wrappers: D = C + A B for one tile. in holds A [16, K], then B [K, 8], then C [16, 8].
#include "case.h"
#include "kernels/cuda/matrix.cuh"
#include "kernels/half.h"

using namespace llmkern;

__device__ void load(const float* c, float (&d)[4]) {
  const int g = lane_index() / 4, t = lane_index() % 4;
  for (int i = 0; i < 4; ++i) d[i] = c[8 * (g + i / 2 * 8) + 2 * t + i % 2];
}

__device__ void store(float* out, const float (&d)[4]) {
  const int g = lane_index() / 4, t = lane_index() % 4;
  for (int i = 0; i < 4; ++i) out[8 * (g + i / 2 * 8) + 2 * t + i % 2] = d[i];
}

// A by load_matrices from row-major shared memory, B from row-major shared memory by its transposing form.
template <class T>
__global__ void multiply(Case a) {
  alignas(16) __shared__ T A[16][16], B[16][8];
  const int lane = lane_index();
  for (int i = lane; i < 256; i += kWarp) A[i / 16][i % 16] = narrow<T>(a.in[i]);
  for (int i = lane; i < 128; i += kWarp) B[i / 8][i % 8] = narrow<T>(a.in[256 + i]);
  __syncwarp();
  float d[4];
  load(a.in + 384, d);
  uint32_t left[4], right[4];
  load_matrices(left, &A[lane % 16][lane / 16 * 8]);
  load_matrices<true>(right, &B[lane % 16][0]);  // of four matrices two are needed
  const uint32_t b[2] = {right[0], right[1]};
  matrix_multiply<T>(d, left, b);
  store(a.out, d);
}
CASE(multiply<bfloat16>, {.grid = 1, .block = 32})
CASE(multiply<float16>, {.grid = 1, .block = 32})

__global__ void multiply_tf32(Case a) {
  const float *A = a.in, *B = a.in + 128;
  const int g = lane_index() / 4, t = lane_index() % 4;
  const uint32_t left[4] = {round_to_tf32(A[8 * g + t]), round_to_tf32(A[8 * (g + 8) + t]),
                            round_to_tf32(A[8 * g + t + 4]), round_to_tf32(A[8 * (g + 8) + t + 4])};
  const uint32_t right[2] = {round_to_tf32(B[8 * t + g]), round_to_tf32(B[8 * (t + 4) + g])};
  float d[4];
  load(a.in + 192, d);
  matrix_multiply_tf32(d, left, right);
  store(a.out, d);
}
CASE(multiply_tf32, {.grid = 1, .block = 32})

// What a value becomes as bfloat16 and float16, and what every pattern of 16 bits is worth: in holds N values.
__global__ void narrowed(Case a) {
  const int64_t N = a.N;
  for (int64_t i = threadIdx.x; i < N; i += blockDim.x) {
    a.out[i] = widen(narrow<bfloat16>(a.in[i]));
    a.out[N + i] = widen(narrow<float16>(a.in[i]));
  }
}
CASE(narrowed)

__global__ void widened(Case a) {
  const uint32_t i = 64 * blockIdx.x + threadIdx.x;
  a.out[i] = widen(bfloat16{static_cast<uint16_t>(i)});
  a.out[65536 + i] = widen(float16{static_cast<uint16_t>(i)});
}
CASE(widened, {.grid = 1024, .block = 64})

BINDINGS
