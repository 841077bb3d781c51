// SPDX-License-Identifier: Apache-2.0
// Producers and consumers: asynchronous copies, named barriers, mbarriers.
#include "case.h"
#include "kernels/cuda/async.cuh"

// Two tiles in flight, the classic double buffer. out[i] = sum over rounds of in[64 round + (i ^ 1)].
__global__ void double_buffer(Case a) {
  __shared__ float tiles[2][64];
  const int rounds = static_cast<int>(a.N / 64), t = static_cast<int>(threadIdx.x);
  const auto fetch = [&](int round) {
    if (round < rounds) async_copy<4>(&tiles[round % 2][t], &a.in[64 * round + t]);
    async_commit();
  };
  fetch(0);
  float sum = 0;
  for (int round = 0; round < rounds; ++round) {
    fetch(round + 1);
    async_wait<1>();
    __syncthreads();
    sum += tiles[round % 2][t ^ 1];
    __syncthreads();
  }
  async_wait<0>();
  a.out[t] = sum;
}
CASE(double_buffer)

// Wide copies, and zeros where nothing is wanted.
__global__ void wide_copies(Case a) {
  alignas(16) __shared__ float tile[64];
  if (threadIdx.x < 16) async_copy<16>(&tile[4 * threadIdx.x], &a.in[4 * threadIdx.x], threadIdx.x % 2 == 0);
  async_commit();
  async_wait<0>();
  __syncthreads();
  a.out[threadIdx.x] = tile[threadIdx.x];
}
CASE(wide_copies)

// The first warp fills a tile, the second drains it, by two named barriers: 1 says full, 2 says empty.
__global__ void named_barriers(Case a) {
  __shared__ float tile[32];
  const int rounds = static_cast<int>(a.N / 32), lane = lane_index();
  float sum = 0;
  for (int round = 0; round < rounds; ++round) {
    if (warp_index() == 0) {
      if (round > 0) named_barrier_sync(2, 64);
      tile[lane] = a.in[32 * round + lane];
      named_barrier_arrive(1, 64);
    } else {
      named_barrier_sync(1, 64);
      sum += tile[31 - lane];
      if (round + 1 < rounds) named_barrier_arrive(2, 64);
    }
  }
  if (warp_index() == 1) a.out[lane] = sum;
}
CASE(named_barriers)

// The same by mbarriers, whose phases alternate.
__global__ void mbarriers(Case a) {
  __shared__ float tile[32];
  __shared__ uint64_t full, empty;
  if (threadIdx.x == 0) {
    mbarrier_init(&full, 32);
    mbarrier_init(&empty, 32);
  }
  __syncthreads();
  const int rounds = static_cast<int>(a.N / 32), lane = lane_index();
  float sum = 0;
  for (int round = 0; round < rounds; ++round) {
    const unsigned phase = round % 2;
    if (warp_index() == 0) {
      if (round > 0) mbarrier_wait(&empty, phase ^ 1);
      if (round % 3 == 2) {
        tile[lane] = a.in[32 * round + lane];
        mbarrier_arrive(&full);
      } else {
        async_copy<4>(&tile[lane], &a.in[32 * round + lane]);
        mbarrier_arrive_after_copies(&full);
      }
    } else {
      mbarrier_wait(&full, phase);
      sum += tile[31 - lane];
      mbarrier_arrive(&empty);
    }
  }
  if (warp_index() == 1) a.out[lane] = sum;
}
CASE(mbarriers)

#if LLMKERN_ARCH >= 900

// One thread asks for whole tiles; everyone waits for the bytes.
__global__ void bulk_copies(Case a) {
  alignas(16) __shared__ float tile[64];
  __shared__ uint64_t barrier;
  if (threadIdx.x == 0) mbarrier_init(&barrier, 1);
  __syncthreads();
  const int rounds = static_cast<int>(a.N / 64);
  float sum = 0;
  for (int round = 0; round < rounds; ++round) {
    if (threadIdx.x == 0) {
      mbarrier_arrive_expect(&barrier, sizeof tile);
      bulk_copy(tile, &a.in[64 * round], sizeof tile / 2, &barrier);
      bulk_copy(tile + 32, &a.in[64 * round + 32], sizeof tile / 2, &barrier);
    }
    mbarrier_wait(&barrier, round % 2);
    sum += tile[threadIdx.x ^ 1];
    __syncthreads();
  }
  a.out[threadIdx.x] = sum;
}
CASE(bulk_copies)

#endif

BINDINGS
