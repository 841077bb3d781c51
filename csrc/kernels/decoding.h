// SPDX-License-Identifier: Apache-2.0
// Decoding beyond one token a row, exactly: a step of beam search, the verification of drafted tokens, many draws from
// one row.
//
// A row of logits [V], V < kMaxSampleVocabulary, is treated as kernels/sampling.h treats one at temperature 1:
//   z_v = min(logits_v in float32, FLT_MAX), -0 being 0;  m = max z;  d_v = z_v - m in float32;
//   mass(v) = exp_mass(d_v, falloff(1)) rounded to an integer;  M = sum of the masses;  logprob(v) = d_v - log_mass(M)
//   in float64.
// It is invalid when a z is NaN, and empty when m = -inf. No result depends on any other batch entry.
#pragma once

#include <cstdint>

#include "kernels/half.h"
#include "kernels/philox.h"
#include "kernels/sampling.h"

namespace llmkern {

// Rows of V elements, each contiguous, [B, n] of them at any distance.
template <class T>
struct RowGrid {
  const T* data;
  int64_t outer, inner;  // strides

  const T* row(int64_t b, int64_t i) const { return data + b * outer + i * inner; }
};

// One step of beam search: of the K * V continuations of batch entry b, the n best.
//
//   score(k, v) = (float)(scores[b, k] + logprob(k, v)), the sum in float64
//
// A continuation whose score is -inf is none: those of masked tokens and empty rows, and those of a beam with scores
// -inf (finished, or unused), whose logits are not read. The others are ordered by score descending, then k * V + v
// ascending. Where they are fewer than n: beam -1, token -1, score -inf. A beam that is not at -inf but has an invalid
// row, or a score that is NaN or +inf, makes entry b invalid: beams -1, tokens -1, scores NaN.
template <class T>
struct BeamSearchStep {
  RowGrid<T> logits;    // [B, K, V]
  const float* scores;  // [B, K]
  int64_t B, K, V, n;
  float* score;    // [B, n]
  int64_t* beam;   // [B, n]
  int64_t* token;  // [B, n]
};

// Speculative sampling of a chain of draft tokens (Leviathan et al. 2023; Chen et al. 2023): the result has the
// target's distribution, whatever the draft's.
//
// For i = 0, 1, ... with p = target[b, i] and q = draft[b, i] (masses mp and mq, sums Mp and Mq):
//   1. Where the draft has ended, i = n or draft_ids[b, i] = -1: one draw from p, and the end.
//   2. x = draft_ids[b, i] is accepted if u < p(x) / q(x), that is
//        floor(u * (mq(x) * Mp) / 2^64) < mp(x) * Mq,   u = philox_u64(seed, kDraftTest, position + i).
//   3. Otherwise one draw from the rest, w(v) = max(0, mp(v) * Mq - mq(v) * Mp), and the end. Nothing is left only
//      where p and q are the same and x has no mass (its logit is that low): then the draw is from p.
// A draw, of weights w (or mp) with the sum W: target = floor(u * W / 2^64), u = philox_u64(seed, kDraftReplacement,
// position + i); the first token, ascending, whose running weight exceeds it. All of this in integers: a weight is
// below 2^103, W below 2^126.
//
// Without draft logits the draft was certain of its tokens (greedy, or copied from a text): mq(x) = Mq = 1, 0
// elsewhere.
//
// Out: token [B, n + 1], the accepted ones, then the one drawn, then -1; how many were accepted; logprob under p of
// each token, 0 where there is none. A row that is needed and invalid or empty ends the chain without a draw: token
// -1 at num_accepted. Rows after the end are not read.
template <class T>
struct SpeculativeVerify {
  const int64_t* draft_ids;  // [B, n]: in [0, V), -1 after the last
  RowGrid<T> draft;          // [B, n, V], or no data
  RowGrid<T> target;         // [B, n + 1, V]
  const int64_t* seeds;      // [1] or [B]
  int64_t seed_stride;       // 0 or 1
  const int64_t* positions;  // [B]
  int64_t B, n, V;
  int64_t* token;         // [B, n + 1]
  int64_t* num_accepted;  // [B]
  float* logprob;         // [B, n + 1]
};

// n draws from each row, with replacement or without.
//
// The masses of a row of weights w >= 0 (float32, for float64 weights float64): with e such that
// 2^(e-1) <= max w < 2^e and k = multinomial_bits(V),
//   mass(v) = round(w_v * 2^(k-e)), halves to even,
// so that a weight of 24 bits is exact down to 2^(24-k) of the largest. V < kMaxCategories. Of a row of logits: mass as
// above, k = 40.
//
// Draw i: target = floor(u * M / 2^64), u = multinomial_u64(seed, position, i), M the sum; the first v, ascending,
// whose running mass exceeds it. Without replacement its weight becomes 0 (its logit -inf); when then M < 2^(k-8) and
// more are to be drawn, the masses are taken anew from what is left: by its own maximum, so that small weights count as
// precisely when the large ones are gone.
//
// A row has a fault, and no token, when a weight is negative, infinite or NaN (a logit NaN); when nothing in it is
// above 0 (-inf); or, without replacement, when fewer than n are.
enum class RowFault : int32_t { kNone, kBadValue, kNothing, kTooFew };

template <class T>
struct Multinomial {
  const T* input;  // [B, V]
  int64_t stride;  // between rows
  bool from_logits, replacement;
  const int64_t* seeds;      // [1] or [B]
  int64_t seed_stride;       // 0 or 1
  const int64_t* positions;  // [B]
  int64_t B, V, n;
  int64_t* token;   // [B, n]
  RowFault* fault;  // [B]
};

constexpr int64_t kMaxCategories = int64_t{1} << 31;  // weights; V is below it
constexpr int64_t kMaxDraws = int64_t{1} << 32;       // n is below it
constexpr int kMostMultinomialBits = 51;              // round_to_integer's range

namespace {  // one copy an instruction-set build: the linker must not merge them

// Temperature 1.
inline Falloff unit_falloff() { return falloff(1.0); }

// The most bits with which V masses stay below 2^63.
inline int multinomial_bits(int64_t V) {
  const int bits = __builtin_clzll(static_cast<uint64_t>(V)) - 1;  // 63 less the bits of V
  return bits < kMostMultinomialBits ? bits : kMostMultinomialBits;
}

// The draw is the last word of Philox' counter, so that no two pairs of position and draw share a number.
inline uint64_t multinomial_u64(uint64_t seed, uint64_t position, int64_t draw) {
  const Philox c = philox(seed, Philox{{static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32),
                                        static_cast<uint32_t>(Purpose::kMultinomial), static_cast<uint32_t>(draw)}});
  return c.words[0] | static_cast<uint64_t>(c.words[1]) << 32;
}

}  // namespace

}  // namespace llmkern
