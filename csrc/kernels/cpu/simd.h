// SPDX-License-Identifier: Apache-2.0
// Vectors of the instruction set that this file is being compiled for, and the functions of an LSTM cell on them.
//
// Vec<T> is a GCC/Clang vector type: +, -, *, /, comparisons and ?: work as on numbers. Everything here lives in the
// namespace of one instruction set, so that the builds share no symbol.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef LLMKERN_X86
#include <immintrin.h>
#endif

#include "kernels/half.h"

namespace llmkern::cpu::LLMKERN_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

typedef float FloatVec __attribute__((vector_size(kVectorBytes)));
typedef double DoubleVec __attribute__((vector_size(kVectorBytes)));
typedef int32_t IntVec __attribute__((vector_size(kVectorBytes)));
typedef int64_t LongVec __attribute__((vector_size(kVectorBytes)));
typedef uint16_t HalfVec __attribute__((vector_size(kVectorBytes / 2)));  // as many as a vector has floats

typedef float HalfFloatVec __attribute__((vector_size(kVectorBytes / 2)));
typedef int32_t HalfIntVec __attribute__((vector_size(kVectorBytes / 2)));

template <class T>
struct VecOf;
template <>
struct VecOf<float> {
  using type = FloatVec;
};
template <>
struct VecOf<double> {
  using type = DoubleVec;
};
template <>
struct VecOf<int32_t> {
  using type = IntVec;
};

// Integers as wide as T, one a lane: what a shuffle is told.
template <class T>
struct IndexOf;
template <>
struct IndexOf<float> {
  using type = IntVec;
};
template <>
struct IndexOf<double> {
  using type = LongVec;
};
template <>
struct IndexOf<int32_t> {
  using type = IntVec;
};

template <class T>
using Vec = typename VecOf<T>::type;

// Half a vector: with AVX-512 what takes half the time. Of other types and builds, a whole one.
template <class T>
struct HalfOf {
  using type = Vec<T>;
};
#if defined(__AVX512F__)
template <>
struct HalfOf<float> {
  using type = HalfFloatVec;
};
template <>
struct HalfOf<int32_t> {
  using type = HalfIntVec;
};
#endif
template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <class T>
inline Vec<T> load(const T* from) {
  Vec<T> v;
  memcpy(&v, from, sizeof v);
  return v;
}

template <class T>
inline void store(T* to, Vec<T> v) {
  memcpy(to, &v, sizeof v);
}

// The first `count` lanes, at most all; the others read as zero and are not written. With AVX-512 one instruction; a
// memcpy of a variable size is a call.
template <class T>
inline Vec<T> load(const T* from, int64_t count) {
  if (count == kLanes<T>) return load(from);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return (Vec<T>)_mm512_maskz_loadu_epi32(static_cast<__mmask16>((1u << count) - 1), from);
  } else {
    return (Vec<T>)_mm512_maskz_loadu_epi64(static_cast<__mmask8>((1u << count) - 1), from);
  }
#else
  Vec<T> v = {};
  memcpy(&v, from, static_cast<size_t>(count) * sizeof(T));
  return v;
#endif
}

template <class T>
inline void store(T* to, Vec<T> v, int64_t count) {
  if (count == kLanes<T>) return store(to, v);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_epi32(to, static_cast<__mmask16>((1u << count) - 1), (__m512i)v);
  } else {
    _mm512_mask_storeu_epi64(to, static_cast<__mmask8>((1u << count) - 1), (__m512i)v);
  }
#else
  memcpy(to, &v, static_cast<size_t>(count) * sizeof(T));
#endif
}

// Calls f(column, count) on every vector of [begin, end); the last may be shorter than a vector.
template <class T, class F>
inline void for_lanes(int64_t begin, int64_t end, const F& f) {
  for (int64_t j = begin; j < end; j += kLanes<T>) f(j, end - j < kLanes<T> ? end - j : kLanes<T>);
}

template <class T>
inline Vec<T> broadcast(T x) {
  return x - Vec<T>{};  // x + 0 would lose the sign of -0
}

