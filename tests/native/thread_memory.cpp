// SPDX-License-Identifier: Apache-2.0
// What threads remember, by itself; built by test_thread_memory.py with -DLLMKERN_DEBUG.
#include "kernels/thread_memory.h"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <thread>
#include <vector>

#include "kernels/cpu/scratch.h"

using namespace llmkern;
using namespace llmkern::cpu::LLMKERN_ISA;

namespace {

void expect(bool truth, const char* text) {
  if (truth) return;
  std::printf("expected %s\n", text);
  std::exit(1);
}

template <class F>
std::string error_of(const F& f) {
  try {
    f();
  } catch (const std::logic_error& error) {
    return error.what();
  }
  return "";
}

bool contains(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

// The planted fault: a kernel that calls another one, both with the same slot.
void two_holders() {
  const AtWork work;
  const auto first = scratch<float>(Slot::kGemmTiles, 100);
  const auto other = scratch<float>(Slot::kGemmPanel, 100);
  expect(contains(error_of([] { scratch<float>(Slot::kGemmTiles, 100); }), "two holders"), "two holders to be noticed");
  expect(contains(error_of([] { carve<double>(Slot::kGemmPanel, {3, 4}); }), "two holders"), "those of arrays too");
}

void one_after_another() {
  const AtWork work;
  for (int i = 0; i < 3; ++i) {
    auto first = scratch<float>(Slot::kGemmTiles, 100 + i);
    Scratch<float> moved;
    moved = std::move(first);
    first = scratch<float>(Slot::kGemmPanel, 10);
    const auto [a, b] = carve<double>(Slot::kGemmSums, {3, 4});
    expect(b - a == 8 && reinterpret_cast<uintptr_t>(a) % 64 == 0, "arrays in cache lines of their own");
  }
}

void other_threads_have_their_own() {
  const AtWork work;
  const auto mine = scratch<int>(Slot::kGemmTiles, 1);
  std::thread([&] {
    const AtWork other_work;
    expect(scratch<int>(Slot::kGemmTiles, 1).get() != mine.get(), "memory by thread");
  }).join();
}

void idle_threads_have_none() {
  expect(contains(error_of([] { scratch<int>(Slot::kGemmTiles, 1); }), "not at work"), "idle threads to be noticed");
}

void fill(int64_t count) {
  const AtWork work;
  const auto values = scratch<char>(Slot::kGemmTiles, count);
  std::memset(values, 1, static_cast<size_t>(count));
}

constexpr int64_t kLarge = 5 << 20;

void idle_memory_is_freed() {
  fill(kLarge);
  std::atomic<int> stage{0};
  std::thread other([&] {
    fill(kLarge);
    stage = 1;
    while (stage != 2) std::this_thread::yield();
    fill(64);
  });
  while (stage != 1) std::this_thread::yield();
  expect(thread_memory().threads == 2 && thread_memory().bytes >= 2 * kLarge, "two threads' memory");
  free_thread_memory();
  expect(thread_memory().bytes == 0, "idle threads to lose theirs");
  stage = 2;
  other.join();
  expect(thread_memory().threads == 1 && thread_memory().bytes == 0, "a thread that ends to take its memory with it");
}

void memory_at_work_is_freed_later() {
  {
    const AtWork work;
    const auto values = scratch<char>(Slot::kGemmTiles, kLarge);
    {
      const AtWork nested;
      free_thread_memory();
    }
    std::memset(values, 1, kLarge);  // AddressSanitizer would report it
    expect(thread_memory().bytes >= kLarge, "a thread at work to keep its memory");
  }
  expect(thread_memory().bytes == 0, "it to go with the work");
}

void nobody_works() {
  int calls = 0;
  const auto count = [](void* context) { ++*static_cast<int*>(context); };
  expect(while_nobody_works(count, &calls) && calls == 1, "one call");
  std::atomic<int> stage{0};
  std::thread other([&] {
    const AtWork work;
    stage = 1;
    while (stage != 2) std::this_thread::yield();
  });
  while (stage != 1) std::this_thread::yield();
  expect(!while_nobody_works(count, &calls) && calls == 1, "no call beside a thread at work");
  stage = 2;
  other.join();
  expect(while_nobody_works(count, &calls) && calls == 2, "a call after it");
}

// Threads at work beside one that frees and one that excludes them: nobody loses what is being used.
void everybody_at_once() {
  std::atomic<bool> done{false};
  std::atomic<int> inside{0};
  std::vector<std::thread> workers;
  for (int w = 0; w < 3; ++w) {
    workers.emplace_back([&, w] {
      for (int i = 0; i < 2000; ++i) {
        const AtWork work;
        inside.fetch_add(1);
        const int64_t count = 100 + i % 50 * 100;
        const auto values = scratch<int>(Slot::kGemmTiles, count);
        for (int64_t k = 0; k < count; ++k) values.get()[k] = w;
        for (int64_t k = 0; k < count; ++k) expect(values.get()[k] == w, "memory that nobody else writes to");
        inside.fetch_sub(1);
      }
    });
  }
  std::thread freeing([&] {
    while (!done) free_thread_memory();
  });
  std::thread excluding([&] {
    const auto check = [](void* context) {
      expect(static_cast<std::atomic<int>*>(context)->load() == 0, "nobody inside");
    };
    while (!done) while_nobody_works(check, &inside);
  });
  for (std::thread& worker : workers) worker.join();
  done = true;
  freeing.join();
  excluding.join();
}

// The child has one thread, and may free, exclude and work.
void forks() {
  std::atomic<int> stage{0};
  std::thread other([&] {
    const AtWork work;
    const auto values = scratch<char>(Slot::kGemmTiles, kLarge);
    stage = 1;
    while (stage != 2) std::this_thread::yield();
    std::memset(values, 1, kLarge);
  });
  while (stage != 1) std::this_thread::yield();
  const pid_t child = fork();
  if (child == 0) {
    fill(kLarge);
    bool fine = thread_memory().threads == 1 && while_nobody_works([](void*) {}, nullptr);
    free_thread_memory();
    _exit(fine && thread_memory().bytes == 0 ? 0 : 1);
  }
  int status = 1;
  waitpid(child, &status, 0);
  stage = 2;
  other.join();
  expect(status == 0, "a child that works");
}

void no_memory() {
  const AtWork work;
  constexpr int64_t kMost = int64_t{1} << 60;
  size_t bytes = 0;
  try {
    scratch<char>(Slot::kGemmTiles, kMost);
  } catch (const OutOfMemory& error) {
    bytes = error.bytes;
  }
  expect(bytes == static_cast<size_t>(kMost), "an error with the bytes that were wanted");
  expect(scratch<char>(Slot::kGemmTiles, 100).get() != nullptr, "memory again after that");
}

constexpr struct {
  const char* name;
  void (*run)();
} kCases[] = {
    {"two_holders", two_holders},
    {"one_after_another", one_after_another},
    {"other_threads_have_their_own", other_threads_have_their_own},
    {"idle_threads_have_none", idle_threads_have_none},
    {"idle_memory_is_freed", idle_memory_is_freed},
    {"memory_at_work_is_freed_later", memory_at_work_is_freed_later},
    {"nobody_works", nobody_works},
    {"everybody_at_once", everybody_at_once},
    {"forks", forks},
    {"no_memory", no_memory},
};

}  // namespace

int main(int, char** arguments) {
  for (const auto& [name, run] : kCases) {
    if (std::strcmp(name, arguments[1]) != 0) continue;
    run();
    return 0;
  }
  return 2;
}
