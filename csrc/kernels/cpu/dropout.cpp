// SPDX-License-Identifier: Apache-2.0
// Dropout on the CPU; the contract is kernels/dropout.h.
#include "kernels/dropout.h"

#include "kernels/cpu/mask_bits.h"
#include "kernels/run.h"

namespace llmkern::cpu::LLMKERN_ISA {

namespace {

constexpr int64_t kGroups = 64;              // drawn at once
constexpr int64_t kGrainElements = 1 << 13;  // several times what it takes to wake another core

void execute(const DrawMask& a, const Parallel& parallel) {
  const Mask mask = make_mask(*a.seed, a.purpose, a.p);
  const int64_t groups = mask_groups(a.columns);
  parallel(a.rows, kGrainElements / (a.columns + 1) + 1, [&](int64_t begin, int64_t end) {
    uint16_t bits[kGroups];
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t column = 0; column < a.columns; ++column) {
        const int64_t g = column / kMaskGroup;
        if (column % (kGroups * kMaskGroup) == 0) {
          draw_mask(mask, row * groups + g, groups - g < kGroups ? groups - g : kGroups, bits);
        }
        a.mask[row * a.columns + column] = bits[g % kGroups] >> (column % kMaskGroup) & 1;
      }
    }
  });
}

}  // namespace

template <class Args>
void run(const Args& args, const Parallel& parallel) {
  execute(args, parallel);
}

template void run(const DrawMask&, const Parallel&);

}  // namespace llmkern::cpu::LLMKERN_ISA
