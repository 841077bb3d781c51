// SPDX-License-Identifier: Apache-2.0
// Words for what the checkers find.
#include <cstdio>
#include <string>

#include "block.h"

namespace simt {

std::string name_of(uint3 position) {
  return "(" + std::to_string(position.x) + ", " + std::to_string(position.y) + ", " + std::to_string(position.z) + ")";
}

std::string text(Site site) {
  return site.file == nullptr ? "" : std::string(" (") + site.file + ":" + std::to_string(site.line) + ")";
}

uint32_t short_pc(const void* pc) {
  return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(pc) - running->module->base);
}

std::string text_of_pc(uint32_t pc) {
  if (pc == 0) return "";
  char offset[32];
  std::snprintf(offset, sizeof offset, "+0x%x", pc - 1);  // the call, not what follows it
  return " [" + running->module->path + offset + "]";
}

std::string report(const Thread& thread, const char* kind, const std::string& detail, const void* pc) {
  return std::string("simt: ") + kind + ": " + running->kernel + ", block " + name_of(thread.block->index) +
         ", thread " + name_of(thread.position) + ": " + detail + (pc == nullptr ? "" : text_of_pc(short_pc(pc)));
}

void fault(const char* kind, const std::string& detail, const void* pc) {
  running->fault = report(*current, kind, detail, pc);
  current->state = State::kWaiting;
  current->fiber.suspend();  // for good: the launch is over
  __builtin_unreachable();
}

}  // namespace simt
