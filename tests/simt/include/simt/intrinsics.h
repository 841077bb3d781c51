// SPDX-License-Identifier: Apache-2.0
// CUDA's device functions on top of device.h: barriers, shuffles, votes, atomics, bits and rounded arithmetic.
//
// The fast approximations (__expf, __fdividef, ...) are not here on purpose: the project promises the same bits on both
// sides, or an error below torch's.
#pragma once

#include <bit>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "simt/device.h"

// The caller's place in the source, as two trailing default arguments.
#define SIMT_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

// ---- barriers and fences ----

inline void __syncthreads(SIMT_SITE) { simt::block_barrier(0, {file, line}); }
inline int __syncthreads_count(int predicate, SIMT_SITE) {
  return simt::block_barrier(predicate, {file, line}).positive;
}
inline int __syncthreads_or(int predicate, SIMT_SITE) {
  return simt::block_barrier(predicate, {file, line}).positive > 0;
}
inline int __syncthreads_and(int predicate, SIMT_SITE) {
  const auto counts = simt::block_barrier(predicate, {file, line});
  return counts.positive == counts.threads;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, SIMT_SITE) { simt::warp_barrier(mask, {file, line}); }
inline void __threadfence() { simt::thread_fence(); }
inline void __threadfence_block() { simt::thread_fence(); }
inline void __threadfence_system() { simt::thread_fence(); }

// ---- shuffles ----

namespace simt {

// Every value travels in 64 bits.
template <class T>
uint64_t to_bits(T value) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}
template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T>
T shuffle_value(const char* operation, unsigned mask, T value, int source, Site site) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  return from_bits<T>(shuffle(operation, mask, to_bits(value), source, site));
}

}  // namespace simt

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, SIMT_SITE) {
  const int first = static_cast<int>(simt::lane()) & ~(width - 1);
  return simt::shuffle_value("__shfl_sync", mask, value, first + (source & (width - 1)), {file, line});
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_SITE) {
  const int me = static_cast<int>(simt::lane()), source = me - static_cast<int>(delta);
  const int first = me & ~(width - 1);
  return simt::shuffle_value("__shfl_up_sync", mask, value, source < first ? me : source, {file, line});
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_SITE) {
  const int me = static_cast<int>(simt::lane()), source = me + static_cast<int>(delta);
  const int end = (me & ~(width - 1)) + width;
  return simt::shuffle_value("__shfl_down_sync", mask, value, source >= end ? me : source, {file, line});
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, SIMT_SITE) {
  const int me = static_cast<int>(simt::lane()), source = me ^ lanes;
  const int end = (me & ~(width - 1)) + width;
  return simt::shuffle_value("__shfl_xor_sync", mask, value, source >= end ? me : source, {file, line});
}

// ---- votes and reductions ----

inline unsigned __ballot_sync(unsigned mask, int predicate, SIMT_SITE) {
  const auto either = [](unsigned a, unsigned b) { return a | b; };
  return simt::reduce("__ballot_sync", mask, predicate != 0 ? 1u << simt::lane() : 0u, either, {file, line});
}
inline int __any_sync(unsigned mask, int predicate, SIMT_SITE) {
  const auto either = [](unsigned a, unsigned b) { return a | b; };
  return static_cast<int>(simt::reduce("__any_sync", mask, predicate != 0, either, {file, line}));
}
inline int __all_sync(unsigned mask, int predicate, SIMT_SITE) {
  const auto both = [](unsigned a, unsigned b) { return a & b; };
  return static_cast<int>(simt::reduce("__all_sync", mask, predicate != 0, both, {file, line}));
}
inline unsigned __activemask() { return simt::active_mask(); }

// int and unsigned, as on the GPU; a and b are in the expression's type.
#define SIMT_REDUCE(name, T, expression)                                                                  \
  inline T __reduce_##name##_sync(unsigned mask, T value, SIMT_SITE) {                                    \
    const auto fold = [](unsigned first, unsigned second) {                                               \
      const T a = static_cast<T>(first), b = static_cast<T>(second);                                      \
      return static_cast<unsigned>(expression);                                                           \
    };                                                                                                    \
    return static_cast<T>(                                                                                \
        simt::reduce("__reduce_" #name "_sync", mask, static_cast<unsigned>(value), fold, {file, line})); \
  }
SIMT_REDUCE(add, unsigned, a + b)
SIMT_REDUCE(add, int, static_cast<unsigned>(a) + static_cast<unsigned>(b))
SIMT_REDUCE(min, unsigned, b < a ? b : a)
SIMT_REDUCE(min, int, b < a ? b : a)
SIMT_REDUCE(max, unsigned, a < b ? b : a)
SIMT_REDUCE(max, int, a < b ? b : a)
SIMT_REDUCE(and, unsigned, a& b)
SIMT_REDUCE(or, unsigned, a | b)
SIMT_REDUCE(xor, unsigned, a ^ b)
#undef SIMT_REDUCE

// ---- atomics: relaxed, as CUDA's ----

namespace simt {

template <class T>
T add(T a, T b) {  // wraps round
  if constexpr (std::is_integral_v<T>) {
    return static_cast<T>(static_cast<uint64_t>(a) + static_cast<uint64_t>(b));
  } else {
    return a + b;
  }
}
template <class T>
constexpr bool kAtomic = std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8);

}  // namespace simt

