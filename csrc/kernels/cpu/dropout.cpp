// SPDX-License-Identifier: Apache-2.0
// Dropout on the CPU; the contract is kernels/dropout.h.
#include "kernels/dropout.h"

#include "kernels/cpu/mask_bits.h"
#include "kernels/cpu/storage.h"
#include "kernels/run.h"

namespace llmkern::cpu::LLMKERN_ISA {

namespace {

constexpr int64_t kTaskGroups = 64;          // groups that a task draws at once, whatever row they are of
constexpr int64_t kGrainElements = 1 << 14;  // several times what it takes to wake another core

// Draws all groups of a mask [rows, columns], and calls f(bits, row, first, end) with every run of them in one row:
// bit j % 16 of bits[j / 16] is column first + j. An element costs `uses` times what drawing it does, or less.
template <class F>
void for_runs(const Mask& mask, int64_t rows, int64_t columns, int64_t uses, const Parallel& parallel, const F& f) {
  const int64_t of_row = mask_groups(columns), all = rows * of_row;
  const int64_t grain = kGrainElements / (kTaskGroups * kMaskGroup * (uses + 1)) + 1;
  parallel((all + kTaskGroups - 1) / kTaskGroups, grain, [&](int64_t begin_task, int64_t end_task) {
    uint16_t bits[kTaskGroups];
    for (int64_t task = begin_task; task < end_task; ++task) {
      const int64_t begin = task * kTaskGroups, end = begin + kTaskGroups < all ? begin + kTaskGroups : all;
      draw_mask(mask, begin, end - begin, bits);
      for (int64_t g = begin; g < end;) {
        const int64_t row = g / of_row, next = (row + 1) * of_row < end ? (row + 1) * of_row : end;
        const int64_t first = (g - row * of_row) * kMaskGroup, last = (next - row * of_row) * kMaskGroup;
        f(bits + (g - begin), row, first, last < columns ? last : columns);
        g = next;
      }
    }
  });
}

void execute(const DrawMask& a, const Parallel& parallel) {
  const Mask mask = make_mask(*a.seed, a.purpose, a.p);
  for_runs(mask, a.rows, a.columns, 1, parallel, [&](const uint16_t* bits, int64_t row, int64_t first, int64_t end) {
    bool* to = a.mask + row * a.columns;
    for (int64_t d = first; d < end; ++d) to[d] = bits[(d - first) / kMaskGroup] >> (d % kMaskGroup) & 1;
  });
}

template <class T>
void drop(const uint16_t* bits, const T* from, T* to, int64_t count, Widened<T> scale) {
  using W = Widened<T>;
  for_lanes<W>(0, count, [&](int64_t j, int64_t lanes) {
    const Vec<W> kept = load_wide(from + j, lanes) * scale;
    store_narrow(to + j, mask_lanes<W>(bits, j) ? Vec<W>{} : kept, lanes);
  });
}

template <class T>
void execute(const Dropout<T>& a, const Parallel& parallel) {
  if (a.N == 0 || a.D == 0) return;
  const Mask mask = make_mask(*a.seed, Purpose::kDropout, a.p);
  const Widened<T> scale = dropout_scale<T>(a.p);
  const auto drop_run = [&](const uint16_t* bits, int64_t row, int64_t first, int64_t end) {
    for (int64_t n = row; n < a.N; n += a.R) {
      drop(bits, a.x + n * a.D + first, a.out + n * a.D + first, end - first, scale);
    }
  };
  for_runs(mask, a.R, a.D, a.N / a.R, parallel, drop_run);
}

}  // namespace

template <class Args>
void run(const Args& args, const Parallel& parallel) {
  execute(args, parallel);
}

template void run(const DrawMask&, const Parallel&);
template void run(const Dropout<float>&, const Parallel&);
template void run(const Dropout<double>&, const Parallel&);
template void run(const Dropout<bfloat16>&, const Parallel&);
template void run(const Dropout<float16>&, const Parallel&);

}  // namespace llmkern::cpu::LLMKERN_ISA
