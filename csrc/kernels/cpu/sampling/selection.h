// SPDX-License-Identifier: Apache-2.0
// Picking tokens out of a row without sorting it.
//
// A bound that no wanted token is below turns the row into a short list (gather); exact thresholds are then found in
// the list by radix selection (shortest_prefix).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels/cpu/sampling/mass_bins.h"

namespace llmkern::cpu::LLMKERN_ISA {

namespace {

// An item of an order: value descending, then id ascending.
struct Candidate {
  float value;
  int32_t id;
  uint64_t mass;  // or another weight
};

// The first tokens of an order: all above `value` and, of the ones equal to it, the ids up to last_id.
struct Prefix {
  float value;
  int32_t last_id;

  // Bitwise: which tokens pass is as good as random, and a wrong guess costs more than both comparisons.
  bool keeps(const Candidate& c) const { return (c.value > value) | ((c.value == value) & (c.id <= last_id)); }
};

inline uint64_t mass_of(const Row& row, float y) { return round_to_integer(exp_mass(y - row.maximum, row.scale)); }

inline Candidate candidate(const Row& row, int64_t token) {
  const float y = row.y[token] + 0.0f;  // -0 becomes 0: the order is taken from the bits
  return {y, static_cast<int32_t>(token), mass_of(row, y)};
}

// Lists the tokens with y >= bound, by ascending id. The number of them.
int64_t gather(const Row& row, float bound, Candidate* out) {
  int64_t size = 0;
  const FloatVec least = broadcast(bound);
  for (int64_t block = 0; block < row.blocks(); ++block) {
    if (!block_reaches(row, block, bound)) continue;
    BlockBits hits;
    const int64_t begin = block * kBlock;
    for_block(row.y, begin, row.block_end(block),
              [&](int64_t i, FloatVec y) { hits.set(i - begin, lane_bits(at_least(y, least))); });
    int32_t places[kBlock + BlockBits::kSpare];
    const int64_t found = hits.list(places);
    for (int64_t i = 0; i < found; ++i) out[size++] = candidate(row, begin + places[i]);
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
  // One digit: the candidates with the digit in which the mass is reached. `needed` becomes the rest, which they have
  // to make up.
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

// A value that at least k tokens reach: the k-th largest of the maxima of disjoint groups, which are lanes of some
// blocks, at least 2 k of them. `work` [V].
//
// Four groups a wanted token: a good bound is a little below the k-th token, and more groups take longer.
float reached_by_groups(const Row& row, int64_t k, Candidate* work) {
  constexpr int64_t n = kLanes<float>;
  const int64_t wanted = (4 * k + n - 1) / n, vectors = wanted < row.blocks() ? wanted : row.blocks();
  int64_t live = 0;
  for (int64_t first = 0; first < vectors; ++first) {
    FloatVec high = row.block_maxima[first];
    for (int64_t block = first + vectors; block < row.blocks(); block += vectors) {
      high = max(row.block_maxima[block], high);
    }
    for (int lane = 0; lane < n; ++lane) {
      work[live] = {high[lane] + 0.0f, static_cast<int32_t>(live), 1};
      live += high[lane] > -INFINITY;
    }
  }
  return live < k ? kLeastLive : shortest_prefix(work, live, static_cast<uint64_t>(k), work, counted).value;
}

// A value that k tokens may reach, by a sample: three standard deviations more of them.
float reached_by_sample(const Row& row, int64_t k) {
  const MassSample sample(row);
  const double wanted = static_cast<double>(k), slack = 3 * std::sqrt(wanted * sample.weight());
  double above = 0;
  for (int bin = kMassBins - 1; bin > 0; --bin) {
    above += sample.tokens(bin);
    if (above >= wanted + slack) return bin_floor(row, bin);
  }
  return kLeastLive;
}

// Lists the first k of the order, k <= row.num_live, by ascending id.
int64_t list_first(const Row& row, int64_t k, Candidate* work, Candidate* out) {
  const bool few = 2 * k <= row.blocks() * kLanes<float>;
  int64_t n = gather(row, few ? reached_by_groups(row, k, work) : reached_by_sample(row, k), out);
  if (n < k) n = gather(row, kLeastLive, out);  // the sample misled
  return keep_prefix(out, n, static_cast<uint64_t>(k), work, counted);
}

// A y that no token of this mass is below.
//
// exp_mass errs by 2e-6 before it rounds to an integer, which matters to small masses: half of one is a bit.
float reached_by_mass(const Row& row, uint64_t mass) {
  const double slack = mass < 1024 ? 1.01 : 0.001;
  const double bits = log_mass(mass) / kLn2 - slack;
  const double y = static_cast<double>(row.maximum) + bits / static_cast<double>(row.scale.scale);
  // The difference y - maximum is rounded once more: half a unit in the last place of the larger of the two.
  const float below = static_cast<float>(y - 0x1p-22 * (std::fabs(y) + std::fabs(static_cast<double>(row.maximum))));
  return below > kLeastLive ? below : kLeastLive;
}

int32_t first_of_order(const Row& row) {
  for (int64_t block = 0;; ++block) {
    if (!block_reaches(row, block, row.maximum)) continue;
    int64_t token = block * kBlock;
    while (row.y[token] != row.maximum) ++token;
    return static_cast<int32_t>(token);
  }
}

// The number of tokens before this one in the order.
int64_t rank_of(const Row& row, int64_t token) {
  const float y = row.y[token];
  int32_t rank = 0;  // narrow, so that it takes as many lanes as the floats
  for (int64_t v = 0; v < token; ++v) rank += row.y[v] >= y;
  for (int64_t v = token + 1; v < row.V; ++v) rank += row.y[v] > y;
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
