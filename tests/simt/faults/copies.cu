// SPDX-License-Identifier: Apache-2.0
// Asynchronous copies read too early. <true> has the fault, <false> is its clean twin.
#include "case.h"
#include "kernels/cuda/async.cuh"

template <bool kPlanted>
__global__ void not_waited_for(Case a) {
  __shared__ float tile[64];
  async_copy<4>(&tile[threadIdx.x], &a.in[threadIdx.x]);
  async_commit();
  if (!kPlanted) async_wait<0>();
  a.out[threadIdx.x] = tile[threadIdx.x];
  async_wait<0>();
}
CASE(not_waited_for<true>)
CASE(not_waited_for<false>)

// Waiting is for one's own copies; those of others are there after a barrier.
template <bool kPlanted>
__global__ void no_barrier_after_wait(Case a) {
  __shared__ float tile[64];
  async_copy<4>(&tile[threadIdx.x], &a.in[threadIdx.x]);
  async_commit();
  async_wait<0>();
  if (!kPlanted) __syncthreads();
  a.out[threadIdx.x] = tile[threadIdx.x & ~1u];
}
CASE(no_barrier_after_wait<true>)
CASE(no_barrier_after_wait<false>)

template <bool kPlanted>
__global__ void never_waited_for(Case a) {
  __shared__ float tile[64];
  async_copy<4>(&tile[threadIdx.x], &a.in[threadIdx.x]);
  async_commit();
  if (!kPlanted) async_wait<0>();
  a.out[threadIdx.x] = a.in[threadIdx.x];
}
CASE(never_waited_for<true>)
CASE(never_waited_for<false>)

template <bool kPlanted>
__global__ void copy_beyond_the_input(Case a) {
  __shared__ float tile[64];
  async_copy<4>(&tile[threadIdx.x], &a.in[threadIdx.x + (kPlanted ? 1 : 0)]);
  async_commit();
  async_wait<0>();
  a.out[threadIdx.x] = tile[threadIdx.x];
}
CASE(copy_beyond_the_input<true>)
CASE(copy_beyond_the_input<false>)

template <bool kPlanted>
__global__ void bulk_copy_not_waited_for(Case a) {
  alignas(16) __shared__ float tile[64];
  __shared__ uint64_t barrier;
  if (threadIdx.x == 0) mbarrier_init(&barrier, 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect(&barrier, sizeof tile);
    bulk_copy(tile, a.in, sizeof tile, &barrier);
  }
  if (kPlanted) {
    __syncthreads();  // orders the threads, not the copy
  } else {
    mbarrier_wait(&barrier, 0);
  }
  a.out[threadIdx.x] = tile[threadIdx.x];
}
CASE(bulk_copy_not_waited_for<true>)
CASE(bulk_copy_not_waited_for<false>)

template <bool kPlanted>
__global__ void mbarrier_used_too_early(Case a) {
  __shared__ uint64_t barrier;
  if (threadIdx.x == 0) mbarrier_init(&barrier, 64);
  if (!kPlanted) __syncthreads();
  a.out[threadIdx.x] = a.in[threadIdx.x];
  mbarrier_arrive(&barrier);
  mbarrier_wait(&barrier, 0);
}
CASE(mbarrier_used_too_early<true>)
CASE(mbarrier_used_too_early<false>)

BINDINGS
