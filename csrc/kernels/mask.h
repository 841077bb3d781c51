// SPDX-License-Identifier: Apache-2.0
// Random masks [rows, columns]: what dropout drops and zoneout holds. An element is a pure function of seed, purpose,
// row and column; so a kernel draws what it needs where it needs it, in any order, again in the backward pass.
//
// A row is ceil(columns / 16) groups of 16 columns, and group = row * groups of a row + column / 16. With
// j = column % 16,
//
//   the element is set   iff   philox(seed, purpose, 4 * group + j % 4).words[j / 4] < p * 2^32
//
// so p = 1 sets all and p = 0 none. The four counters of a group stand side by side: word w of them is elements 4 w to
// 4 w + 3, the lanes of a vector. kernels/cpu/mask_bits.h draws the groups of a row by vectors.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/philox.h"

namespace llmkern {

constexpr int64_t kMaskGroup = 16;

namespace {  // one copy an instruction-set build: the linker must not merge them

LLMKERN_HOST_DEVICE constexpr int64_t mask_groups(int64_t columns) { return (columns + kMaskGroup - 1) / kMaskGroup; }

struct Mask {
  uint64_t seed;
  Purpose purpose;
  uint64_t limit;  // words below it are set; 2^32 at most
};

LLMKERN_HOST_DEVICE inline Mask make_mask(int64_t seed, Purpose purpose, double p) {
  return {static_cast<uint64_t>(seed), purpose, static_cast<uint64_t>(ceil(p * 0x1p32))};
}

// The elements j, j + 4, j + 8 and j + 12 of a group, as bits at these places.
LLMKERN_HOST_DEVICE inline uint32_t mask_quarter(const Mask& mask, int64_t group, int j) {
  const Philox drawn = philox(mask.seed, mask.purpose, static_cast<uint64_t>(4 * group + j));
  uint32_t bits = 0;
  for (int w = 0; w < 4; ++w) bits |= static_cast<uint32_t>(drawn.words[w] < mask.limit) << (4 * w + j);
  return bits;
}

// The 16 elements of a group: bit j is column j.
LLMKERN_HOST_DEVICE inline uint32_t mask_bits(const Mask& mask, int64_t group) {
  uint32_t bits = 0;
  for (int j = 0; j < 4; ++j) bits |= mask_quarter(mask, group, j);
  return bits;
}

}  // namespace

}  // namespace llmkern
