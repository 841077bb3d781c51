// SPDX-License-Identifier: Apache-2.0
// Rows of logits as kernels/decoding.h defines them, read in blocks from where they lie: z, its maximum, the masses.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "kernels/cpu/sampling/masses.h"
#include "kernels/decoding.h"

namespace llmkern::cpu::LLMKERN_ISA {

namespace {

constexpr int64_t kRowBlock = 512;         // tokens
constexpr int64_t kGrainTokens = 1 << 14;  // tokens worth waking another core for

inline int64_t row_blocks(int64_t V) { return (V + kRowBlock - 1) / kRowBlock; }

inline int64_t row_block_size(int64_t block, int64_t V) {
  return V - block * kRowBlock < kRowBlock ? V - block * kRowBlock : kRowBlock;
}

inline float clamped(float y) {
  y += 0.0f;  // -0 becomes 0
  return y > FLT_MAX ? FLT_MAX : y;
}

template <class T>
inline float z_of(T logit) {
  return clamped(static_cast<float>(widen(logit)));
}

inline uint64_t mass_of(float z, float maximum) { return round_to_integer(exp_mass(z - maximum, unit_falloff())); }

// z of `count` tokens; beyond them -inf.
template <int64_t size, class T>
inline void load_z(const T* logits, int64_t count, float (&z)[size]) {
  if constexpr (sizeof(T) == 2) {
    convert(z, logits, count);
  } else {
    for (int64_t i = 0; i < count; ++i) z[i] = static_cast<float>(logits[i]);
  }
  for (int64_t i = count; i < size; ++i) z[i] = -INFINITY;
  for (int64_t i = 0; i < size; ++i) z[i] = clamped(z[i]);
}

// As integers that floats hold.
template <int64_t size>
inline void masses_of(const float (&z)[size], float maximum, float (&mass)[size]) {
  const Weigher weigher(maximum, unit_falloff());
  for (int64_t i = 0; i < size; i += kLanes<float>) store(mass + i, rounded(weigher.mass(load(z + i))));
}

// The vectors of a block of `count` logits, by f(i, vector); beyond them -inf. Their z, but for -0, which no use of it
// tells from 0.
template <class T, class F>
inline void for_block(const T* logits, int64_t count, const F& f) {
  if constexpr (sizeof(T) < 8) {
    if (count == kRowBlock) {
#pragma GCC unroll 4
      for (int64_t i = 0; i < kRowBlock; i += kLanes<float>) {
        const FloatVec x = load_wide(logits + i);
        f(i, x > FLT_MAX ? broadcast(FLT_MAX) : x);
      }
      return;
    }
  }
  float z[kRowBlock];
  load_z(logits, count, z);
  for (int64_t i = 0; i < kRowBlock; i += kLanes<float>) f(i, load(z + i));
}

// The largest z of a block, NaN when one is. Several at a time: a maximum waits for the one before.
template <class T>
inline float maximum_of_block(const T* logits, int64_t count) {
  constexpr int kChains = 4;
  FloatVec best[kChains];
  IntVec is_nan[kChains] = {};
  for (FloatVec& x : best) x = broadcast(-INFINITY);
  for_block(logits, count, [&](int64_t i, FloatVec x) {
    const int64_t chain = i / kLanes<float> % kChains;
    is_nan[chain] |= x != x;
    best[chain] = max(x, best[chain]);
  });
  for (int j = 1; j < kChains; ++j) {
    is_nan[0] |= is_nan[j];
    best[0] = max(best[j], best[0]);
  }
  for (int i = 0; i < kLanes<float>; ++i) {
    if (is_nan[0][i] != 0) return NAN;
  }
  return maximum<float>(best[0]) + 0.0f;
}

// The largest z, NaN when one is. block_maxima: null, or one for every block.
template <class T>
float maximum_of_row(const T* logits, int64_t V, float* block_maxima) {
  float m = -INFINITY;
  for (int64_t block = 0; block < row_blocks(V); ++block) {
    const float of_block = maximum_of_block(logits + block * kRowBlock, row_block_size(block, V));
    if (block_maxima != nullptr) block_maxima[block] = of_block;
    if (of_block != of_block) return of_block;
    m = of_block > m ? of_block : m;
  }
  return m;
}

// The sum of the masses, for a finite maximum. block_mass: null, or one for every block.
template <class T>
uint64_t mass_of_row(const T* logits, int64_t V, float maximum, uint64_t* block_mass) {
  const Weigher weigher(maximum, unit_falloff());
  uint64_t total = 0;
  for (int64_t block = 0; block < row_blocks(V); ++block) {
    ExactSum sum;
    for_block(logits + block * kRowBlock, row_block_size(block, V),
              [&](int64_t, FloatVec z) { sum.add(weigher.mass(z)); });
    const uint64_t of_block = sum.total();
    if (block_mass != nullptr) block_mass[block] = of_block;
    total += of_block;
  }
  return total;
}

}  // namespace

}  // namespace llmkern::cpu::LLMKERN_ISA
