// SPDX-License-Identifier: Apache-2.0
// Steps 1 and 2 of sampling (kernels/sampling.h) on CUDA: from the logits of a row, or a slice of one, to y and the
// sums of masses. sampling.cu does the rest.
#pragma once

#include <type_traits>
#include <utility>

#include "kernels/cuda/selection.cuh"
#include "kernels/half.h"
#include "kernels/sampling.h"

namespace llmkern::cuda {

constexpr int kGroup = 4;              // tokens a load
constexpr int kBatch = 4;              // loads in flight
constexpr int kStep = kWarp * kGroup;  // tokens a load of a warp
constexpr int kSliceUnit = 32;         // tokens: slices begin on a cache line

// What the logits are stored in. Their loads alone depend on it, so the kernels are there once for all types.
enum class Storage { kFloat, kBfloat16, kFloat16 };

struct AnySample : Sample<void> {
  Storage storage;
};

// One row at work, or a slice of it.
struct Row {
  float* y;   // [V], then -inf up to a whole group
  int* list;  // [V] tokens, in no order; the occurrences before that
  int V;
  int first_token, end_token;  // of the slice
  int begin, end;              // of the warp's share
  // From here on: once it is known what all of the row's y are.
  float maximum = 0;  // of y
  int first = 0;      // the first token that has it
  int num_live = 0;   // tokens that are not -inf
  Falloff falloff = {};
  const uint32_t* powers = nullptr;  // exp_mass's table
  int size = 0;                      // of the list
};

struct Sums {
  uint64_t mass, weighted;
};

// What a thread saw of y.
struct Seen {
  float maximum = -INFINITY;
  int first = 0;
  int num_live = 0;
  bool has_nan = false;

  __device__ void add(int v, float y) {
    if (y > maximum) {
      maximum = y;
      first = v;
    }
    num_live += y > -INFINITY;
    has_nan |= y != y;
  }
};

// What a block, or all blocks of a row, saw of y.
struct Found {
  uint64_t best = 0;  // the ordered maximum, then the complement of its first token
  int num_live = 0;
  int has_nan = 0;

  __device__ void add(const Found& other) {
    best = max(best, other.best);
    num_live += other.num_live;
    has_nan |= other.has_nan;
  }
};

// ---- passes over a row ----------------------------------------------------------------------------------------------

// Every warp has a share of neighbouring tokens, so that what it sums is the mass of a range.
template <int kThreads>
__device__ int share_of_warp(int tokens) {
  constexpr int kWarps = kThreads / kWarp;
  return (tokens + kWarps * kStep - 1) / (kWarps * kStep) * kStep;
}

__host__ __device__ constexpr int tokens_of_slice(int64_t V, int slices) {
  return static_cast<int>(ceil_div(ceil_div(V, slices), kSliceUnit) * kSliceUnit);
}

template <int kThreads>
__device__ Row row_at(const AnySample& a, int64_t b, int slice, int slices) {
  const int V = static_cast<int>(a.V), whole = (V + kGroup - 1) / kGroup * kGroup;
  const int tokens = tokens_of_slice(V, slices), share = share_of_warp<kThreads>(tokens);
  const int first = slice * tokens, end = min(first + tokens, whole), begin = first + warp_index() * share;
  float* y = static_cast<float*>(a.workspace);
  int* occurrences = reinterpret_cast<int*>(y + a.B * whole);
  return {.y = y + b * whole,
          .list = occurrences + b * whole,
          .V = V,
          .first_token = first,
          .end_token = min(end, V),
          .begin = min(begin, end),
          .end = min(begin + share, end)};
}

// f(v, y) for every token of the warp's share. Lanes without a token of their own call it with -inf.
template <class F>
__device__ void for_each_token(const Row& row, const F& f) {
  for (int v = row.begin; v < row.end; v += kBatch * kStep) {
    const int mine = v + lane_index() * kGroup;
    Pack<float, kGroup> y[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (mine + j * kStep < row.end) {
        y[j] = *reinterpret_cast<const Pack<float, kGroup>*>(row.y + mine + j * kStep);
      } else {
        y[j] = {{-INFINITY, -INFINITY, -INFINITY, -INFINITY}};
      }
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) f(mine + j * kStep + i, y[j].x[i]);
    }
  }
}

// ---- step 1: from logits to y ---------------------------------------------------------------------------------------

// from[v], ..., from[v + 3], and `beyond` from `end` on.
template <class T>
__device__ Pack<T, kGroup> load_group(const T* from, bool is_aligned, int v, int end, T beyond) {
  if (is_aligned && v + kGroup <= end) return *reinterpret_cast<const Pack<T, kGroup>*>(from + v);
  Pack<T, kGroup> group;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) group.x[i] = v + i < end ? from[v + i] : beyond;
  return group;
}

