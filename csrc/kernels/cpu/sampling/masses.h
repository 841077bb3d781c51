// SPDX-License-Identifier: Apache-2.0
// The masses of a row's tokens (exp_mass in kernels/arithmetic.h), by vectors and to the same bits, and their sums.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/arithmetic.h"
#include "kernels/cpu/storage.h"

namespace llmkern::cpu::LLMKERN_ISA {

typedef uint32_t UintVec __attribute__((vector_size(kVectorBytes)));

namespace {

// a * b + c with one rounding, on every build: fma() of simd.h rounds twice where there is no instruction for it.
inline FloatVec fused(FloatVec a, FloatVec b, FloatVec c) {
#if defined(__FMA__)
  return fma(a, b, c);
#else
  FloatVec sum;
  for (int i = 0; i < kLanes<float>; ++i) sum[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return sum;
#endif
}

// To an integer, halves to even.
inline FloatVec rounded(FloatVec x) {
#if defined(__AVX512F__)
  return _mm512_maskz_roundscale_ps(0xffff, x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  for (int i = 0; i < kLanes<float>; ++i) x[i] = __builtin_rintf(x[i]);
  return x;
#endif
}

// kEighthPowers[bits & 7] in every lane.
inline UintVec eighth_powers(IntVec bits) {
  UintVec powers;
#if defined(__AVX2__)
  for (int i = 0; i < kLanes<float>; ++i) powers[i] = kEighthPowers[i & 7];
  return __builtin_shuffle(powers, bits);  // of which only the lower three or four bits count
#else
  for (int i = 0; i < kLanes<float>; ++i) powers[i] = kEighthPowers[bits[i] & 7];
  return powers;
#endif
}

// Tokens of one row.
struct Weigher {
  FloatVec maximum, scale, lowest;

  Weigher(float row_maximum, const Falloff& f)
      : maximum(broadcast(row_maximum)), scale(broadcast(f.scale)), lowest(broadcast(f.lowest)) {}

  FloatVec distance(FloatVec y) const { return max(y - maximum, lowest); }

  // Not rounded yet. kRaises: whether d may be below `lowest`.
  template <bool kRaises = true>
  FloatVec mass(FloatVec y) const {
    const FloatVec d = kRaises ? distance(y) : y - maximum, round = broadcast(kRoundToEighths + kMassBits);
    const FloatVec shifted = fused(d, scale, round);
    const FloatVec r = fused(d, scale, round - shifted);
    const IntVec bits = bits_of(shifted);
    const FloatVec power = float_of((IntVec)(eighth_powers(bits) + ((UintVec)bits << 20)));
    FloatVec q = fused(r, broadcast(kPowerOfTwo[2]), broadcast(kPowerOfTwo[1]));
    q = fused(q, r, broadcast(kPowerOfTwo[0]));
    return fused(power * r, q, power);
  }

  // d * scale as a multiple of 1/8, counted from kNoMass.
  IntVec bin(FloatVec y) const {
    constexpr float kRound = kRoundToEighths + kMassBits, kFirst = kRound + kNoMass;
    return bits_of(fused(distance(y), scale, broadcast(kRound))) - static_cast<int32_t>(float_to_bits(kFirst));
  }

  FloatVec weighted(FloatVec mass, FloatVec y) const { return rounded(mass) * -(distance(y) * scale); }
};

// Numbers in [0, 2^41), rounded to integers and added up, exactly and therefore in any order.
//
// There is no cheap way from 16 floats to 64-bit integers. But x = high + low with high a multiple of 2^20; the sums of
// x + 1.5 * 2^43 and low + 1.5 * 2^23, taken on the bits of these floats, are the sums of high / 2^20 and of the
// rounded low, each with a constant a term.
class ExactSum {
 public:
  static constexpr int kMostTerms = 1024;  // 2^20 each, in 31 bits

  void add(FloatVec x) {
    const FloatVec high_part = x + broadcast(kHigh);
    high_ += (UintVec)bits_of(high_part);
    const FloatVec low_part = x - (high_part - broadcast(kHigh));
    low_ += (UintVec)bits_of(low_part + broadcast(kLow));
    ++terms_;
  }

  uint64_t total() const {
    const UintVec high = high_ - terms_ * float_to_bits(kHigh), low = low_ - terms_ * float_to_bits(kLow);
    int32_t high_lanes[kLanes<float>], low_lanes[kLanes<float>];
    memcpy(high_lanes, &high, sizeof high);
    memcpy(low_lanes, &low, sizeof low);
    int64_t high_total = 0, low_total = 0;
    for (int i = 0; i < kLanes<float>; ++i) {
      high_total += high_lanes[i];
      low_total += low_lanes[i];
    }
    return static_cast<uint64_t>(high_total << 20) + static_cast<uint64_t>(low_total);
  }

 private:
  static constexpr float kHigh = 0x1.8p43f, kLow = 0x1.8p23f;
  UintVec high_ = {}, low_ = {};
  uint32_t terms_ = 0;
};

}  // namespace

}  // namespace llmkern::cpu::LLMKERN_ISA