// a * b + c, fused where the instruction set can. The generic build rounds twice.
inline FloatVec fma(FloatVec a, FloatVec b, FloatVec c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

#if defined(__AVX512F__)
inline HalfFloatVec fma(HalfFloatVec a, HalfFloatVec b, HalfFloatVec c) { return _mm256_fmadd_ps(a, b, c); }
#endif

inline DoubleVec fma(DoubleVec a, DoubleVec b, DoubleVec c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_pd(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_pd(a, b, c);
#else
  return a * b + c;
#endif
}

template <class V>
inline V max(V a, V b) {
  return a > b ? a : b;
}

template <class V>
inline V min(V a, V b) {
  return a < b ? a : b;
}

// The same as one instruction, which gcc does not find by itself (and warns about its own header without a mask).
#if defined(__AVX512F__)
inline FloatVec max(FloatVec a, FloatVec b) { return _mm512_maskz_max_ps(0xffff, a, b); }
inline FloatVec min(FloatVec a, FloatVec b) { return _mm512_maskz_min_ps(0xffff, a, b); }
#elif defined(__AVX2__)
inline FloatVec max(FloatVec a, FloatVec b) { return _mm256_max_ps(a, b); }
inline FloatVec min(FloatVec a, FloatVec b) { return _mm256_min_ps(a, b); }
#endif

// rows[i][j] and rows[j][i] change places: log2(lanes) rounds, each of which swaps the off-diagonal quarters of every
// square of 2 * step rows and lanes.
template <class T>
inline void transpose(Vec<T> (&rows)[kLanes<T>]) {
  using Index = typename IndexOf<T>::type;
#pragma GCC unroll 4
  for (int step = 1; step < kLanes<T>; step *= 2) {
    Index upper, lower;  // lanes of the two new rows, counted through both old ones
    for (int j = 0; j < kLanes<T>; ++j) {
      upper[j] = (j & step) == 0 ? j : kLanes<T> + j - step;
      lower[j] = (j & step) == 0 ? j + step : kLanes<T> + j;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; ++i) {
      if ((i & step) != 0) continue;
      const Vec<T> a = rows[i], b = rows[i + step];
      rows[i] = __builtin_shuffle(a, b, upper);
      rows[i + step] = __builtin_shuffle(a, b, lower);
    }
  }
}

// Vectors lie in parts of 16 bytes, within which shuffles are cheapest.
template <class T>
constexpr int kPartLanes = 16 / static_cast<int>(sizeof(T));

// The part at each of as many places as a vector has parts, `stride` bytes from one to the next.
template <class T>
inline Vec<T> load_parts(const void* first, int64_t stride) {
  const char* from = static_cast<const char*>(first);
#if defined(__AVX512F__)
  const auto part = [&](int64_t i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * stride)); };
  __m512i v = _mm512_maskz_broadcast_i32x4(0x000f, part(0));
  v = _mm512_mask_broadcast_i32x4(v, 0x00f0, part(1));
  v = _mm512_mask_broadcast_i32x4(v, 0x0f00, part(2));
  return (Vec<T>)_mm512_mask_broadcast_i32x4(v, 0xf000, part(3));
#elif defined(__AVX2__)
  const auto part = [&](int64_t i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * stride)); };
  return (Vec<T>)_mm256_inserti128_si256(_mm256_castsi128_si256(part(0)), part(1), 1);
#else
  static_cast<void>(stride);
  return load(reinterpret_cast<const T*>(from));
#endif
}

// Of every part the lower or the upper halves of a and b: their elements of `step` lanes, in turn.
template <class T, int step, bool upper>
inline Vec<T> interleaved(Vec<T> a, Vec<T> b) {
  constexpr int lanes = kLanes<T>, part = kPartLanes<T>;
  typename IndexOf<T>::type from;
  for (int j = 0; j < lanes; ++j) {
    const int pair = j % part / (2 * step), of_b = j % part / step % 2, within = j % step;
    from[j] = of_b * lanes + j / part * part + (upper ? part / 2 : 0) + pair * step + within;
  }
  return __builtin_shuffle(a, b, from);
}