// The mask of a row, whichever way it is given.
struct Allowed {
  const void* row;
  AllowedKind kind;
  bool is_aligned;

  // Of four tokens, v a multiple of four: a bit each, those from `end` on anyhow.
  __device__ uint32_t group(int v, int end) const {
    if (kind == AllowedKind::kBits) return static_cast<const uint32_t*>(row)[v / 32] >> (v % 32);
    const Pack<bool, kGroup> passes = load_group(static_cast<const bool*>(row), is_aligned, v, end, false);
    return passes.x[0] | passes.x[1] << 1 | passes.x[2] << 2 | passes.x[3] << 3;
  }

  __device__ bool operator()(int v) const {
    if (kind == AllowedKind::kAll) return true;
    if (kind == AllowedKind::kBytes) return static_cast<const bool*>(row)[v];
    return (static_cast<const uint32_t*>(row)[v / 32] >> (v % 32) & 1) != 0;
  }
};

__device__ inline Allowed allowed_in_row(const AnySample& a, int64_t b) {
  const int64_t bytes = a.allowed_kind == AllowedKind::kBits ? sizeof(uint32_t) : sizeof(bool);
  const char* row = static_cast<const char*>(a.allowed) + b * a.allowed_stride * bytes;
  return {row, a.allowed_kind, is_aligned<Pack<bool, kGroup>>(row)};
}

// What is not done while the logits are loaded, but in further passes.
__device__ inline bool changes_later(const AnySample& a, const SampleSettings& s) {
  return a.num_bias_ids > 0 || penalises(a, s);
}

// Logits, bias and mask of the warp's share, and clears the occurrences where they will be counted. If nothing changes
// later, bounds y and says what it saw.
template <class T>
__device__ Seen load_logits(const AnySample& a, const SampleSettings& s, int64_t b, const Row& row) {
  const T* logits = static_cast<const T*>(a.logits) + b * a.logits_stride;
  const float* bias = a.bias == nullptr ? nullptr : a.bias + b * a.bias_stride;
  const Allowed allowed = allowed_in_row(a, b);
  using Floats = Pack<float, kGroup>;
  const bool logits_aligned = is_aligned<Pack<T, kGroup>>(logits), bias_aligned = is_aligned<Floats>(bias);
  const bool is_last = !changes_later(a, s), counts = penalises(a, s);
  const int end = min(row.end, row.V);
  Seen seen;
  for (int v = row.begin; v < row.end; v += kBatch * kStep) {
    const int mine = v + lane_index() * kGroup;
    Pack<T, kGroup> loaded[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) loaded[j] = load_group(logits, logits_aligned, mine + j * kStep, end, T{});
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int first = mine + j * kStep;
      if (first >= row.end) continue;
      Floats y;
      for (int i = 0; i < kGroup; ++i) y.x[i] = widen(loaded[j].x[i]);
      if (bias != nullptr) {
        const Floats added = load_group(bias, bias_aligned, first, end, 0.0f);
        for (int i = 0; i < kGroup; ++i) y.x[i] += added.x[i];
      }
      uint32_t passes = allowed.kind == AllowedKind::kAll ? ~0u : allowed.group(first, end);
#pragma unroll
      for (int i = 0; i < kGroup; ++i, passes >>= 1) {
        if ((passes & 1) == 0 || first + i >= end) y.x[i] = -INFINITY;
        if (!is_last) continue;
        if (y.x[i] > FLT_MAX) y.x[i] = FLT_MAX;
        seen.add(first + i, y.x[i]);
      }
      *reinterpret_cast<Floats*>(row.y + first) = y;
      if (counts) *reinterpret_cast<Pack<int, kGroup>*>(row.list + first) = {};
    }
  }
  return seen;
}

__device__ inline Seen load_logits(const AnySample& a, const SampleSettings& s, int64_t b, const Row& row) {
  switch (a.storage) {
    case Storage::kFloat:
      return load_logits<float>(a, s, b, row);
    case Storage::kBfloat16:
      return load_logits<bfloat16>(a, s, b, row);
    default:
      return load_logits<float16>(a, s, b, row);
  }
}

// The ids of a row differ, so that every y has one thread that changes it.
template <int kThreads>
__device__ void add_sparse_bias(const AnySample& a, int64_t b, const Row& row) {
  const Allowed allowed = allowed_in_row(a, b);
  const int64_t* ids = a.bias_ids + b * a.bias_ids_stride;
  const float* values = a.bias_values + b * a.bias_ids_stride;
  for (int64_t i = threadIdx.x; i < a.num_bias_ids; i += kThreads) {
    const int64_t v = ids[i];
    if (v < row.first_token || v >= row.end_token) continue;
    if (allowed(static_cast<int>(v))) row.y[v] += values[i];
  }
}

