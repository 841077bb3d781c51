// SPDX-License-Identifier: Apache-2.0
// Sampling on CUDA; the contract is kernels/sampling.h.
//
// No row is sorted. One pass makes z, one sums the masses. What the filters keep and the first num_logprobs tokens are
// above a bound that is quickly found: one more pass lists the tokens above it, and everything else (thresholds, draw,
// rank) is a selection from that list (selection.cuh). Without a filter the masses of ranges lead to the token drawn.
//
// One block does a row. Where that would leave most of the GPU idle, the two passes in front, which look at every token
// and cost the most, go to several blocks a row in two launches of their own; then one block a row does the rest. All
// sums are of integers: their order, hence the number of blocks and threads, changes no bit.
#include "kernels/sampling.h"

#include <algorithm>

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

// What the filters keep, of the tokens listed.
struct Kept {
  uint64_t last = kLastKey;  // of the order
  uint64_t least_mass = 0;
  uint64_t last_typical = kLastKey;  // of the order by deviation from this mean
  double mean = 0;
};

// ---- settings -------------------------------------------------------------------------------------------------------

__device__ bool check_settings(const Sample& a, int64_t b, const SampleSettings& s) {
  const int column = wrong_setting(s);
  if (column < 0) return true;
  if (threadIdx.x == 0) {
    const double value = reinterpret_cast<const double*>(a.settings + b * a.settings_stride)[column];
    report(a.error, Mistake::kSampleSetting, b, static_cast<int64_t>(double_to_bits(value)), column);
  }
  return false;
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
// d is the exact difference rounded once, and exp_mass errs by 1e-7 before it rounds to an integer, which matters to
// small masses: half of one is ln 2 = 0.693.
__device__ float reached_with(uint64_t mass) {
  if (mass == 0) return -INFINITY;
  return static_cast<float>(log_mass(mass)) - (mass < 1024 ? 0.7f : 0.001f);
}

// The distance that all tokens reach which a filter can keep, k of top_k and 0 for none.
template <int kThreads>
__device__ float reached_by_kept(const Row& row, const SampleSettings& s, int k, uint64_t mass, float maximum_of_thread,
                                 Shared<kThreads>& shared) {
  if (k > 0) return reached_by(row, k, maximum_of_thread, shared);
  // All tokens of less mass than this cannot hold together what the prefix leaves out.
  if (s.top_p < 1) return reached_with((mass - fraction_of_mass(s.top_p, mass)) / static_cast<uint64_t>(row.V));
  return s.min_p > 0 ? reached_with(fraction_of_mass(s.min_p, kFullMass)) : -INFINITY;
}

template <int kThreads>
__device__ int list_tokens(const Row& row, float least, Shared<kThreads>& shared) {
  if (threadIdx.x == 0) shared.listed = 0;
  __syncthreads();
  for_each_token(
      row, [&](int v, float z) { append((z > -INFINITY) & (z - row.maximum >= least), v, row.list, &shared.listed); });
  __syncthreads();
  return shared.listed;
}

// ---- step 4: filters ------------------------------------------------------------------------------------------------

__device__ uint64_t z_key(const Row& row, int v) { return order_key(row.z[v], row.maximum, v); }

__device__ uint64_t typical_key(const Row& row, double mean, int v) {
  const double x = -static_cast<double>(row.z[v] - row.maximum);
  return order_key(0.0f - static_cast<float>(fabs(x - mean)), 0.0f, v);
}

__device__ bool keeps(const Row& row, const Kept& kept, int v) {
  return z_key(row, v) <= kept.last && (kept.least_mass == 0 || mass_of(row, v) >= kept.least_mass) &&
         (kept.last_typical == kLastKey || typical_key(row, kept.mean, v) <= kept.last_typical);
}

template <int kThreads>
__device__ uint64_t kept_mass(const Row& row, const Kept& kept) {
  return sum_of_list<kThreads>(row, [&](int v) { return keeps(row, kept, v) ? mass_of(row, v) : 0; });
}

// The last key of the first n of the order.
template <int kThreads>
__device__ uint64_t last_of_first(const Row& row, int n, Shared<kThreads>& shared) {
  const auto view = [&](int i) { return Entry{true, z_key(row, row.list[i]), 1}; };
  return shortest_prefix<kThreads>(row.size, static_cast<uint64_t>(n), view, shared.digits);
}

template <int kThreads>
__device__ void keep_mass(const Row& row, uint64_t needed, Kept* kept, Shared<kThreads>& shared) {
  const auto view = [&](int i) {
    const int v = row.list[i];
    return Entry{true, z_key(row, v), mass_of(row, v)};
  };
  kept->last = shortest_prefix<kThreads>(row.size, needed, view, shared.digits);
}

template <int kThreads>
__device__ void keep_typical(const Row& row, double p, Kept* kept, Shared<kThreads>& shared) {
  const uint64_t mass = kept_mass<kThreads>(row, *kept);
  const uint64_t weighted =
      sum_of_list<kThreads>(row, [&](int v) { return keeps(row, *kept, v) ? weighted_mass_of(row, v) : 0; });
  const double mean = static_cast<double>(weighted) / static_cast<double>(mass);
  const auto view = [&](int i) {
    const int v = row.list[i];
    return Entry{keeps(row, *kept, v), typical_key(row, mean, v), mass_of(row, v)};
  };
  kept->last_typical = shortest_prefix<kThreads>(row.size, fraction_of_mass(p, mass), view, shared.digits);
  kept->mean = mean;
}

// k of top_k, 0 for none; `mass` of all tokens.
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

// ---- step 5 and the results -----------------------------------------------------------------------------------------

struct Draw {
  int token;
  int64_t rank, num_kept;
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
  for (int i = v; i < min(v + each, end); ++i) mine += mass_of(row, i);
  const uint64_t running = block_scan<kThreads>(mine, Plus{});
  if (running > target && running - mine <= target) {
    target -= running - mine;
    for (uint64_t mass; (mass = mass_of(row, v)) <= target; ++v) target -= mass;
    shared.token = v;
  }
  __syncthreads();
  return shared.token;
}

template <int kThreads>
__device__ Draw draw_any(const Row& row, int tokens_of_range, uint64_t u, uint64_t mass, Shared<kThreads>& shared) {
  const int token = token_at(row, tokens_of_range, multiply_high(u, mass), shared);
  const float z = row.z[token];
  int before = 0;
  for_each_token(row, [&](int v, float other) { before += (other > z) | ((other == z) & (v < token)); });
  return {token, block_reduce<kThreads>(before, Plus{}), row.num_live, mass};
}

template <int kThreads>
__device__ Draw draw_kept(const Row& row, const Kept& kept, uint64_t u, Shared<kThreads>& shared) {
  const uint64_t mass = kept_mass<kThreads>(row, kept);
  const auto view = [&](int i) {
    const int v = row.list[i];
    return Entry{keeps(row, kept, v), static_cast<uint64_t>(v), mass_of(row, v)};
  };
  const uint64_t needed = multiply_high(u, mass) + 1;
  const int token = static_cast<int>(shortest_prefix<kThreads>(row.size, needed, view, shared.digits));
  const uint64_t key = z_key(row, token);
  const uint64_t rank = sum_of_list<kThreads>(row, [&](int v) { return z_key(row, v) < key; });
  const uint64_t num_kept = sum_of_list<kThreads>(row, [&](int v) { return keeps(row, kept, v); });
  return {token, static_cast<int64_t>(rank), static_cast<int64_t>(num_kept), mass};
}

// The first num_logprobs of the order. `room` is for a power of two of them.
template <int kThreads>
__device__ void write_top(const Sample& a, int64_t b, const Row& row, double log_total, uint64_t* room,
                          Shared<kThreads>& shared) {
  const int n = static_cast<int>(min(a.num_logprobs, static_cast<int64_t>(row.num_live)));
  const uint64_t last = n < row.num_live ? last_of_first(row, n, shared) : kLastKey;
  int whole = 1;
  while (whole < n) whole *= 2;
  uint64_t* keys = whole <= kSortedInShared ? shared.sorted : room;
  if (threadIdx.x == 0) shared.num_sorted = 0;
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i - lane_index() < row.size; i += kThreads) {
    const uint64_t key = i < row.size ? z_key(row, row.list[i]) : kLastKey;
    append(i < row.size && key <= last, key, keys, &shared.num_sorted);
  }
  for (int i = n + static_cast<int>(threadIdx.x); i < whole; i += kThreads) keys[i] = kLastKey;
  sort<kThreads>(keys, whole);
  for (int i = static_cast<int>(threadIdx.x); i < a.num_logprobs; i += kThreads) {
    const double d = i < n ? value_of(keys[i]) - row.maximum : 0;
    a.top_ids[b * a.num_logprobs + i] = i < n ? id_of(keys[i]) : -1;
    a.top_logprobs[b * a.num_logprobs + i] = i < n ? static_cast<float>(d - log_total) : -INFINITY;
  }
}