#define SIMT_ATOMIC(name, requirement, result)                                                       \
  template <class T>                                                                                 \
    requires simt::kAtomic<T> && requirement                                                         \
  T atomic##name(T* address, std::type_identity_t<T> value) {                                        \
    const auto update = [](uint64_t first, uint64_t second, uint64_t) {                              \
      const T old = simt::from_bits<T>(first), operand = simt::from_bits<T>(second);                 \
      return simt::to_bits<T>(result);                                                               \
    };                                                                                               \
    return simt::from_bits<T>(simt::atomic(address, sizeof(T), simt::to_bits<T>(value), 0, update)); \
  }
SIMT_ATOMIC(Add, true, simt::add(old, operand))
SIMT_ATOMIC(Sub, (std::is_same_v<T, int> || std::is_same_v<T, unsigned>), simt::add<T>(old, T{0} - operand))
SIMT_ATOMIC(Exch, true, (static_cast<void>(old), operand))
SIMT_ATOMIC(Min, std::is_integral_v<T>, operand < old ? operand : old)
SIMT_ATOMIC(Max, std::is_integral_v<T>, old < operand ? operand : old)
SIMT_ATOMIC(And, std::is_integral_v<T>, old& operand)
SIMT_ATOMIC(Or, std::is_integral_v<T>, old | operand)
SIMT_ATOMIC(Xor, std::is_integral_v<T>, old ^ operand)
SIMT_ATOMIC(Inc, (std::is_same_v<T, unsigned>), old >= operand ? 0u : old + 1u)
SIMT_ATOMIC(Dec, (std::is_same_v<T, unsigned>), old == 0u || old > operand ? operand : old - 1u)
#undef SIMT_ATOMIC

template <class T>
  requires std::is_integral_v<T> && simt::kAtomic<T>
T atomicCAS(T* address, std::type_identity_t<T> compare, std::type_identity_t<T> value) {
  const auto update = [](uint64_t old, uint64_t operand, uint64_t expected) { return old == expected ? operand : old; };
  return simt::from_bits<T>(
      simt::atomic(address, sizeof(T), simt::to_bits<T>(value), simt::to_bits<T>(compare), update));
}

// ---- loads and stores with a cache hint ----

#define SIMT_LOAD(name)      \
  template <class T>         \
  T name(const T* address) { \
    return *address;         \
  }
#define SIMT_STORE(name)                                 \
  template <class T>                                     \
  void name(T* address, std::type_identity_t<T> value) { \
    *address = value;                                    \
  }
// clang-format off
SIMT_LOAD(__ldg)
SIMT_LOAD(__ldca)
SIMT_LOAD(__ldcg)
SIMT_LOAD(__ldcs)
SIMT_LOAD(__ldlu)
SIMT_STORE(__stwb)
SIMT_STORE(__stcg)
SIMT_STORE(__stcs)
// clang-format on
#undef SIMT_LOAD
#undef SIMT_STORE

// ---- bits ----

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned long long __brevll(unsigned long long x) {
  unsigned long long reversed = 0;
  for (int bit = 0; bit < 64; ++bit) reversed |= (x >> bit & 1) << (63 - bit);
  return reversed;
}
inline unsigned __brev(unsigned x) { return static_cast<unsigned>(__brevll(x) >> 32); }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<unsigned long long>(a) * b >> 32);
}
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}

inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }

// ---- arithmetic with one rounding, to nearest even (the build has -ffp-contract=off) ----

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __drcp_rn(double a) { return 1.0 / a; }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
inline int __float2int_rz(float x) { return static_cast<int>(x); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }

// CUDA has these outside std as well.
template <class T>
T min(T a, std::type_identity_t<T> b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, std::type_identity_t<T> b) {
  return a < b ? b : a;
}

#undef SIMT_SITE
