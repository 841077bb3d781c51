// SPDX-License-Identifier: Apache-2.0
// From logits to a token, in one call and exactly.
//
// Every row b of B is independent of the others: its result depends on its logits, its settings, its seed and its
// position alone. With logits [B, V] (float32) the steps are, in float32 with one rounding an operation:
//
//   1. y_v = logits[b, v] + bias[v];  y_v = -inf where allowed[v] is 0.
//      For each distinct v among prompt_ids[b] and output_ids[b] (ids outside [0, V) are padding) with y_v > -inf or
//      NaN:
//        y_v = y_v > 0 ? y_v / repetition : y_v * repetition        (Keskar et al. 2019), and, with
//        c = occurrences of v in output_ids[b], if c > 0:
//        y_v = (y_v - frequency * c) - presence
//   2. z_v = min(y_v * (1 / temperature), FLT_MAX); the inverse is taken in float64, rounded to float32 and at least
//      FLT_MIN. So +inf counts as FLT_MAX and -inf stays; -0 equals 0. m = max z.
//      Temperature 0, and any below kGreedyTemperature (whose inverse might overflow), means temperature 1 and top_k 1:
//      the first token of the order below.
//      A NaN among the z, or m = -inf, makes the row invalid: token -1, logprobs and entropy NaN, counts 0, top ids -1.
//   3. d_v = z_v - m;  mass(v) = exp_mass(d_v), an integer in [0, 2^40] (this and the other primitives: arithmetic.h).
//   4. Tokens with z = -inf are never kept. "The order" is z descending, then id ascending.
//        top_k      (k > 0) keeps the first k of the order;
//        top_p      (p < 1) keeps, of those, the shortest prefix of the order with mass >= fraction_of_mass(p, theirs);
//        min_p      (> 0) keeps, of those, tokens with mass >= fraction_of_mass(min_p, 2^40);
//        typical_p  (< 1; Meister et al. 2022) orders what is left by deviation ascending, then id ascending, where
//                   deviation = (float)|-d_v - S / M| in float64, M = sum mass, S = sum weighted_mass,
//                   and keeps the shortest prefix with mass >= fraction_of_mass(typical_p, M).
//      fraction_of_mass(p, mass) is max(1, ceil(p * mass)), exactly, with p truncated to a multiple of 2^-62. This is
//      the order of Hugging Face.
//   5. u = philox_u64(seed, kSample, position); target = floor(u * M / 2^64), M the mass of all kept tokens;
//      the token is the first kept id, ascending, whose running kept mass exceeds target.
//
// Out, for every row: the token; logprob = d - log_mass(sum of all masses) before filtering; filtered_logprob with the
// kept mass instead; rank, the number of tokens before it in the order; num_kept; entropy of the unfiltered
// distribution, log_mass(M0) + S0 / M0 over all tokens; the first num_logprobs of the order with their logprobs
// (-1 and -inf beyond the last token that is not -inf). Logprobs are computed in float64 and rounded once.
//
// V < 2^23, so that no sum of masses leaves 63 bits.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "kernels/deferred.h"
#include "kernels/philox.h"

namespace llmkern {

constexpr int64_t kMaxSampleVocabulary = int64_t{1} << 23;  // V is below it
constexpr double kGreedyTemperature = 0x1p-100;

// The settings of a row, as they come from Python.
struct SampleSettings {
  double temperature;         // [0, inf)
  double top_k;               // a whole number; 0 keeps all
  double top_p;               // (0, 1]
  double min_p;               // [0, 1]
  double typical_p;           // (0, 1]
  double repetition_penalty;  // (0, FLT_MAX]
  double presence_penalty;    // [-FLT_MAX, FLT_MAX]
  double frequency_penalty;   // [-FLT_MAX, FLT_MAX]
};
constexpr int64_t kSampleSettings = sizeof(SampleSettings) / sizeof(double);

struct Sample {
  const float* logits;        // [B, V]
  const float* bias;          // null, [V] or [B, V]
  int64_t bias_stride;        // 0 or V
  const bool* allowed;        // null, [V] or [B, V]
  int64_t allowed_stride;     // 0 or V
  const int64_t* prompt_ids;  // null or [B, prompt_length]
  const int64_t* output_ids;  // null or [B, output_length]
  int64_t prompt_length, output_length;
  const SampleSettings* settings;  // [1] or [B]
  int64_t settings_stride;         // 0 or 1
  const int64_t* seeds;            // [1] or [B]
  int64_t seed_stride;             // 0 or 1
  const int64_t* positions;        // [B]
  int64_t B, V, num_logprobs;

