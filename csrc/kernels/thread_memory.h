// SPDX-License-Identifier: Apache-2.0
// Memory that a thread keeps from one kernel to the next, and who is at work just now.
//
// A fresh buffer of some megabytes costs more in page faults than the work in it, so kernels keep their working memory,
// by thread and purpose. It is freed when somebody asks for that: the memory of an idle thread at once, that of a
// thread at work when its work ends. Compiled once, not once per instruction set.
#pragma once

#include <cstddef>
#include <new>
#include <string>

namespace llmkern {

// Working memory by who holds it. No two holders share one, and none holds its slot twice at a time on one thread: a
// build with DEBUG=1 checks that.
enum class Slot {
  kGemmTiles,  // gemm.h
  kGemmPanel,
  kGemmSums,
  kLstmForwardWeights,  // lstm.cpp: of a layer, for all its workers
  kLstmHidden,
  kLstmCell,
  kLstmProjection,
  kLstmMoments,
  kLstmBackwardWeights,
  kLstmBackwardMoments,
  kLstmGradHidden,
  kLstmGradCell,
  kLstmGates,
  kLstmScales,
  kLstmGatesInPlace,  // lstm/panels.h
  kLstmInputTiles,    // lstm/forward.h: of a worker
  kLstmProducts,
  kLstmCellMoments,
  kLstmByteTiles,       // lstm/byte_gates.h
  kLstmMasks,           // lstm/zoneout.h
  kLstmColumnsInPlace,  // lstm/backward.h: of a worker
  kLstmGradStep,
  kLstmHanded,
  kLstmRecomputation,  // lstm/products.h
  kLstmNewCell,
  kLstmStackedSteps,
  kSampleRow,
  kMultinomialTree,
  kBeamCandidates,
  kDraftBlockMass,
  kDraftRest,
  kCrossEntropyLosses,
  kCount
};

// The system has no such memory. Everything is defined in thread_memory.cpp: code of several instruction sets uses it.
struct OutOfMemory : std::bad_alloc {
  OutOfMemory(size_t bytes, const std::string& purpose);
  ~OutOfMemory() override;

  size_t bytes;
  std::string purpose;
};
[[noreturn]] void fail_for_working_memory(size_t bytes);

// The calling thread works for as long as this lives: nobody else frees its memory or changes the instruction set. They
// nest.
class AtWork {
 public:
  AtWork();
  ~AtWork();
  AtWork(const AtWork&) = delete;
  AtWork& operator=(const AtWork&) = delete;
};

// This thread's memory for a purpose: at least so many bytes, aligned to a cache line, uninitialised. Only at work.
// Throws OutOfMemory.
void* hold_thread_memory(Slot slot, size_t bytes);

// The holder needs it no longer. It stays for the next one.
void release_thread_memory(Slot slot);

// Frees the memory of all threads; that of a thread at work as soon as its work ends.
void free_thread_memory();

struct ThreadMemory {
  size_t threads, bytes;
};
ThreadMemory thread_memory();

// Calls f(context) while no thread is at work, nor begins to; false, and nothing is called, if one is. f may throw.
bool while_nobody_works(void (*f)(void* context), void* context);

}  // namespace llmkern
