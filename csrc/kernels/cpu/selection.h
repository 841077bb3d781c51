// SPDX-License-Identifier: Apache-2.0
// Picking tokens out of a row without sorting it.
//
// A bound that no wanted token is below turns the row into a short list (gather); exact thresholds are then found in
// the list by radix selection (shortest_prefix).
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels/cpu/masses.h"

namespace llmkern::cpu::LLMKERN_ISA {

namespace {

constexpr int64_t kBlock = 1024;  // tokens; what the team divides, and what is skipped when its maximum is too low

// Which lanes of a vector: a mask register where there are some.
#if defined(__AVX512F__)
using LaneMask = __mmask16;

inline LaneMask at_least(FloatVec x, FloatVec bound) { return _mm512_cmp_ps_mask(x, bound, _CMP_GE_OQ); }
inline LaneMask unordered(FloatVec a, FloatVec b) { return _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q); }
inline FloatVec zero_unless(LaneMask mask, FloatVec x) { return _mm512_maskz_mov_ps(mask, x); }
inline uint32_t lane_bits(LaneMask mask) { return mask; }
#else
using LaneMask = IntVec;

inline LaneMask at_least(FloatVec x, FloatVec bound) { return x >= bound; }
inline LaneMask unordered(FloatVec a, FloatVec b) { return (a != a) | (b != b); }
inline FloatVec zero_unless(LaneMask mask, FloatVec x) { return float_of(bits_of(x) & mask); }
inline uint32_t lane_bits(LaneMask mask) {
#if defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask));
#elif defined(LLMKERN_X86)
  return static_cast<uint32_t>(_mm_movemask_ps((__m128)mask));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes<float>; ++i) bits |= static_cast<uint32_t>(mask[i] & 1) << i;
  return bits;
#endif
}
#endif

// One row at work.
struct Row {
  const float* y;  // [V]
  int64_t V;
  const FloatVec* block_maxima;  // [blocks], by lanes
  float maximum;                 // of y
  int64_t num_live;              // tokens that are not -inf
  double temperature;
  Falloff scale;
  const char* next;  // where the logits of the row lie that this worker reads next: asked for while this one is summed

  int64_t blocks() const { return (V + kBlock - 1) / kBlock; }
  int64_t block_end(int64_t block) const { return (block + 1) * kBlock < V ? (block + 1) * kBlock : V; }
  Weigher weigher() const { return Weigher(maximum, scale); }
};

// Tokens i to i + kLanes of the row after this one, which are of `element` bytes each. To the second level: the first
// has no room for them. (Always inlined: a function that only prefetches counts as one without effects.)
[[gnu::always_inline]] inline void prefetch_next(const Row& row, int64_t i, int64_t element) {
  __builtin_prefetch(row.next + i * element, 0, 2);
}

inline bool block_reaches(const Row& row, int64_t block, float bound) {
  return lane_bits(at_least(row.block_maxima[block], broadcast(bound))) != 0;
}

// Calls f(i, vector) on the tokens of a block, i the first of the vector; lanes beyond the vocabulary read as -inf.
template <class F>
void for_block(const float* y, int64_t begin, int64_t end, const F& f) {
  constexpr int64_t n = kLanes<float>;
  int64_t i = begin;
  for (; i + n <= end; i += n) f(i, load(y + i));
  if (i == end) return;
  float rest[n];
  for (int64_t lane = 0; lane < n; ++lane) rest[lane] = i + lane < end ? y[i + lane] : -INFINITY;
  f(i, load(rest));
}

// Which tokens of a block, a bit each: those of vector j in bits[j].
struct BlockBits {
  static constexpr int kSpare = 4;
  alignas(64) uint16_t bits[kBlock / kLanes<float>] = {};

  void set(int64_t offset, uint32_t lanes) {
    bits[static_cast<uint64_t>(offset) / kLanes<float>] = static_cast<uint16_t>(lanes);
  }

  // Their places in the block, ascending. The number of them.
  //
  // How many there are in a word is as good as random. So a few are written whether they are there or not, and only
  // what is beyond them costs a branch.
  int64_t list(int32_t (&places)[kBlock + kSpare]) const {
    constexpr size_t kVectors = sizeof(uint64_t) / sizeof *bits;  // little-endian, as every machine that builds this
    int64_t size = 0;
    for (size_t j = 0; j < sizeof bits / sizeof *bits; j += kVectors) {
      uint64_t word;
      memcpy(&word, bits + j, sizeof word);
      const int count = __builtin_popcountll(word);
      const auto next = [&] {
        const int bit = __builtin_ctzll(word | uint64_t{1} << 63);
        word &= word - 1;
        return (static_cast<int32_t>(j) + bit / 16) * kLanes<float> + bit % 16;
      };
      for (int i = 0; i < kSpare; ++i) places[size + i] = next();
      for (int i = kSpare; i < count; ++i) places[size + i] = next();
      size += count;
    }
    return size;
  }
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

constexpr float kLeastLive = -FLT_MAX;  // what every token but -inf reaches

// A value that at least k tokens reach: the k-th largest of the maxima of disjoint groups, which are lanes of some
// blocks; or kLeastLive when there are too few of them to tell. `work` [V].
//
// Four groups a wanted token: a good bound is a little below the k-th token, and more groups take longer.
float reached_by(const Row& row, int64_t k, Candidate* work) {
  constexpr int64_t n = kLanes<float>;
  if (row.blocks() * n < 2 * k) return kLeastLive;
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

// Lists the first k of the order, k <= row.num_live, by ascending id.
int64_t list_first(const Row& row, int64_t k, Candidate* work, Candidate* out) {
  const int64_t n = gather(row, reached_by(row, k, work), out);
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
