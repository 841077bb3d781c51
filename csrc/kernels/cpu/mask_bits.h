// SPDX-License-Identifier: Apache-2.0
// The masks of kernels/mask.h, several groups at once: a vector holds a word of as many counters as it has 64-bit
// lanes.
//
//   uint16_t bits[...];                                 // mask_groups(columns)
//   draw_mask(mask, row * mask_groups(H), mask_groups(H), bits);
//   held = mask_lanes<float>(bits, k);                  // of columns k to k + kLanes: -1 where set, 0 elsewhere
#pragma once

#include <cstdint>

#include "kernels/cpu/simd.h"
#include "kernels/mask.h"

namespace llmkern::cpu::LLMKERN_ISA {

// -1 where an element is set: columns first to first + kLanes<T> of a row, first a multiple of kLanes<T>.
template <class T>
inline typename IndexOf<T>::type mask_lanes(const uint16_t* bits, int64_t first) {
  using Index = typename IndexOf<T>::type;
  const int word = bits[first / kMaskGroup] >> (first % kMaskGroup);
  Index bit_of_lane;
  for (int j = 0; j < kLanes<T>; ++j) bit_of_lane[j] = 1 << j;
  return ((Index{} + word) & bit_of_lane) != 0;
}

#ifdef LLMKERN_X86

typedef uint64_t CounterVec __attribute__((vector_size(kVectorBytes)));

constexpr int kCounters = kVectorBytes / 8;  // of a vector
constexpr int kChains = 4;                   // vectors at once: a round waits for its product, another one's need not
constexpr int64_t kGroupsAtOnce = kChains * kCounters / 4;

// The lower 32 bits of every lane times b; what is above them does not matter.
inline CounterVec lower_product(CounterVec a, uint32_t b) {
  const CounterVec factor = CounterVec{} + b;
#if defined(__AVX512F__)
  // Not _mm512_mul_epu32, about whose undefined operand gcc 12 warns; it is the same instruction.
  return (CounterVec)_mm512_maskz_mul_epu32(0xff, (__m512i)a, (__m512i)factor);
#elif defined(__AVX2__)
  return (CounterVec)_mm256_mul_epu32((__m256i)a, (__m256i)factor);
#else
  return (CounterVec)_mm_mul_epu32((__m128i)a, (__m128i)factor);
#endif
}

// Bit l: whether the lower 32 bits of lane l are at most `most`.
inline uint32_t lanes_up_to(CounterVec words, uint32_t most) {
  const CounterVec raised = words << 32, bound = CounterVec{} + (uint64_t{most} << 32);
#if defined(__AVX512F__)
  return _mm512_cmple_epu64_mask((__m512i)raised, (__m512i)bound);
#else
  // Numbers of 32 bits, and signed ones: SSE2 compares no others. The upper half of a lane has the word.
  constexpr int32_t kSign = INT32_MIN;
  const IntVec above = ((IntVec)raised ^ kSign) > ((IntVec)bound ^ kSign);
#if defined(__AVX2__)
  return 15u & ~static_cast<uint32_t>(_mm256_movemask_pd((__m256d)above));
#else
  return 3u & ~static_cast<uint32_t>(_mm_movemask_pd((__m128d)above));
#endif
#endif
}

// kGroupsAtOnce groups from `first` on; limit > 0.
inline void draw_groups(const Mask& mask, int64_t first, uint16_t* bits) {
  CounterVec c[4][kChains], lane;
  for (int l = 0; l < kCounters; ++l) lane[l] = static_cast<uint64_t>(l);
  for (int v = 0; v < kChains; ++v) {
    const CounterVec index = lane + static_cast<uint64_t>(4 * first + v * kCounters);
    c[0][v] = index;
    c[1][v] = index >> 32;
    c[2][v] = CounterVec{} + static_cast<uint64_t>(mask.purpose);
    c[3][v] = CounterVec{};
  }
  uint32_t low = static_cast<uint32_t>(mask.seed), high = static_cast<uint32_t>(mask.seed >> 32);
  for (int round = 0; round < 10; ++round) {  // as in philox(): the upper half of a lane is left as it comes
#pragma GCC unroll 4
    for (int v = 0; v < kChains; ++v) {
      const CounterVec a = lower_product(c[0][v], 0xD2511F53), b = lower_product(c[2][v], 0xCD9E8D57);
      c[0][v] = (b >> 32) ^ c[1][v] ^ low;
      c[1][v] = b;
      c[2][v] = (a >> 32) ^ c[3][v] ^ high;
      c[3][v] = a;
    }
    low += 0x9E3779B9;
    high += 0xBB67AE85;
  }
  uint32_t set[4] = {};  // bit k: this word of counter k
  for (int w = 0; w < 4; ++w) {
#pragma GCC unroll 4
    for (int v = 0; v < kChains; ++v) {
      set[w] |= lanes_up_to(c[w][v], static_cast<uint32_t>(mask.limit - 1)) << (v * kCounters);
    }
  }
  for (int g = 0; g < kGroupsAtOnce; ++g) {
    uint32_t group = 0;
    for (int w = 0; w < 4; ++w) group |= (set[w] >> (4 * g) & 15u) << (4 * w);
    bits[g] = static_cast<uint16_t>(group);
  }
}

// bits[g] are the elements of group first + g.
inline void draw_mask(const Mask& mask, int64_t first, int64_t groups, uint16_t* bits) {
  if (mask.limit == 0) {
    memset(bits, 0, static_cast<size_t>(groups) * sizeof *bits);
    return;
  }
  int64_t g = 0;
  for (; g + kGroupsAtOnce <= groups; g += kGroupsAtOnce) draw_groups(mask, first + g, bits + g);
  if (g == groups) return;
  uint16_t rest[kGroupsAtOnce];
  draw_groups(mask, first + g, rest);
  memcpy(bits + g, rest, static_cast<size_t>(groups - g) * sizeof *bits);
}

#else

inline void draw_mask(const Mask& mask, int64_t first, int64_t groups, uint16_t* bits) {
  for (int64_t g = 0; g < groups; ++g) bits[g] = static_cast<uint16_t>(mask_bits(mask, first + g));
}

#endif

}  // namespace llmkern::cpu::LLMKERN_ISA
