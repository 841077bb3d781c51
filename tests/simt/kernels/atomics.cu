// SPDX-License-Identifier: Apache-2.0
// Atomics, bits, and arithmetic with one rounding.
#include "case.h"

__global__ void atomics(Case a) {
  __shared__ unsigned long long wide;
  if (threadIdx.x == 0) wide = 0;
  __syncthreads();
  const int t = static_cast<int>(64 * blockIdx.x + threadIdx.x);
  atomicAdd(&wide, 1ull << 33);
  atomicAdd(&a.counters[0], t);
  atomicSub(&a.counters[1], 1);
  atomicMin(&a.counters[2], -t);
  atomicMax(&a.counters[3], t);
  atomicOr(&a.counters[4], 1 << (t % 31));
  atomicXor(&a.counters[5], t);
  atomicAnd(&a.counters[6], ~(1 << (t % 31)));
  unsigned* wrapping = reinterpret_cast<unsigned*>(a.counters);
  atomicInc(&wrapping[7], 99);
  atomicDec(&wrapping[8], 99);
  atomicExch(&a.counters[9], 7);
  for (int old = -1; old != t;) old = atomicCAS(&a.counters[10], t, t + 1);
  atomicAdd(a.scratch, 0.5f);
  __syncthreads();
  a.out[t] = static_cast<float>(wide >> 33);
}
CASE(atomics, {.grid = 2, .block = 64})

__global__ void bits(Case a) {
  float* out = a.out;
  *out++ = static_cast<float>(__popc(0xf0f0u) + __popcll(~0ull));
  *out++ = static_cast<float>(__clz(1) + __clzll(1));
  *out++ = static_cast<float>(__ffs(0) + __ffs(8) + __ffsll(1ll << 40));
  *out++ = static_cast<float>(__brev(1) == 0x80000000u && __brevll(2) == 1ull << 62);
  *out++ = static_cast<float>(__umulhi(1u << 31, 6) + __umul64hi(1ull << 63, 6));
  *out++ = __uint_as_float(__float_as_uint(2.5f)) + __int_as_float(__float_as_int(-1.0f));
  *out++ = static_cast<float>(__longlong_as_double(__double_as_longlong(0.25)));
  *out++ = __fmaf_rn(0x1.001p0f, 0x1.001p0f, -1.0f) - (__fmul_rn(0x1.001p0f, 0x1.001p0f) - 1.0f);
  *out++ = __fadd_rn(1, __fsub_rn(5, __fdiv_rn(1, __frcp_rn(__fsqrt_rn(4)))));
  *out++ = static_cast<float>(__dadd_rn(1, __dsub_rn(5, __ddiv_rn(1, __drcp_rn(__dmul_rn(1, __fma_rn(1, 1, 1)))))));
  *out++ = static_cast<float>(__float2int_rn(2.5f) + __float2int_rz(-2.9f)) + __int2float_rn(3);
  *out++ = static_cast<float>(min(3, 4) + max(5u, 2u));
  *out++ = __ldg(a.in) + __ldcg(a.in + 1) + __ldcs(a.in + 2);
  __stcs(out++, 4.0f);
  __stcg(out++, 5.0f);
  const float4 four = make_float4(1, 2, 3, 4);
  *out++ = four.x + four.w + static_cast<float>(make_int2(5, 6).y);
}
CASE(bits, {.grid = 1, .block = 1})

BINDINGS
