// SPDX-License-Identifier: Apache-2.0
// Random masks, as kernels/mask.h states them.
#pragma once

#include "kernels/philox.h"

namespace llmkern::reference {

inline bool is_set(int64_t seed, Purpose purpose, int64_t row, int64_t column, int64_t columns, double p) {
  const int64_t group = row * ((columns + 15) / 16) + column / 16, j = column % 16;
  const Philox drawn = philox(static_cast<uint64_t>(seed), purpose, static_cast<uint64_t>(4 * group + j % 4));
  return drawn.words[j / 4] < p * 4294967296.0;
}

}  // namespace llmkern::reference
