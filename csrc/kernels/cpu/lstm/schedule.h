// SPDX-License-Identifier: Apache-2.0
// Which rows of a batch run at which step of a sequence.
#pragma once

#include "kernels/cpu/scratch.h"

namespace llmkern::cpu::LLMKERN_ISA {

namespace {

// Which rows run at which step. Rows are taken in the order of their lengths, the longest first, so that those of a
// step are the first ones; tokens beyond a row's length cost nothing.
//
// A schedule may be that of a part of the rows, which runs on its own: rows that lie side by side where all are of one
// length, else every parts-th of them, so that parts have equal work.
class Schedule {
 public:
  Schedule(int64_t steps, int64_t B, const int64_t* lengths, bool reverse, int64_t part = 0, int64_t parts = 1)
      : steps_(steps), B_(B), reverse_(reverse), order_(B), first_of_all_(steps + 1), first_(steps + 1) {
    for (int64_t t = 0; t <= steps; ++t) first_of_all_[t] = lengths == nullptr ? t * B : 0;
    if (lengths == nullptr) {
      for (int64_t row = 0; row < B; ++row) order_[row] = row;
    } else {
      sort(lengths);
    }
    begin_ = ragged() ? part : B * part / parts;
    stride_ = ragged() ? parts : 1;
    rows_ = ragged() ? (B - part + parts - 1) / parts : B * (part + 1) / parts - begin_;
    first_[0] = 0;
    for (int64_t t = 0; t < steps; ++t) first_[t + 1] = first_[t] + running(t);
  }

  int64_t steps() const { return steps_; }
  int64_t rows() const { return rows_; }
  // Of the whole batch, as is a token's number.
  int64_t tokens() const { return first_of_all_[steps_]; }
  bool ragged() const { return tokens() != steps_ * B_; }
  int64_t token(int64_t t, int64_t i) const { return first_of_all_[t] + begin_ + i * stride_; }
  int64_t time(int64_t step) const { return reverse_ ? steps_ - 1 - step : step; }
  int64_t row(int64_t i) const { return order_[begin_ + i * stride_]; }
  // Rows [0, active) run at time t, and none outside of the sequence; first: how many ran at the times before.
  int64_t first(int64_t t) const { return first_[t]; }
  int64_t active(int64_t t) const { return t < 0 || t >= steps_ ? 0 : first_[t + 1] - first_[t]; }
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
    for (int64_t t = 0; t < steps_; ++t) first_of_all_[t + 1] = first_of_all_[t] + longer[t];
    for (int64_t row = 0; row < B_; ++row) order_[longer[lengths[row]]++] = row;
  }

  // How many of the part's rows run at time t.
  int64_t running(int64_t t) const {
    const int64_t all = first_of_all_[t + 1] - first_of_all_[t] - begin_;
    const int64_t mine = all <= 0 ? 0 : (all + stride_ - 1) / stride_;
    return mine < rows_ ? mine : rows_;
  }

  int64_t steps_, B_;
  bool reverse_;
  int64_t begin_, stride_, rows_;  // the part's rows are order_[begin_ + i * stride_]
  Buffer<int64_t> order_, first_of_all_, first_;
};

}  // namespace

}  // namespace llmkern::cpu::LLMKERN_ISA