  int64_t* token;           // [B]
  float* logprob;           // [B]
  float* filtered_logprob;  // [B]
  int64_t* rank;            // [B]
  int64_t* num_kept;        // [B]
  float* entropy;           // [B]
  int64_t* top_ids;         // [B, num_logprobs]
  float* top_logprobs;      // [B, num_logprobs]

  // CUDA only. Settings are checked on the device: a row with one out of range is reported, and invalid.
  void* workspace;  // sample_workspace_bytes(B, V, num_logprobs), aligned to 16 bytes
  DeferredError* error;
};

namespace {  // one copy an instruction-set build: the linker must not merge them

// The ranges, in words and in the order of SampleSettings. Those of llmkern/ops/_sampling_arguments.py, which checks
// numbers; tensors are checked where they have values.
inline const char* sample_setting_range(int column) {
  constexpr const char* kRanges[kSampleSettings] = {
      "temperature in [0, inf)",
      "top_k to be a whole number >= 0",
      "top_p in (0, 1]",
      "min_p in [0, 1]",
      "typical_p in (0, 1]",
      "repetition_penalty in (0, 3.4e38]",
      "presence_penalty in [-3.4e38, 3.4e38]",
      "frequency_penalty in [-3.4e38, 3.4e38]",
  };
  return kRanges[column];
}

// The first column out of its range, or -1.
LLMKERN_HOST_DEVICE inline int wrong_setting(const SampleSettings& s) {
  if (!(s.temperature >= 0 && s.temperature <= DBL_MAX)) return 0;
  if (!(s.top_k >= 0 && s.top_k <= DBL_MAX && floor(s.top_k) == s.top_k)) return 1;
  if (!(s.top_p > 0 && s.top_p <= 1)) return 2;
  if (!(s.min_p >= 0 && s.min_p <= 1)) return 3;
  if (!(s.typical_p > 0 && s.typical_p <= 1)) return 4;
  if (!(s.repetition_penalty > 0 && s.repetition_penalty <= FLT_MAX)) return 5;
  if (!(fabs(s.presence_penalty) <= FLT_MAX)) return 6;
  if (!(fabs(s.frequency_penalty) <= FLT_MAX)) return 7;
  return -1;
}

LLMKERN_HOST_DEVICE inline bool is_greedy(const SampleSettings& s) { return s.temperature < kGreedyTemperature; }

// What step 2 multiplies by.
LLMKERN_HOST_DEVICE inline float inverse_temperature(const SampleSettings& s) {
  const float inverse = is_greedy(s) ? 1.0f : static_cast<float>(1.0 / s.temperature);
  return inverse > FLT_MIN ? inverse : FLT_MIN;
}

// Whether step 1 has penalties to apply.
LLMKERN_HOST_DEVICE inline bool penalises(const Sample& a, const SampleSettings& s) {
  const bool has_penalty = s.repetition_penalty != 1 || s.presence_penalty != 0 || s.frequency_penalty != 0;
  return has_penalty && (a.prompt_ids != nullptr || a.output_ids != nullptr);
}

// y, above -inf, of a token that occurs in the ids, `count` times in output_ids.
LLMKERN_HOST_DEVICE inline float penalised(float y, const SampleSettings& s, int32_t count) {
  const float repetition = static_cast<float>(s.repetition_penalty);
  const float presence = static_cast<float>(s.presence_penalty), frequency = static_cast<float>(s.frequency_penalty);
  y = y > 0 ? y / repetition : y * repetition;
  return count > 0 ? (y - frequency * static_cast<float>(count)) - presence : y;
}

}  // namespace

// CUDA: z and the occurrences of every token, and room to sort the num_logprobs first tokens (a power of two of them).
inline int64_t sample_workspace_bytes(int64_t B, int64_t V, int64_t num_logprobs) {
  int64_t sorted = 1;
  while (sorted < num_logprobs) sorted *= 2;
  const int64_t whole = (V + 3) / 4 * 4;  // keeps every row aligned
  return B * (whole * static_cast<int64_t>(sizeof(float) + sizeof(int32_t)) +
              (num_logprobs > 0 ? sorted + 1 : 0) / 2 * 2 * static_cast<int64_t>(sizeof(uint64_t)));
}

}  // namespace llmkern
