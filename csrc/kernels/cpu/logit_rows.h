// SPDX-License-Identifier: Apache-2.0
// Rows of logits as kernels/decoding.h defines them, read in blocks from where they lie: z, its maximum, the masses.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "kernels/cpu/masses.h"
#include "kernels/decoding.h"

namespace llmkern::cpu::LLMKERN_ISA {

namespace {

constexpr int64_t kRowBlock = 256;         // tokens
constexpr int64_t kGrainTokens = 1 << 14;  // tokens worth waking another core for

inline int64_t row_blocks(int64_t V) { return (V + kRowBlock - 1) / kRowBlock; }

inline int64_t row_block_size(int64_t block, int64_t V) {
  return V - block * kRowBlock < kRowBlock ? V - block * kRowBlock : kRowBlock;
}

// Orders as the float does, NaN beyond both infinities.
inline int32_t ordered(float value) {
  const int32_t bits = static_cast<int32_t>(float_to_bits(value));
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

inline float from_ordered(int32_t key) {
  return bits_to_float(static_cast<uint32_t>(key ^ ((key >> 31) & 0x7fffffff)));
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

// z of `count` tokens, at most `size`; up to there -inf.
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

// The largest of a whole block, NaN when one is.
template <class T>
inline float maximum_of_block(const T* x) {
  FloatVec best = load_wide(x);
  IntVec is_nan = best != best;
  for (int64_t i = kLanes<float>; i < kRowBlock; i += kLanes<float>) {
    const FloatVec next = load_wide(x + i);
    is_nan |= next != next;
    best = max(next, best);
  }
  best = is_nan ? broadcast(NAN) : best;
  float lanes[kLanes<float>];
  store(lanes, best);
  for (int width = kLanes<float> / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) {
      const float other = lanes[i + width];
      lanes[i] = other > lanes[i] || other != other ? other : lanes[i];
    }
  }
  return lanes[0];
}

// Of the first `count` elements of it.
template <class T>
inline float maximum_of_block(const T* x, int64_t count) {
  if constexpr (sizeof(T) < 8) {
    if (count == kRowBlock) return maximum_of_block(x);
  }
  float z[kRowBlock];
  load_z(x, count, z);
  return maximum_of_block(z);
}

// The largest z, NaN when one is. block_maxima: null, or one for every block.
template <class T>
float maximum_of_row(const T* logits, int64_t V, float* block_maxima) {
  float m = -INFINITY;
  for (int64_t block = 0; block < row_blocks(V); ++block) {
    const float of_block = clamped(maximum_of_block(logits + block * kRowBlock, row_block_size(block, V)));
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
    float z[kRowBlock];
    load_z(logits + block * kRowBlock, row_block_size(block, V), z);
    ExactSum sum;
    for (int64_t i = 0; i < kRowBlock; i += kLanes<float>) sum.add(weigher.mass(load(z + i)));
    const uint64_t of_block = sum.total();
    if (block_mass != nullptr) block_mass[block] = of_block;
    total += of_block;
  }
  return total;
}

}  // namespace

}  // namespace llmkern::cpu::LLMKERN_ISA
