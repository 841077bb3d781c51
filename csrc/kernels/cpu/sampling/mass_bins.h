// SPDX-License-Identifier: Apache-2.0
// Where the tokens of a row lie, by a sample of them: the first guess of selections that would else take many passes.
#pragma once

#include <cfloat>

#include "kernels/cpu/sampling/blocks.h"

namespace llmkern::cpu::LLMKERN_ISA {

namespace {

constexpr float kLeastLive = -FLT_MAX;  // every token but -inf reaches it

// Tokens by the octaves of their mass, eight bins each: bin j has masses near 2^(j / 8 - 8).
constexpr int kMassBins = 8 * (kMassBits + 8) + 1;

inline float bin_mass(int bin) {
  constexpr uint32_t kOctaves = 8;
  return bits_to_float(kEighthPowers[bin & 7] + (static_cast<uint32_t>(bin) << 20) - (kOctaves << 23));
}

// The least y of a bin; not -inf, which lanes beyond the vocabulary reach.
inline float bin_floor(const Row& row, int bin) {
  const float y = row.maximum + (static_cast<float>(bin) / 8 + kNoMass - 1.0f / 16) / row.scale.scale;
  return y > kLeastLive ? y : kLeastLive;
}

// A sample of a row's tokens: every stride-th vector.
class MassSample {
 public:
  explicit MassSample(const Row& row) {
    constexpr int64_t kEnough = 2048, kMostStride = 16, n = kLanes<float>;
    const int64_t stride = row.V / kEnough < kMostStride ? row.V / kEnough : kMostStride;
    weight_ = static_cast<double>(stride > 1 ? stride : 1);
    const Weigher weigher = row.weigher();
    for (int64_t i = 0; i + n <= row.V; i += n * static_cast<int64_t>(weight_)) {
      int32_t bins[n];
      store(bins, weigher.bin(load(row.y + i)));
      for (int64_t lane = 0; lane < n; ++lane) ++count_[bins[lane]][lane % 4];
    }
  }

  // How many tokens of the row one of the sample stands for.
  double weight() const { return weight_; }

  double tokens(int bin) const { return weight_ * (count_[bin][0] + count_[bin][1] + count_[bin][2] + count_[bin][3]); }

 private:
  // Four counts of every bin side by side, so that equal tokens one after the other need not wait for each other.
  int32_t count_[kMassBins][4] = {};
  double weight_;
};

}  // namespace

}  // namespace llmkern::cpu::LLMKERN_ISA