template <int kThreads>
__device__ void write_invalid(const Sample& a, int64_t b) {
  if (threadIdx.x == 0) {
    a.token[b] = -1;
    a.logprob[b] = a.filtered_logprob[b] = a.entropy[b] = NAN;
    a.rank[b] = a.num_kept[b] = 0;
  }
  for (int64_t i = threadIdx.x; i < a.num_logprobs; i += kThreads) {
    a.top_ids[b * a.num_logprobs + i] = -1;
    a.top_logprobs[b * a.num_logprobs + i] = NAN;
  }
}

__device__ void write_drawn(const Sample& a, int64_t b, const Row& row, const Draw& drawn, const Sums& all) {
  const double d = row.z[drawn.token] - row.maximum, log_total = log_mass(all.mass);
  a.token[b] = drawn.token;
  a.logprob[b] = static_cast<float>(d - log_total);
  a.filtered_logprob[b] = static_cast<float>(d - log_mass(drawn.mass));
  a.rank[b] = drawn.rank;
  a.num_kept[b] = drawn.num_kept;
  a.entropy[b] = static_cast<float>(log_total + static_cast<double>(all.weighted) / static_cast<double>(all.mass));
}

__device__ uint64_t* sort_room(const Sample& a, int64_t b) {
  const int64_t whole = (a.V + kGroup - 1) / kGroup * kGroup;
  int64_t sorted = 1;
  while (sorted < a.num_logprobs) sorted *= 2;
  uint64_t* rooms = reinterpret_cast<uint64_t*>(static_cast<float*>(a.workspace) + 2 * a.B * whole);
  return rooms + b * ((sorted + 1) / 2 * 2);
}

