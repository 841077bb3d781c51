// SPDX-License-Identifier: Apache-2.0
// Steps 1 to 3 of sampling (kernels/sampling.h) on CUDA: from the logits of a row, or a slice of one, to z and the sums
// of masses. sampling.cu does the rest.
#pragma once

#include "kernels/cuda/selection.cuh"
#include "kernels/sampling.h"

namespace llmkern::cuda {

constexpr int kGroup = 4;              // tokens a load
constexpr int kBatch = 4;              // loads in flight
constexpr int kStep = kWarp * kGroup;  // tokens a load of a warp
constexpr int kSliceUnit = 32;         // tokens: slices begin on a cache line

// One row at work, or a slice of it.
struct Row {
  float* z;   // [V], then -inf up to a whole group
  int* list;  // [V] tokens, in no order; the occurrences before that
  int V;
  int first_token, end_token;  // of the slice
  int begin, end;              // of the warp's share
  float maximum = 0;           // of z
  int first = 0;               // the first token that has it
  int num_live = 0;            // tokens that are not -inf
  int size = 0;                // of the list
};

struct Sums {
  uint64_t mass, weighted;
};

// What a thread saw of z.
struct Seen {
  float maximum = -INFINITY;
  int first = 0;
  int num_live = 0;
  bool has_nan = false;

  __device__ void add(int v, float z) {
    if (z > maximum) {
      maximum = z;
      first = v;
    }
    num_live += z > -INFINITY;
    has_nan |= z != z;
  }
};

// What a block, or all blocks of a row, saw of z.
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
__device__ Row row_at(const Sample& a, int64_t b, int slice, int slices) {
  const int V = static_cast<int>(a.V), whole = (V + kGroup - 1) / kGroup * kGroup;
  const int tokens = tokens_of_slice(V, slices), share = share_of_warp<kThreads>(tokens);
  const int first = slice * tokens, end = min(first + tokens, whole), begin = first + warp_index() * share;
  float* z = static_cast<float*>(a.workspace);
  int* occurrences = reinterpret_cast<int*>(z + a.B * whole);
  return {.z = z + b * whole,
          .list = occurrences + b * whole,
          .V = V,
          .first_token = first,
          .end_token = min(end, V),
          .begin = min(begin, end),
          .end = min(begin + share, end)};
}

// f(v, z) for every token of the warp's share. Lanes without a token of their own call it with -inf.
template <class F>
__device__ void for_each_token(const Row& row, const F& f) {
  for (int v = row.begin; v < row.end; v += kBatch * kStep) {
    const int mine = v + lane_index() * kGroup;
    Pack<float, kGroup> z[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (mine + j * kStep < row.end) {
        z[j] = *reinterpret_cast<const Pack<float, kGroup>*>(row.z + mine + j * kStep);
      } else {
        z[j] = {{-INFINITY, -INFINITY, -INFINITY, -INFINITY}};
      }
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) f(mine + j * kStep + i, z[j].x[i]);
    }
  }
}

// ---- steps 1 and 2: from logits to z --------------------------------------------------------------------------------

__device__ inline float scaled(float y, float inverse) {
  const float z = y * inverse + 0.0f;  // -0 becomes 0
  return z > FLT_MAX ? FLT_MAX : z;    // NaN stays
}

// from[v], ..., from[v + 3], and `beyond` from `end` on.
template <class T>
__device__ Pack<T, kGroup> load_group(const T* from, bool is_aligned, int v, int end, T beyond) {
  if (is_aligned && v + kGroup <= end) return *reinterpret_cast<const Pack<T, kGroup>*>(from + v);
  Pack<T, kGroup> group;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) group.x[i] = v + i < end ? from[v + i] : beyond;
  return group;
}

// z without penalties, for the warp's share; clears the occurrences where they will be counted.
__device__ inline Seen logits_to_z(const Sample& a, int64_t b, const Row& row, float inverse, bool counts) {
  const float* logits = a.logits + b * a.V;
  const float* bias = a.bias == nullptr ? nullptr : a.bias + b * a.bias_stride;
  const bool* allowed = a.allowed == nullptr ? nullptr : a.allowed + b * a.allowed_stride;
  using Floats = Pack<float, kGroup>;
  const bool logits_aligned = is_aligned<Floats>(logits), bias_aligned = is_aligned<Floats>(bias);
  const bool allowed_aligned = is_aligned<Pack<bool, kGroup>>(allowed);
  const int end = min(row.end, row.V);
  Seen seen;
  for (int v = row.begin; v < row.end; v += kBatch * kStep) {
    const int mine = v + lane_index() * kGroup;
    Floats y[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) y[j] = load_group(logits, logits_aligned, mine + j * kStep, end, -INFINITY);
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int first = mine + j * kStep;
      if (first >= row.end) continue;
      if (bias != nullptr) {
        const Floats added = load_group(bias, bias_aligned, first, end, 0.0f);
        for (int i = 0; i < kGroup; ++i) y[j].x[i] += added.x[i];
      }
      if (allowed != nullptr) {
        const Pack<bool, kGroup> passes = load_group(allowed, allowed_aligned, first, end, false);
        for (int i = 0; i < kGroup; ++i) y[j].x[i] = passes.x[i] ? y[j].x[i] : -INFINITY;
      }
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        y[j].x[i] = scaled(y[j].x[i], inverse);
        seen.add(first + i, y[j].x[i]);
      }
      *reinterpret_cast<Floats*>(row.z + first) = y[j];
      if (counts) *reinterpret_cast<Pack<int, kGroup>*>(row.list + first) = {};
    }
  }
  return seen;
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