// columns[k][i] = element k of row i, for as many rows as there are lanes and as many k as a part has. load(i) gives a
// vector of parts, those of rows i, i + kPartLanes, ...: only squares of a part are left to transpose.
template <class T, class Load>
[[gnu::always_inline]] inline void load_columns(const Load& load, Vec<T> (&columns)[kPartLanes<T>]) {
  const Vec<T> a = load(0), b = load(1);
  if constexpr (kPartLanes<T> == 2) {
    columns[0] = interleaved<T, 1, false>(a, b);
    columns[1] = interleaved<T, 1, true>(a, b);
  } else {
    const Vec<T> c = load(2), d = load(3);
    const Vec<T> ab = interleaved<T, 1, false>(a, b), cd = interleaved<T, 1, false>(c, d);
    const Vec<T> ab_upper = interleaved<T, 1, true>(a, b), cd_upper = interleaved<T, 1, true>(c, d);
    columns[0] = interleaved<T, 2, false>(ab, cd);
    columns[1] = interleaved<T, 2, true>(ab, cd);
    columns[2] = interleaved<T, 2, false>(ab_upper, cd_upper);
    columns[3] = interleaved<T, 2, true>(ab_upper, cd_upper);
  }
}

// Every lane takes the place of the one that is so many before it. A template, so that the shuffle is a constant.
template <class T, int places>
inline Vec<T> rotated(Vec<T> v) {
  typename IndexOf<T>::type from;
  for (int i = 0; i < kLanes<T>; ++i) from[i] = (i + places) % kLanes<T>;
  return __builtin_shuffle(v, from);
}

// The lanes are added in a fixed tree, so the sum is the same on every run.
template <class T, int width = kLanes<T> / 2>
inline T sum(Vec<T> v) {
  if constexpr (width == 0) {
    return v[0];
  } else {
    return sum<T, width / 2>(v + rotated<T, width>(v));
  }
}

template <class T, int width = kLanes<T> / 2>
inline T maximum(Vec<T> v) {
  if constexpr (width == 0) {
    return v[0];
  } else {
    return maximum<T, width / 2>(max(v, rotated<T, width>(v)));
  }
}

// ---- exp, sigmoid and tanh
//
// exp(k x) = 2^n exp(k rest) with n = k x / ln 2 rounded to a multiple of 1 / kPowers, rest = x - n ln 2 / k. 2^n is an
// exponent and one of kPowers numbers, which a shuffle finds; what is left is so small that a short polynomial does.

#if defined(__AVX512F__)
constexpr int kPowerBits = 4;
#elif defined(__AVX2__)
constexpr int kPowerBits = 3;
#else
constexpr int kPowerBits = 0;  // no shuffle
#endif
constexpr int kPowers = 1 << kPowerBits;

// (exp(r) - 1 - r) / r^2 for |r| <= ln 2 / kPowers / 2, coefficients from the last to the first. The error of exp(r) -
// 1 is at most 2e-8 of itself, which near 0 tanh is; that of the shorter one for exp is 2e-9 of exp(r).
#if defined(__AVX2__)
constexpr float kGrowth[] = {0x1.555d12p-5f, 0x1.555c22p-3f, 0.5f};
#else
constexpr float kGrowth[] = {0x1.6d995cp-10f, 0x1.122838p-7f, 0x1.555486p-5f, 0x1.5554bp-3f, 0.5f};
#endif
#if defined(__AVX512F__)
constexpr float kExpGrowth[] = {0x1.555762p-3f, 0x1.00022p-1f};
#else
static constexpr auto& kExpGrowth = kGrowth;
#endif

// 2^(j / 16) rounded to float: its bits, and the logarithm of the float less j / 16 ln 2.
constexpr int32_t kSixteenthPowers[] = {0x3f800000, 0x3f85aac3, 0x3f8b95c2, 0x3f91c3d3, 0x3f9837f0, 0x3f9ef532,
                                        0x3fa5fed7, 0x3fad583f, 0x3fb504f3, 0x3fbd08a4, 0x3fc5672a, 0x3fce248c,
                                        0x3fd744fd, 0x3fe0ccdf, 0x3feac0c7, 0x3ff5257d};
constexpr float kSixteenthErrors[] = {
    0.0f,           -4.62854697e-8f, 1.19921572e-8f,  -4.72978225e-8f, -3.19341804e-8f, -3.62105725e-8f,
    3.09907212e-8f, 7.47521319e-9f,  -1.71142712e-8f, 3.04768347e-8f,  -5.23333424e-9f, -6.10759160e-9f,
    1.47196056e-8f, 5.25879514e-9f,  6.12825984e-9f,  -5.14060920e-9f};

