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

// The lanes are added in a fixed tree, so the sum is the same on every run.
template <class T>
inline T sum(Vec<T> v) {
  T lanes[kLanes<T>];
  memcpy(lanes, &v, sizeof lanes);
  for (int width = kLanes<T> / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

template <class T>
inline T maximum(Vec<T> v) {
  T best = v[0];
  for (int i = 1; i < kLanes<T>; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

// exp(x) to about one unit in the last place for |x| <= 87. exp(x) = 2^n exp(r), ln 2 split in two (Cody & Waite 1980),
// exp(r) by its Taylor polynomial. A NaN stays one.
inline FloatVec exp_of_bounded(FloatVec x) {
  const FloatVec round = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, left in the low bits
  const FloatVec shifted = fma(x, broadcast(1.44269504f), round), n = shifted - round;
  FloatVec r = fma(n, broadcast(-0.693359375f), x);
  r = fma(n, broadcast(2.12194440e-4f), r);
  FloatVec p = broadcast(1.0f / 5040.0f);
  constexpr float kTaylor[] = {1.0f / 720.0f, 1.0f / 120.0f, 1.0f / 24.0f, 1.0f / 6.0f, 0.5f, 1.0f, 1.0f};
  for (float coefficient : kTaylor) p = fma(p, r, broadcast(coefficient));
  return p * (FloatVec)(((IntVec)shifted + 127) << 23);
}

// Below -87, 0, so that a logit of -inf has no probability; above 87, the value there. max and min return their second
// operand when one is NaN: it stays NaN.
inline FloatVec exp(FloatVec x) {
  const FloatVec bounded = min(broadcast(87.0f), max(broadcast(-87.0f), x));
  return x < -87.0f ? FloatVec{} : exp_of_bounded(bounded);
}

// float64 exists for gradient checks and references: libm, lane by lane.
inline DoubleVec exp(DoubleVec x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = ::exp(x[i]);
  return x;
}

// What exp(-x) is beyond 87 and -87 does not matter to the sum.
inline FloatVec sigmoid(FloatVec x) {
  return 1 / (1 + exp_of_bounded(min(broadcast(87.0f), max(broadcast(-87.0f), -x))));
}

inline DoubleVec sigmoid(DoubleVec x) { return 1 / (1 + exp(-x)); }

// tanh(x): an odd polynomial below 0.625, where 1 - 2 / (exp(2x) + 1) would cancel (coefficients: Cephes, Moshier
// 1992).
inline FloatVec tanh(FloatVec x) {
  const FloatVec z = x * x;
  FloatVec p = broadcast(-5.70498872745e-3f);
  constexpr float kOdd[] = {2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f, -3.33332819422e-1f};
  for (float coefficient : kOdd) p = fma(p, z, broadcast(coefficient));
  const FloatVec small = fma(p * z, x, x);
  const IntVec sign = (IntVec)x & INT32_MIN;
  const FloatVec magnitude = (FloatVec)((IntVec)x ^ sign);
  const FloatVec large = 1 - 2 / (exp_of_bounded(min(broadcast(87.0f), 2 * magnitude)) + 1);
  return magnitude < 0.625f ? small : (FloatVec)((IntVec)large | sign);
}

inline DoubleVec tanh(DoubleVec x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = ::tanh(x[i]);
  return x;
}

}  // namespace llmkern::cpu::LLMKERN_ISA
