// SPDX-License-Identifier: Apache-2.0
// Arithmetic that must give the same bits on every CPU build and on the GPU.
//
// Only IEEE operations with one defined rounding are used: +, -, *, / and an explicit fused multiply-add, in a fixed
// order, and integers. No libm, no contraction (-ffp-contract=off, --fmad=false), no fast-math. Compilers may vectorise
// loops over these functions: that changes no bit.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define LLMKERN_HOST_DEVICE __host__ __device__
#else
#define LLMKERN_HOST_DEVICE
#endif

namespace llmkern {

namespace {  // one copy an instruction-set build: the linker must not merge them

LLMKERN_HOST_DEVICE inline float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

LLMKERN_HOST_DEVICE inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

LLMKERN_HOST_DEVICE inline uint64_t double_to_bits(double value) {
  uint64_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

LLMKERN_HOST_DEVICE inline double bits_to_double(uint64_t bits) {
  double value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// The high 64 bits of the 128-bit product.
LLMKERN_HOST_DEVICE inline uint64_t multiply_high(uint64_t a, uint64_t b) {
#ifdef __CUDA_ARCH__
  return __umul64hi(a, b);
#else
  return static_cast<uint64_t>((static_cast<unsigned __int128>(a) * b) >> 64);
#endif
}

constexpr int kMassBits = 40;
constexpr uint64_t kFullMass = uint64_t{1} << kMassBits;
constexpr float kMaxDistance = 64.0f;  // exp(-64) * 2^40 is far below one half

// x in [0, 2^51] rounded to an integer, halves to even.
LLMKERN_HOST_DEVICE inline uint64_t round_to_integer(float x) {
#ifdef __CUDA_ARCH__
  return __float2ull_rn(x);
#else
  return double_to_bits(static_cast<double>(x) + 0x1p52) & 0xfffffffffffffull;  // the addition rounds; vectorises
#endif
}

// min(-d, 64) for d <= 0, d = -inf included.
LLMKERN_HOST_DEVICE inline float distance(float d) {
  constexpr uint32_t kLimit = 0x42800000u;  // the bits of 64: non-negative floats compare as integers, without a branch
  const uint32_t magnitude = float_to_bits(d) & 0x7fffffffu;
  return bits_to_float(magnitude < kLimit ? magnitude : kLimit);
}

// round(2^40 * exp(d)), halves to even, for d <= 0 (-inf gives 0): an integer, and 24 bits hold it, so it comes as a
// float. Sums of masses, taken in 64-bit integers (round_to_integer), are exact in any order.
//
// exp(d) = 2^n * exp(r), n = round(d / ln 2), |r| <= ln(2)/2 + rounding; exp(r) is its Taylor polynomial of degree 7,
// whose remainder 0.347^8 / 8! = 5e-9 is below half a unit in the last place. ln 2 is split in two (Cody & Waite 1980)
// so that n * ln2_high is exact. Before the last rounding the relative error is below 8e-8 (every d tried).
LLMKERN_HOST_DEVICE inline float exp_mass(float d) {
  constexpr float kLog2E = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr float kRound = 0x1.8p23f;  // adding it rounds to an integer, left in the low bits
  d = -distance(d);
  const float shifted = fmaf(d, kLog2E, kRound);
  const float n = shifted - kRound;
  float r = fmaf(n, -kLn2High, d);
  r = fmaf(n, -kLn2Low, r);
  float p = 1.0f / 5040.0f;
  p = fmaf(p, r, 1.0f / 720.0f);
  p = fmaf(p, r, 1.0f / 120.0f);
  p = fmaf(p, r, 1.0f / 24.0f);
  p = fmaf(p, r, 1.0f / 6.0f);
  p = fmaf(p, r, 0.5f);
  p = fmaf(p, r, 1.0f);
  p = fmaf(p, r, 1.0f);
  // p * 2^(n + 40), by adding to the exponent; -53 <= n + 40 <= 40.
  const uint32_t exponent = float_to_bits(shifted) - float_to_bits(kRound) + kMassBits;
  return rintf(bits_to_float(float_to_bits(p) + (exponent << 23)));
}

// round(mass * -d), halves to even: what a token adds to the mean distance from the maximum.
LLMKERN_HOST_DEVICE inline uint64_t weighted_mass(float mass, float d) { return round_to_integer(mass * distance(d)); }

// max(1, ceil(p * mass)) for p in (0, 1], mass < 2^63; p is first truncated to a multiple of 2^-62.
LLMKERN_HOST_DEVICE inline uint64_t fraction_of_mass(double p, uint64_t mass) {
  const uint64_t numerator = static_cast<uint64_t>(p * 0x1p62);
  const uint64_t high = multiply_high(numerator, mass), low = numerator * mass;
  const uint64_t floor = high << 2 | low >> 62;
  const uint64_t ceiling = floor + ((low << 2) != 0);
  return ceiling > 1 ? ceiling : 1;
}

// log(mass / 2^40) for mass > 0, in float64.
//
// mass = 2^e * m with m in [sqrt(1/2), sqrt(2)); log m = 2 atanh(s), s = (m - 1) / (m + 1), |s| <= 0.172, by its series
// to s^21, whose remainder is below 1e-18.
LLMKERN_HOST_DEVICE inline double log_mass(uint64_t mass) {
  constexpr double kLn2 = 0.6931471805599453;
  const uint64_t bits = double_to_bits(static_cast<double>(mass));
  int32_t e = static_cast<int32_t>(bits >> 52) - 1023;
  double m = bits_to_double((bits & 0xfffffffffffffull) | 0x3ff0000000000000ull);
  if (m > 1.4142135623730951) {
    m *= 0.5;
    ++e;
  }
  const double s = (m - 1.0) / (m + 1.0), s2 = s * s;
  double series = 1.0 / 21.0;
  for (int32_t k = 19; k >= 1; k -= 2) series = series * s2 + 1.0 / k;
  return (e - kMassBits) * kLn2 + 2.0 * s * series;
}

}  // namespace

}  // namespace llmkern
