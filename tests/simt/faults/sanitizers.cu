// SPDX-License-Identifier: Apache-2.0
// What only the compiler's sanitizers see.
#include "case.h"

__global__ void own_array(Case a) {
  float own[4] = {1, 2, 3, 4};
  volatile float* pointer = own;
  a.out[threadIdx.x] = pointer[a.counters[0]];
}
CASE(own_array)

__global__ void overflow(Case a) { a.out[threadIdx.x] = static_cast<float>(a.counters[0] + 0x7fffffff); }
CASE(overflow)

__global__ void beside_global(Case a) { a.out[threadIdx.x] = a.in[a.counters[0]]; }
CASE(beside_global)

__global__ void beside_dynamic_shared(Case a) {
  float* tile = shared_memory<float>();
  tile[threadIdx.x] = 0;
  a.out[threadIdx.x] = tile[a.counters[0] * 16];
}
CASE(beside_dynamic_shared, {.grid = 1, .block = 64, .shared_bytes = 256})

BINDINGS
