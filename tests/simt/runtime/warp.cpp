// SPDX-License-Identifier: Apache-2.0
// Operations of a warp: every lane of the mask must come, to the same place, with the same mask.
#include "warp.h"

#include <algorithm>
#include <string>
#include <vector>

namespace simt {

namespace {

std::string hexadecimal(unsigned mask) {
  char text[16];
  std::snprintf(text, sizeof text, "0x%08x", mask);
  return text;
}

void check_lane(const Thread& me, const Thread& other, const char* operation, unsigned mask, Site site) {
  const std::string lane = "lane " + std::to_string(other.lane());
  if (other.state == State::kExited) {
    fault("wrong lane mask", std::string(operation) + text(site) + " with mask " + hexadecimal(mask) + " names " +
                                 lane + ", which has returned");
  }
  if (other.mask == 0 || &other == &me) return;
  if (other.mask != mask) {
    fault("wrong lane mask", std::string(operation) + text(site) + " with mask " + hexadecimal(mask) + ", but " + lane +
                                 " waits with mask " + hexadecimal(other.mask));
  }
  if (std::string_view(other.waits_in) != operation || !(other.site == site)) {
    fault("wrong lane mask", std::string("comes to ") + operation + text(site) + ", but " + lane +
                                 " of its mask is in " + other.waits_in + text(other.site));
  }
}

}  // namespace

void collective(const char* operation, unsigned mask, void* operand, Finish finish, Site site) {
  Thread& me = *current;
  if ((mask >> me.lane() & 1) == 0) {
    fault("wrong lane mask", std::string(operation) + text(site) + " with mask " + hexadecimal(mask) +
                                 ", which lacks the calling lane " + std::to_string(me.lane()));
  }
  std::vector<Thread>& threads = me.block->threads;
  const unsigned first = me.index - me.lane();
  unsigned missing = 0;
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    if (first + lane >= threads.size()) {
      if (mask >> lane == 0) break;
      fault("wrong lane mask", std::string(operation) + text(site) + " with mask " + hexadecimal(mask) +
                                   " names lanes beyond the block's " + std::to_string(threads.size()) + " threads");
    }
    const Thread& other = threads[first + lane];
    if (mask >> lane & 1) {
      check_lane(me, other, operation, mask, site);
      missing += other.mask == 0 && &other != &me;
    } else if (other.mask >> me.lane() & 1) {
      check_lane(me, other, operation, mask, site);
    }
  }
  me.mask = mask;
  me.operand = operand;
  if (missing > 0) return wait(operation, site);
  Thread* lanes[kLanes] = {};
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    if (mask >> lane & 1) lanes[lane] = &threads[first + lane];
  }
  finish(lanes);
  for (Thread* thread : lanes) {
    if (thread == nullptr) continue;
    thread->mask = 0;
    if (thread != &me) release(*thread);
  }
}

void warp_barrier(unsigned mask, Site site) {
  // Each lane of the mask learns what all of them know, and what all of them did.
  const auto finish = [](Thread* const* lanes) {
    std::vector<uint32_t> clock;
    Block& block = *current->block;
    for (unsigned lane = 0; lane < kLanes; ++lane) {
      if (lanes[lane] != nullptr) block.teach(lanes[lane]->index, clock);
    }
    for (unsigned lane = 0; lane < kLanes; ++lane) {
      if (lanes[lane] != nullptr) block.learn(lanes[lane]->index, clock);
    }
  };
  collective("__syncwarp", mask, nullptr, finish, site);
}

uint64_t shuffle(const char* operation, unsigned mask, uint64_t value, int source, Site site) {
  struct Operand {
    uint64_t value, result;
    int source;
  } operand{value, 0, source};
  if ((mask >> source & 1) == 0) {
    fault("wrong lane mask", std::string(operation) + text(site) + " reads lane " + std::to_string(source) +
                                 ", which is not in its mask " + hexadecimal(mask));
  }
  const auto finish = [](Thread* const* lanes) {
    for (unsigned lane = 0; lane < kLanes; ++lane) {
      if (lanes[lane] == nullptr) continue;
      auto& mine = *static_cast<Operand*>(lanes[lane]->operand);
      mine.result = static_cast<Operand*>(lanes[mine.source]->operand)->value;
    }
  };
  collective(operation, mask, &operand, finish, site);
  return operand.result;
}

unsigned reduce(const char* operation, unsigned mask, unsigned value, Fold fold, Site site) {
  struct Operand {
    unsigned value;
    Fold fold;
  } operand{value, fold};
  const auto finish = [](Thread* const* lanes) {
    Operand* total = nullptr;
    for (unsigned lane = 0; lane < kLanes; ++lane) {
      if (lanes[lane] == nullptr) continue;
      auto* mine = static_cast<Operand*>(lanes[lane]->operand);
      if (total != nullptr) total->value = total->fold(total->value, mine->value);
      total = total == nullptr ? mine : total;
    }
    for (unsigned lane = 0; lane < kLanes; ++lane) {
      if (lanes[lane] != nullptr) static_cast<Operand*>(lanes[lane]->operand)->value = total->value;
    }
  };
  collective(operation, mask, &operand, finish, site);
  return operand.value;
}

unsigned active_mask() {
  unsigned mask = 0;
  const std::vector<Thread>& threads = current->block->threads;
  const unsigned first = current->index - current->lane();
  for (unsigned lane = 0; lane < kLanes && first + lane < threads.size(); ++lane) {
    if (threads[first + lane].state != State::kExited) mask |= 1u << lane;
  }
  return mask;
}

unsigned lane() { return current->lane(); }

}  // namespace simt
