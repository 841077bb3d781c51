// SPDX-License-Identifier: Apache-2.0
// Which build of the CPU kernels runs: decided once, from cpuid and LLMKERN_CPU.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels/run.h"

namespace llmkern::cpu {

namespace {

constexpr const char* kNames[] = {"generic", "avx2", "avx512"};

// The instruction set of that name, which this machine has to have.
Isa available(const char* wanted, const char* asked_by) {
  std::string names;
  for (Isa isa = Isa::kGeneric; isa <= detected_isa(); isa = static_cast<Isa>(static_cast<int>(isa) + 1)) {
    if (std::strcmp(wanted, name(isa)) == 0) return isa;
    names += std::string(names.empty() ? "" : ", ") + name(isa);
  }
  throw std::invalid_argument(std::string("llmkern.cpu: expected ") + asked_by +
                              " to be an instruction set that this machine has (" + names + "), got '" + wanted + "'");
}

Isa from_environment() {
  const char* wanted = std::getenv("LLMKERN_CPU");
  return wanted == nullptr || *wanted == '\0' ? detected_isa() : available(wanted, "LLMKERN_CPU");
}

std::atomic<Isa>& active() {
  static std::atomic<Isa> isa{from_environment()};
  return isa;
}

}  // namespace

const char* name(Isa isa) { return kNames[static_cast<int>(isa)]; }

Isa detected_isa() {
#ifdef LLMKERN_X86
  // The lists match the flags in setup.py: a build may use every instruction that its check names.
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) {
    return Isa::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) {
    return Isa::kAvx2;
  }
#endif
  return Isa::kGeneric;
}

Isa active_isa() { return active().load(std::memory_order_relaxed); }

void select_isa(const char* wanted) { active().store(available(wanted, "name"), std::memory_order_relaxed); }

}  // namespace llmkern::cpu
