// SPDX-License-Identifier: Apache-2.0
// Every operation of a warp and a block once, each result in a row of 64 of its own. in[t] is t.
#include "case.h"

__global__ void shuffles(Case a) {
  auto put = [&, row = 0](float value) mutable { a.out[64 * row++ + threadIdx.x] = value; };
  const float x = a.in[threadIdx.x];
  put(__shfl_sync(kAllLanes, x, 3));
  put(__shfl_sync(kAllLanes, x, 9, 8));
  put(__shfl_up_sync(kAllLanes, x, 2));
  put(__shfl_up_sync(kAllLanes, x, 1, 4));
  put(__shfl_down_sync(kAllLanes, x, 2));
  put(__shfl_down_sync(kAllLanes, x, 1, 4));
  put(__shfl_xor_sync(kAllLanes, x, 16));
  put(static_cast<float>(__shfl_sync(kAllLanes, static_cast<double>(x) + 0.5, 31)));
  put(static_cast<float>(__shfl_xor_sync(kAllLanes, uint64_t{threadIdx.x} << 40, 1) >> 40));
  // The halves of a warp go their own ways.
  if (lane_index() < 16) {
    put(__shfl_sync(0x0000ffffu, x, 15));
  } else {
    put(__shfl_sync(0xffff0000u, x, 16));
  }
}
CASE(shuffles)

__global__ void votes(Case a) {
  auto put = [&, row = 0](auto value) mutable { a.out[64 * row++ + threadIdx.x] = static_cast<float>(value); };
  const int x = static_cast<int>(threadIdx.x) - 10;
  put(__popc(__ballot_sync(kAllLanes, x % 3 == 0)));
  put(__any_sync(kAllLanes, x == 40));
  put(__all_sync(kAllLanes, x < 22));
  put(__reduce_add_sync(kAllLanes, x));
  put(__reduce_min_sync(kAllLanes, x));
  put(__reduce_max_sync(kAllLanes, x));
  put(__reduce_min_sync(kAllLanes, static_cast<unsigned>(x)) < 60);
  put(__reduce_max_sync(kAllLanes, threadIdx.x));
  put(__reduce_add_sync(kAllLanes, threadIdx.x));
  put(__reduce_and_sync(kAllLanes, threadIdx.x | 32));
  put(__reduce_or_sync(kAllLanes, threadIdx.x));
  put(__reduce_xor_sync(kAllLanes, threadIdx.x * threadIdx.x));
  put(__popc(__activemask()));
  put(__syncthreads_count(x > 0));
  put(__syncthreads_or(x == 53));
  put(__syncthreads_and(x > -10));
}
CASE(votes)

// The helpers of common.cuh.
__global__ void reductions(Case a) {
  auto put = [&, row = 0](auto value) mutable { a.out[64 * row++ + threadIdx.x] = static_cast<float>(value); };
  const float x = a.in[threadIdx.x];
  put(warp_reduce(x, Plus{}));
  put(warp_scan(x, Plus{}));
  put(block_reduce<64>(x, Plus{}));
  put(block_reduce<64>(x, Plus{}));
  put(block_reduce<64>(static_cast<uint64_t>(x), Maximum{}));
  put(block_scan<64>(x, Plus{}));
  put(block_scan<64>(-x, Maximum{}));
}
CASE(reductions)

__global__ void one_warp(Case a) {
  a.out[threadIdx.x] = block_reduce<32>(a.in[threadIdx.x], Plus{});
  a.out[32 + threadIdx.x] = block_scan<32>(a.in[threadIdx.x], Plus{});
}
CASE(one_warp, {.grid = 1, .block = 32})

// A block in three dimensions has its threads in order of x, then y, then z.
__global__ void three_dimensions(Case a) {
  const unsigned t = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned b = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const float first = __shfl_sync(kAllLanes, a.in[t], 0);
  a.out[blockDim.x * blockDim.y * blockDim.z * b + t] = first + static_cast<float>(100 * b);
}
CASE(three_dimensions, {.grid = dim3(2, 2, 2), .block = dim3(4, 4, 4)})

BINDINGS
