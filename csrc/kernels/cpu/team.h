// SPDX-License-Identifier: Apache-2.0
// Workers that stay for a whole sequence and meet at a barrier after every step.
//
// A recurrence has a barrier a step. Leaving and entering a parallel region costs microseconds, spinning on a counter
// 50 ns. But Parallel does not promise that its calls run side by side: a pool may run them one after another, and a
// barrier would then never open. So the calls are counted first. When all of them have come they work together; when
// some stay away, the first one does all the work alone.
#pragma once

#include <atomic>
#include <chrono>
#include <thread>

#include "kernels/parallel.h"

#ifdef LLMKERN_X86
#include <immintrin.h>
#endif

namespace llmkern::cpu::LLMKERN_ISA {

// Some ten microseconds of spinning, more than workers come apart in a step: whoever yields sooner hands its core to a
// process that only spins. Later, the one that is waited for may need this very core.
inline void pause_briefly(int64_t turn) {
#ifdef LLMKERN_X86
  _mm_pause();
#endif
  if (turn % 1024 == 1023) std::this_thread::yield();
}

// Another worker has failed.
struct Abandoned {};

// Reusable; every party must come as often as every other, unless one gives up.
class Barrier {
 public:
  void set_parties(int parties) { parties_.store(parties, std::memory_order_relaxed); }
  void give_up() { abandoned_.store(true); }

  void wait() {
    const int phase = phase_.load(std::memory_order_relaxed);
    if (waiting_.fetch_add(1, std::memory_order_acq_rel) == parties_.load(std::memory_order_relaxed) - 1) {
      waiting_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int64_t turn = 0; phase_.load(std::memory_order_acquire) == phase; ++turn) {
      if (abandoned_.load(std::memory_order_relaxed)) throw Abandoned{};
      pause_briefly(turn);
    }
  }

 private:
  std::atomic<int> parties_{1};
  std::atomic<bool> abandoned_{false};
  alignas(64) std::atomic<int> waiting_{0};
  alignas(64) std::atomic<int> phase_{0};
};

// What a worker does: parts [begin, end) of [0, parts), in step with the others.
struct Share {
  int64_t begin, end;
  Barrier& barrier;
};

// Divides `parts` among the threads: f(Share) on each of them, side by side; on one thread if `parts` are few or the
// pool does not run its calls at once. Of workers that fail because another one has, the pool hears nothing.
template <class F>
void run_team(const Parallel& parallel, int64_t parts, const F& f) {
  struct RollCall {
    std::atomic<int64_t> come{0};  // threads that have come; kAlone: somebody does everything
    std::atomic<int> calls{0};
    Barrier barrier;
  } roll;
  constexpr int64_t kAlone = -1;
  constexpr std::chrono::milliseconds kPatience(5);
  const int64_t threads = parallel.threads() < parts ? parallel.threads() : parts;
  if (threads <= 1) return f(Share{0, parts, roll.barrier});
  parallel(threads, 1, [&](int64_t first, int64_t last) {
    roll.calls.fetch_add(1);
    int64_t come = roll.come.load();
    do {
      if (come == kAlone) return;
    } while (!roll.come.compare_exchange_weak(come, come + last - first));
    const auto start = std::chrono::steady_clock::now();
    for (int64_t turn = 1; (come = roll.come.load()) != threads; ++turn) {
      if (come == kAlone) return;
      pause_briefly(turn);
      const bool late = turn % 1024 == 0 && std::chrono::steady_clock::now() - start > kPatience;
      if (late && roll.come.compare_exchange_strong(come, kAlone)) return f(Share{0, parts, roll.barrier});
    }
    roll.barrier.set_parties(roll.calls.load());  // everybody writes the same number
    try {
      f(Share{parts * first / threads, parts * last / threads, roll.barrier});
    } catch (const Abandoned&) {
      return;
    } catch (...) {
      roll.barrier.give_up();
      throw;
    }
  });
}

}  // namespace llmkern::cpu::LLMKERN_ISA
