// SPDX-License-Identifier: Apache-2.0
// Picking tokens out of a row without sorting it: exact thresholds by radix selection, and the first n in order.
//
// The whole row is read in blocks: a loop without a branch, which the compiler vectorises, counts the hits of a block,
// and only a block that has some is looked at token by token.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/arithmetic.h"

namespace llmkern::cpu::LLMKERN_ISA {

namespace {

constexpr int64_t kBlock = 256;  // tokens
constexpr int kDigitShift = 21;  // the first digit: sign, exponent and two bits of the mantissa
constexpr int kDigits = 1 << (32 - kDigitShift);

// One row at work.
struct Row {
  const float* z;  // [V]
  int64_t V;
  float maximum;  // of z
};

// The first tokens of an order: those above `value` and, of those equal to it, the ids up to last_id.
struct Prefix {
  float value;
  int32_t last_id;

  bool keeps(float v, int32_t id) const { return v > value || (v == value && id <= last_id); }
};

constexpr Prefix kEveryToken = {-INFINITY, -1};  // but those at -inf

struct Candidate {
  float value;  // what it is ordered by, descending: z, or the deviation's negative
  int32_t id;
  uint64_t mass;  // or 1, where tokens are counted
};

// What the tokens of one first digit count and weigh.
struct Bins {
  uint64_t count[kDigits], mass[kDigits];
};

// Orders as the float does, NaN beyond both infinities.
inline int32_t ordered(float value) {
  const int32_t bits = static_cast<int32_t>(float_to_bits(value));
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

inline float from_ordered(int32_t key) {
  return bits_to_float(static_cast<uint32_t>(key ^ ((key >> 31) & 0x7fffffff)));
}

inline uint32_t digits_of(float value) { return static_cast<uint32_t>(ordered(value)) ^ 0x80000000u; }

int64_t block_size(int64_t begin, int64_t V) { return V - begin < kBlock ? V - begin : kBlock; }

void masses(const float* z, int64_t n, float maximum, uint64_t* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = round_to_integer(exp_mass(z[i] - maximum));
}

// Appends to `out` the tokens that a test on (z, id, mass) passes; `might` tests z alone, for whole blocks.
template <class Might, class Test>
int64_t gather(const Row& row, const Might& might, const Test& test, Candidate* out) {
  int64_t size = 0;
  for (int64_t begin = 0; begin < row.V; begin += kBlock) {
    const float* z = row.z + begin;
    const int64_t n = block_size(begin, row.V);
    int32_t hits = 0;
    for (int64_t i = 0; i < n; ++i) hits += might(z[i]);
    if (hits == 0) continue;
    uint64_t mass[kBlock];
    masses(z, n, row.maximum, mass);
    for (int64_t i = 0; i < n; ++i) {
      const int32_t id = static_cast<int32_t>(begin + i);
      out[size] = {z[i], id, mass[i]};  // never beyond out[id]
      size += test(z[i], id, mass[i]);
    }
  }
  return size;
}

// The shortest prefix of the order (value descending, id ascending) with mass >= needed, of candidates in ascending id
// that have it. Destroys them.
Prefix shortest_prefix(Candidate* candidates, int64_t n, uint64_t needed) {
  for (int shift = 24; shift >= 0; shift -= 8) {
    uint64_t mass[256] = {};
    for (int64_t i = 0; i < n; ++i) mass[(digits_of(candidates[i].value) >> shift) & 255] += candidates[i].mass;
    uint32_t digit = 255;
    while (mass[digit] < needed) needed -= mass[digit--];
    int64_t size = 0;
    for (int64_t i = 0; i < n; ++i) {
      const Candidate c = candidates[i];
      candidates[size] = c;
      size += ((digits_of(c.value) >> shift) & 255) == digit;
    }
    n = size;
  }
  int64_t last = 0;  // all that are left are equal
  while (candidates[last].mass < needed) needed -= candidates[last++].mass;
  return {candidates[last].value, candidates[last].id};
}

// The same among all tokens of the row, by mass or by_count. `work` [V] is overwritten.
Prefix row_prefix(const Row& row, const Bins& bins, uint64_t needed, bool by_count, Candidate* work) {
  const uint64_t* in_bin = by_count ? bins.count : bins.mass;
  uint32_t digit = kDigits - 1;
  while (in_bin[digit] < needed) needed -= in_bin[digit--];
  const auto has_digit = [digit](float z) { return digits_of(z) >> kDigitShift == digit; };
  const auto test = [&](float z, int32_t, uint64_t) { return has_digit(z); };
  const int64_t n = gather(row, has_digit, test, work);
  if (by_count) {
    for (int64_t i = 0; i < n; ++i) work[i].mass = 1;
  }
  return shortest_prefix(work, n, needed);
}

// Lists the tokens of a prefix that have at least the mass `least`.
int64_t gather_prefix(const Row& row, Prefix prefix, uint64_t least, Candidate* out) {
  return gather(
      row, [&](float z) { return z >= prefix.value; },
      [&](float z, int32_t id, uint64_t mass) { return prefix.keeps(z, id) & (mass >= least); }, out);
}

Prefix first_of_order(const Row& row) {
  int32_t id = 0;
  while (row.z[id] != row.maximum) ++id;
  return {row.maximum, id};
}

int64_t count_above(const Row& row, float value) {
  int32_t count = 0;  // narrow, so that it takes as many lanes as the floats
  for (int64_t v = 0; v < row.V; ++v) count += row.z[v] > value;
  return count;
}

// The number of tokens before this one in the order.
int64_t rank_of(const Row& row, int64_t token) {
  const float z = row.z[token];
  int32_t rank = 0;
  for (int64_t v = 0; v < token; ++v) rank += row.z[v] >= z;
  for (int64_t v = token + 1; v < row.V; ++v) rank += row.z[v] > z;
  return rank;
}

bool before(const Candidate& a, const Candidate& b) { return a.value > b.value || (a.value == b.value && a.id < b.id); }

// Heapsort: std::sort would leave symbols that the builds for other instruction sets share.
void sort_by_order(Candidate* items, int64_t n) {
  const auto sink = [items](int64_t at, int64_t size) {
    const Candidate moving = items[at];
    for (int64_t child; (child = 2 * at + 1) < size; at = child) {
      if (child + 1 < size && before(items[child], items[child + 1])) ++child;
      if (!before(moving, items[child])) break;
      items[at] = items[child];
    }
    items[at] = moving;
  };
  for (int64_t at = n / 2 - 1; at >= 0; --at) sink(at, n);
  for (int64_t size = n - 1; size > 0; --size) {
    const Candidate last = items[0];
    items[0] = items[size];
    items[size] = last;
    sink(0, size);
  }
}

}  // namespace

}  // namespace llmkern::cpu::LLMKERN_ISA
