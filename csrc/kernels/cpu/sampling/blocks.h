// SPDX-License-Identifier: Apache-2.0
// One row of logits at work: its blocks, and vectors and sets of its tokens.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels/cpu/sampling/masses.h"

namespace llmkern::cpu::LLMKERN_ISA {

namespace {

constexpr int64_t kBlock = 1024;  // tokens: a team divides blocks, and skips one whose maximum is too low

// Which lanes of a vector: a mask register where there are some.
#if defined(__AVX512F__)
using LaneMask = __mmask16;

inline LaneMask at_least(FloatVec x, FloatVec bound) { return _mm512_cmp_ps_mask(x, bound, _CMP_GE_OQ); }
inline LaneMask unordered(FloatVec a, FloatVec b) { return _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q); }
inline FloatVec zero_unless(LaneMask mask, FloatVec x) { return _mm512_maskz_mov_ps(mask, x); }
inline uint32_t lane_bits(LaneMask mask) { return mask; }
#else
using LaneMask = IntVec;

inline LaneMask at_least(FloatVec x, FloatVec bound) { return x >= bound; }
inline LaneMask unordered(FloatVec a, FloatVec b) { return (a != a) | (b != b); }
inline FloatVec zero_unless(LaneMask mask, FloatVec x) { return float_of(bits_of(x) & mask); }
inline uint32_t lane_bits(LaneMask mask) {
#if defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask));
#elif defined(LLMKERN_X86)
  return static_cast<uint32_t>(_mm_movemask_ps((__m128)mask));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes<float>; ++i) bits |= static_cast<uint32_t>(mask[i] & 1) << i;
  return bits;
#endif
}
#endif

// One row at work.
struct Row {
  const float* y;  // [V]
  int64_t V;
  const FloatVec* block_maxima;  // [blocks], by lanes
  float maximum;                 // of y
  int64_t num_live;              // tokens that are not -inf
  double temperature;
  Falloff scale;
  const char* next;  // where the logits of the row lie that this worker reads next: asked for while this one is summed

  int64_t blocks() const { return (V + kBlock - 1) / kBlock; }
  int64_t block_end(int64_t block) const { return (block + 1) * kBlock < V ? (block + 1) * kBlock : V; }
  Weigher weigher() const { return Weigher(maximum, scale); }
};

// Tokens i to i + kLanes of the row after this one, which are of `element` bytes each. To the second level: the first
// has no room for them. (Always inlined: a function that only prefetches counts as one without effects.)
[[gnu::always_inline]] inline void prefetch_next(const Row& row, int64_t i, int64_t element) {
  __builtin_prefetch(row.next + i * element, 0, 2);
}

inline bool block_reaches(const Row& row, int64_t block, float bound) {
  return lane_bits(at_least(row.block_maxima[block], broadcast(bound))) != 0;
}

// Calls f(i, vector) on the tokens of a block, i the first of the vector; lanes beyond the vocabulary read as -inf.
template <class F>
void for_block(const float* y, int64_t begin, int64_t end, const F& f) {
  constexpr int64_t n = kLanes<float>;
  int64_t i = begin;
  for (; i + n <= end; i += n) f(i, load(y + i));
  if (i == end) return;
  float rest[n];
  for (int64_t lane = 0; lane < n; ++lane) rest[lane] = i + lane < end ? y[i + lane] : -INFINITY;
  f(i, load(rest));
}

// A set of a block's tokens, a bit each: the tokens of vector j in bits[j].
struct BlockBits {
  static constexpr int kSpare = 4;
  alignas(64) uint16_t bits[kBlock / kLanes<float>] = {};

  void set(int64_t offset, uint32_t lanes) {
    bits[static_cast<uint64_t>(offset) / kLanes<float>] = static_cast<uint16_t>(lanes);
  }

  // Their places in the block, ascending. The number of them.
  //
  // How many there are in a word is as good as random. So a few are written whether they are there or not, and only
  // further ones cost a branch.
  int64_t list(int32_t (&places)[kBlock + kSpare]) const {
    constexpr size_t kVectors = sizeof(uint64_t) / sizeof *bits;  // little-endian, as every machine that builds this
    int64_t size = 0;
    for (size_t j = 0; j < sizeof bits / sizeof *bits; j += kVectors) {
      uint64_t word;
      memcpy(&word, bits + j, sizeof word);
      const int count = __builtin_popcountll(word);
      const auto next = [&] {
        const int bit = __builtin_ctzll(word | uint64_t{1} << 63);
        word &= word - 1;
        return (static_cast<int32_t>(j) + bit / 16) * kLanes<float> + bit % 16;
      };
      for (int i = 0; i < kSpare; ++i) places[size + i] = next();
      for (int i = kSpare; i < count; ++i) places[size + i] = next();
      size += count;
    }
    return size;
  }
};

}  // namespace

}  // namespace llmkern::cpu::LLMKERN_ISA
