// SPDX-License-Identifier: Apache-2.0
// One way to call every kernel: fill in its argument struct (declared, with shapes and math, in the family's header)
// and hand it to run(). The struct is the kernel's name.
//
//   cpu::run(EmbeddingForward<float>{...}, parallel);      chosen once, by cpuid, among the builds below
//   cuda::run(EmbeddingForward<float>{...}, stream);
//
// A family's source instantiates run() for its structs; nothing else has to be registered anywhere.
#pragma once

#include "kernels/parallel.h"

namespace llmkern {

namespace cpu {

// Every source in kernels/cpu is compiled once per namespace below, with that instruction set switched on.
enum class Isa { kGeneric, kAvx2, kAvx512 };

Isa detected_isa();         // the best that both this machine and this build have
const char* name(Isa isa);  // "generic", "avx2", "avx512": the values of LLMKERN_CPU
// What is in use: detected, or what LLMKERN_CPU asks for. Throws std::invalid_argument where that is none of the names,
// or more than the machine has.
Isa active_isa();
// Likewise. Only while no kernel runs.
void select_isa(const char* name);

namespace generic {
template <class Args>
void run(const Args& args, const Parallel& parallel);
}
#ifdef LLMKERN_X86
namespace avx2 {
template <class Args>
void run(const Args& args, const Parallel& parallel);
}
namespace avx512 {
template <class Args>
void run(const Args& args, const Parallel& parallel);
}
#endif

template <class Args>
void run(const Args& args, const Parallel& parallel) {
#ifdef LLMKERN_X86
  switch (active_isa()) {
    case Isa::kAvx512:
      return avx512::run(args, parallel);
    case Isa::kAvx2:
      return avx2::run(args, parallel);
    case Isa::kGeneric:
      break;
  }
#endif
  generic::run(args, parallel);
}

}  // namespace cpu

namespace cuda {
// `stream` is a cudaStream_t on the current device. Throws std::runtime_error naming the kernel when a launch fails.
template <class Args>
void run(const Args& args, void* stream);
}  // namespace cuda

}  // namespace llmkern
