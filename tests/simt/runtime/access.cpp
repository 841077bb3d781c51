// SPDX-License-Identifier: Apache-2.0
// Finds the variable or buffer an access belongs to, and judges accesses that belong to none.
#include <algorithm>
#include <string>

#include "block.h"
#include "memory.h"

namespace simt {

#ifdef SIMT_UNCHECKED  // no hooks: nothing is known about ordinary accesses

void touch(const void*, size_t, Access, const void*, bool) {}

#else

namespace {

const char* verb(Access access) {
  return access == Access::kRead || access == Access::kAtomicRead ? "reads" : "writes";
}

[[noreturn]] void outside(Space space, const Region* near, uintptr_t address, size_t bytes, Access access,
                          const void* pc) {
  std::string detail = std::string(verb(access)) + " " + std::to_string(bytes) + " bytes ";
  if (near == nullptr) {
    detail += "before every buffer";
  } else if (address < near->base) {
    detail += std::to_string(near->base - address) + " bytes before " + near->name;
  } else {
    detail += "at " + near->name + "+" + std::to_string(address - near->base) + ", which has " +
              std::to_string(near->bytes) + " bytes";
  }
  fault(space == Space::kShared ? "shared memory out of bounds" : "global memory out of bounds", detail, pc);
}

// The region of this block's shared memory at or before the address, null if it is elsewhere.
Region* shared_region(Block& block, uintptr_t address) {
  if (block.dynamic && address - block.dynamic->base + kSharedMargin < block.dynamic->bytes + 2 * kSharedMargin) {
    return &*block.dynamic;
  }
  if (address - block.tls >= running->module->tls_bytes) return nullptr;
  const auto after = std::upper_bound(block.statics.begin(), block.statics.end(), address,
                                      [](uintptr_t a, const Region& region) { return a < region.base; });
  return after == block.statics.begin() ? nullptr : &*(after - 1);
}

void touch_shared(Region& region, uintptr_t address, size_t bytes, Access access, const void* pc, bool asynchronous) {
  const Block& mine = *current->block;
  if (region.owner != &mine) {
    if (region.owner->cluster != mine.cluster) {
      fault("shared memory out of bounds",
            std::string(verb(access)) + " " + region.name + " of a block of another cluster", pc);
    }
    if (region.owner->alive == 0) {
      fault("shared memory out of bounds",
            std::string(verb(access)) + " " + region.name + " of block " + name_of(region.owner->index) +
                ", which has exited",
            pc);
    }
  }
  const size_t offset = address - region.base;
  if (offset >= region.bytes || bytes > region.bytes - offset) {
    outside(Space::kShared, &region, address, bytes, access, pc);
  }
  if (region.generation != region.owner->generation) {  // this block's first access to the variable
    region.generation = region.owner->generation;
    region.forget(false);
    std::fill_n(reinterpret_cast<unsigned char*>(region.base), region.bytes, kFill);
  }
  region.access(offset, bytes, access, pc, asynchronous);
}

void touch_global(uintptr_t address, size_t bytes, Access access, const void* pc, bool asynchronous) {
  Region* buffer = buffer_at(address);
  if (buffer == nullptr || address < buffer->base || address - buffer->base >= buffer->bytes ||
      bytes > buffer->bytes - (address - buffer->base)) {
    outside(Space::kGlobal, buffer, address, bytes, access, pc);
  }
  const bool writes = access == Access::kWrite || access == Access::kAtomic;
  if (writes) current->fenced = false;
  if (!buffer->constant) return buffer->access(address - buffer->base, bytes, access, pc, asynchronous);
  if (writes) {
    fault(
        "write to an input",
        "writes " + std::to_string(bytes) + " bytes at " + buffer->name + "+" + std::to_string(address - buffer->base),
        pc);
  }
}

// Constants and variables of the library, and the kernel's parameters.
bool is_elsewhere(uintptr_t address, bool writes) {
  if (running->module->contains(address)) return true;
  return !writes && address - reinterpret_cast<uintptr_t>(running->parameters) < running->parameter_bytes;
}

}  // namespace

void touch(const void* pointer, size_t bytes, Access access, const void* pc, bool asynchronous) {
  if (current == nullptr || bytes == 0 || current->fiber.on_stack(pointer)) return;
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  if (in_device_memory(address)) return touch_global(address, bytes, access, pc, asynchronous);
  Block& mine = *current->block;
  if (mine.last != nullptr && address - mine.last->base < mine.last->bytes) {
    return touch_shared(*mine.last, address, bytes, access, pc, asynchronous);
  }
  if (Region* region = shared_region(mine, address)) {
    mine.last = region;
    return touch_shared(*region, address, bytes, access, pc, asynchronous);
  }
  for (Block* other : running->alive) {
    if (Region* region = shared_region(*other, address)) {
      return touch_shared(*region, address, bytes, access, pc, asynchronous);
    }
  }
  if (is_elsewhere(address, access == Access::kWrite)) return;
  fault("out of bounds",
        std::string(verb(access)) + " " + std::to_string(bytes) + " bytes at address " + std::to_string(address) +
            ", which is in no buffer",
        pc);
}

#endif

}  // namespace simt
