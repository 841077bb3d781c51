// SPDX-License-Identifier: Apache-2.0
// How a kernel uses more than one core without knowing whose threads they are.
//
// The binding hands in torch's pool; the sanitizer harness hands in a plain loop. A kernel must be right with any
// number of workers, and must give the same bits: it splits its *outputs*, never a sum.
#pragma once

#include <cstdint>

namespace llmkern {

class Parallel {
 public:
  using Body = void (*)(const void* context, int64_t begin, int64_t end);
  // Calls body on disjoint ranges that cover [0, n), none shorter than `grain` but the last; returns when all are done,
  // and then throws the first of their exceptions.
  using Launcher = void (*)(int64_t n, int64_t grain, Body body, const void* context);

  Parallel(Launcher launcher, int threads) : launcher_(launcher), threads_(threads) {}

  // The calling thread.
  static Parallel alone() { return Parallel(nullptr, 1); }

  int threads() const { return threads_; }  // that may work side by side

  template <class F>
  void operator()(int64_t n, int64_t grain, const F& f) const {
    if (n <= 0) return;
    if (n <= grain || threads_ <= 1) return f(int64_t{0}, n);
    // The pool may have more threads than `threads` says: ranges that are no more of them keep the others out.
    const int64_t least = (n + threads_ - 1) / threads_;
    launcher_(
        n, grain > least ? grain : least,
        [](const void* context, int64_t begin, int64_t end) { (*static_cast<const F*>(context))(begin, end); }, &f);
  }

 private:
  Launcher launcher_;
  int threads_;
};

}  // namespace llmkern
