// SPDX-License-Identifier: Apache-2.0
// What a kernel calls in the runtime; tests/simt/runtime implements it. CUDA's own names are built on these in
// intrinsics.h, and the wrappers of csrc/kernels/cuda call them directly.
#pragma once

#include <cstddef>
#include <cstdint>

#include "simt/vector_types.h"

namespace simt {

// Where in the source a collective stands: threads that meet must have come to the same place.
struct Site {
  const char* file;
  int line;
  bool operator==(const Site&) const = default;
};

void* dynamic_shared_memory();

// ---- barriers ----

struct BarrierCounts {
  int threads;   // that came
  int positive;  // of those, with a predicate that is not zero
};
BarrierCounts block_barrier(int predicate, Site site);
void named_barrier(int id, int threads, bool wait);
void grid_barrier(Site site);
void cluster_barrier(Site site);
void thread_fence();

unsigned cluster_rank();
unsigned cluster_size();
void* map_shared_rank(const void* pointer, unsigned rank);

// ---- warps ----

// Each waits for every lane of `mask`, all in the same operation at the same place.
void warp_barrier(unsigned mask, Site site);
uint64_t shuffle(const char* operation, unsigned mask, uint64_t value, int source_lane, Site site);
// fold(...fold(first, second)..., last) in the order of lanes, in every lane.
using Fold = unsigned (*)(unsigned, unsigned);
unsigned reduce(const char* operation, unsigned mask, unsigned value, Fold fold, Site site);
unsigned active_mask();
unsigned lane();

// ---- memory ----

// *address = update(*address, operand, compare), indivisibly; the old value. Values travel in the low bytes.
using Update = uint64_t (*)(uint64_t old, uint64_t operand, uint64_t compare);
uint64_t atomic(void* address, size_t bytes, uint64_t operand, uint64_t compare, Update update);

unsigned load_acquire(const unsigned* flag);
void add_release(unsigned* flag, unsigned value);

void async_copy(void* shared, const void* global, size_t bytes, bool wanted);
void async_commit();
void async_wait(size_t pending);
void bulk_copy(void* shared, const void* global, unsigned bytes, uint64_t* barrier);

void mbarrier_init(uint64_t* barrier, unsigned arrivals);
void mbarrier_arrive(uint64_t* barrier, unsigned expected_bytes);
void mbarrier_arrive_after_copies(uint64_t* barrier);
void mbarrier_wait(uint64_t* barrier, unsigned parity);

// ---- matrices ----

enum class Element { kBfloat16, kFloat16, kTf32 };
void matrix_multiply(float* d, const uint32_t* a, const uint32_t* b, Element element);
void load_matrices(uint32_t* x, const void* row, bool transposed);

}  // namespace simt
