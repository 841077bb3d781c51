// SPDX-License-Identifier: Apache-2.0
// Copies that run beside the computation, and the barriers that wait for less than the whole block. Each wrapper has
// two bodies: PTX, and the emulation of tests/simt.
//
//   async_copy / async_commit / async_wait   cp.async: this thread's copies, in groups; visible to this thread after
//                                            async_wait, to others after a barrier behind it
//   named_barrier_sync / _arrive             barriers 1..15, for some warps of the block (0 is __syncthreads)
//   mbarrier_*                               a barrier in shared memory with phases; waits may be anywhere
//   bulk_copy                                one thread copies up to a whole tile; an mbarrier counts its bytes (sm_90)
//   load_acquire / add_release               flags in global memory between blocks that are resident together
#pragma once

#include "kernels/cuda/common.cuh"

namespace llmkern::cuda {

#ifndef LLMKERN_SIMT
__device__ inline unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}
#endif

// Copies kBytes (4, 8 or 16, both sides so aligned) from global to shared memory, or fills zeros when `wanted` is false
// (`global` is then not read).
template <int kBytes>
__device__ inline void async_copy(void* shared, const void* global, bool wanted = true) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
#ifdef LLMKERN_SIMT
  simt::async_copy(shared, global, kBytes, wanted);
#else
  const unsigned destination = shared_address(shared), bytes = wanted ? kBytes : 0;
  if constexpr (kBytes == 16) {  // past the L1 cache: a tile is read from shared memory afterwards
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination), "l"(global), "r"(bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(destination), "l"(global), "n"(kBytes),
                 "r"(bytes)
                 : "memory");
  }
#endif
}

// Closes the group of this thread's copies since the last commit.
__device__ inline void async_commit() {
#ifdef LLMKERN_SIMT
  simt::async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most `kPending` of this thread's newest groups are still under way.
template <int kPending>
__device__ inline void async_wait() {
#ifdef LLMKERN_SIMT
  simt::async_wait(kPending);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// Waits at barrier `id` until `threads` threads, whole warps, have come by sync or arrive.
__device__ inline void named_barrier_sync(int id, int threads) {
#ifdef LLMKERN_SIMT
  simt::named_barrier(id, threads, true);
#else
  asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

// Counts at the barrier without waiting: a producer that has written.
__device__ inline void named_barrier_arrive(int id, int threads) {
#ifdef LLMKERN_SIMT
  simt::named_barrier(id, threads, false);
#else
  asm volatile("barrier.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

// By one thread; the others may use the barrier after the next __syncthreads. A phase ends with its `arrivals`th.
__device__ inline void mbarrier_init(uint64_t* barrier, unsigned arrivals) {
#ifdef LLMKERN_SIMT
  simt::mbarrier_init(barrier, arrivals);
#else
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
#if LLMKERN_ARCH >= 900  // bulk copies look at it from outside the thread's own order
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
#endif
}

__device__ inline void mbarrier_arrive(uint64_t* barrier) {
#ifdef LLMKERN_SIMT
  simt::mbarrier_arrive(barrier, 0);
#else
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(shared_address(barrier))
               : "memory");
#endif
}

// Arrives when all of this thread's earlier async_copy are done; counts as one of the phase's arrivals.
__device__ inline void mbarrier_arrive_after_copies(uint64_t* barrier) {
#ifdef LLMKERN_SIMT
  simt::mbarrier_arrive_after_copies(barrier);
#else
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
#endif
}

// Waits for the end of the phase of this parity: the first phase has 0, the second 1, the third 0.
__device__ inline void mbarrier_wait(uint64_t* barrier, unsigned parity) {
#ifdef LLMKERN_SIMT
  simt::mbarrier_wait(barrier, parity);
#else
  unsigned done = 0;
  while (done == 0) {
#if LLMKERN_ARCH >= 900  // try: the hardware may let the thread sleep a while
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done)
                 : "r"(shared_address(barrier)), "r"(parity)
                 : "memory");
#else
    asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done)
                 : "r"(shared_address(barrier)), "r"(parity)
                 : "memory");
#endif
  }
#endif
}

#if LLMKERN_ARCH >= 900

// Arrives, and makes the phase wait for `bytes` more of bulk copies.
__device__ inline void mbarrier_arrive_expect(uint64_t* barrier, unsigned bytes) {
#ifdef LLMKERN_SIMT
  simt::mbarrier_arrive(barrier, bytes);
#else
  asm volatile(
      "{ .reg .b64 state; mbarrier.arrive.expect_tx.shared.b64 state, [%0], %1; }" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
#endif
}

// Copies `bytes`, a multiple of 16 between addresses that are, from global to shared memory; `barrier` counts them.
__device__ inline void bulk_copy(void* shared, const void* global, unsigned bytes, uint64_t* barrier) {
#ifdef LLMKERN_SIMT
  simt::bulk_copy(shared, global, bytes, barrier);
#else
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
#endif
}

#endif  // LLMKERN_ARCH >= 900

// What other blocks did before their add_release comes before what follows a load that sees its result. Loops that wait
// for a flag load it by this: the emulation lets other threads run here.
__device__ inline unsigned load_acquire(const unsigned* flag) {
#ifdef LLMKERN_SIMT
  return simt::load_acquire(flag);
#else
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
#endif
}

// Covers what this thread did, and what others of its block did before a barrier between them.
__device__ inline void add_release(unsigned* flag, unsigned value) {
#ifdef LLMKERN_SIMT
  simt::add_release(flag, value);
#else
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
#endif
}

}  // namespace llmkern::cuda