// (exp(k r) - 1) / |k|.
template <int k, int terms>
inline FloatVec growth(FloatVec r, const float (&coefficients)[terms]) {
  constexpr float magnitude = k < 0 ? -k : k;
  float factor = k * k / magnitude;
  for (int i = 1; i < terms; ++i) factor *= k;
  FloatVec p = broadcast(coefficients[0] * factor);
  for (int i = 1; i < terms; ++i) p = fma(p, r, broadcast(coefficients[i] * (factor /= k)));
  return fma(p * r, r, k < 0 ? -r : r);
}

// exp(k x) = scale * exp(k rest - error), error that of the table.
struct Power {
  FloatVec scale, rest;
  IntVec index;  // into the table: the low bits
};

// For |k x| <= 87. ln 2 in two parts, after Cody & Waite 1980. Their first part has so few bits that its product with n
// is exact; where that product is not rounded anyway, the first part is good enough alone unless x is far from 0.
template <int k, bool kFar>
inline Power power(FloatVec x) {
#if defined(__FMA__)
  constexpr bool kFused = true;
  constexpr float kHigh = 0.693147182464599609f, kLow = -1.904654300e-9f;
#else
  constexpr bool kFused = false;
  constexpr float kHigh = 0.693359375f, kLow = -2.12194440e-4f;
#endif
  constexpr int kShift = 23 - kPowerBits;
  constexpr float kRound = 3 << (kShift - 1);  // adding it rounds, into the low bits
  const FloatVec shifted = fma(x, broadcast(k * 1.44269504f), broadcast(kRound)), n = shifted - kRound;
  Power p = {{}, fma(n, broadcast(-kHigh / k), x), (IntVec)shifted};
  if constexpr (kFar || !kFused) p.rest = fma(n, broadcast(-kLow / k), p.rest);
  IntVec powers;  // less what the bits of the index will add to them
  for (int i = 0; i < kLanes<float>; ++i) {
    const int j = i % kPowers;
    powers[i] = kSixteenthPowers[j * 16 / kPowers] - j * (1 << kShift);
  }
  if constexpr (kPowers > 1) powers = __builtin_shuffle(powers, p.index);
  p.scale = (FloatVec)(powers + (p.index << kShift));
  return p;
}

// exp(k x) to about one unit in the last place for |x| <= 87. A NaN stays one.
template <int k>
inline FloatVec exp_of_bounded(FloatVec x) {
  const Power p = power<k, true>(x);
  return fma(p.scale, growth<k>(p.rest, kExpGrowth), p.scale);
}

// Below -87, 0, so that a logit of -inf has no probability; above 87, the value there. max and min return their second
// operand when one is NaN: it stays NaN.
inline FloatVec exp(FloatVec x) {
  const FloatVec bounded = min(broadcast(87.0f), max(broadcast(-87.0f), x));
  return x < -87.0f ? FloatVec{} : exp_of_bounded<1>(bounded);
}

// float64 exists for gradient checks and references: libm, lane by lane.
inline DoubleVec exp(DoubleVec x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = ::exp(x[i]);
  return x;
}

// What exp(-x) is beyond 87 and -87 does not matter to the sum.
inline FloatVec sigmoid(FloatVec x) {
  return 1 / (1 + exp_of_bounded<-1>(min(broadcast(87.0f), max(broadcast(-87.0f), x))));
}

inline DoubleVec sigmoid(DoubleVec x) { return 1 / (1 + exp(-x)); }

// tanh(x) = a / (a + 1) for a = (exp(2x) - 1) / 2, whose `scale - 1` is exact where it is small. From 10 on it is 1.
inline FloatVec tanh(FloatVec x) {
  const IntVec sign = (IntVec)x & INT32_MIN;
  const Power p = power<2, false>(min(broadcast(10.0f), (FloatVec)((IntVec)x ^ sign)));
  FloatVec rest = p.rest;
  if constexpr (kPowers > 1) {
    FloatVec errors;
    for (int i = 0; i < kLanes<float>; ++i) errors[i] = kSixteenthErrors[i % kPowers * 16 / kPowers] / 2;
    rest -= __builtin_shuffle(errors, p.index);
  }
  const FloatVec half = fma(p.scale, broadcast(0.5f), broadcast(-0.5f)),
                 a = fma(p.scale, growth<2>(rest, kGrowth), half);
  return (FloatVec)((IntVec)(a / (a + 1)) | sign);
}

inline DoubleVec tanh(DoubleVec x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = ::tanh(x[i]);
  return x;
}

}  // namespace llmkern::cpu::LLMKERN_ISA