// y of one token that occurs in the ids, `count` times in output_ids.
__device__ inline float penalised_logit(const Sample& a, const SampleSettings& s, int64_t b, int v, int count) {
  float y = a.logits[b * a.V + v];
  if (a.bias != nullptr) y += a.bias[b * a.bias_stride + v];
  const bool passes = a.allowed == nullptr || a.allowed[b * a.allowed_stride + v];
  return passes && y != -INFINITY ? penalised(y, s, count) : -INFINITY;
}

// Two passes over the ids, none over the vocabulary: count, and whoever takes the count away applies it.
template <int kThreads>
__device__ void penalise(const Sample& a, const SampleSettings& s, int64_t b, const Row& row, float inverse) {
  constexpr int kTaken = -1;
  int* occurrences = row.list;
  const auto count = [&](int v) { atomicAdd(&occurrences[v], 1); };
  const auto apply = [&](int v) {
    const int occurred = atomicExch(&occurrences[v], kTaken);
    if (occurred != kTaken) row.z[v] = scaled(penalised_logit(a, s, b, v, occurred), inverse);
  };
  for_each_id<kThreads>(a.output_ids, a.output_length, b, row, count);
  __syncthreads();
  for_each_id<kThreads>(a.prompt_ids, a.prompt_length, b, row, apply);
  for_each_id<kThreads>(a.output_ids, a.output_length, b, row, apply);
  __syncthreads();
}

// Fills the slice's z; what this thread saw of it.
template <int kThreads>
__device__ Seen fill(const Sample& a, const SampleSettings& s, int64_t b, const Row& row) {
  const float inverse = inverse_temperature(s);
  Seen seen = logits_to_z(a, b, row, inverse, penalises(a, s));
  if (penalises(a, s)) {
    __syncthreads();
    penalise<kThreads>(a, s, b, row, inverse);
    seen = Seen{};
    for_each_token(row, [&](int v, float z) { seen.add(v, z); });
  }
  return seen;
}

template <int kThreads>
__device__ Found found_by_block(const Seen& seen) {
  const uint64_t mine = static_cast<uint64_t>(ordered(seen.maximum)) << 32 | ~static_cast<uint32_t>(seen.first);
  return {block_reduce<kThreads>(mine, Maximum{}), block_reduce<kThreads>(seen.num_live, Plus{}),
          __syncthreads_or(seen.has_nan)};
}

// False when the row is invalid.
__device__ inline bool describe(const Found& found, Row* row) {
  row->maximum = from_ordered(static_cast<uint32_t>(found.best >> 32));
  row->first = static_cast<int>(~static_cast<uint32_t>(found.best));
  row->num_live = found.num_live;
  return found.has_nan == 0 && found.num_live > 0;
}

// ---- step 3: masses -------------------------------------------------------------------------------------------------

__device__ inline uint64_t mass_of(float z, float maximum) { return round_to_integer(exp_mass(z - maximum)); }
__device__ inline uint64_t mass_of(const Row& row, int v) { return mass_of(row.z[v], row.maximum); }

__device__ inline uint64_t weighted_mass_of(const Row& row, int v) {
  const float d = row.z[v] - row.maximum;
  return weighted_mass(exp_mass(d), d);
}

// Of the slice; *of_warp is that of the warp's share.
template <int kThreads>
__device__ Sums sum_masses(const Row& row, uint64_t* of_warp) {
  Sums mine = {0, 0};
  for_each_token(row, [&](int, float z) {
    const float d = z - row.maximum, mass = exp_mass(d);
    mine.mass += round_to_integer(mass);
    mine.weighted += weighted_mass(mass, d);
  });
  *of_warp = warp_reduce(mine.mass, Plus{});
  return {block_reduce<kThreads>(mine.mass, Plus{}), block_reduce<kThreads>(mine.weighted, Plus{})};
}

}  // namespace llmkern::cuda
