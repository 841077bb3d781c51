// SPDX-License-Identifier: Apache-2.0
// Which rows of a batch run at which step of a sequence.
#pragma once

#include "kernels/cpu/scratch.h"

namespace llmkern::cpu::LLMKERN_ISA {

namespace {

// Which rows run at which step. Rows are taken in the order of their lengths, the longest first, so that those of a
// step are the first ones; tokens beyond a row's length cost nothing.
class Schedule {
 public:
  Schedule(int64_t steps, int64_t B, const int64_t* lengths, bool reverse)
      : steps_(steps), B_(B), reverse_(reverse), order_(B), first_(steps + 1) {
    for (int64_t t = 0; t <= steps; ++t) first_[t] = lengths == nullptr ? t * B : 0;
    if (lengths == nullptr) {
      for (int64_t row = 0; row < B; ++row) order_[row] = row;
    } else {
      sort(lengths);
    }
  }

  int64_t steps() const { return steps_; }
  int64_t tokens() const { return first_[steps_]; }
  bool ragged() const { return tokens() != steps_ * B_; }
  int64_t time(int64_t step) const { return reverse_ ? steps_ - 1 - step : step; }
  int64_t row(int64_t i) const { return order_[i]; }
  // Rows [0, active) run at time t, and none outside of the sequence; their tokens are first + [0, active) of all.
  int64_t first(int64_t t) const { return first_[t]; }
  int64_t active(int64_t t) const { return t < 0 || t >= steps_ ? 0 : first(t + 1) - first(t); }
  int64_t time_before(int64_t t) const { return reverse_ ? t + 1 : t - 1; }
  int64_t time_after(int64_t t) const { return reverse_ ? t - 1 : t + 1; }

 private:
  // A counting sort: rows longer than t are those that run at t, and end where the rows of length t begin.
  void sort(const int64_t* lengths) {
    Buffer<int64_t> longer(steps_ + 1);
    for (int64_t t = 0; t <= steps_; ++t) longer[t] = 0;
    for (int64_t row = 0; row < B_; ++row) {
      if (lengths[row] > 0) ++longer[lengths[row] - 1];
    }
    for (int64_t t = steps_ - 1; t >= 0; --t) longer[t] += longer[t + 1];
    for (int64_t t = 0; t < steps_; ++t) first_[t + 1] = first_[t] + longer[t];
    for (int64_t row = 0; row < B_; ++row) order_[longer[lengths[row]]++] = row;
  }

  int64_t steps_, B_;
  bool reverse_;
  Buffer<int64_t> order_, first_;
};

}  // namespace

}  // namespace llmkern::cpu::LLMKERN_ISA
