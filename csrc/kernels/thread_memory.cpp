// SPDX-License-Identifier: Apache-2.0
#include "kernels/thread_memory.h"

#include <pthread.h>

#include <atomic>
#include <cstdlib>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "kernels/pages.h"

namespace llmkern {

namespace {

constexpr int kSlots = static_cast<int>(Slot::kCount);

// One thread: its memory, and whether it is at work. Others touch the memory only while they have claimed the thread.
class Thread {
 public:
  Thread();
  ~Thread();

  void begin_work() {
    if (depth_++ > 0) return;
    for (State idle = kIdle; !state_.compare_exchange_weak(idle, kWorking); idle = kIdle) std::this_thread::yield();
  }

  void end_work() {
    if (--depth_ > 0) return;
    State working = kWorking;
    if (state_.compare_exchange_strong(working, kIdle)) return;
    free_memory();
    state_.store(kIdle);
  }

  bool claim() {
    State idle = kIdle;
    return state_.compare_exchange_strong(idle, kClaimed);
  }
  void let_go() { state_.store(kIdle); }

  // The memory goes now, or when the thread's work ends.
  void free_soon() {
    for (;;) {
      if (claim()) {
        free_memory();
        return let_go();
      }
      State working = kWorking;
      if (state_.compare_exchange_strong(working, kWorkingThenFree) || working == kWorkingThenFree) return;
    }
  }

  void* hold(Slot slot, size_t bytes);
  void release(Slot slot) { buffers_[static_cast<int>(slot)].held = false; }
  void free_memory();
  size_t bytes() const { return bytes_.load(std::memory_order_relaxed); }

 private:
  enum State { kIdle, kWorking, kWorkingThenFree, kClaimed };
  struct Buffer {
    void* memory = nullptr;
    size_t bytes = 0;
    bool held = false;
  };

  std::atomic<State> state_{kIdle};
  std::atomic<size_t> bytes_{0};
  int depth_ = 0;
  Buffer buffers_[kSlots];
};

struct Registry {
  std::mutex mutex;
  std::vector<Thread*> threads;
};

thread_local Thread* known = nullptr;  // this thread, once it has worked
thread_local Thread self;

Registry* make_registry();

// Made when the library is loaded and never destroyed: threads may outlive everything else.
Registry* const kRegistry = make_registry();

Registry* make_registry() {
  pthread_atfork([] { kRegistry->mutex.lock(); }, [] { kRegistry->mutex.unlock(); },
                 [] {  // the child has this thread alone
                   for (Thread* thread : kRegistry->threads) {
                     if (thread != known) thread->free_memory();
                   }
                   std::erase_if(kRegistry->threads, [](const Thread* thread) { return thread != known; });
                   kRegistry->mutex.unlock();
                 });
  return new Registry;
}

Thread::Thread() {
  const std::lock_guard lock(kRegistry->mutex);
  kRegistry->threads.push_back(this);
  known = this;
}

Thread::~Thread() {
  const std::lock_guard lock(kRegistry->mutex);
  std::erase(kRegistry->threads, this);
  free_memory();
}

void Thread::free_memory() {
  for (Buffer& buffer : buffers_) {
    std::free(buffer.memory);
    buffer = {};
  }
  bytes_.store(0, std::memory_order_relaxed);
}

void* Thread::hold(Slot slot, size_t bytes) {
  Buffer& buffer = buffers_[static_cast<int>(slot)];
#ifdef LLMKERN_DEBUG
  const std::string place = "llmkern: scratch memory " + std::to_string(static_cast<int>(slot));
  if (depth_ == 0) throw std::logic_error(place + " was asked for by a thread that is not at work");
  if (buffer.held) throw std::logic_error(place + " has two holders on one thread");
#endif
  if (bytes > buffer.bytes) {
    std::free(buffer.memory);
    const size_t before = buffer.bytes, alignment = bytes < kHugePageBytes ? 64 : kHugePageBytes;
    const size_t whole = (bytes + alignment - 1) / alignment * alignment;
    buffer.memory = whole < bytes ? nullptr : std::aligned_alloc(alignment, whole);
    buffer.bytes = buffer.memory == nullptr ? 0 : whole;
    bytes_.store(bytes_.load(std::memory_order_relaxed) - before + buffer.bytes, std::memory_order_relaxed);
    if (buffer.memory == nullptr) fail_for_working_memory(bytes);
    advise_huge_pages(buffer.memory, whole);
  }
  buffer.held = true;
  return buffer.memory;
}

}  // namespace

OutOfMemory::OutOfMemory(size_t wanted, const std::string& what_for) : bytes(wanted), purpose(what_for) {}
OutOfMemory::~OutOfMemory() = default;

void fail_for_working_memory(size_t bytes) { throw OutOfMemory(bytes, "working memory"); }

AtWork::AtWork() { self.begin_work(); }
AtWork::~AtWork() { self.end_work(); }

void* hold_thread_memory(Slot slot, size_t bytes) { return self.hold(slot, bytes); }

void release_thread_memory(Slot slot) { self.release(slot); }

void free_thread_memory() {
  const std::lock_guard lock(kRegistry->mutex);
  for (Thread* thread : kRegistry->threads) thread->free_soon();
}

ThreadMemory thread_memory() {
  const std::lock_guard lock(kRegistry->mutex);
  ThreadMemory memory = {kRegistry->threads.size(), 0};
  for (const Thread* thread : kRegistry->threads) memory.bytes += thread->bytes();
  return memory;
}

bool while_nobody_works(void (*f)(void* context), void* context) {
  struct Claimed {
    std::vector<Thread*> threads;
    ~Claimed() {
      for (Thread* thread : threads) thread->let_go();
    }
  } claimed;
  const std::lock_guard lock(kRegistry->mutex);
  claimed.threads.reserve(kRegistry->threads.size());
  for (Thread* thread : kRegistry->threads) {
    if (!thread->claim()) return false;
    claimed.threads.push_back(thread);
  }
  f(context);
  return true;
}

}  // namespace llmkern
