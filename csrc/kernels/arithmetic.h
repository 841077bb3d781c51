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

// round(2^40 * exp(d)) for d <= 0 (-inf gives 0), as an integer: sums of masses are exact in any order.
//
// exp(d) = 2^n * exp(r), n = round(d / ln 2), |r| <= ln(2)/2 + rounding; exp(r) is its Taylor polynomial of degree 7,
// whose remainder 0.347^8 / 8! = 5e-9 is below half a unit in the last place. ln 2 is split in two (Cody & Waite 1980)
// so that n * ln2_high is exact. The last step rounds half up in integers.
LLMKERN_HOST_DEVICE inline uint64_t exp_mass(float d) {
  constexpr float kLog2E = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  d = d > -64.0f ? d : -64.0f;           // exp(-64) * 2^40 is far below one half
  const float n = fmaf(d, kLog2E, kRound) - kRound;
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
  // p = mantissa * 2^(exponent - 23), so the mass is (mantissa << 18) / 2^shift.
  const uint32_t bits = float_to_bits(p);
  const uint64_t mantissa = (bits & 0x7fffffu) | 0x800000u;
  const int32_t exponent = static_cast<int32_t>(bits >> 23) - 127;
  const int32_t wanted = 1 - exponent - static_cast<int32_t>(n);
  const int32_t shift = wanted < 63 ? wanted : 63;
  return ((mantissa << 18) + (uint64_t{1} << (shift - 1))) >> shift;
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
