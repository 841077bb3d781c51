// SPDX-License-Identifier: Apache-2.0
// bfloat16 and float16 as storage: kernels widen what they load, compute in float32 and round once when they store.
//
// Rounding is to nearest even; a NaN becomes 0x7fff, as the GPU's conversions have it, so both sides give the same
// bits. Types of our own, because CUDA's need CUDA's headers and torch's need torch's.
#pragma once

#include <cstdint>

#include "kernels/arithmetic.h"

namespace llmkern {

struct bfloat16 {
  uint16_t bits;
};

struct float16 {
  uint16_t bits;
};

// What a value of type T is computed in.
template <class T>
struct WidenedType {
  using type = float;
};
template <>
struct WidenedType<double> {
  using type = double;
};
template <class T>
using Widened = typename WidenedType<T>::type;

namespace {  // one copy an instruction-set build: the linker must not merge them

LLMKERN_HOST_DEVICE inline double widen(double x) { return x; }
LLMKERN_HOST_DEVICE inline float widen(float x) { return x; }
LLMKERN_HOST_DEVICE inline float widen(bfloat16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }

LLMKERN_HOST_DEVICE inline float widen(float16 x) {
#ifdef __CUDA_ARCH__
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  if (magnitude < 0x400u) {  // zero and subnormals: multiples of 2^-24
    return bits_to_float(sign | float_to_bits(static_cast<float>(magnitude) * 0x1p-24f));
  }
  if (magnitude > 0x7c00u) return bits_to_float(0x7fffffffu);
  return bits_to_float(sign | ((magnitude << 13) + (magnitude == 0x7c00u ? 0x70000000u : 0x38000000u)));
#endif
}

LLMKERN_HOST_DEVICE inline uint16_t bfloat16_bits(float x) {
#ifdef __CUDA_ARCH__
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
#else
  const uint32_t bits = float_to_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffu;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#endif
}

LLMKERN_HOST_DEVICE inline uint16_t float16_bits(float x) {
#ifdef __CUDA_ARCH__
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
#else
  const uint32_t bits = float_to_bits(x), magnitude = bits & 0x7fffffffu, sign = (bits >> 16) & 0x8000u;
  if (magnitude > 0x7f800000u) return 0x7fffu;
  uint32_t rounded;
  if (magnitude >= 0x477ff000u) {  // 65520: half way from the largest number to the next power of two
    rounded = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: beside 0.5 a float's last place is 2^-24, so the sum rounds
    rounded = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    const uint32_t rebiased = magnitude - 0x38000000u;
    rounded = (rebiased + 0xfffu + ((rebiased >> 13) & 1u)) >> 13;
  }
  return static_cast<uint16_t>(sign | rounded);
#endif
}

template <class T>
struct Narrow {
  LLMKERN_HOST_DEVICE static T from(Widened<T> x) { return x; }
};
template <>
struct Narrow<bfloat16> {
  LLMKERN_HOST_DEVICE static bfloat16 from(float x) { return {bfloat16_bits(x)}; }
};
template <>
struct Narrow<float16> {
  LLMKERN_HOST_DEVICE static float16 from(float x) { return {float16_bits(x)}; }
};

// narrow<T>(x): x rounded to T.
template <class T>
LLMKERN_HOST_DEVICE inline T narrow(Widened<T> x) {
  return Narrow<T>::from(x);
}

}  // namespace

}  // namespace llmkern
