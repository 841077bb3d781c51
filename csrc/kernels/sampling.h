// SPDX-License-Identifier: Apache-2.0
// From logits to a token, in one call and exactly.
//
// Every row b of B is independent of the others: its result depends on its logits, its settings, its seed and its
// position alone. The steps are, in float32 with one rounding an operation:
//
//   1. y_v = logits[b, v] + bias[b, v];  y_v += the sparse bias of v;  y_v = -inf where v is not allowed.
//      For each distinct v among prompt_ids[b] and output_ids[b] (ids outside [0, V) are padding) with y_v > -inf or
//      NaN:
//        y_v = y_v > 0 ? y_v / repetition : y_v * repetition        (Keskar et al. 2019), and, with
//        c = occurrences of v in output_ids[b], if c > 0:
//        y_v = (y_v - frequency * c) - presence
//      At last y_v = min(y_v, FLT_MAX), so that +inf counts as FLT_MAX; -inf stays; -0 equals 0.
//      A NaN among the y, or none above -inf, makes the row invalid: token -1, logprobs and entropy NaN, counts 0, top
//      ids -1.
//   2. m = max y;  d_v = (y_v - m) + 0, never -0;
//      mass(v) = exp_mass(d_v, falloff(temperature)) rounded to an integer in [0, 2^40] (this and the other primitives:
//      arithmetic.h).
//      Temperature 0, and any below kGreedyTemperature (whose inverse might overflow), means temperature 1 and top_k 1:
//      the first token of the order below.
//   3. Tokens with y = -inf are never kept. "The order" is y descending, then id ascending: the temperature has no part
//      in it, as it has none in mathematics.
//        top_k      (k > 0) keeps the first k of the order;
//        top_p      (p < 1) keeps, of those, the shortest prefix of the order with mass >= fraction_of_mass(p, theirs);
//        min_p      (> 0) keeps, of those, tokens with mass >= fraction_of_mass(min_p, 2^40);
//        typical_p  (< 1; Meister et al. 2022) orders what is left by deviation ascending, then id ascending, where
//                   deviation = (float)|-(d_v * scale) - S / M| in float64, M = sum mass, S = sum weighted_mass, each
//                   rounded to an integer; and keeps the shortest prefix with mass >= fraction_of_mass(typical_p, M).
//      fraction_of_mass(p, mass) is max(1, ceil(p * mass)), exactly, with p truncated to a multiple of 2^-62. This is
//      the order of Hugging Face.
//   4. u = philox_u64(seed, kSample, position); target = floor(u * M / 2^64), M the mass of all kept tokens;
//      the token is the first kept id, ascending, whose running kept mass exceeds target.
//
// Out, for every row: the token; whether the row is valid; num_kept; filtered_logprob = d / temperature - log_mass(kept
// mass). On request: logprob, the same with the sum M0 of all masses; rank, the number of tokens before it in the
// order; entropy of the unfiltered distribution, log_mass(M0) + ln 2 * S0 / M0 over all tokens; the first num_logprobs
// of the order with their logprobs (-1 and -inf beyond the last token that is not -inf); and processed [B, V], y /
// temperature of the kept tokens in float32 and -inf for the others. Logprobs are computed in float64 and rounded once.
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

// How allowed is given: a byte a token, or as in xgrammar and vLLM a bit, token v bit v % 32 of word v / 32.
enum class AllowedKind { kAll, kBytes, kBits };

