// SPDX-License-Identifier: Apache-2.0
// Accesses that nothing orders. <true> has the fault, <false> is its clean twin.
#include <cooperative_groups.h>

#include "case.h"

namespace cg = cooperative_groups;

template <bool kPlanted>
__global__ void missing_barrier(Case a) {
  __shared__ float tile[64];
  tile[threadIdx.x] = a.in[threadIdx.x];
  if (!kPlanted) __syncthreads();
  a.out[threadIdx.x] = tile[threadIdx.x & ~1u];
}
CASE(missing_barrier<true>)
CASE(missing_barrier<false>)

// The barrier before a tile is filled again is the one that gets forgotten.
template <bool kPlanted>
__global__ void missing_second_barrier(Case a) {
  __shared__ float tile[64];
  for (int round = 0; round < 2; ++round) {
    tile[threadIdx.x] = a.in[threadIdx.x];
    __syncthreads();
    a.out[threadIdx.x] = tile[threadIdx.x | 1u];
    if (!kPlanted) __syncthreads();
  }
}
CASE(missing_second_barrier<true>)
CASE(missing_second_barrier<false>)

// A shuffle waits for the lanes but does not order memory; __syncwarp does.
template <bool kPlanted>
__global__ void missing_warp_barrier(Case a) {
  __shared__ float tile[64];
  tile[threadIdx.x] = a.in[threadIdx.x];
  if (kPlanted) {
    __shfl_sync(kAllLanes, 0, 0);
  } else {
    __syncwarp();
  }
  a.out[threadIdx.x] = tile[threadIdx.x ^ 1u];
}
CASE(missing_warp_barrier<true>)
CASE(missing_warp_barrier<false>)

// __syncwarp orders a warp, not the block.
template <bool kPlanted>
__global__ void barrier_too_small(Case a) {
  float* tile = shared_memory<float>();
  tile[threadIdx.x] = a.in[threadIdx.x];
  if (kPlanted) {
    __syncwarp();
  } else {
    __syncthreads();
  }
  a.out[threadIdx.x] = tile[threadIdx.x % 32];
}
CASE(barrier_too_small<true>, {.grid = 1, .block = 64, .shared_bytes = 256})
CASE(barrier_too_small<false>, {.grid = 1, .block = 64, .shared_bytes = 256})

template <bool kPlanted>
__global__ void blocks_share_output(Case a) {
  a.out[threadIdx.x + (kPlanted ? 0 : 64 * blockIdx.x)] = a.in[threadIdx.x];
}
CASE(blocks_share_output<true>, {.grid = 2, .block = 64})
CASE(blocks_share_output<false>, {.grid = 2, .block = 64})

template <bool kPlanted>
__global__ void missing_grid_barrier(Case a) {
  a.scratch[64 * blockIdx.x + threadIdx.x] = a.in[threadIdx.x];
  if (!kPlanted) cg::this_grid().sync();
  a.out[64 * blockIdx.x + threadIdx.x] = a.scratch[64 * (1 - blockIdx.x) + threadIdx.x];
}
CASE(missing_grid_barrier<true>, {.grid = 2, .block = 64, .cooperative = true})
CASE(missing_grid_barrier<false>, {.grid = 2, .block = 64, .cooperative = true})

// The last block to finish sums up: it may read what others wrote before a fence and an atomic.
template <bool kPlanted>
__global__ void missing_fence(Case a) {
  __shared__ int place;
  if (threadIdx.x == 0) {
    a.scratch[blockIdx.x] = a.in[blockIdx.x];
    if (!kPlanted) __threadfence();
    place = atomicAdd(a.counters, 1);
  }
  __syncthreads();
  if (place != static_cast<int>(gridDim.x) - 1) return;
  float sum = 0;
  for (unsigned block = 0; block < gridDim.x; ++block) sum += a.scratch[block];
  a.out[threadIdx.x] = sum;
}
CASE(missing_fence<true>, {.grid = 3, .block = 64})
CASE(missing_fence<false>, {.grid = 3, .block = 64})

template <bool kPlanted>
__global__ void plain_update(Case a) {
  if (kPlanted) {
    a.counters[0] += 1;
  } else {
    atomicAdd(a.counters, 1);
  }
  a.out[threadIdx.x] = a.in[threadIdx.x];
}
CASE(plain_update<true>)
CASE(plain_update<false>)

template <bool kPlanted>
__global__ void missing_cluster_barrier(Case a) {
  __shared__ float tile[64];
  const auto cluster = cg::this_cluster();
  tile[threadIdx.x] = a.in[threadIdx.x];
  if (!kPlanted) cluster.sync();
  a.out[64 * blockIdx.x + threadIdx.x] = *cluster.map_shared_rank(&tile[threadIdx.x], 1 - cluster.block_rank());
  cluster.sync();
}
CASE(missing_cluster_barrier<true>, {.grid = 2, .block = 64, .cluster = 2})
CASE(missing_cluster_barrier<false>, {.grid = 2, .block = 64, .cluster = 2})

// A block must not return while others read its shared memory, whichever comes first here.
template <bool kPlanted>
__global__ void returns_too_early(Case a) {
  const unsigned reader = a.counters[0];
  __shared__ float tile[64];
  const auto cluster = cg::this_cluster();
  tile[threadIdx.x] = a.in[threadIdx.x];
  cluster.sync();
  if (cluster.block_rank() == reader) a.out[threadIdx.x] = *cluster.map_shared_rank(&tile[threadIdx.x], 1 - reader);
  if (!kPlanted) cluster.sync();
}
CASE(returns_too_early<true>, {.grid = 2, .block = 64, .cluster = 2})
CASE(returns_too_early<false>, {.grid = 2, .block = 64, .cluster = 2})

BINDINGS
