// SPDX-License-Identifier: Apache-2.0
// Counter-based randomness: Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
//
// A draw is a pure function of (seed, purpose, index): no state, no order, the same on CPU and GPU. Masks are computed
// again in the backward pass instead of being stored.
#pragma once

#include <cstdint>

#include "kernels/arithmetic.h"

namespace llmkern {

// What a random number is for: part of the counter, so that one seed never gives the same number twice.
enum class Purpose : uint32_t {
  kSample = 1,
  kDropout = 2,
  kZoneoutCell = 3,
  kZoneoutHidden = 4,
  kDraftTest = 5,  // this and the next: kernels/decoding.h
  kDraftReplacement = 6,
  kMultinomial = 7
};

namespace {

struct Philox {
  uint32_t words[4];
};

// The generator itself: a keyed permutation of 128 bits.
LLMKERN_HOST_DEVICE inline Philox philox(uint64_t key, Philox c) {
  uint32_t low = static_cast<uint32_t>(key), high = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * c.words[0], b = uint64_t{0xCD9E8D57} * c.words[2];
    c = {{static_cast<uint32_t>(b >> 32) ^ c.words[1] ^ low, static_cast<uint32_t>(b),
          static_cast<uint32_t>(a >> 32) ^ c.words[3] ^ high, static_cast<uint32_t>(a)}};
    low += 0x9E3779B9;
    high += 0xBB67AE85;
  }
  return c;
}

LLMKERN_HOST_DEVICE inline Philox philox(uint64_t seed, Purpose purpose, uint64_t index) {
  return philox(seed, Philox{{static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32),
                              static_cast<uint32_t>(purpose), 0}});
}

LLMKERN_HOST_DEVICE inline uint64_t philox_u64(uint64_t seed, Purpose purpose, uint64_t index) {
  const Philox c = philox(seed, purpose, index);
  return c.words[0] | static_cast<uint64_t>(c.words[1]) << 32;
}

}  // namespace

}  // namespace llmkern