// T is the type that the logits are stored in: float, bfloat16 or float16.
template <class T>
struct Sample {
  const T* logits;        // [B, V]
  int64_t logits_stride;  // from row to row; so are the other strides, 0 where all rows share one
  const float* bias;      // null or [B, V]
  int64_t bias_stride;
  const int64_t* bias_ids;   // null or [B, num_bias_ids], distinct in a row; ids outside [0, V) are padding
  const float* bias_values;  // their bias
  int64_t num_bias_ids, bias_ids_stride;
  const void* allowed;  // null, bool [B, V] or uint32_t [B, ceil(V / 32)]
  int64_t allowed_stride;
  AllowedKind allowed_kind;
  const int64_t* prompt_ids;  // null or [B, prompt_length]
  const int64_t* output_ids;  // null or [B, output_length]
  int64_t prompt_length, output_length;
  const SampleSettings* settings;  // [1] or [B]
  int64_t settings_stride;
  const int64_t* seeds;  // [1] or [B]
  int64_t seed_stride;
  const int64_t* positions;  // [1] or [B]; null: b where all rows share a seed, else 0
  int64_t position_stride;
  int64_t B, V, num_logprobs;

  int64_t* token;           // [B]
  bool* valid;              // [B]
  int64_t* num_kept;        // [B]
  float* filtered_logprob;  // [B]
  // Null where nobody asked for it.
  float* logprob;       // [B]
  float* entropy;       // [B]
  int64_t* rank;        // [B]
  int64_t* top_ids;     // [B, num_logprobs]
  float* top_logprobs;  // [B, num_logprobs]
  float* processed;     // [B, V]

  // CUDA only. Settings are checked on the device: a row with one out of range is reported, and invalid.
  void* workspace;  // sample_workspace_bytes(B, V, num_logprobs), aligned to 16 bytes
  DeferredError* error;
};

namespace {  // one copy an instruction-set build: the linker must not merge them

// The ranges, in words and in the order of SampleSettings. The same as in llmkern/ops/_sampling_arguments.py, which
// checks numbers; tensors are checked where they have values.
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

// The divisor of step 2 and later ones.
LLMKERN_HOST_DEVICE inline double effective_temperature(const SampleSettings& s) {
  return is_greedy(s) ? 1.0 : s.temperature;
}

// Whether step 1 has penalties to apply.
template <class T>
LLMKERN_HOST_DEVICE inline bool penalises(const Sample<T>& a, const SampleSettings& s) {
  const bool has_penalty = s.repetition_penalty != 1 || s.presence_penalty != 0 || s.frequency_penalty != 0;
  return has_penalty && (a.prompt_ids != nullptr || a.output_ids != nullptr);
}

// The random number of a row's draw.
template <class T>
LLMKERN_HOST_DEVICE inline uint64_t sample_u64(const Sample<T>& a, int64_t b) {
  const int64_t implied = a.seed_stride == 0 ? b : 0;
  const int64_t position = a.positions == nullptr ? implied : a.positions[b * a.position_stride];
  return philox_u64(static_cast<uint64_t>(a.seeds[b * a.seed_stride]), Purpose::kSample,
                    static_cast<uint64_t>(position));
}

// y, above -inf, of a token that occurs in the ids, `count` times in output_ids.
LLMKERN_HOST_DEVICE inline float penalised(float y, const SampleSettings& s, int32_t count) {
  const float repetition = static_cast<float>(s.repetition_penalty);
  const float presence = static_cast<float>(s.presence_penalty), frequency = static_cast<float>(s.frequency_penalty);
  y = y > 0 ? y / repetition : y * repetition;
  return count > 0 ? (y - frequency * static_cast<float>(count)) - presence : y;
}

}  // namespace

// CUDA: y and the occurrences of every token, and room to sort the num_logprobs first tokens (a power of two of them).
inline int64_t sample_workspace_bytes(int64_t B, int64_t V, int64_t num_logprobs) {
  int64_t sorted = 1;
  while (sorted < num_logprobs) sorted *= 2;
  const int64_t whole = (V + 3) / 4 * 4;  // keeps every row aligned
  return B * (whole * static_cast<int64_t>(sizeof(float) + sizeof(int32_t)) +
              (num_logprobs > 0 ? sorted + 1 : 0) / 2 * 2 * static_cast<int64_t>(sizeof(uint64_t)));
}

}  // namespace llmkern
