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

// How fast a token's mass falls with its distance d <= 0 from the most likely one: mass = 2^40 * 2^(d * scale).
struct Falloff {
  float scale;   // log2(e) / temperature, in [2^-120, 2^101]
  float lowest;  // where it has come to nothing; what d is raised to
};

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

// Orders as the float does, NaN beyond both infinities.
LLMKERN_HOST_DEVICE inline int32_t ordered(float value) {
  const int32_t bits = static_cast<int32_t>(float_to_bits(value));
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

LLMKERN_HOST_DEVICE inline float from_ordered(int32_t key) {
  return bits_to_float(static_cast<uint32_t>(key ^ ((key >> 31) & 0x7fffffff)));
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
constexpr float kNoMass = -48.0f;  // 2^(40 - 48) is far below one half

// x in [0, 2^51] rounded to an integer, halves to even.
LLMKERN_HOST_DEVICE inline uint64_t round_to_integer(float x) {
#ifdef __CUDA_ARCH__
  return __float2ull_rn(x);
#else
  return double_to_bits(static_cast<double>(x) + 0x1p52) & 0xfffffffffffffull;  // the addition rounds
#endif
}

LLMKERN_HOST_DEVICE inline Falloff falloff(double temperature) {
  constexpr double kLog2E = 1.4426950408889634;
  constexpr float kLeast = 0x1p-120f;  // kNoMass / kLeast is finite, so that d = -inf has no mass either
  const float scale = static_cast<float>(kLog2E / temperature);
  const float bounded = scale > kLeast ? scale : kLeast;
  return {bounded, kNoMass / bounded};
}

// The bits of 2^(j / 8), less j in units of the first three bits of the mantissa: see exp_mass.
constexpr uint32_t kEighthPowers[8] = {0x3f800000u,
                                       0x3f8b95c2u - (1u << 20),
                                       0x3f9837f0u - (2u << 20),
                                       0x3fa5fed7u - (3u << 20),
                                       0x3fb504f3u - (4u << 20),
                                       0x3fc5672au - (5u << 20),
                                       0x3fd744fdu - (6u << 20),
                                       0x3feac0c7u - (7u << 20)};
// 2^r = 1 + r * (c0 + c1 r + c2 r^2) for |r| <= 1/16, minimax: the relative error is below 2.7e-8.
constexpr float kPowerOfTwo[3] = {0x1.62e432p-1f, 0x1.ec0c32p-3f, 0x1.c6a004p-5f};
constexpr float kRoundToEighths = 0x1.8p20f;  // adding it rounds to a multiple of 1/8, left in the low bits

// 2^(40 + d * scale) for d <= 0, -inf included; its rounding to an integer (halves to even) is the token's mass. Sums
// of masses, taken in integers, are exact in any order.
//
// d * scale = n + r, n a multiple of 1/8. In `shifted` the low bits are 8 * (n + 40): the last three choose 2^(j / 8)
// from a table, and all of them, moved to where a float's exponent begins, scale it by the power of two (j itself
// arrives in the mantissa, which is why the table has it taken off). The relative error is below 1.5e-7 and
// 3e-8 * |d * scale|, that of `scale` itself. On the GPU the table is given, in memory of the device's choice.
LLMKERN_HOST_DEVICE inline float exp_mass(float d, const Falloff& f, const uint32_t* powers = kEighthPowers) {
  d = d > f.lowest ? d : f.lowest;
  const float shifted = fmaf(d, f.scale, kRoundToEighths + kMassBits);
  const float n = shifted - (kRoundToEighths + kMassBits);
  const float r = fmaf(d, f.scale, -n);
  const uint32_t bits = float_to_bits(shifted);
  const float power = bits_to_float(powers[bits & 7] + (bits << 20));
  const float q = fmaf(fmaf(r, kPowerOfTwo[2], kPowerOfTwo[1]), r, kPowerOfTwo[0]);
  return fmaf(power * r, q, power);
}

// mass * -d * scale before its rounding to an integer: what a token adds to the mean of the information, in bits. For
// a rounded mass.
LLMKERN_HOST_DEVICE inline float weighted_mass(float mass, float d, const Falloff& f) {
  d = d > f.lowest ? d : f.lowest;
  return mass * -(d * f.scale);
}

// max(1, ceil(p * mass)) for p in (0, 1], mass < 2^63; p is first truncated to a multiple of 2^-62.
LLMKERN_HOST_DEVICE inline uint64_t fraction_of_mass(double p, uint64_t mass) {
  const uint64_t numerator = static_cast<uint64_t>(p * 0x1p62);
  const uint64_t high = multiply_high(numerator, mass), low = numerator * mass;
  const uint64_t floor = high << 2 | low >> 62;
  const uint64_t ceiling = floor + ((low << 2) != 0);
  return ceiling > 1 ? ceiling : 1;
}

constexpr double kLn2 = 0.6931471805599453;

// log(mass / 2^40) for mass > 0, in float64.
//
// mass = 2^e * m with m in [sqrt(1/2), sqrt(2)); log m = 2 atanh(s), s = (m - 1) / (m + 1), |s| <= 0.172, by its series
// to s^21, whose remainder is below 1e-18.
LLMKERN_HOST_DEVICE inline double log_mass(uint64_t mass) {
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
