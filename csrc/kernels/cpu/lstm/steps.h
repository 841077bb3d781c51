// SPDX-License-Identifier: Apache-2.0
// What the steps of both passes share: the states that they carry on, resets, the panels of a worker.
#pragma once

#include "kernels/cpu/lstm/panels.h"
#include "kernels/cpu/lstm/schedule.h"
#include "kernels/cpu/scratch.h"
#include "kernels/cpu/team.h"
#include "kernels/lstm.h"

namespace llmkern::cpu::LLMKERN_ISA {

namespace {

// Rows between the one that is worked on and the one that is asked for.
constexpr int64_t kFetchAhead = 4;

template <class T>
void copy_or_zero(T* to, const T* from, int64_t count) {
  if (count == 0) return;  // an empty tensor may have no memory at all
  if (from != nullptr) {
    memcpy(to, from, static_cast<size_t>(count) * sizeof(T));
  } else {
    memset(to, 0, static_cast<size_t>(count) * sizeof(T));
  }
}

// A state that the steps carry on: in its tensor, or beside it where that has fewer bits.
template <class T>
class Running {
 public:
  using S = Widened<T>;

  Running(Slot slot, T* state, const T* initial, int64_t count) : state_(state), count_(count) {
    if constexpr (std::is_same_v<S, T>) {
      copy_or_zero(state, initial, count);
      values_ = state;
      return;
    } else {
      memory_ = scratch<S>(slot, count);
      values_ = memory_;
      if (initial == nullptr) {
        copy_or_zero<S>(values_, nullptr, count);
      } else {
        convert(values_, initial, count);
      }
    }
  }

  S* values() const { return values_; }
  void finish() const {
    if constexpr (!std::is_same_v<S, T>) convert(state_, values_, count_);
  }

 private:
  T* state_;
  Scratch<S> memory_;
  S* values_;
  int64_t count_;
};

template <class T>
bool resets(const LstmVariant<T>& variant, int64_t t, int64_t row, int64_t B) {
  return variant.reset != nullptr && variant.reset[t * B + row];
}

// A worker's share of the panels of the output: that of the panels of hidden units, without a projection.
template <class S>
Share projected(const Share& share, int64_t H, int64_t P) {
  const int64_t panels = panels_of<S>(H), projected_panels = panels_of<S>(P);
  return {share.begin * projected_panels / panels, share.end * projected_panels / panels, share.barrier};
}

}  // namespace

}  // namespace llmkern::cpu::LLMKERN_ISA
