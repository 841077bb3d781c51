// SPDX-License-Identifier: Apache-2.0
// Blocks that are alive together: grids and clusters.
#include <cooperative_groups.h>

#include "case.h"
#include "kernels/cuda/async.cuh"

namespace cg = cooperative_groups;

// Each round every block passes its row to the next one.
__global__ void ring(Case a) {
  const auto blocks = gridDim.x, mine = blockIdx.x, t = threadIdx.x;
  a.scratch[64 * mine + t] = a.in[64 * mine + t];
  for (unsigned round = 0; round < blocks; ++round) {
    cg::this_grid().sync();
    const float value = a.scratch[64 * ((mine + 1) % blocks) + t];
    cg::this_grid().sync();
    a.scratch[64 * mine + t] = value + 1;
  }
  a.out[64 * mine + t] = a.scratch[64 * mine + t];
}
CASE(ring, {.grid = 5, .block = 64, .cooperative = true})

// A cluster adds up through distributed shared memory, static and dynamic.
__global__ void clusters(Case a) {
  __shared__ float fixed[64];
  float* dynamic = shared_memory<float>();
  const auto cluster = cg::this_cluster();
  fixed[threadIdx.x] = a.in[64 * blockIdx.x + threadIdx.x];
  dynamic[threadIdx.x] = static_cast<float>(cluster.block_rank());
  cluster.sync();
  float sum = 0;
  for (unsigned rank = 0; rank < cluster.num_blocks(); ++rank) {
    sum += cluster.map_shared_rank(fixed, rank)[threadIdx.x] + cluster.map_shared_rank(dynamic, rank)[threadIdx.x];
  }
  cluster.sync();
  cluster.map_shared_rank(fixed, (cluster.block_rank() + 1) % cluster.num_blocks())[threadIdx.x] = sum;
  cluster.sync();
  a.out[64 * blockIdx.x + threadIdx.x] = fixed[threadIdx.x];
}
CASE(clusters, {.grid = 6, .block = 64, .shared_bytes = 50 << 10, .cluster = 3})

// A grid barrier of the kernel's own.
__global__ void own_barrier(Case a) {
  a.scratch[64 * blockIdx.x + threadIdx.x] = a.in[64 * blockIdx.x + threadIdx.x];
  __syncthreads();
  if (threadIdx.x == 0) {
    unsigned* arrived = reinterpret_cast<unsigned*>(a.counters);
    add_release(arrived, 1);
    while (load_acquire(arrived) < gridDim.x) {
    }
  }
  __syncthreads();
  a.out[64 * blockIdx.x + threadIdx.x] = a.scratch[64 * ((blockIdx.x + 1) % gridDim.x) + threadIdx.x];
}
CASE(own_barrier, {.grid = 5, .block = 64, .cooperative = true})

// What a launch may not ask for.
__global__ void nothing(Case) {}
CASE(nothing, {.grid = 1, .block = 1025})
__global__ void too_much_shared(Case) {}
CASE(too_much_shared, {.grid = 1, .block = 64, .shared_bytes = 228 << 10})
__global__ void grid_too_large(Case) {}
CASE(grid_too_large, {.grid = 1000, .block = 64, .cooperative = true})
__global__ void odd_cluster(Case) {}
CASE(odd_cluster, {.grid = 5, .block = 64, .cluster = 2})
__global__ void large_cluster(Case a) {
  if (threadIdx.x == 0) a.out[blockIdx.x] = static_cast<float>(cg::this_cluster().num_blocks());
}
CASE(large_cluster, {.grid = 16, .block = 64, .cluster = 16})

BINDINGS
