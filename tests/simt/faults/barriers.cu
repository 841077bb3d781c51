// SPDX-License-Identifier: Apache-2.0
// Barriers that not everyone reaches. <true> has the fault, <false> is its clean twin.
#include <cooperative_groups.h>

#include "case.h"
#include "kernels/cuda/async.cuh"

template <bool kPlanted>
__global__ void thread_returned(Case a) {
  a.out[threadIdx.x] = a.in[threadIdx.x];
  if (kPlanted && threadIdx.x == 40) return;
  __syncthreads();
}
CASE(thread_returned<true>)
CASE(thread_returned<false>)

template <bool kPlanted>
__global__ void thread_elsewhere(Case a) {
  if (kPlanted && threadIdx.x >= 32) {
    __syncthreads();
    a.out[threadIdx.x] = a.in[threadIdx.x];
  } else {
    a.out[threadIdx.x] = a.in[threadIdx.x];
    __syncthreads();
  }
}
CASE(thread_elsewhere<true>)
CASE(thread_elsewhere<false>)

template <bool kPlanted>
__global__ void too_few_at_named_barrier(Case a) {
  a.out[threadIdx.x] = a.in[threadIdx.x];
  if (threadIdx.x < 32) named_barrier_sync(1, kPlanted ? 64 : 32);
}
CASE(too_few_at_named_barrier<true>)
CASE(too_few_at_named_barrier<false>)

template <bool kPlanted>
__global__ void block_left_the_grid(Case a) {
  a.out[64 * blockIdx.x + threadIdx.x] = a.in[threadIdx.x];
  if (kPlanted && blockIdx.x == 1) return;
  cooperative_groups::this_grid().sync();
}
CASE(block_left_the_grid<true>, {.grid = 2, .block = 64, .cooperative = true})
CASE(block_left_the_grid<false>, {.grid = 2, .block = 64, .cooperative = true})

template <bool kPlanted>
__global__ void spins_for_ever(Case a) {
  volatile int* flag = a.counters;
  if (blockIdx.x == 1 && !kPlanted) *flag = 1;
  if (blockIdx.x == 0) {
    while (*flag == 0) {
    }
  }
  a.out[64 * blockIdx.x + threadIdx.x] = a.in[threadIdx.x];
}
CASE(spins_for_ever<true>, {.grid = 2, .block = 64, .cooperative = true})
CASE(spins_for_ever<false>, {.grid = 2, .block = 64, .cooperative = true})

template <bool kPlanted>
__global__ void phase_never_ends(Case a) {
  __shared__ uint64_t barrier;
  if (threadIdx.x == 0) mbarrier_init(&barrier, kPlanted ? 65 : 64);
  __syncthreads();
  a.out[threadIdx.x] = a.in[threadIdx.x];
  mbarrier_arrive(&barrier);
  mbarrier_wait(&barrier, 0);
}
CASE(phase_never_ends<true>)
CASE(phase_never_ends<false>)

BINDINGS
