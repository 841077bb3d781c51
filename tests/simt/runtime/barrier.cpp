// SPDX-License-Identifier: Apache-2.0
// Barriers of the block, of some of its warps, of the cluster and of the grid.
#include <string>

#include "block.h"

namespace simt {

namespace {

// Counts the current thread; true if it is the last one.
bool arrive(Barrier& barrier, const char* where, unsigned expected, Site site) {
  if (barrier.arrived == 0) {
    barrier.expected = expected;
    barrier.site = site;
  } else if (!(barrier.site == site)) {
    fault("barrier divergence",
          std::string("comes to ") + where + text(site) + " while others wait at the one" + text(barrier.site));
  } else if (barrier.expected != expected) {
    fault("barrier divergence", std::string("comes to ") + where + " for " + std::to_string(expected) +
                                    " threads, others to the same for " + std::to_string(barrier.expected));
  }
  return ++barrier.arrived == expected;
}

void release_all(Barrier& barrier) {
  for (Thread* thread : barrier.waiting) release(*thread);
  barrier.waiting.clear();
  barrier.arrived = barrier.positive = 0;
}

void wait_at(Barrier& barrier, const char* where, Site site) {
  barrier.waiting.push_back(current);
  wait(where, site);
}

}  // namespace

BarrierCounts block_barrier(int predicate, Site site) {
  Block& block = *current->block;
  Barrier& barrier = block.barriers[0];
  const bool last = arrive(barrier, "__syncthreads", static_cast<unsigned>(block.threads.size()), site);
  barrier.positive += predicate != 0;
  if (!last) {
    wait_at(barrier, "__syncthreads", site);
    return block.counted;
  }
  block.counted = {static_cast<int>(block.threads.size()), static_cast<int>(barrier.positive)};
  release_all(barrier);
  block.new_epoch();
  return block.counted;
}

void named_barrier(int id, int threads, bool waits) {
  Block& block = *current->block;
  if (id < 1 || id > 15 || threads < 1 || threads % kLanes != 0 || threads > static_cast<int>(block.threads.size())) {
    fault("barrier divergence", "comes to named barrier " + std::to_string(id) + " for " + std::to_string(threads) +
                                    " threads; ids are 1 to 15, threads whole warps of the block");
  }
  Barrier& barrier = block.barriers[id];
  const bool last = arrive(barrier, "a named barrier", static_cast<unsigned>(threads), {});
  block.teach(current->index, barrier.clock);
  if (last) {
    if (waits) block.learn(current->index, barrier.clock);
    for (const Thread* thread : barrier.waiting) block.learn(thread->index, barrier.clock);
    release_all(barrier);
  } else if (waits) {
    wait_at(barrier, "a named barrier", {});
  }
}

void cluster_barrier(Site site) {
  const Block& mine = *current->block;
  Barrier& barrier = running->cluster_barriers[mine.cluster];
  if (!arrive(barrier, "cluster.sync", running->cluster * running->threads_per_block(), site)) {
    return wait_at(barrier, "cluster.sync", site);
  }
  release_all(barrier);
  running->cluster_synced[mine.cluster] = ticks;
  for (Block* block : running->alive) {
    if (block->cluster == mine.cluster) block->new_epoch();
  }
}

void grid_barrier(Site site) {
  if (!running->cooperative) fault("barrier divergence", "calls grid.sync in a launch that is not cooperative");
  Barrier& barrier = running->grid_barrier;
  if (!arrive(barrier, "grid.sync", running->blocks() * running->threads_per_block(), site)) {
    return wait_at(barrier, "grid.sync", site);
  }
  release_all(barrier);
  running->grid_synced = ticks;
  for (Block* block : running->alive) block->new_epoch();
}

namespace {

const Thread* find(const Launch& launch, bool (*wanted)(const Thread&)) {
  for (const Block* block : launch.alive) {
    for (const Thread& thread : block->threads) {
      if (wanted(thread)) return &thread;
    }
  }
  return nullptr;
}

std::string place(const Thread& thread) {
  if (thread.state == State::kExited) return "has returned";
  return std::string("is in ") + thread.waits_in + text(thread.site);
}

std::string missing_lane(const Thread& thread) {
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    if ((thread.mask >> lane & 1) == 0) continue;
    const Thread& other = thread.block->threads[thread.index / kLanes * kLanes + lane];
    if (other.mask != 0) continue;
    return std::string("waits in ") + thread.waits_in + text(thread.site) + " for lane " + std::to_string(lane) +
           " of its mask, which " + place(other);
  }
  return {};
}

}  // namespace

std::string stuck(Launch& launch) {
  if (const Thread* lane = find(launch, [](const Thread& t) { return t.mask != 0 && t.state == State::kWaiting; })) {
    return report(*lane, "wrong lane mask", missing_lane(*lane));
  }
  const Thread* waiting = find(launch, [](const Thread& t) { return t.state == State::kWaiting; });
  if (waiting == nullptr) {
    const Thread* polling = find(launch, [](const Thread& t) { return t.state == State::kPolling; });
    return report(*polling, "deadlock", std::string("waits for ever in ") + polling->waits_in);
  }
  std::string detail = std::string("waits in ") + waiting->waits_in + text(waiting->site);
  for (const Block* block : launch.alive) {
    for (const Thread& other : block->threads) {
      if (other.state == State::kWaiting && std::string_view(other.waits_in) == waiting->waits_in) continue;
      const bool same = block == waiting->block;
      detail += std::string(", but ") + (same ? "" : "block " + name_of(block->index) + ", ") + "thread " +
                name_of(other.position) + " " + place(other);
      return report(*waiting, "barrier divergence", detail);
    }
  }
  return report(*waiting, "barrier divergence", detail + " for threads that never come");
}

}  // namespace simt
