// SPDX-License-Identifier: Apache-2.0
// Warp operations whose mask is not who comes. <true> has the fault, <false> is its clean twin.
#include "case.h"

template <bool kPlanted>
__global__ void caller_missing(Case a) {
  const unsigned mask = kPlanted ? 0xfffffffeu : kAllLanes;
  a.out[threadIdx.x] = __shfl_sync(mask, a.in[threadIdx.x], 1);
}
CASE(caller_missing<true>)
CASE(caller_missing<false>)

template <bool kPlanted>
__global__ void lane_elsewhere(Case a) {
  float value = a.in[threadIdx.x];
  if (lane_index() < 16) value = __shfl_xor_sync(kPlanted ? kAllLanes : 0xffffu, value, 1);
  __syncthreads();
  a.out[threadIdx.x] = value;
}
CASE(lane_elsewhere<true>)
CASE(lane_elsewhere<false>)

template <bool kPlanted>
__global__ void lane_returned(Case a) {
  a.out[threadIdx.x] = a.in[threadIdx.x];
  if (kPlanted && threadIdx.x == 37) return;
  if (__any_sync(kAllLanes, a.in[threadIdx.x] < 0)) a.out[threadIdx.x] = 0;
}
CASE(lane_returned<true>)
CASE(lane_returned<false>)

template <bool kPlanted>
__global__ void masks_differ(Case a) {
  const unsigned mask = kPlanted && lane_index() == 5 ? 0x7fffffffu : kAllLanes;
  __syncwarp(mask);
  a.out[threadIdx.x] = a.in[threadIdx.x];
}
CASE(masks_differ<true>)
CASE(masks_differ<false>)

template <bool kPlanted>
__global__ void source_missing(Case a) {
  float value = a.in[threadIdx.x];
  if (lane_index() < 16) value = __shfl_sync(0xffffu, value, kPlanted ? 16 : 15);
  a.out[threadIdx.x] = value;
}
CASE(source_missing<true>)
CASE(source_missing<false>)

template <bool kPlanted>
__global__ void beyond_the_block(Case a) {
  const unsigned mask = kPlanted ? kAllLanes : threadIdx.x < 32 ? kAllLanes : 0xffffu;
  a.out[threadIdx.x] = __reduce_add_sync(mask, static_cast<int>(a.in[threadIdx.x]));
}
CASE(beyond_the_block<true>, {.grid = 1, .block = 48})
CASE(beyond_the_block<false>, {.grid = 1, .block = 48})

template <bool kPlanted>
__global__ void operations_differ(Case a) {
  int votes;
  if (kPlanted && lane_index() == 9) {
    votes = __all_sync(kAllLanes, 1);
  } else {
    votes = __any_sync(kAllLanes, 1);
  }
  a.out[threadIdx.x] = static_cast<float>(votes);
}
CASE(operations_differ<true>)
CASE(operations_differ<false>)

BINDINGS
