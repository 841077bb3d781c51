// SPDX-License-Identifier: Apache-2.0
// Accesses beside what they were meant for. <true> has the fault, <false> is its clean twin.
#include "case.h"

// The kernels pass pointers through this, so that no compiler can see the fault.
template <class T>
__device__ T* opaque(T* pointer) {
  asm volatile("" : "+r"(pointer));
  return pointer;
}

template <bool kPlanted>
__global__ void static_shared(Case a) {
  __shared__ float before[64], tile[64], after[64];
  before[threadIdx.x] = after[threadIdx.x] = 0;
  opaque(tile)[threadIdx.x + (kPlanted ? 1 : 0)] = a.in[threadIdx.x];
  __syncthreads();
  a.out[threadIdx.x] = opaque(tile)[threadIdx.x] + opaque(before)[threadIdx.x] + opaque(after)[threadIdx.x];
}
CASE(static_shared<true>)
CASE(static_shared<false>)

template <bool kPlanted>
__global__ void array_index(Case a) {
  __shared__ float tile[8][8];
  const int row = threadIdx.x / 8, column = threadIdx.x % 8;
  tile[row][column] = a.in[threadIdx.x];
  __syncthreads();
  a.out[threadIdx.x] = tile[row][column + (kPlanted && row < 7 ? 1 : 0)];
}
CASE(array_index<true>)
CASE(array_index<false>)

template <bool kPlanted>
__global__ void dynamic_shared(Case a) {
  float* tile = shared_memory<float>();
  tile[threadIdx.x] = a.in[threadIdx.x];
  if (threadIdx.x == 9) tile[kPlanted ? 64 : 9] = a.in[9];
  a.out[threadIdx.x] = tile[threadIdx.x];
}
CASE(dynamic_shared<true>, {.grid = 1, .block = 64, .shared_bytes = 256})
CASE(dynamic_shared<false>, {.grid = 1, .block = 64, .shared_bytes = 256})

template <bool kPlanted>
__global__ void global_read(Case a) {
  a.out[threadIdx.x] = a.in[static_cast<int>(threadIdx.x) - (kPlanted ? 1 : 0)];
}
CASE(global_read<true>)
CASE(global_read<false>)

template <bool kPlanted>
__global__ void global_write(Case a) {
  a.out[threadIdx.x + (kPlanted ? 1 : 0)] = a.in[threadIdx.x];
}
CASE(global_write<true>)
CASE(global_write<false>)

template <bool kPlanted>
__global__ void null_pointer(Case a) {
  const float* none = nullptr;
  a.out[threadIdx.x] = *opaque(kPlanted ? none : a.in + threadIdx.x);
}
CASE(null_pointer<true>)
CASE(null_pointer<false>)

template <bool kPlanted>
__global__ void input_written(Case a) {
  if (kPlanted && threadIdx.x == 3) *const_cast<float*>(a.in + 3) = 0;
  a.out[threadIdx.x] = a.in[threadIdx.x];
}
CASE(input_written<true>)
CASE(input_written<false>)

template <bool kPlanted>
__global__ void misaligned(Case a) {
  using Four = Pack<float, 4>;
  const float* from = a.in + (kPlanted && threadIdx.x == 7 ? 1 : 4 * (threadIdx.x % 16));
  const Four four = *reinterpret_cast<const Four*>(from);
  a.out[threadIdx.x] = four.x[0] + four.x[1] + four.x[2] + four.x[3];
}
CASE(misaligned<true>)
CASE(misaligned<false>)

// The C library's copies are seen as well.
template <bool kPlanted>
__global__ void copied(Case a) {
  if (threadIdx.x == 0) memcpy(a.out, a.in, static_cast<size_t>(a.N + (kPlanted ? 1 : 0)) * sizeof(float));
}
CASE(copied<true>)
CASE(copied<false>)

BINDINGS