// Everything behind the first two passes: the row is described, shared.range_mass filled, `all` the sums of all tokens.
template <int kThreads>
__device__ void finish_row(const Sample& a, const SampleSettings& s, int64_t b, Row row, const Sums& all,
                           int tokens_of_range, float maximum_of_thread, Shared<kThreads>& shared) {
  const double wanted = is_greedy(s) ? 1 : s.top_k;
  const int k = wanted < row.num_live ? static_cast<int>(wanted) : 0;
  // The first token alone needs no list: the other filters keep it.
  const bool filtered = k != 1 && (k > 1 || s.top_p < 1 || s.min_p > 0 || s.typical_p < 1);
  const int num_top = static_cast<int>(min(a.num_logprobs, static_cast<int64_t>(row.num_live)));
  if (filtered || num_top > 0) {
    float least = 0;  // the maximum itself is always listed
    if (filtered) least = reached_by_kept(row, s, k, all.mass, maximum_of_thread, shared);
    if (num_top > 1) least = min(least, reached_by(row, num_top, maximum_of_thread, shared));
    row.size = list_tokens(row, least, shared);
  }

  const uint64_t u = philox_u64(static_cast<uint64_t>(a.seeds[b * a.seed_stride]), Purpose::kSample,
                                static_cast<uint64_t>(a.positions[b]));
  Draw drawn = {row.first, 0, 1, kFullMass};
  if (filtered) {
    drawn = draw_kept(row, filter(row, s, k, all.mass, shared), u, shared);
  } else if (k == 0) {
    drawn = draw_any(row, tokens_of_range, u, all.mass, shared);
  }
  if (threadIdx.x == 0) write_drawn(a, b, row, drawn, all);
  if (a.num_logprobs > 0) write_top(a, b, row, log_mass(all.mass), sort_room(a, b), shared);
}

// ---- one block a row ------------------------------------------------------------------------------------------------

template <int kThreads>
__device__ void sample_row(const Sample& a, int64_t b, Shared<kThreads>& shared) {
  const SampleSettings& s = a.settings[b * a.settings_stride];
  if (!check_settings(a, b, s)) return write_invalid<kThreads>(a, b);
  Row row = row_at<kThreads>(a, b, 0, 1);
  const Seen seen = fill<kThreads>(a, s, b, row);
  if (!describe(found_by_block<kThreads>(seen), &row)) return write_invalid<kThreads>(a, b);
  uint64_t of_warp;
  const Sums all = sum_masses<kThreads>(row, &of_warp);
  if (lane_index() == 0) shared.range_mass[warp_index()] = of_warp;
  __syncthreads();
  finish_row(a, s, b, row, all, share_of_warp<kThreads>(tokens_of_slice(row.V, 1)), seen.maximum, shared);
}

template <int kThreads>
__global__ void __launch_bounds__(kThreads, 1) sample_rows(Sample a) {
  __shared__ Shared<kThreads> shared;
  for (int64_t b = blockIdx.x; b < a.B; b += gridDim.x) {
    sample_row<kThreads>(a, b, shared);
    __syncthreads();  // the next row uses the same memory
  }
}

