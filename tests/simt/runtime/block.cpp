// SPDX-License-Identifier: Apache-2.0
#include "block.h"

#include <algorithm>

#include "memory.h"

namespace simt {

uint32_t* Block::row(unsigned thread) {
  if (known.empty()) known.assign(threads.size() * columns(), 0);
  return known.data() + thread * columns();
}

void Block::learn(unsigned thread, const std::vector<uint32_t>& clock) {
  uint32_t* mine = row(thread);
  for (size_t s = 0; s < clock.size(); ++s) mine[s] = std::max(mine[s], clock[s]);
}

void Block::teach(unsigned thread, std::vector<uint32_t>& clock) {
  clock.resize(columns());
  const uint32_t* mine = row(thread);
  for (size_t s = 0; s < clock.size(); ++s) clock[s] = std::max(clock[s], mine[s]);
  clock[thread] = time++;
}

void Block::new_epoch() {
  epoch = stamp = ++ticks;
  if (known.empty()) return;
  // A wait for asynchronous copies by one thread counts for all behind the barrier.
  uint32_t copies = 0;
  for (unsigned t = 0; t < threads.size(); ++t) copies = std::max(copies, row(t)[threads.size()]);
  for (unsigned t = 0; t < threads.size(); ++t) row(t)[threads.size()] = copies;
}

void Block::begin(uint3 at, uint32_t number) {
  const Launch& launch = *running;
  index = at;
  linear = number;
  cluster = number / launch.cluster;
  if (threads.size() != launch.threads_per_block()) threads = std::vector<Thread>(launch.threads_per_block());
  alive = static_cast<unsigned>(threads.size());
  for (unsigned t = 0; t < alive; ++t) {
    Thread& thread = threads[t];
    thread.block = this;
    thread.index = t;
    thread.position = {t % launch.block.x, t / launch.block.x % launch.block.y, t / (launch.block.x * launch.block.y)};
    thread.state = State::kRunnable;
    thread.mask = 0;
    thread.fenced = false;
    thread.copies.assign(1, {});
  }
  for (Barrier& barrier : barriers) barrier = {};
  mbarriers.clear();
  known.clear();
  acquired.clear();
  epoch = stamp = ++ticks;
  static uint32_t generations = 0;
  generation = ++generations;
  last = nullptr;
}

}  // namespace simt
