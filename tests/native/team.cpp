// SPDX-License-Identifier: Apache-2.0
// Teams of workers on pools that run their calls side by side, one after another, or late; built by test_team.py.
#include "kernels/cpu/team.h"

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

using namespace llmkern;
using namespace llmkern::cpu::LLMKERN_ISA;

namespace {

constexpr int64_t kThreads = 3, kParts = 7, kSteps = 200;

// Calls body(i, i + 1) for [0, n), each on a thread of its own; throws what the first that failed has thrown.
void side_by_side(int64_t n, int64_t, Parallel::Body body, const void* context) {
  std::mutex mutex;
  std::exception_ptr failure;
  const auto call = [&](int64_t i) {
    try {
      body(context, i, i + 1);
    } catch (...) {
      const std::lock_guard lock(mutex);
      if (!failure) failure = std::current_exception();
    }
  };
  std::vector<std::thread> threads;
  for (int64_t i = 1; i < n; ++i) threads.emplace_back(call, i);
  call(0);
  for (std::thread& thread : threads) thread.join();
  if (failure) std::rethrow_exception(failure);
}

void one_after_another(int64_t n, int64_t, Parallel::Body body, const void* context) {
  for (int64_t i = 0; i < n; ++i) body(context, i, i + 1);
}

void all_in_one_call(int64_t n, int64_t, Parallel::Body body, const void* context) { body(context, 0, n); }

void two_calls(int64_t n, int64_t, Parallel::Body body, const void* context) {
  std::thread other([=] { body(context, 0, 2); });
  body(context, 2, n);
  other.join();
}

// Every part adds what all parts had one step before: wrong as soon as one worker is a step ahead or behind.
void check(const char* name, const Parallel& parallel) {
  int64_t values[2][kParts];
  for (int64_t& value : values[0]) value = 1;
  run_team(parallel, kParts, [&](const Share& share) {
    for (int64_t step = 0; step < kSteps; ++step) {
      share.barrier.wait();
      const int64_t* before = values[step % 2];
      for (int64_t part = share.begin; part < share.end; ++part) {
        int64_t sum = 0;
        for (int64_t i = 0; i < kParts; ++i) sum = (sum + before[i]) % 1000003;
        values[(step + 1) % 2][part] = sum;
      }
    }
  });
  int64_t expected = 1;
  for (int64_t step = 0; step < kSteps; ++step) expected = expected * kParts % 1000003;
  for (int64_t value : values[kSteps % 2]) {
    if (value == expected) continue;
    std::printf("%s: expected %lld, got %lld\n", name, static_cast<long long>(expected), static_cast<long long>(value));
    std::exit(1);
  }
}

// A worker that fails does not leave the others waiting for ever, and its caller hears of it.
void check_failure(const char* name, const Parallel& parallel) {
  try {
    run_team(parallel, kParts, [](const Share& share) {
      if (share.begin == 0) throw std::runtime_error("planted");
      share.barrier.wait();
    });
  } catch (const std::runtime_error& error) {
    if (std::string(error.what()) == "planted") return;
  }
  std::printf("%s: expected the error of the worker that failed\n", name);
  std::exit(1);
}

}  // namespace

int main() {
  check("side by side", Parallel(side_by_side, kThreads));
  check("one after another", Parallel(one_after_another, kThreads));
  check("all in one call", Parallel(all_in_one_call, kThreads));
  check("two calls", Parallel(two_calls, kThreads));
  check("alone", Parallel::alone());
  check_failure("failure side by side", Parallel(side_by_side, kThreads));
  check_failure("failure one after another", Parallel(one_after_another, kThreads));
  check_failure("failure alone", Parallel::alone());
}
