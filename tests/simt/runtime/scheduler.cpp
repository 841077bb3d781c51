// SPDX-License-Identifier: Apache-2.0
// Runs a launch: the threads of a block in turn, until each waits or has returned; blocks that must be alive together
// in turn, each on an OS thread of its own because its __shared__ variables are that thread's thread-locals.
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <thread>

#include "block.h"
#include "memory.h"

// What kernels know as threadIdx, blockIdx, blockDim and gridDim.
extern "C" {
uint3 simt_thread_index, simt_block_index, simt_block_dimensions, simt_grid_dimensions;
}

namespace simt {

Launch* running = nullptr;
Thread* current = nullptr;
uint32_t ticks = kHostTick;

namespace {

// An OS thread that does one thing at a time while its owner waits.
class Worker {
 public:
  Worker() : thread_([this] { loop(); }) {}
  ~Worker() {
    hand_over(nullptr);
    thread_.join();
  }
  void operator()(const std::function<void()>& job) {
    hand_over(&job);
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return idle_; });
  }

 private:
  void hand_over(const std::function<void()>* job) {
    const std::lock_guard lock(mutex_);
    job_ = job;
    idle_ = false;
    changed_.notify_all();
  }
  void loop() {
    for (;;) {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [this] { return !idle_; });
      if (job_ == nullptr) return;
      (*job_)();
      idle_ = true;
      changed_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  const std::function<void()>* job_ = nullptr;
  bool idle_ = true;
  std::thread thread_;  // last: the others must exist when it starts
};

void thread_main() {
  running->thread(running->parameters);
  Thread& thread = *current;
  for (const auto& group : thread.copies) {
    if (!group.empty()) fault("unfinished copy", "returns with asynchronous copies not waited for", group[0].pc);
  }
  Block& block = *thread.block;
  if (running->cluster > 1 && block.alive == 1) {
    block.dynamic->retire();
    for (Region& region : block.statics) {
      if (region.generation == block.generation) region.retire();
    }
  }
  thread.state = State::kExited;
  --block.alive;
  ++running->progress;
  thread.fiber.suspend();
}

// On the OS thread the block is going to run on.
void prepare_shared_memory(Block& block) {
  const Module& module = *running->module;
  if (const uintptr_t tls = module.tls_base(); block.tls != tls || block.statics.empty()) {
    block.tls = tls;
    block.statics.clear();
    for (const Symbol& s : module.shared) {
      block.statics.emplace_back("`" + s.name + "`", Space::kShared, tls + s.offset, s.bytes, &block);
    }
  }
#ifdef SIMT_UNCHECKED  // elsewhere it is filled variable by variable, on first use
  std::fill_n(reinterpret_cast<unsigned char*>(block.tls), module.tls_bytes, kFill);
#endif
  constexpr size_t kAlignment = 128;
  static_assert(kSharedMargin % kAlignment == 0);
  void* memory = nullptr;
  if (posix_memalign(&memory, kAlignment, running->shared_bytes + 2 * kSharedMargin) != 0) throw std::bad_alloc();
  block.dynamic_memory.reset(memory);
  unsigned char* start = static_cast<unsigned char*>(memory) + kSharedMargin;
  std::memset(start, kFill, running->shared_bytes);
  block.dynamic.emplace("dynamic shared memory", Space::kShared, reinterpret_cast<uintptr_t>(start),
                        running->shared_bytes, &block);
  block.dynamic->forget(false);
  block.dynamic->generation = block.generation;
}

// Until every thread has returned or waits for something outside the block.
void step(Block& block) {
  simt_block_index = block.index;
  for (uint64_t before = running->progress - 1; before != running->progress && block.alive > 0;) {
    before = running->progress;
    for (Thread& thread : block.threads) {
      if (thread.state != State::kRunnable && thread.state != State::kPolling) continue;
      if (thread.state == State::kRunnable) ++running->progress;
      thread.state = State::kRunnable;
      current = &thread;
      simt_thread_index = thread.position;
      thread.fiber.resume();
      current = nullptr;
      if (!running->fault.empty()) return;
    }
  }
}

bool any_polls(const Launch& launch) {
  for (const Block* block : launch.alive) {
    for (const Thread& thread : block->threads) {
      if (thread.state == State::kPolling) return true;
    }
  }
  return false;
}

// Blocks first .. first + count - 1, alive together.
void run_together(Launch& launch, uint32_t first, std::vector<Block>& blocks,
                  std::vector<std::unique_ptr<Worker>>& on) {
  constexpr int kPatience = 2000;  // rounds in which threads only look whether they may go on
  const auto go = [&](size_t i, const std::function<void()>& job) { on.empty() ? job() : (*on[i])(job); };
  launch.alive.clear();
  for (size_t i = 0; i < blocks.size(); ++i) {
    const auto number = static_cast<uint32_t>(first + i);
    blocks[i].begin(
        {number % launch.grid.x, number / launch.grid.x % launch.grid.y, number / (launch.grid.x * launch.grid.y)},
        number);
    go(i, [&] { prepare_shared_memory(blocks[i]); });
    for (Thread& thread : blocks[i].threads) thread.fiber.start(thread_main);
    launch.alive.push_back(&blocks[i]);
  }
  for (int idle = 0;;) {
    const uint64_t before = launch.progress;
    unsigned alive = 0;
    for (size_t i = 0; i < blocks.size(); ++i) {
      if (blocks[i].alive > 0) go(i, [&] { step(blocks[i]); });
      if (!launch.fault.empty()) return;
      alive += blocks[i].alive;
    }
    if (alive == 0) return;
    idle = launch.progress == before ? idle + 1 : 0;
    if (idle > (any_polls(launch) ? kPatience : 0)) {
      launch.fault = stuck(launch);
      return;
    }
  }
}

}  // namespace

void wait(const char* where, Site site) {
  Thread& thread = *current;
  thread.waits_in = where;
  thread.site = site;
  thread.state = State::kWaiting;
  thread.fiber.suspend();
}

void release(Thread& thread) {
  thread.state = State::kRunnable;
  ++running->progress;
}

void poll(const char* where) {
  current->waits_in = where;
  current->site = {};
  current->state = State::kPolling;
  current->fiber.suspend();
}

void spin() {
  constexpr unsigned kTurns = 64;
  if (++current->spins % kTurns == 0) poll("a loop over a volatile or an atomic");
}

void run(Launch& launch) {
  running = &launch;
  launch.start = ticks++;
  simt_block_dimensions = {launch.block.x, launch.block.y, launch.block.z};
  simt_grid_dimensions = {launch.grid.x, launch.grid.y, launch.grid.z};
  const uint32_t together = launch.cooperative ? launch.blocks() : launch.cluster;
  std::vector<std::unique_ptr<Worker>> workers;
  for (uint32_t i = 0; together > 1 && i < together; ++i) workers.push_back(std::make_unique<Worker>());
  std::vector<Block> blocks(together);
  for (uint32_t first = 0; first < launch.blocks() && launch.fault.empty(); first += together) {
    run_together(launch, first, blocks, workers);
  }
  running = nullptr;
  if (!launch.fault.empty()) throw std::runtime_error(launch.fault);
}

}  // namespace simt
