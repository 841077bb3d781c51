// SPDX-License-Identifier: Apache-2.0
// Which build of the CPU kernels runs: decided once, from cpuid and LLMKERN_CPU.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <optional>

#include "kernels/run.h"

namespace llmkern::cpu {

namespace {

constexpr const char* kNames[] = {"generic", "avx2", "avx512"};

// The instruction set of that name, if this machine can execute it.
std::optional<Isa> available(const char* wanted) {
  for (Isa isa : {Isa::kGeneric, Isa::kAvx2, Isa::kAvx512}) {
    if (std::strcmp(wanted, name(isa)) == 0 && isa <= detected_isa()) return isa;
  }
  return std::nullopt;
}

Isa from_environment() {
  const char* wanted = std::getenv("LLMKERN_CPU");
  if (wanted == nullptr || *wanted == '\0') return detected_isa();
  if (const std::optional<Isa> isa = available(wanted)) return *isa;
  std::fprintf(
      stderr,
      "llmkern: expected LLMKERN_CPU to be one of generic, avx2, avx512 and at most '%s' here, got '%s'; using '%s'\n",
      name(detected_isa()), wanted, name(detected_isa()));
  return detected_isa();
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

bool select_isa(const char* wanted) {
  const std::optional<Isa> isa = available(wanted);
  if (isa) active().store(*isa, std::memory_order_relaxed);
  return isa.has_value();
}

}  // namespace llmkern::cpu
