// SPDX-License-Identifier: Apache-2.0
// Vectors from memory and back to it, whatever the numbers are stored in: 16-bit ones become float32 (half.h).
#pragma once

#include "kernels/cpu/simd.h"

namespace llmkern::cpu::LLMKERN_ISA {

// As many elements of T as there are lanes of what it is computed in.
template <class T>
constexpr int kWideLanes = kLanes<Widened<T>>;

namespace {

template <class T>
inline HalfVec load_bits(const T* from, int64_t count) {
  HalfVec bits = {};
  if (count == kWideLanes<T>) {
    memcpy(&bits, from, sizeof bits);
  } else {
    memcpy(&bits, from, static_cast<size_t>(count) * sizeof(T));
  }
  return bits;
}

inline void store_bits(void* to, HalfVec bits, int64_t count) {
  if (count == kLanes<float>) {
    memcpy(to, &bits, sizeof bits);
  } else {
    memcpy(to, &bits, static_cast<size_t>(count) * sizeof(uint16_t));
  }
}

inline IntVec bits_of(FloatVec x) {
  IntVec bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline FloatVec float_of(IntVec bits) {
  FloatVec x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

inline FloatVec widen_bits(bfloat16, HalfVec bits) { return float_of(__builtin_convertvector(bits, IntVec) << 16); }

inline HalfVec narrow_bits(bfloat16, FloatVec x) {
  const IntVec bits = bits_of(x);
  const IntVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return __builtin_convertvector(x == x ? rounded : IntVec{} + 0x7fff, HalfVec);
}

inline FloatVec widen_bits(float16, HalfVec bits) {
#if defined(__AVX512F__)
  __m256i packed;
  memcpy(&packed, &bits, sizeof packed);
  return _mm512_maskz_cvtph_ps(0xffff, packed);  // gcc warns about its own header where there is no mask
#elif defined(__F16C__)
  __m128i packed;
  memcpy(&packed, &bits, sizeof packed);
  return _mm256_cvtph_ps(packed);
#else
  FloatVec x;
  for (int i = 0; i < kLanes<float>; ++i) x[i] = widen(float16{bits[i]});
  return x;
#endif
}

inline HalfVec narrow_bits(float16, FloatVec x) {
#if defined(__AVX512F__) || defined(__F16C__)
  x = x == x ? x : float_of(IntVec{} + 0x7fffffff);  // as in half.h; the instruction would keep a NaN's own bits
#if defined(__AVX512F__)
  const __m256i packed = _mm512_maskz_cvtps_ph(0xffff, x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const __m128i packed = _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#endif
  HalfVec bits;
  memcpy(&bits, &packed, sizeof bits);
  return bits;
#else
  HalfVec bits;
  for (int i = 0; i < kLanes<float>; ++i) bits[i] = float16_bits(x[i]);
  return bits;
#endif
}

// The first `count` elements, at most all lanes; the others read as zero.
template <class T>
inline Vec<Widened<T>> load_wide(const T* from, int64_t count = kWideLanes<T>) {
  if constexpr (sizeof(T) == 2) {
    return widen_bits(T{}, load_bits(from, count));
  } else {
    return load(from, count);
  }
}

// Parts as load_parts() of simd.h gives them, of words that are widened elements.
template <class T>
inline Vec<Widened<T>> load_wide_parts(const T* from, int64_t stride) {
  if constexpr (sizeof(T) > 2) {
    return load_parts<T>(from, stride * static_cast<int64_t>(sizeof(T)));
  } else {
#if defined(__AVX2__)
    const auto pair = [&](const T* low, const T* high) {
      const __m128d lower = _mm_castsi128_pd(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(low)));
      return _mm_castpd_si128(_mm_loadh_pd(lower, reinterpret_cast<const double*>(high)));
    };
    HalfVec bits;
#if defined(__AVX512F__)
    const __m256i four = _mm256_inserti128_si256(_mm256_castsi128_si256(pair(from, from + stride)),
                                                 pair(from + 2 * stride, from + 3 * stride), 1);
#else
    const __m128i four = pair(from, from + stride);
#endif
    memcpy(&bits, &four, sizeof bits);
    return widen_bits(T{}, bits);
#else
    static_cast<void>(stride);
    return load_wide(from);
#endif
  }
}

// The first `count` lanes, rounded to T.
template <class T>
inline void store_narrow(T* to, Vec<Widened<T>> v, int64_t count = kWideLanes<T>) {
  if constexpr (sizeof(T) == 2) {
    store_bits(to, narrow_bits(T{}, v), count);
  } else {
    store(to, v, count);
  }
}

// to[0, count) = from[0, count), between any two types.
template <class To, class From>
inline void convert(To* to, const From* from, int64_t count) {
  for_lanes<Widened<To>>(0, count, [&](int64_t i, int64_t n) { store_narrow(to + i, load_wide(from + i, n), n); });
}

}  // namespace

}  // namespace llmkern::cpu::LLMKERN_ISA
