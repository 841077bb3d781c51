// SPDX-License-Identifier: Apache-2.0
// The nucleus of a row (top_p over the whole vocabulary): the shortest prefix of the order that has a given mass.
//
// It may be a tenth of the vocabulary, too much for a list. A sample of the row tells about where it ends. One pass
// then adds up the tokens above that place and lists the ones around it; the end is found in the list, exactly. Where
// the sample misled, the sums show it, and the pass is made again a little higher or lower: a guess costs time, never a
// bit.
#pragma once

#include <cmath>

#include "kernels/cpu/sampling/selection.h"
#include "kernels/cpu/team.h"

namespace llmkern::cpu::LLMKERN_ISA {

namespace {

// Tokens >= high are in, tokens < low are out, as far as a guess goes; tokens between are candidates.
struct Bracket {
  float low, high;
};

struct Nucleus {
  Prefix prefix;
  int64_t count;
  uint64_t mass;
};

// Memory that the passes over a row fill, block by block.
struct NucleusWork {
  const float* mass;                    // [V], rounded or not
  uint64_t* block_mass;                 // [blocks], of the nucleus: out
  int32_t *block_count, *block_listed;  // [blocks]: tokens above the bracket, and candidates
  Candidate *candidates, *work;         // [V]: a block's own from its first token's place on
  int64_t logits_element;               // bytes
};

// Where the mass beyond the nucleus, `outside`, ends: by the sample, two standard deviations to either side. Tokens so
// few that the sample may have missed them, and all the mass with them, are candidates.
Bracket guess(const Row& row, uint64_t outside) {
  constexpr double kSquaredDeviations = 4, kFew = 256, kFewEnough = 1024;
  const MassSample sample(row);
  const double allowed = static_cast<double>(outside);
  double tail = 0, variance = 0, above = static_cast<double>(row.V);
  int low = 0, high = kMassBins;
  for (int bin = 0; bin < kMassBins && high == kMassBins; ++bin) {
    const double mass = static_cast<double>(bin_mass(bin)), tokens = sample.tokens(bin);
    tail += tokens * mass;
    variance += tokens * (sample.weight() - 1) * mass * mass;
    const double left = allowed - tail;
    const bool sure = left * left >= kSquaredDeviations * variance;
    if (sure && left < 0) {
      high = bin + 1;
    } else if (sure && above - tokens >= kFew) {
      low = bin + 1;
      above -= tokens;
    }
  }
  const bool all_above = above <= kFewEnough || high == kMassBins;
  return {bin_floor(row, low), all_above ? INFINITY : bin_floor(row, high)};
}

// Adds up the tokens >= high of a block and lists the others that are >= low.
void pass_over(const Row& row, const Bracket& bracket, const NucleusWork& w, int64_t block) {
  w.block_mass[block] = 0;
  w.block_count[block] = w.block_listed[block] = 0;
  if (!block_reaches(row, block, bracket.low)) return;
  const FloatVec low = broadcast(bracket.low), high = broadcast(bracket.high);
  const int64_t begin = block * kBlock;
  BlockBits around;
  ExactSum sum;
  uint32_t count = 0;
  for_block(row.y, begin, row.block_end(block), [&](int64_t i, FloatVec y) {
    prefetch_next(row, i, w.logits_element);
    const LaneMask above = at_least(y, high);
    const uint32_t above_bits = lane_bits(above);
    sum.add(zero_unless(above, load(w.mass + i)));
    count += static_cast<uint32_t>(__builtin_popcount(above_bits));
    around.set(i - begin, lane_bits(at_least(y, low)) & ~above_bits);
  });
  int32_t places[kBlock + BlockBits::kSpare];
  const int64_t listed = around.list(places);
  for (int64_t i = 0; i < listed; ++i) {
    const int64_t token = begin + places[i];
    w.candidates[begin + i] = {row.y[token] + 0.0f, static_cast<int32_t>(token), round_to_integer(w.mass[token])};
  }
  w.block_mass[block] = sum.total();
  w.block_count[block] = static_cast<int32_t>(count);
  w.block_listed[block] = static_cast<int32_t>(listed);
}

struct Pass {
  uint64_t mass_above;
  int64_t count_above, num_candidates;
};

// Adds up the findings of all blocks; the candidates move together.
Pass collect(const Row& row, const NucleusWork& w) {
  Pass pass = {0, 0, 0};
  for (int64_t block = 0; block < row.blocks(); ++block) {
    pass.mass_above += w.block_mass[block];
    pass.count_above += w.block_count[block];
    for (int64_t i = 0; i < w.block_listed[block]; ++i) {
      w.candidates[pass.num_candidates++] = w.candidates[block * kBlock + i];
    }
  }
  return pass;
}

uint64_t list_sum(const Candidate* list, int64_t n) {
  uint64_t mass = 0;
  for (int64_t i = 0; i < n; ++i) mass += list[i].mass;
  return mass;
}

// Looks for the shortest prefix of the row's order with mass >= needed.
class NucleusSearch {
 public:
  // Every worker of a team comes here, with blocks of its own. `total` is the mass of all tokens.
  void run(const Row& row, uint64_t needed, uint64_t total, const NucleusWork& w, const Share& share) {
    const bool leads = share.begin == 0;
    if (leads) {
      bracket_ = guess(row, total - needed);
      step_ = 1 / row.scale.scale;
      is_found_ = false;
    }
    do {
      share.barrier.wait();
      for (int64_t block = share.begin; block < share.end; ++block) pass_over(row, bracket_, w, block);
      share.barrier.wait();
      if (leads) judge(row, needed, w);
      share.barrier.wait();
    } while (!is_found_);
  }

  const Nucleus& found() const { return found_; }

 private:
  void judge(const Row& row, uint64_t needed, const NucleusWork& w) {
    const Pass pass = collect(row, w);
    if (pass.mass_above >= needed) {
      bracket_ = {bracket_.high, bracket_.high + step_};
    } else if (pass.mass_above + list_sum(w.candidates, pass.num_candidates) < needed) {
      const float lower = bracket_.low - step_;
      bracket_ = {lower > kLeastLive ? lower : kLeastLive, bracket_.low};
    } else {
      is_found_ = true;
      found_ = ending(pass, needed, w);
    }
    step_ *= 4;
  }

  static Nucleus ending(const Pass& pass, uint64_t needed, const NucleusWork& w) {
    Nucleus found = {{}, pass.count_above, pass.mass_above};
    found.prefix = shortest_prefix(w.candidates, pass.num_candidates, needed - pass.mass_above, w.work,
                                   [](const Candidate& c) { return c; });
    for (int64_t i = 0; i < pass.num_candidates; ++i) {  // no branch: which are kept is as good as random
      const Candidate& c = w.candidates[i];
      const uint64_t kept = found.prefix.keeps(c), mass = kept * c.mass;
      w.block_mass[static_cast<uint32_t>(c.id) / kBlock] += mass;
      found.mass += mass;
      found.count += static_cast<int64_t>(kept);
    }
    return found;
  }

  Bracket bracket_ = {};
  float step_ = 0;  // by which a bracket that missed is moved: an octave of mass at first
  bool is_found_ = false;
  Nucleus found_ = {};
};

}  // namespace

}  // namespace llmkern::cpu::LLMKERN_ISA