// ---- several blocks a row -------------------------------------------------------------------------------------------

template <int kThreads>
__device__ SliceResult<kThreads>& result_of(const Sample& a, const Row& row, int slice, int slices) {
  return *reinterpret_cast<SliceResult<kThreads>*>(row.list + slice * tokens_of_slice(a.V, slices));
}

// What all blocks of the row saw, in every thread.
template <int kThreads>
__device__ Found found_by_all(const Sample& a, const Row& row, int slices) {
  Found found;
  for (int slice = 0; slice < slices; ++slice) found.add(result_of<kThreads>(a, row, slice, slices).found);
  return found;
}

template <int kThreads>
__global__ void __launch_bounds__(kThreads) fill_slices(Sample a, int slices) {
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
__global__ void __launch_bounds__(kThreads) sum_slices(Sample a, int slices) {
  for (int64_t i = blockIdx.x; i < a.B * slices; i += gridDim.x) {
    const int64_t b = i / slices;
    const int slice = static_cast<int>(i % slices);
    if (wrong_setting(a.settings[b * a.settings_stride]) >= 0) continue;
    Row row = row_at<kThreads>(a, b, slice, slices);
    if (!describe(found_by_all<kThreads>(a, row, slices), &row)) continue;
    uint64_t of_warp;
    const Sums sums = sum_masses<kThreads>(row, &of_warp);
    if (threadIdx.x == 0) result_of<kThreads>(a, row, slice, slices).sums = sums;
  }
}

template <int kThreads>
__device__ void finish_slices(const Sample& a, int64_t b, int slices, Shared<kThreads>& shared) {
  const SampleSettings& s = a.settings[b * a.settings_stride];
  if (!check_settings(a, b, s)) return write_invalid<kThreads>(a, b);
  Row row = row_at<kThreads>(a, b, 0, 1);
  if (!describe(found_by_all<kThreads>(a, row, slices), &row)) return write_invalid<kThreads>(a, b);
  Sums all = {0, 0};
  float maximum_of_thread = -INFINITY;
  for (int slice = 0; slice < slices; ++slice) {
    const SliceResult<kThreads>& result = result_of<kThreads>(a, row, slice, slices);
    all.mass += result.sums.mass;
    all.weighted += result.sums.weighted;
    maximum_of_thread = max(maximum_of_thread, result.maximum_of_thread[threadIdx.x]);
    if (threadIdx.x == 0) shared.range_mass[slice] = result.sums.mass;
  }
  __syncthreads();  // from here on the list may take the results' place
  finish_row(a, s, b, row, all, tokens_of_slice(a.V, slices), maximum_of_thread, shared);
}

template <int kThreads>
__global__ void __launch_bounds__(kThreads, 1) finish_rows(Sample a, int slices) {
  __shared__ Shared<kThreads> shared;
  for (int64_t b = blockIdx.x; b < a.B; b += gridDim.x) {
    finish_slices<kThreads>(a, b, slices, shared);
    __syncthreads();  // the next row uses the same memory
  }
}

// ---- launches -------------------------------------------------------------------------------------------------------

// Enough for every multiprocessor to have a block.
int slices_of_row(const Sample& a) {
  const int64_t wanted = device_attribute("sample", cudaDevAttrMultiProcessorCount) / a.B;
  const int64_t most = std::min<int64_t>(a.V / kLeastSlice, kMostSlices);
  return static_cast<int>(std::max<int64_t>(std::min(wanted, most), 1));
}

void execute(const Sample& a, void* stream) {
  if (a.B == 0) return;
  const unsigned rows = grid_size(a.B, kMostBlocks);
  if (a.V <= kSmallVocabulary) {
    return launch("sample", sample_rows<kSmallBlock>, {.grid = rows, .block = kSmallBlock}, stream, a);
  }
  const int slices = slices_of_row(a);
  if (slices == 1) {
    return launch("sample", sample_rows<kLargeBlock>, {.grid = rows, .block = kLargeBlock}, stream, a);
  }
  const LaunchShape sliced = {.grid = grid_size(a.B * slices, kMostBlocks), .block = kLargeBlock};
  launch("sample", fill_slices<kLargeBlock>, sliced, stream, a, slices);
  launch("sample", sum_slices<kLargeBlock>, sliced, stream, a, slices);
  launch("sample", finish_rows<kLargeBlock>, {.grid = rows, .block = kLargeBlock}, stream, a, slices);
}

}  // namespace

template <class Args>
void run(const Args& args, void* stream) {
  execute(args, stream);
}

template void run(const Sample&, void*);

}  // namespace llmkern::cuda
