// SPDX-License-Identifier: Apache-2.0
// Picking tokens out of a row without sorting it.
//
// A bound that no wanted token is below turns the row into a short list (gather); exact thresholds are then found in
// the list by radix selection (shortest_prefix). Loops over the whole row carry no branch, so that they are vectorised.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels/arithmetic.h"

namespace llmkern::cpu::LLMKERN_ISA {

namespace {

constexpr int64_t kBlock = 256;  // tokens

// One row at work.
struct Row {
  const float* z;  // [V]
  int64_t V;
  float maximum;     // of z
  int64_t num_live;  // tokens that are not -inf
};

// What an order is over: value descending, then id ascending.
struct Candidate {
  float value;
  int32_t id;
  uint64_t mass;  // or another weight
};

// The first tokens of an order: those above `value` and, of those equal to it, the ids up to last_id.
struct Prefix {
  float value;
  int32_t last_id;

  // Bitwise: which tokens pass is as good as random, and a wrong guess costs more than both comparisons.
  bool keeps(const Candidate& c) const { return (c.value > value) | ((c.value == value) & (c.id <= last_id)); }
};

// Orders as the float does, NaN beyond both infinities.
inline int32_t ordered(float value) {
  const int32_t bits = static_cast<int32_t>(float_to_bits(value));
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

inline float from_ordered(int32_t key) {
  return bits_to_float(static_cast<uint32_t>(key ^ ((key >> 31) & 0x7fffffff)));
}

int64_t block_size(int64_t begin, int64_t V) { return V - begin < kBlock ? V - begin : kBlock; }

void masses(const float* z, int64_t n, float maximum, uint64_t* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = round_to_integer(exp_mass(z[i] - maximum));
}

// Lists the tokens whose z passes a test, by ascending id. The number of them.
template <class Test>
int64_t gather(const Row& row, const Test& test, Candidate* out) {
  int64_t size = 0;
  for (int64_t begin = 0; begin < row.V; begin += kBlock) {
    const float* z = row.z + begin;
    const int64_t n = block_size(begin, row.V);
    alignas(64) uint8_t hit[kBlock] = {};
    for (int64_t i = 0; i < n; ++i) hit[i] = test(z[i]);
    uint64_t mass[kBlock];
    bool has_masses = false;
    for (int64_t first = 0; first < n; first += 8) {
      uint64_t hits;  // eight bytes of 0 or 1; little-endian, as every machine that builds this
      memcpy(&hits, hit + first, sizeof hits);
      if (hits != 0 && !has_masses) {
        masses(z, n, row.maximum, mass);
        has_masses = true;
      }
      for (; hits != 0; hits &= hits - 1) {
        const int64_t i = first + __builtin_ctzll(hits) / 8;
        out[size++] = {z[i], static_cast<int32_t>(begin + i), mass[i]};
      }
    }
  }
  return size;
}

// The shortest prefix with mass >= needed in the order of view(candidate), of a list in ascending id that has that
// mass. `work` is as long as the list and may be the list itself.
//
// Radix selection on the float's bits, from the first digit in which the candidates differ.
template <class View>
Prefix shortest_prefix(const Candidate* list, int64_t n, uint64_t needed, Candidate* work, const View& view) {
  int32_t low = ordered(INFINITY), high = ordered(-INFINITY);
  for (int64_t i = 0; i < n; ++i) {
    const int32_t key = ordered(view(list[i]).value);
    low = key < low ? key : low;
    high = key > high ? key : high;
  }
  const auto offset = [low](const Candidate& c) {
    return static_cast<uint32_t>(ordered(c.value)) - static_cast<uint32_t>(low);
  };
  // One digit: the candidates that share the digit in which the mass is reached. `needed` becomes what is left for
  // them.
  const auto narrow = [&](const Candidate* from, int shift, const auto& seen) {
    uint64_t mass[256] = {};
    for (int64_t i = 0; i < n; ++i) {
      const Candidate c = seen(from[i]);
      mass[(offset(c) >> shift) & 255] += c.mass;
    }
    uint32_t digit = 255;
    while (mass[digit] < needed) needed -= mass[digit--];
    int64_t size = 0;
    for (int64_t i = 0; i < n; ++i) {
      const Candidate c = seen(from[i]);
      work[size] = c;
      size += ((offset(c) >> shift) & 255) == digit;
    }
    n = size;
  };
  const uint32_t range = static_cast<uint32_t>(high) - static_cast<uint32_t>(low);
  int shift = range < 256 ? 0 : 24 - __builtin_clz(range);
  narrow(list, shift, view);
  while (shift > 0) {
    shift = shift > 8 ? shift - 8 : 0;
    narrow(work, shift, [](const Candidate& c) { return c; });
  }
  int64_t last = 0;  // all that are left are equal
  while (work[last].mass < needed) needed -= work[last++].mass;
  return {work[last].value, work[last].id};
}

// Of a list, keeps the shortest prefix with mass >= needed in the order of view(candidate).
template <class View>
int64_t keep_prefix(Candidate* list, int64_t n, uint64_t needed, Candidate* work, const View& view) {
  const Prefix prefix = shortest_prefix(list, n, needed, work, view);
  int64_t size = 0;
  for (int64_t i = 0; i < n; ++i) {
    const Candidate c = list[i];
    list[size] = c;
    size += prefix.keeps(view(c));
  }
  return size;
}

inline Candidate counted(const Candidate& c) { return {c.value, c.id, 1}; }

// A value that at least k tokens reach: the k-th largest of the maxima of disjoint groups, or -inf when groups would be
// too small to tell. The tokens above it are little more than k. `maxima` [V / 2], `work` [V / 2].
float reached_by(const Row& row, int64_t k, float* maxima, Candidate* work) {
  int64_t groups = kBlock;
  while (groups < 2 * k) groups *= 2;
  if (groups > row.V / 2) return -INFINITY;
  memcpy(maxima, row.z, static_cast<size_t>(groups) * sizeof(float));
  for (int64_t begin = groups; begin + groups <= row.V; begin += groups) {
    const float* z = row.z + begin;
    for (int64_t i = 0; i < groups; ++i) maxima[i] = z[i] > maxima[i] ? z[i] : maxima[i];
  }
  for (int64_t i = 0; i < groups; ++i) work[i] = {maxima[i], static_cast<int32_t>(i), 1};
  return shortest_prefix(work, groups, static_cast<uint64_t>(k), work, counted).value;
}

// Lists the first k of the order, k <= row.num_live, by ascending id.
void list_first(const Row& row, int64_t k, float* maxima, Candidate* work, Candidate* out) {
  const float least = reached_by(row, k, maxima, work);
  const int64_t n = gather(row, [least](float z) { return z >= least; }, out);
  keep_prefix(out, n, static_cast<uint64_t>(k), work, counted);
}

// Lists the tokens above -inf that can have this mass, and perhaps some that have not.
//
// d is the exact difference rounded once, and exp_mass errs by 1e-7 before it rounds to an integer, which matters to
// small masses: half of one is ln 2 = 0.693. The comparison is on d because z itself may be too large to tell.
int64_t list_mass(const Row& row, uint64_t mass, Candidate* out) {
  if (mass == 0) return gather(row, [](float z) { return z > -INFINITY; }, out);
  const float slack = mass < 1024 ? 0.7f : 0.001f;
  const float maximum = row.maximum, least = static_cast<float>(log_mass(mass)) - slack;
  return gather(row, [=](float z) { return z - maximum >= least; }, out);
}

int32_t first_of_order(const Row& row) {
  for (int64_t begin = 0;; begin += kBlock) {
    const float* z = row.z + begin;
    const int64_t n = block_size(begin, row.V);
    int32_t hits = 0;
    for (int64_t i = 0; i < n; ++i) hits += z[i] == row.maximum;
    if (hits == 0) continue;
    int64_t i = 0;
    while (z[i] != row.maximum) ++i;
    return static_cast<int32_t>(begin + i);
  }
}

// The number of tokens before this one in the order.
int64_t rank_of(const Row& row, int64_t token) {
  const float z = row.z[token];
  int32_t rank = 0;  // narrow, so that it takes as many lanes as the floats
  for (int64_t v = 0; v < token; ++v) rank += row.z[v] >= z;
  for (int64_t v = token + 1; v < row.V; ++v) rank += row.z[v] > z;
  return rank;
}

// Heapsort: std::sort would leave symbols that the builds for other instruction sets share.
void sort_by_order(Candidate* items, int64_t n) {
  const auto before = [](const Candidate& a, const Candidate& b) {
    return a.value > b.value || (a.value == b.value && a.id < b.id);
  };
  const auto sink = [&](int64_t at, int64_t size) {
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
