// SPDX-License-Identifier: Apache-2.0
// Sampling on CUDA; the contract is kernels/sampling.h.
//
// No row is sorted. One pass makes y, one sums the masses where somebody needs all of them. What the filters keep and
// the first num_logprobs tokens are above a bound that is quickly found: one more pass lists the tokens above it, and
// everything else (thresholds, draw, rank) is a selection from that list (selection.cuh). Without a filter the masses
// of ranges lead to the token drawn.
//
// One block does a row. Where that would leave most of the GPU idle, the two passes in front, which look at every token
// and cost the most, go to several blocks a row in two launches of their own; then one block a row does the rest. All
// sums are of integers: their order, hence the number of blocks and threads, changes no bit.
#include "kernels/sampling.h"

#include <algorithm>
#include <bit>

#include "kernels/cuda/deferred.cuh"
#include "kernels/cuda/sampling_row.cuh"
#include "kernels/run.h"

namespace llmkern::cuda {

namespace {

constexpr int kSortedInShared = 1024;
constexpr int64_t kMostBlocks = 1024;       // more than are resident at once; blocks stride over rows
constexpr int64_t kSmallVocabulary = 2048;  // for fewer threads, whose barriers cost less
constexpr int kSmallBlock = 128, kLargeBlock = 512;
constexpr int kLeastSlice = 2048, kMostSlices = 32;  // tokens of a slice, slices of a row
constexpr int kMostRanges = 32;

template <int kThreads>
struct Shared {
  Digits digits;
  uint64_t range_mass[kMostRanges];  // of neighbouring tokens: the shares of warps, or slices
  uint64_t sorted[kSortedInShared];
  int listed, num_sorted;  // while they grow
  int token;
};

// What the blocks of a slice leave for those that follow, where the slice had its occurrences.
template <int kThreads>
struct SliceResult {
  Found found;
  Sums sums;
  float maximum_of_thread[kThreads];
};
// All slices but the last have kLeastSlice tokens; rounding to units takes some from the last.
static_assert(sizeof(SliceResult<kLargeBlock>) <= (kLeastSlice - kMostSlices * kSliceUnit) * sizeof(int));

// What the filters keep.
struct Kept {
  uint64_t last = kLastKey;  // of the order
  uint64_t least_mass = 0;
  uint64_t last_typical = kLastKey;  // of the order by deviation from this mean
  double mean = 0;
};

// ---- settings -------------------------------------------------------------------------------------------------------

__device__ bool check_settings(const AnySample& a, int64_t b, const SampleSettings& s) {
  const int column = wrong_setting(s);
  if (column < 0) return true;
  if (threadIdx.x == 0) {
    const double value = reinterpret_cast<const double*>(a.settings + b * a.settings_stride)[column];
    report(a.error, Mistake::kSampleSetting, b, static_cast<int64_t>(double_to_bits(value)), column);
  }
  return false;
}

// What a row's settings and the outputs asked for take.
struct Plan {
  int k;       // of top_k; 0 keeps all
  bool lists;  // the tokens kept are chosen from a list
  bool sums;   // over all tokens
};

__device__ Plan plan_of(const AnySample& a, const SampleSettings& s, const Row& row) {
  const double wanted = is_greedy(s) ? 1 : s.top_k;
  const int k = wanted < row.num_live ? static_cast<int>(wanted) : 0;
  // The first token alone needs no list: the other filters keep it.
  const bool lists = k != 1 && (k > 1 || s.top_p < 1 || s.min_p > 0 || s.typical_p < 1);
  const bool fraction_of_all = k == 0 && (s.top_p < 1 || !lists);
  return {k, lists, fraction_of_all || a.logprob != nullptr || a.entropy != nullptr || a.num_logprobs > 0};
}

// ---- the list -------------------------------------------------------------------------------------------------------

// The sum of f(v) over the tokens listed.
template <int kThreads, class F>
__device__ uint64_t sum_of_list(const Row& row, const F& f) {
  uint64_t sum = 0;
  for (int i = static_cast<int>(threadIdx.x); i < row.size; i += kThreads) sum += f(row.list[i]);
  return block_reduce<kThreads>(sum, Plus{});
}

// A distance from the maximum that at least k tokens reach: the k-th largest of the threads' maxima, or -inf when there
// are too few to tell. The tokens that reach it are little more than k.
template <int kThreads>
__device__ float reached_by(const Row& row, int k, float maximum_of_thread, Shared<kThreads>& shared) {
  if (k > kThreads / 2 || row.V < 4 * kThreads) return -INFINITY;
  const bool is_live = maximum_of_thread > -INFINITY;
  if (__syncthreads_count(is_live) < k) return -INFINITY;
  const auto view = [&](int thread) { return Entry{is_live, order_key(maximum_of_thread, row.maximum, thread), 1}; };
  const uint64_t key = shortest_prefix<kThreads>(kThreads, static_cast<uint64_t>(k), view, shared.digits);
  return value_of(key) - row.maximum;
}

// A distance that all tokens of this mass reach, and perhaps some of less.
//
// A mass is 2^(40 + d * scale), within a millionth, rounded to an integer: by half of one, which is a bit to the
// smallest and a thousandth of a bit at most above 1024.
__device__ float reached_with(const Row& row, uint64_t mass) {
  if (mass == 0) return -INFINITY;
  const double bits = log_mass(mass) / kLn2 - (mass < 1024 ? 1.01 : 0.002);
  return static_cast<float>(bits / row.falloff.scale);
}

// The distance that all tokens reach which a filter can keep; `mass` of all tokens.
template <int kThreads>
__device__ float reached_by_kept(const Row& row, const SampleSettings& s, int k, uint64_t mass, float maximum_of_thread,
                                 Shared<kThreads>& shared) {
  if (k > 0) return reached_by(row, k, maximum_of_thread, shared);
  // All tokens of less mass than this cannot hold together what the prefix leaves out.
  if (s.top_p < 1) return reached_with(row, (mass - fraction_of_mass(s.top_p, mass)) / static_cast<uint64_t>(row.V));
  return s.min_p > 0 ? reached_with(row, fraction_of_mass(s.min_p, kFullMass)) : -INFINITY;
}

template <int kThreads>
__device__ int list_tokens(const Row& row, float least, Shared<kThreads>& shared) {
  if (threadIdx.x == 0) shared.listed = 0;
  __syncthreads();
  for_each_token(
      row, [&](int v, float y) { append((y > -INFINITY) & (y - row.maximum >= least), v, row.list, &shared.listed); });
  __syncthreads();
  return shared.listed;
}

// ---- step 3: filters ------------------------------------------------------------------------------------------------

__device__ uint64_t key_of(const Row& row, int v) { return order_key(row.y[v], row.maximum, v); }
__device__ uint64_t mass_at(const Row& row, int v) { return mass_of(row, row.y[v]); }

__device__ uint64_t typical_key(const Row& row, double mean, int v, float y) {
  const double information = -static_cast<double>((y - row.maximum) * row.falloff.scale);
  return order_key(0.0f - static_cast<float>(fabs(information - mean)), 0.0f, v);
}

// y is that of the token. Of tokens that are -inf it says nothing.
__device__ bool keeps(const Row& row, const Kept& kept, int v, float y) {
  return order_key(y, row.maximum, v) <= kept.last && (kept.least_mass == 0 || mass_of(row, y) >= kept.least_mass) &&
         (kept.last_typical == kLastKey || typical_key(row, kept.mean, v, y) <= kept.last_typical);
}

// The sum of f(y) over the tokens listed that are kept.
template <int kThreads, class F>
__device__ uint64_t sum_of_kept(const Row& row, const Kept& kept, const F& f) {
  return sum_of_list<kThreads>(row, [&](int v) {
    const float y = row.y[v];
    return keeps(row, kept, v, y) ? f(y) : 0;
  });
}

template <int kThreads>
__device__ uint64_t kept_mass(const Row& row, const Kept& kept) {
  return sum_of_kept<kThreads>(row, kept, [&](float y) { return mass_of(row, y); });
}

// The last key of the first n of the order.
template <int kThreads>
__device__ uint64_t last_of_first(const Row& row, int n, Shared<kThreads>& shared) {
  const auto view = [&](int i) { return Entry{true, key_of(row, row.list[i]), 1}; };
  return shortest_prefix<kThreads>(row.size, static_cast<uint64_t>(n), view, shared.digits);
}

template <int kThreads>
__device__ void keep_mass(const Row& row, uint64_t needed, Kept* kept, Shared<kThreads>& shared) {
  const auto view = [&](int i) {
    const int v = row.list[i];
    return Entry{true, key_of(row, v), mass_at(row, v)};
  };
  kept->last = shortest_prefix<kThreads>(row.size, needed, view, shared.digits);
}

template <int kThreads>
__device__ void keep_typical(const Row& row, double p, Kept* kept, Shared<kThreads>& shared) {
  const uint64_t mass = kept_mass<kThreads>(row, *kept);
  const uint64_t weighted = sum_of_kept<kThreads>(row, *kept, [&](float y) { return weighted_mass_of(row, y); });
  const double mean = static_cast<double>(weighted) / static_cast<double>(mass);
  const auto view = [&](int i) {
    const int v = row.list[i];
    const float y = row.y[v];
    return Entry{keeps(row, *kept, v, y), typical_key(row, mean, v, y), mass_of(row, y)};
  };
  kept->last_typical = shortest_prefix<kThreads>(row.size, fraction_of_mass(p, mass), view, shared.digits);
  kept->mean = mean;
}

// Of the tokens listed; `mass` of all tokens.
template <int kThreads>
__device__ Kept filter(const Row& row, const SampleSettings& s, int k, uint64_t mass, Shared<kThreads>& shared) {
  Kept kept;
  if (k > 0) {
    kept.last = last_of_first(row, k, shared);
    if (s.top_p < 1) mass = kept_mass<kThreads>(row, kept);
  }
  if (s.top_p < 1) keep_mass(row, fraction_of_mass(s.top_p, mass), &kept, shared);
  if (s.min_p > 0) kept.least_mass = fraction_of_mass(s.min_p, kFullMass);
  if (s.typical_p < 1) keep_typical(row, s.typical_p, &kept, shared);
  return kept;
}

// ---- step 4 ---------------------------------------------------------------------------------------------------------

struct Draw {
  int token;
  int64_t num_kept;
  uint64_t mass;
};

// The first token whose running mass exceeds `target`: by the masses of ranges, of threads, then one by one.
template <int kThreads>
__device__ int token_at(const Row& row, int tokens_of_range, uint64_t target, Shared<kThreads>& shared) {
  int range = 0;
  for (; shared.range_mass[range] <= target; ++range) target -= shared.range_mass[range];
  const int each = (tokens_of_range + kThreads - 1) / kThreads;
  const int end = min((range + 1) * tokens_of_range, row.V);
  int v = range * tokens_of_range + static_cast<int>(threadIdx.x) * each;
  uint64_t mine = 0;
  for (int i = v; i < min(v + each, end); ++i) mine += mass_at(row, i);
  const uint64_t running = block_scan<kThreads>(mine, Plus{});
  if (running > target && running - mine <= target) {
    target -= running - mine;
    for (uint64_t mass; (mass = mass_at(row, v)) <= target; ++v) target -= mass;
    shared.token = v;
  }
  __syncthreads();
  return shared.token;
}

template <int kThreads>
__device__ Draw draw_kept(const Row& row, const Kept& kept, uint64_t u, Shared<kThreads>& shared) {
  const uint64_t mass = kept_mass<kThreads>(row, kept);
  const auto view = [&](int i) {
    const int v = row.list[i];
    const float y = row.y[v];
    return Entry{keeps(row, kept, v, y), static_cast<uint64_t>(v), mass_of(row, y)};
  };
  const uint64_t needed = multiply_high(u, mass) + 1;
  const int token = static_cast<int>(shortest_prefix<kThreads>(row.size, needed, view, shared.digits));
  const uint64_t num_kept = sum_of_kept<kThreads>(row, kept, [](float) { return uint64_t{1}; });
  return {token, static_cast<int64_t>(num_kept), mass};
}

// ---- the results ----------------------------------------------------------------------------------------------------

// Tokens before this one. The list, where the token comes from it, has them all.
template <int kThreads>
__device__ int64_t rank_of(const Row& row, bool is_listed, int token) {
  if (token == row.first) return 0;
  const uint64_t key = key_of(row, token);
  if (is_listed) {
    const uint64_t rank = sum_of_list<kThreads>(row, [&](int v) { return key_of(row, v) < key; });
    return static_cast<int64_t>(rank);
  }
  int before = 0;
  const float mine = row.y[token];
  for_each_token(row, [&](int v, float y) { before += (y > mine) | ((y == mine) & (v < token)); });
  return block_reduce<kThreads>(before, Plus{});
}

// The first num_logprobs of the order. `room` is for a power of two of them.
template <int kThreads>
__device__ void write_top(const AnySample& a, int64_t b, const Row& row, double temperature, double log_total,
                          uint64_t* room, Shared<kThreads>& shared) {
  const int n = static_cast<int>(min(a.num_logprobs, static_cast<int64_t>(row.num_live)));
  const uint64_t last = n < row.num_live ? last_of_first(row, n, shared) : kLastKey;
  int whole = 1;
  while (whole < n) whole *= 2;
  uint64_t* keys = whole <= kSortedInShared ? shared.sorted : room;
  if (threadIdx.x == 0) shared.num_sorted = 0;
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i - lane_index() < row.size; i += kThreads) {
    const uint64_t key = i < row.size ? key_of(row, row.list[i]) : kLastKey;
    append(i < row.size && key <= last, key, keys, &shared.num_sorted);
  }
  for (int i = n + static_cast<int>(threadIdx.x); i < whole; i += kThreads) keys[i] = kLastKey;
  sort<kThreads>(keys, whole);
  for (int i = static_cast<int>(threadIdx.x); i < a.num_logprobs; i += kThreads) {
    const double d = i < n ? (value_of(keys[i]) - row.maximum) + 0.0f : 0;
    a.top_ids[b * a.num_logprobs + i] = i < n ? id_of(keys[i]) : -1;
    a.top_logprobs[b * a.num_logprobs + i] = i < n ? static_cast<float>(d / temperature - log_total) : -INFINITY;
  }
}

__device__ void write_processed(const AnySample& a, int64_t b, const Row& row, double temperature, const Kept& kept) {
  float* processed = a.processed + b * a.V;
  const int end = min(row.end, row.V);
  for_each_token(row, [&](int v, float y) {
    if (v >= end) return;
    processed[v] = keeps(row, kept, v, y) ? static_cast<float>(y / temperature) : -INFINITY;
  });
}

template <int kThreads>
__device__ void write_invalid(const AnySample& a, int64_t b) {
  if (threadIdx.x == 0) {
    a.token[b] = -1;
    a.valid[b] = false;
    a.num_kept[b] = 0;
    a.filtered_logprob[b] = NAN;
    if (a.logprob != nullptr) a.logprob[b] = NAN;
    if (a.entropy != nullptr) a.entropy[b] = NAN;
    if (a.rank != nullptr) a.rank[b] = 0;
  }
  for (int64_t i = threadIdx.x; i < a.num_logprobs; i += kThreads) {
    a.top_ids[b * a.num_logprobs + i] = -1;
    a.top_logprobs[b * a.num_logprobs + i] = NAN;
  }
  if (a.processed == nullptr) return;
  for (int64_t v = threadIdx.x; v < a.V; v += kThreads) a.processed[b * a.V + v] = -INFINITY;
}

// By one thread. log_total and `all` are there where the plan has sums.
__device__ void write_drawn(const AnySample& a, int64_t b, const Row& row, double temperature, const Draw& drawn,
                            double log_total, const Sums& all) {
  const double scaled = static_cast<double>((row.y[drawn.token] - row.maximum) + 0.0f) / temperature;
  a.token[b] = drawn.token;
  a.valid[b] = true;
  a.num_kept[b] = drawn.num_kept;
  a.filtered_logprob[b] = static_cast<float>(scaled - log_mass(drawn.mass));
  if (a.logprob != nullptr) a.logprob[b] = static_cast<float>(scaled - log_total);
  if (a.entropy == nullptr) return;
  const double bits = static_cast<double>(all.weighted) / static_cast<double>(all.mass);
  a.entropy[b] = static_cast<float>(log_total + kLn2 * bits);
}

__device__ uint64_t* sort_room(const AnySample& a, int64_t b) {
  const int64_t whole = (a.V + kGroup - 1) / kGroup * kGroup;
  int64_t sorted = 1;
  while (sorted < a.num_logprobs) sorted *= 2;
  uint64_t* rooms = reinterpret_cast<uint64_t*>(static_cast<float*>(a.workspace) + 2 * a.B * whole);
  return rooms + b * ((sorted + 1) / 2 * 2);
}

// Everything behind the first two passes: the row is described, and where the plan has sums, shared.range_mass filled
// and `all` the sums of all tokens.
template <int kThreads>
__device__ void finish_row(const AnySample& a, const SampleSettings& s, int64_t b, Row row, const Plan& plan,
                           const Sums& all, int tokens_of_range, float maximum_of_thread, Shared<kThreads>& shared) {
  const int num_top = static_cast<int>(min(a.num_logprobs, static_cast<int64_t>(row.num_live)));
  if (plan.lists || num_top > 0) {
    float least = 0;  // the maximum itself is always listed
    if (plan.lists) least = reached_by_kept(row, s, plan.k, all.mass, maximum_of_thread, shared);
    if (num_top > 1) least = min(least, reached_by(row, num_top, maximum_of_thread, shared));
    row.size = list_tokens(row, least, shared);
  }

  const uint64_t u = sample_u64(a, b);
  Kept kept;
  Draw drawn = {row.first, 1, kFullMass};
  if (plan.lists) {
    kept = filter(row, s, plan.k, all.mass, shared);
    drawn = draw_kept(row, kept, u, shared);
  } else if (plan.k == 0) {
    drawn = {token_at(row, tokens_of_range, multiply_high(u, all.mass), shared), row.num_live, all.mass};
  } else {
    kept.last = key_of(row, row.first);
  }

  const double temperature = effective_temperature(s), log_total = plan.sums ? log_mass(all.mass) : 0;
  if (threadIdx.x == 0) write_drawn(a, b, row, temperature, drawn, log_total, all);
  if (a.rank != nullptr) {
    const int64_t rank = rank_of<kThreads>(row, plan.lists, drawn.token);
    if (threadIdx.x == 0) a.rank[b] = rank;
  }
  if (a.num_logprobs > 0) write_top(a, b, row, temperature, log_total, sort_room(a, b), shared);
  if (a.processed != nullptr) write_processed(a, b, row, temperature, kept);
}

// ---- one block a row ------------------------------------------------------------------------------------------------

template <int kThreads>
__device__ void sample_row(const AnySample& a, int64_t b, const uint32_t* powers, Shared<kThreads>& shared) {
  const SampleSettings& s = a.settings[b * a.settings_stride];
  if (!check_settings(a, b, s)) return write_invalid<kThreads>(a, b);
  Row row = row_at<kThreads>(a, b, 0, 1);
  const Seen seen = fill<kThreads>(a, s, b, row);
  if (!describe(found_by_block<kThreads>(seen), s, powers, &row)) return write_invalid<kThreads>(a, b);
  const Plan plan = plan_of(a, s, row);
  Sums all = {0, 0};
  if (plan.sums) {
    uint64_t of_warp;
    all = sum_masses<kThreads>(row, a.entropy != nullptr, &of_warp);
    if (lane_index() == 0) shared.range_mass[warp_index()] = of_warp;
    __syncthreads();
  }
  const int tokens_of_range = share_of_warp<kThreads>(tokens_of_slice(row.V, 1));
  finish_row(a, s, b, row, plan, all, tokens_of_range, seen.maximum, shared);
}

template <int kThreads>
__global__ void __launch_bounds__(kThreads, 1) sample_rows(AnySample a) {
  __shared__ Shared<kThreads> shared;
  const uint32_t* powers = powers_of_block();
  for (int64_t b = blockIdx.x; b < a.B; b += gridDim.x) {
    sample_row(a, b, powers, shared);
    __syncthreads();  // the next row uses the same memory
  }
}

// ---- several blocks a row -------------------------------------------------------------------------------------------

template <int kThreads>
__device__ SliceResult<kThreads>& result_of(const AnySample& a, const Row& row, int slice, int slices) {
  return *reinterpret_cast<SliceResult<kThreads>*>(row.list + slice * tokens_of_slice(a.V, slices));
}

// What all blocks of the row saw, in every thread.
template <int kThreads>
__device__ Found found_by_all(const AnySample& a, const Row& row, int slices) {
  Found found;
  for (int slice = 0; slice < slices; ++slice) found.add(result_of<kThreads>(a, row, slice, slices).found);
  return found;
}

template <int kThreads>
__global__ void __launch_bounds__(kThreads) fill_slices(AnySample a, int slices) {
  for (int64_t i = blockIdx.x; i < a.B * slices; i += gridDim.x) {
    const int64_t b = i / slices;
    const int slice = static_cast<int>(i % slices);
    const SampleSettings& s = a.settings[b * a.settings_stride];
    if (wrong_setting(s) >= 0) continue;
    const Row row = row_at<kThreads>(a, b, slice, slices);
    const Seen seen = fill<kThreads>(a, s, b, row);
    const Found found = found_by_block<kThreads>(seen);
    SliceResult<kThreads>& result = result_of<kThreads>(a, row, slice, slices);
    result.maximum_of_thread[threadIdx.x] = seen.maximum;
    if (threadIdx.x == 0) result.found = found;
  }
}

template <int kThreads>
__global__ void __launch_bounds__(kThreads) sum_slices(AnySample a, int slices) {
  const uint32_t* powers = powers_of_block();
  for (int64_t i = blockIdx.x; i < a.B * slices; i += gridDim.x) {
    const int64_t b = i / slices;
    const int slice = static_cast<int>(i % slices);
    const SampleSettings& s = a.settings[b * a.settings_stride];
    if (wrong_setting(s) >= 0) continue;
    Row row = row_at<kThreads>(a, b, slice, slices);
    if (!describe(found_by_all<kThreads>(a, row, slices), s, powers, &row) || !plan_of(a, s, row).sums) continue;
    uint64_t of_warp;
    const Sums sums = sum_masses<kThreads>(row, a.entropy != nullptr, &of_warp);
    if (threadIdx.x == 0) result_of<kThreads>(a, row, slice, slices).sums = sums;
  }
}

template <int kThreads>
__device__ void finish_slices(const AnySample& a, int64_t b, int slices, const uint32_t* powers,
                              Shared<kThreads>& shared) {
  const SampleSettings& s = a.settings[b * a.settings_stride];
  if (!check_settings(a, b, s)) return write_invalid<kThreads>(a, b);
  Row row = row_at<kThreads>(a, b, 0, 1);
  if (!describe(found_by_all<kThreads>(a, row, slices), s, powers, &row)) return write_invalid<kThreads>(a, b);
  const Plan plan = plan_of(a, s, row);
  Sums all = {0, 0};
  float maximum_of_thread = -INFINITY;
  for (int slice = 0; slice < slices; ++slice) {
    const SliceResult<kThreads>& result = result_of<kThreads>(a, row, slice, slices);
    maximum_of_thread = max(maximum_of_thread, result.maximum_of_thread[threadIdx.x]);
    if (!plan.sums) continue;
    all.mass += result.sums.mass;
    all.weighted += result.sums.weighted;
    if (threadIdx.x == 0) shared.range_mass[slice] = result.sums.mass;
  }
  __syncthreads();  // from here on the list may take the results' place
  finish_row(a, s, b, row, plan, all, tokens_of_slice(a.V, slices), maximum_of_thread, shared);
}

template <int kThreads>
__global__ void __launch_bounds__(kThreads, 1) finish_rows(AnySample a, int slices) {
  __shared__ Shared<kThreads> shared;
  const uint32_t* powers = powers_of_block();
  for (int64_t b = blockIdx.x; b < a.B; b += gridDim.x) {
    finish_slices(a, b, slices, powers, shared);
    __syncthreads();  // the next row uses the same memory
  }
}

// ---- launches -------------------------------------------------------------------------------------------------------

// Enough for every multiprocessor to have a block.
int slices_of_row(int64_t B, int64_t V) {
  const int64_t wanted = device_attribute("sample", cudaDevAttrMultiProcessorCount) / B;
  const int64_t most = std::min<int64_t>(V / kLeastSlice, kMostSlices);
  return static_cast<int>(std::max<int64_t>(std::min(wanted, most), 1));
}

void execute(const AnySample& a, void* stream) {
  if (a.B == 0) return;
  const unsigned rows = grid_size(a.B, kMostBlocks);
  if (a.V <= kSmallVocabulary) {
    return launch("sample", sample_rows<kSmallBlock>, {.grid = rows, .block = kSmallBlock}, stream, a);
  }
  const int slices = slices_of_row(a.B, a.V);
  if (slices == 1) {
    return launch("sample", sample_rows<kLargeBlock>, {.grid = rows, .block = kLargeBlock}, stream, a);
  }
  const LaunchShape sliced = {.grid = grid_size(a.B * slices, kMostBlocks), .block = kLargeBlock};
  launch("sample", fill_slices<kLargeBlock>, sliced, stream, a, slices);
  launch("sample", sum_slices<kLargeBlock>, sliced, stream, a, slices);
  launch("sample", finish_rows<kLargeBlock>, {.grid = rows, .block = kLargeBlock}, stream, a, slices);
}

template <class T>
constexpr Storage kStorage = Storage::kFloat;
template <>
constexpr Storage kStorage<bfloat16> = Storage::kBfloat16;
template <>
constexpr Storage kStorage<float16> = Storage::kFloat16;

template <class T>
AnySample any(const Sample<T>& a) {
  return {std::bit_cast<Sample<void>>(a), kStorage<T>};  // they differ in what a pointer points to
}

}  // namespace

template <class Args>
void run(const Args& args, void* stream) {
  execute(any(args), stream);
}

template void run(const Sample<float>&, void*);
template void run(const Sample<bfloat16>&, void*);
template void run(const Sample<float16>&, void*);

}  // namespace llmkern::cuda
