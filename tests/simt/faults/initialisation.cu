// SPDX-License-Identifier: Apache-2.0
// Memory that nobody wrote. <true> has the fault, <false> is its clean twin.
#include "case.h"

template <bool kPlanted>
__global__ void shared_read(Case a) {
  __shared__ float tile[64];
  if (!kPlanted || threadIdx.x != 17) tile[threadIdx.x] = a.in[threadIdx.x];
  __syncthreads();
  a.out[threadIdx.x] = tile[threadIdx.x];
}
CASE(shared_read<true>)
CASE(shared_read<false>)

// Shared memory does not survive from one block to the next.
template <bool kPlanted>
__global__ void left_by_another_block(Case a) {
  __shared__ float tile[64];
  if (!kPlanted || blockIdx.x == 0) tile[threadIdx.x] = a.in[threadIdx.x];
  a.out[64 * blockIdx.x + threadIdx.x] = tile[threadIdx.x];
}
CASE(left_by_another_block<true>, {.grid = 2, .block = 64})
CASE(left_by_another_block<false>, {.grid = 2, .block = 64})

template <bool kPlanted>
__global__ void global_read(Case a) {
  if (!kPlanted) a.scratch[threadIdx.x] = 0;
  a.out[threadIdx.x] = a.in[threadIdx.x] + a.scratch[threadIdx.x];
}
CASE(global_read<true>)
CASE(global_read<false>)

// Half of a 16-bit pair.
template <bool kPlanted>
__global__ void half_a_word(Case a) {
  __shared__ uint16_t tile[128];
  tile[2 * threadIdx.x] = 0;
  if (!kPlanted || threadIdx.x != 5) tile[2 * threadIdx.x + 1] = 0;
  const auto pair = *reinterpret_cast<const volatile uint32_t*>(&tile[2 * threadIdx.x]);
  a.out[threadIdx.x] = a.in[threadIdx.x] + static_cast<float>(pair);
}
CASE(half_a_word<true>)
CASE(half_a_word<false>)

template <bool kPlanted>
__global__ void unwritten_output(Case a) {
  if (!kPlanted || threadIdx.x != 63) a.out[threadIdx.x] = a.in[threadIdx.x];
}
CASE(unwritten_output<true>)
CASE(unwritten_output<false>)

BINDINGS