// f(v) for every id of the row that is in the slice.
template <int kThreads, class F>
__device__ void for_each_id(const int64_t* ids, int64_t length, int64_t b, const Row& row, const F& f) {
  if (ids == nullptr) return;
  for (int64_t i = threadIdx.x; i < length; i += kThreads) {
    const int64_t v = ids[b * length + i];
    if (v >= row.first_token && v < row.end_token) f(static_cast<int>(v));
  }
}

// Two passes over the ids, none over the vocabulary: count, and whoever takes the count away applies it. What was done
// to y before is seen behind the barrier.
template <int kThreads>
__device__ void penalise(const AnySample& a, const SampleSettings& s, int64_t b, const Row& row) {
  constexpr int kTaken = -1;
  int* occurrences = row.list;
  const auto count = [&](int v) { atomicAdd(&occurrences[v], 1); };
  const auto apply = [&](int v) {
    const int occurred = atomicExch(&occurrences[v], kTaken);
    if (occurred != kTaken && row.y[v] != -INFINITY) row.y[v] = penalised(row.y[v], s, occurred);
  };
  for_each_id<kThreads>(a.output_ids, a.output_length, b, row, count);
  __syncthreads();
  for_each_id<kThreads>(a.prompt_ids, a.prompt_length, b, row, apply);
  for_each_id<kThreads>(a.output_ids, a.output_length, b, row, apply);
}

// Fills the slice's y; what this thread saw of it.
template <int kThreads>
__device__ Seen fill(const AnySample& a, const SampleSettings& s, int64_t b, const Row& row) {
  Seen seen = load_logits(a, s, b, row);
  if (!changes_later(a, s)) return seen;
  __syncthreads();
  if (a.num_bias_ids > 0) add_sparse_bias<kThreads>(a, b, row);
  if (penalises(a, s)) penalise<kThreads>(a, s, b, row);
  __syncthreads();
  for_each_token(row, [&](int v, float y) {
    if (y > FLT_MAX) row.y[v] = y = FLT_MAX;
    seen.add(v, y);
  });
  return seen;
}

template <int kThreads>
__device__ Found found_by_block(const Seen& seen) {
  const uint64_t mine = static_cast<uint64_t>(ordered(seen.maximum)) << 32 | ~static_cast<uint32_t>(seen.first);
  return {block_reduce<kThreads>(mine, Maximum{}), block_reduce<kThreads>(seen.num_live, Plus{}),
          __syncthreads_or(seen.has_nan)};
}

// False when the row is invalid.
__device__ inline bool describe(const Found& found, const SampleSettings& s, const uint32_t* powers, Row* row) {
  row->num_live = found.num_live;
  if (found.has_nan != 0 || found.num_live == 0) return false;
  row->first = static_cast<int>(~static_cast<uint32_t>(found.best));
  row->maximum = from_ordered(static_cast<uint32_t>(found.best >> 32));
  if (row->maximum == 0) row->maximum = row->y[row->first];  // or -0, which orders do not know
  row->falloff = falloff(effective_temperature(s));
  row->powers = powers;
  return true;
}

// ---- step 2: masses -------------------------------------------------------------------------------------------------

template <size_t... j>
__device__ void store_powers(uint32_t* to, std::index_sequence<j...>) {
  ((to[j] = std::integral_constant<uint32_t, kEighthPowers[j]>::value), ...);
}

// exp_mass's table in shared memory, where every lane reads its own entry in one go. Every thread must call it, once a
// kernel.
__device__ inline const uint32_t* powers_of_block() {
  constexpr int kPowers = sizeof(kEighthPowers) / sizeof(kEighthPowers[0]);
  __shared__ uint32_t powers[kPowers];
  if (threadIdx.x == 0) store_powers(powers, std::make_index_sequence<kPowers>());
  __syncthreads();
  return powers;
}

__device__ inline uint64_t mass_of(const Row& row, float y) {
  return round_to_integer(exp_mass(y - row.maximum, row.falloff, row.powers));
}

__device__ inline uint64_t weighted_mass_of(const Row& row, float y) {
  const float d = y - row.maximum;
  return round_to_integer(weighted_mass(rintf(exp_mass(d, row.falloff, row.powers)), d, row.falloff));
}

// Of the slice; *of_warp is that of the warp's share. The weighted masses are summed on request.
template <int kThreads>
__device__ Sums sum_masses(const Row& row, bool weighs, uint64_t* of_warp) {
  Sums mine = {0, 0};
  for_each_token(row, [&](int, float y) {
    const float d = y - row.maximum, mass = rintf(exp_mass(d, row.falloff, row.powers));
    mine.mass += round_to_integer(mass);
    if (weighs) mine.weighted += round_to_integer(weighted_mass(mass, d, row.falloff));
  });
  *of_warp = warp_reduce(mine.mass, Plus{});
  return {block_reduce<kThreads>(mine.mass, Plus{}), block_reduce<kThreads>(mine.weighted, Plus{})};
}

}  // namespace llmkern::cuda
