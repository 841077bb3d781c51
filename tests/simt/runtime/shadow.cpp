// SPDX-License-Identifier: Apache-2.0
#include "shadow.h"

#include <algorithm>

#include "block.h"

namespace simt {

namespace {

// The tick up to which everything `other` did comes before what this block does now.
uint32_t seen(const Block& block, uint32_t other) {
  uint32_t tick = std::max(running->start, running->grid_synced);
  const auto limit = [&](uint32_t cluster) {
    const auto synced = running->cluster_synced.find(cluster);
    if (synced != running->cluster_synced.end()) tick = std::max(tick, synced->second);
  };
  if (other == kManyBlocks) return tick;
  if (other & kManyInCluster) {
    if ((other & ~kManyInCluster) == block.cluster) limit(block.cluster);
    return tick;
  }
  if (other / running->cluster == block.cluster) limit(block.cluster);
  const auto acquired = block.acquired.find(other);
  return acquired == block.acquired.end() ? tick : std::max(tick, acquired->second);
}

bool ordered(const WriteRecord& write, Thread& thread) {
  Block& block = *thread.block;
  if (write.tick <= running->start) return true;
  if (write.block != block.linear) return write.tick <= seen(block, write.block);
  if (write.thread == thread.index) return true;
  const bool asynchronous = write.thread == block.threads.size();
  if (write.tick < block.epoch && !asynchronous) return true;
  return !block.known.empty() && block.row(thread.index)[write.thread] >= write.clock;
}

bool ordered(const ReadRecord& read, Thread& thread) {
  Block& block = *thread.block;
  if (read.tick <= running->start) return true;
  if (read.block != block.linear) return read.tick <= seen(block, read.block);
  if (read.tick < block.epoch) return true;
  const uint32_t* known = block.known.empty() ? nullptr : block.row(thread.index);
  for (uint32_t warps = read.warps; warps != 0; warps &= warps - 1) {
    for (uint32_t lanes = read.lanes; lanes != 0; lanes &= lanes - 1) {
      const unsigned reader = kLanes * std::countr_zero(warps) + std::countr_zero(lanes);
      if (reader == thread.index || reader >= block.threads.size()) continue;
      if (known == nullptr || known[reader] < read.clock) return false;
    }
  }
  return true;
}

void add_reader(ReadRecord& read, Thread& thread, uint32_t pc, bool atomic) {
  Block& block = *thread.block;
  const uint32_t warp = 1u << thread.index / kLanes, lane = 1u << thread.lane();
  const ReadRecord mine = {block.stamp, block.time, block.linear, pc, warp, lane, atomic};
  if (read.tick <= running->start) {
    read = mine;
  } else if (read.block == block.linear) {
    if (read.tick < block.epoch) {
      read = mine;
    } else {
      read = {block.stamp, block.time, block.linear, pc, read.warps | warp, read.lanes | lane, read.atomic && atomic};
    }
  } else if (read.tick <= seen(block, read.block)) {
    read = mine;
  } else {
    const bool many = (read.block & kManyInCluster) != 0;
    const uint32_t cluster = many ? read.block & ~kManyInCluster : read.block / running->cluster;
    const bool together = read.block != kManyBlocks && cluster == block.cluster;
    read = {block.stamp, 0, together ? kManyInCluster | cluster : kManyBlocks, pc, 0, 0, read.atomic && atomic};
  }
}

const char* verb(Access access) {
  return access == Access::kWrite ? "writes" : access == Access::kAtomic ? "atomically updates" : "reads";
}

std::string writer_of(const WriteRecord& write) {
  const Block* block = nullptr;
  for (const Block* alive : running->alive) {
    if (alive->linear == write.block) block = alive;
  }
  if (block == nullptr) return "block " + std::to_string(write.block) + " (which is done)";
  if (write.thread == block->threads.size()) return "an asynchronous copy";
  return "block " + name_of(block->index) + ", thread " + name_of(block->threads[write.thread].position);
}

std::string readers_of(const ReadRecord& read) {
  if (read.block & kManyInCluster) return "several blocks";
  const std::string block = "block " + std::to_string(read.block);
  if (std::popcount(read.warps) > 1 || std::popcount(read.lanes) > 1) return block + ", several threads";
  return block + ", thread " + std::to_string(kLanes * std::countr_zero(read.warps) + std::countr_zero(read.lanes));
}

}  // namespace

void Region::forget(bool written) {
  written_ = written;
  std::fill(cells_.begin(), cells_.end(), Cell{});
  if (written) cells_.clear();
}

void Region::split(size_t offset, size_t count) {
  if (cells_.empty()) cells_.resize((bytes >> shift_) + 1, Cell{{written_ ? kHostTick : 0, 0, 0, 0, 0, false}, {}});
  while ((offset | count) & ((size_t{1} << shift_) - 1)) {
    std::vector<Cell> finer(cells_.size() * 2);
    for (size_t i = 0; i < finer.size(); ++i) finer[i] = cells_[i / 2];
    cells_ = std::move(finer);
    --shift_;
  }
}

void Region::host_write(size_t offset, size_t count) {
  split(offset, count);
  for (size_t i = offset >> shift_; i < (offset + count) >> shift_; ++i)
    cells_[i] = {{kHostTick, 0, 0, 0, 0, false}, {}};
}

int64_t Region::never_written(size_t offset, size_t count) const {
  if (cells_.empty()) return written_ || count == 0 ? -1 : static_cast<int64_t>(offset);
  for (size_t i = offset >> shift_; i << shift_ < offset + count; ++i) {
    if (cells_[i].write.tick == 0) return static_cast<int64_t>(std::max(i << shift_, offset));
  }
  return -1;
}

void Region::access(size_t offset, size_t count, Access access, const void* pc, bool asynchronous) {
  Thread& thread = *current;
  Block& block = *thread.block;
  const bool writes = access == Access::kWrite || access == Access::kAtomic;
  const bool atomic = access == Access::kAtomic || access == Access::kAtomicRead;
  const uint32_t at = short_pc(pc);
  split(offset, count);
  for (size_t i = offset >> shift_; i < (offset + count) >> shift_; ++i) {
    Cell& cell = cells_[i];
    if (access != Access::kWrite && cell.write.tick == 0) {
      fault("uninitialised read",
            std::string(verb(access)) + " " + std::to_string(count) + " bytes at " + name + "+" +
                std::to_string(offset) + ", which nothing has written",
            pc);
    }
    if (!(atomic && cell.write.atomic) && !ordered(cell.write, thread)) race(cell, offset, count, access, true, pc);
    if (writes) {
      if (!(atomic && cell.read.atomic) && !ordered(cell.read, thread)) race(cell, offset, count, access, false, pc);
      const auto writer = static_cast<uint16_t>(asynchronous ? block.threads.size() : thread.index);
      cell.write = {block.stamp, block.time, block.linear, at, writer, atomic};
    } else {
      add_reader(cell.read, thread, at, atomic);
    }
  }
}

void Region::retire() {
  for (const Cell& cell : cells_) {
    if (cell.read.tick == 0 || cell.read.block == owner->linear || ordered(cell.read, *current)) continue;
    fault("shared memory out of bounds", "returns while " + readers_of(cell.read) + " reads its " + name +
                                             text_of_pc(cell.read.pc) + " with no cluster barrier behind");
  }
}

void Region::race(const Cell& cell, size_t offset, size_t count, Access access, bool with_write, const void* pc) const {
  std::string other;
  if (with_write) {
    other = writer_of(cell.write) + (cell.write.atomic ? " updated" : " wrote") + text_of_pc(cell.write.pc);
  } else {
    other = readers_of(cell.read) + " read" + text_of_pc(cell.read.pc);
  }
  fault(space == Space::kShared ? "shared memory race" : "global memory race",
        std::string(verb(access)) + " " + std::to_string(count) + " bytes at " + name + "+" + std::to_string(offset) +
            ", which " + other + " with nothing to order the two",
        pc);
}

}  // namespace simt
