// SPDX-License-Identifier: Apache-2.0
// Picking tokens out of a list without sorting it, by a block and exactly.
//
// An order is a 64-bit key for every token, all different; a weight is an integer. Sums of integers do not depend on
// who adds first, so neither does anything here.
#pragma once

#include "kernels/arithmetic.h"
#include "kernels/cuda/common.cuh"

namespace llmkern::cuda {

// One entry of a list, as an order sees it.
struct Entry {
  bool present;  // false: the entry is not there
  uint64_t key, weight;
};

// ---- keys -----------------------------------------------------------------------------------------------------------

constexpr int kIdBits = 23;  // of a token
constexpr uint64_t kLastKey = ~uint64_t{0};

// Orders as the float does, -0 as 0.
__device__ inline uint32_t ordered(float value) {
  const uint32_t bits = float_to_bits(value + 0.0f);
  return bits ^ (bits >> 31 != 0 ? 0xffffffffu : 0x80000000u);
}

__device__ inline float from_ordered(uint32_t key) {
  return bits_to_float(key ^ (key >> 31 != 0 ? 0x80000000u : 0xffffffffu));
}

// Ascending where the value, at most `top`, descends, then the id ascends.
//
// The nine bits in front say nothing new: they are linear in the value, so that the first digits of a selection part
// the tokens better than the exponents of floats would.
__device__ inline uint64_t order_key(float value, float top, int id) {
  const uint32_t eighths = static_cast<uint32_t>(fminf((top - value) * 8.0f, 511.0f));
  return static_cast<uint64_t>(eighths) << (32 + kIdBits) | static_cast<uint64_t>(~ordered(value)) << kIdBits |
         static_cast<uint64_t>(id);
}

__device__ inline float value_of(uint64_t key) { return from_ordered(~static_cast<uint32_t>(key >> kIdBits)); }
__device__ inline int id_of(uint64_t key) { return static_cast<int>(key & ((uint64_t{1} << kIdBits) - 1)); }

// ---- the shortest prefix of an order --------------------------------------------------------------------------------

constexpr int kDigitBits = 8, kDigits = 1 << kDigitBits;

// The weight behind every digit, in shared memory, and what find_digit found.
struct Digits {
  uint32_t low[kDigits], high[kDigits];  // 64-bit atomics on shared memory would be loops of compare and swap
  uint64_t needed;
  int digit;

  __device__ uint64_t weight(int i) const { return static_cast<uint64_t>(high[i]) << 32 | low[i]; }

  __device__ void add(int i, uint64_t weight) {
    const uint32_t part = static_cast<uint32_t>(weight);
    const uint32_t carry = atomicAdd(&low[i], part) > ~part;
    const uint32_t rest = static_cast<uint32_t>(weight >> 32) + carry;
    if (rest != 0) atomicAdd(&high[i], rest);
  }
};

// By one warp: the digit in which the running weight reaches `needed`, and what is left for that digit.
__device__ inline void find_digit(Digits& digits, uint64_t needed) {
  constexpr int kEach = kDigits / kWarp;
  const int first = lane_index() * kEach;
  uint64_t mine = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) mine += digits.weight(first + i);
  const uint64_t running = warp_scan(mine, Plus{});
  if (running < needed || running - mine >= needed) return;  // all lanes but one
  needed -= running - mine;
  int digit = first;
  for (; digits.weight(digit) < needed; ++digit) needed -= digits.weight(digit);
  digits.digit = digit;
  digits.needed = needed;
}

// The last key of the shortest prefix with weight >= needed, in ascending order of the keys of view(0), ...,
// view(n - 1), which have that weight together.
//
// Radix selection that looks at the keys between `low` and `high` alone: a digit is cut from where those begin to
// differ.
template <int kThreads, class View>
__device__ uint64_t shortest_prefix(int n, uint64_t needed, const View& view, Digits& digits) {
  uint64_t low = 0, high = kLastKey;
  const auto for_each = [&](const auto& f) {
    for (int i = static_cast<int>(threadIdx.x); i < n; i += kThreads) {
      const Entry entry = view(i);
      if (entry.present && entry.key >= low && entry.key <= high) f(entry);
    }
  };
  for (;;) {
    uint64_t largest = 0, largest_complement = 0;
    for_each([&](const Entry& entry) {
      largest = max(largest, entry.key);
      largest_complement = max(largest_complement, ~entry.key);
    });
    high = block_reduce<kThreads>(largest, Maximum{});
    low = ~block_reduce<kThreads>(largest_complement, Maximum{});
    if (low == high) return low;
    const int shift = max(64 - kDigitBits - __clzll(static_cast<long long>(high - low)), 0);
    for (int i = static_cast<int>(threadIdx.x); i < kDigits; i += kThreads) digits.low[i] = digits.high[i] = 0;
    __syncthreads();
    for_each([&](const Entry& entry) { digits.add(static_cast<int>((entry.key - low) >> shift), entry.weight); });
    __syncthreads();
    if (warp_index() == 0) find_digit(digits, needed);
    __syncthreads();
    needed = digits.needed;
    low += static_cast<uint64_t>(digits.digit) << shift;
    if (shift == 0) return low;
    // Keys above `high` were left behind, and stay there.
    high = low + min(high - low, (uint64_t{1} << shift) - 1);
  }
}

// ---- lists ----------------------------------------------------------------------------------------------------------

// Appends what the lanes with a hit bring, in no particular order. Every lane of the warp must call it.
template <class T>
__device__ void append(bool hit, T value, T* list, int* size) {
  const unsigned hits = __ballot_sync(kAllLanes, hit);
  if (hits == 0) return;
  int at = 0;
  if (lane_index() == 0) at = atomicAdd(size, __popc(hits));
  at = __shfl_sync(kAllLanes, at, 0);
  if (hit) list[at + __popc(hits & ((1u << lane_index()) - 1))] = value;
}

// Sorts n keys, a power of two of them, in ascending order (Batcher 1968).
template <int kThreads>
__device__ void sort(uint64_t* keys, int n) {
  for (int run = 2; run <= n; run *= 2) {
    for (int distance = run / 2; distance > 0; distance /= 2) {
      __syncthreads();
      for (int i = static_cast<int>(threadIdx.x); i < n / 2; i += kThreads) {
        const int first = 2 * i - (i & (distance - 1)), second = first + distance;
        const uint64_t a = keys[first], b = keys[second];
        const bool ascending = (first & run) == 0;
        if ((a > b) == ascending) {
          keys[first] = b;
          keys[second] = a;
        }
      }
    }
  }
  __syncthreads();
}

}  // namespace llmkern::cuda
