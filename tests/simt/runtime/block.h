// SPDX-License-Identifier: Apache-2.0
// The state of a launch: threads, blocks, barriers.
//
// One thread of one block runs at any time, whatever OS thread it is on, so nothing here is locked.
#pragma once

#include <array>
#include <cstdlib>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "cuda_runtime.h"
#include "fiber.h"
#include "module.h"
#include "shadow.h"

namespace simt {

constexpr unsigned kLanes = 32;

enum class State { kRunnable, kPolling, kWaiting, kExited };

struct Copy {
  void* shared;
  const void* global;
  size_t bytes;
  bool wanted;
  const void* pc;
};

struct Thread {
  Fiber fiber;
  Block* block = nullptr;
  unsigned index = 0;
  uint3 position = {};
  State state = State::kRunnable;
  const char* waits_in = nullptr;  // what it waits in, and where
  Site site = {};
  unsigned mask = 0;  // of the warp operation it waits in, 0 if none
  void* operand = nullptr;
  bool fenced = false;  // __threadfence since its last write
  unsigned spins = 0;
  std::vector<std::vector<Copy>> copies;  // groups not waited for; the last one is open

  unsigned lane() const { return index % kLanes; }
};

struct Barrier {
  unsigned expected = 0, arrived = 0, positive = 0;
  Site site = {};
  std::vector<Thread*> waiting;
  std::vector<uint32_t> clock;
};

struct Mbarrier {
  unsigned expected = 0, pending = 0, phase = 0;
  int64_t bytes = 0;
  std::vector<uint32_t> clock;
};

struct Block {
  uint3 index = {};
  uint32_t linear = 0, cluster = 0;
  std::vector<Thread> threads;
  unsigned alive = 0;

  std::array<Barrier, 16> barriers;
  BarrierCounts counted = {};
  std::unordered_map<uint64_t*, Mbarrier> mbarriers;

  // known[t][s]: thread t comes after everything thread s did up to this time. The last column is for asynchronous
  // copies, which are nobody's until their barrier is waited for. Empty until something else than __syncthreads orders.
  uint32_t time = 1, epoch = 0, stamp = 0, generation = 0;
  std::vector<uint32_t> known;
  std::map<uint32_t, uint32_t> acquired;  // other block -> its tick up to which a fence and an atomic order it

  std::vector<Region> statics;  // by address
  std::optional<Region> dynamic;
  std::unique_ptr<void, void (*)(void*)> dynamic_memory{nullptr, std::free};
  uintptr_t tls = 0;
  Region* last = nullptr;  // of the latest shared access: mostly the next one's too

  size_t columns() const { return threads.size() + 1; }
  uint32_t* row(unsigned thread);
  void learn(unsigned thread, const std::vector<uint32_t>& clock);  // an acquire
  void teach(unsigned thread, std::vector<uint32_t>& clock);        // a release
  void new_epoch();                                                 // after a barrier of the whole block
  void begin(uint3 at, uint32_t number);
};

struct Launch {
  dim3 grid, block;
  size_t shared_bytes = 0;
  unsigned cluster = 1;
  bool cooperative = false;
  const Module* module = nullptr;
  std::string kernel;
  void (*thread)(const void*) = nullptr;
  const void* parameters = nullptr;
  size_t parameter_bytes = 0;

  std::vector<Block*> alive;
  Barrier grid_barrier;
  std::map<uint32_t, Barrier> cluster_barriers;
  uint32_t start = 0, grid_synced = 0;                                   // ticks
  std::map<uint32_t, uint32_t> cluster_synced;                           // cluster -> tick
  std::unordered_map<uintptr_t, std::map<uint32_t, uint32_t>> released;  // atomic's address -> block -> tick
  uint64_t progress = 0;
  std::string fault;

  unsigned threads_per_block() const { return block.x * block.y * block.z; }
  uint32_t blocks() const { return grid.x * grid.y * grid.z; }
};

extern Launch* running;  // null between launches
extern Thread* current;  // null in host code
extern uint32_t ticks;

// Ends the launch with a report: what kind of fault, by which kernel, block and thread, and the details.
[[noreturn]] void fault(const char* kind, const std::string& detail, const void* pc = nullptr);
std::string report(const Thread& thread, const char* kind, const std::string& detail, const void* pc = nullptr);
std::string name_of(uint3 position);
std::string text(Site site);
// Code addresses are kept as offsets in the library; the harness turns their text into file and line.
uint32_t short_pc(const void* pc);
std::string text_of_pc(uint32_t pc);

// Leaves the processor to others; release() lets a waiting thread go on.
void wait(const char* where, Site site);
void release(Thread& thread);
// Called by what a spinning thread must call: now and then lets others run.
void poll(const char* where);
void spin();

// A flag between blocks: what is before a fence before a release comes before what follows an acquire of the address.
void release_at(const void* address);
void acquire_at(const void* address);

void run(Launch& launch);
[[nodiscard]] std::string stuck(Launch& launch);  // why nothing can go on

}  // namespace simt
