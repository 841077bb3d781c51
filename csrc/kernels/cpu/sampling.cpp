// SPDX-License-Identifier: Apache-2.0
// Sampling on the CPU; the contract is kernels/sampling.h.
//
// Nothing is sorted. One pass makes z, one sums the masses. The first filter lists the tokens that can pass it
// (selection.h); the exact thresholds, later filters and the draw look at the list alone. Without a filter there is no
// list: the draw skips whole blocks by their masses.
#include "kernels/sampling.h"

#include <cfloat>
#include <cmath>

#include "kernels/cpu/scratch.h"
#include "kernels/cpu/selection.h"
#include "kernels/run.h"

namespace llmkern::cpu::LLMKERN_ISA {

namespace {

constexpr int64_t kGrainTokens = 1 << 14;  // tokens worth waking another core for

struct Workspace {
  float *y, *z;            // [V]
  int32_t* occurrences;    // [V]
  uint64_t* block_mass;    // [ceil(V / kBlock)]
  Candidate *kept, *work;  // [V]
};

struct Sums {
  uint64_t mass, weighted;
};

struct Draw {
  int64_t token, num_kept;
  uint64_t mass;
};

Workspace workspace(int64_t V) {
  const int64_t whole = (V + kBlock - 1) / kBlock * kBlock, blocks = whole / kBlock;
  const int64_t per_token = 2 * sizeof(float) + sizeof(int32_t) + 2 * sizeof(Candidate);
  char* memory = scratch<char>(Slot::kKernel, whole * per_token + blocks * int64_t{sizeof(uint64_t)});
  const auto take = [&memory](int64_t bytes) {
    char* taken = memory;
    memory += bytes;
    return static_cast<void*>(taken);
  };
  Workspace w;
  w.y = static_cast<float*>(take(whole * sizeof(float)));
  w.z = static_cast<float*>(take(whole * sizeof(float)));
  w.occurrences = static_cast<int32_t*>(take(whole * sizeof(int32_t)));
  w.kept = static_cast<Candidate*>(take(whole * sizeof(Candidate)));
  w.work = static_cast<Candidate*>(take(whole * sizeof(Candidate)));
  w.block_mass = static_cast<uint64_t*>(take(blocks * sizeof(uint64_t)));
  return w;
}

// ---- steps 1 and 2: from logits to z ----

void add_bias(const Sample& a, int64_t b, float* y) {
  const float* logits = a.logits + b * a.V;
  const float* bias = a.bias == nullptr ? nullptr : a.bias + b * a.bias_stride;
  const bool* allowed = a.allowed == nullptr ? nullptr : a.allowed + b * a.allowed_stride;
  if (bias == nullptr) {
    for (int64_t v = 0; v < a.V; ++v) y[v] = logits[v];
  } else {
    for (int64_t v = 0; v < a.V; ++v) y[v] = logits[v] + bias[v];
  }
  if (allowed == nullptr) return;
  for (int64_t v = 0; v < a.V; ++v) y[v] = allowed[v] ? y[v] : -INFINITY;
}

// f(v) for every id of the row that is in the vocabulary.
template <class F>
void for_each_id(const int64_t* ids, int64_t length, int64_t b, int64_t V, const F& f) {
  if (ids == nullptr) return;
  for (int64_t i = b * length; i < (b + 1) * length; ++i) {
    if (ids[i] >= 0 && ids[i] < V) f(ids[i]);
  }
}

// Three passes over the ids, none over the vocabulary: forget, count, apply once.
void penalise(const Sample& a, const SampleSettings& s, int64_t b, int32_t* occurrences, float* y) {
  const auto forget = [&](int64_t v) { occurrences[v] = 0; };
  const auto apply = [&](int64_t v) {
    const int32_t count = occurrences[v];
    occurrences[v] = -1;
    if (count >= 0 && y[v] != -INFINITY) y[v] = penalised(y[v], s, count);
  };
  for_each_id(a.prompt_ids, a.prompt_length, b, a.V, forget);
  for_each_id(a.output_ids, a.output_length, b, a.V, forget);
  for_each_id(a.output_ids, a.output_length, b, a.V, [&](int64_t v) { ++occurrences[v]; });
  for_each_id(a.prompt_ids, a.prompt_length, b, a.V, apply);
  for_each_id(a.output_ids, a.output_length, b, a.V, apply);
}

// z = min(y * inverse, FLT_MAX), its maximum and how many are above -inf; false when the row is invalid.
bool scale(const float* y, float inverse, float* z, Row* row) {
  const int32_t largest = ordered(FLT_MAX);
  int32_t high = ordered(-INFINITY), low = ordered(INFINITY), num_live = 0;
  for (int64_t v = 0; v < row->V; ++v) {
    const float scaled = y[v] * inverse + 0.0f;  // -0 becomes 0
    const int32_t key = ordered(scaled);
    high = key > high ? key : high;
    low = key < low ? key : low;
    num_live += key > ordered(-INFINITY);
    z[v] = key > largest ? FLT_MAX : scaled;
  }
  row->maximum = from_ordered(high < largest ? high : largest);
  row->num_live = num_live;
  const bool has_nan = high > ordered(INFINITY) || low < ordered(-INFINITY);
  return !has_nan && num_live > 0;
}

// Fills w.z and the row; false when it is invalid.
bool logits_to_z(const Sample& a, const SampleSettings& s, int64_t b, const Workspace& w, Row* row) {
  const float* y = a.logits + b * a.V;
  if (a.bias != nullptr || a.allowed != nullptr || penalises(a, s)) {
    add_bias(a, b, w.y);
    if (penalises(a, s)) penalise(a, s, b, w.occurrences, w.y);
    y = w.y;
  }
  return scale(y, inverse_temperature(s), w.z, row);
}

// ---- step 3: masses ----

Sums sum_masses(const Row& row, uint64_t* block_mass) {
  Sums total = {0, 0};
  for (int64_t begin = 0; begin < row.V; begin += kBlock) {
    const float* z = row.z + begin;
    const int64_t n = block_size(begin, row.V);
    float mass[kBlock];
    for (int64_t i = 0; i < n; ++i) mass[i] = exp_mass(z[i] - row.maximum);
    uint64_t sum = 0, weighted = 0;
    for (int64_t i = 0; i < n; ++i) {
      sum += round_to_integer(mass[i]);
      weighted += weighted_mass(mass[i], z[i] - row.maximum);
    }
    block_mass[begin / kBlock] = sum;
    total.mass += sum;
    total.weighted += weighted;
  }
  return total;
}

Sums sum_kept(const Row& row, const Candidate* kept, int64_t n) {
  Sums total = {0, 0};
  for (int64_t i = 0; i < n; ++i) {
    total.mass += kept[i].mass;
    total.weighted += weighted_mass(static_cast<float>(kept[i].mass), kept[i].value - row.maximum);
  }
  return total;
}

// ---- step 4: filters ----

int64_t keep_mass(const Workspace& w, int64_t n, uint64_t needed) {
  return keep_prefix(w.kept, n, needed, w.work, [](const Candidate& c) { return c; });
}

int64_t keep_min_p(const Workspace& w, int64_t n, double p) {
  const uint64_t least = fraction_of_mass(p, kFullMass);
  int64_t size = 0;
  for (int64_t i = 0; i < n; ++i) {
    const Candidate c = w.kept[i];
    w.kept[size] = c;
    size += c.mass >= least;
  }
  return size;
}

int64_t keep_typical(const Row& row, const Workspace& w, int64_t n, double p) {
  const Sums sums = sum_kept(row, w.kept, n);
  const double mean = static_cast<double>(sums.weighted) / static_cast<double>(sums.mass);
  return keep_prefix(w.kept, n, fraction_of_mass(p, sums.mass), w.work, [&](const Candidate& c) {
    const double x = -static_cast<double>(c.value - row.maximum);
    return Candidate{0.0f - static_cast<float>(std::fabs(x - mean)), c.id, c.mass};
  });
}

// Lists in w.kept the tokens that pass every filter; k = 0 keeps all. The number of them.
int64_t filter(const Row& row, const SampleSettings& s, const Workspace& w, int64_t k, uint64_t mass) {
  int64_t n = k;
  if (k == 1) {
    w.kept[0] = {row.maximum, first_of_order(row), kFullMass};
    return 1;  // the other filters keep it
  }
  if (k > 1) {
    list_first(row, k, w.y, w.work, w.kept);
    if (s.top_p < 1) n = keep_mass(w, n, fraction_of_mass(s.top_p, sum_kept(row, w.kept, n).mass));
  } else if (s.top_p < 1) {
    const uint64_t needed = fraction_of_mass(s.top_p, mass);
    // All tokens of less mass than this cannot hold together what the prefix leaves out.
    n = list_mass(row, (mass - needed) / static_cast<uint64_t>(row.V), w.kept);
    n = keep_mass(w, n, needed);
  } else {
    n = list_mass(row, s.min_p > 0 ? fraction_of_mass(s.min_p, kFullMass) : 0, w.kept);
  }
  if (s.min_p > 0) n = keep_min_p(w, n, s.min_p);
  return s.typical_p < 1 ? keep_typical(row, w, n, s.typical_p) : n;
}

// ---- step 5 and the results ----

Draw draw_any(const Row& row, const uint64_t* block_mass, uint64_t u, uint64_t mass) {
  uint64_t target = multiply_high(u, mass);
  int64_t begin = 0;
  while (block_mass[begin / kBlock] <= target) {
    target -= block_mass[begin / kBlock];
    begin += kBlock;
  }
  uint64_t in_block[kBlock];
  masses(row.z + begin, block_size(begin, row.V), row.maximum, in_block);
  int64_t i = 0;
  while (in_block[i] <= target) target -= in_block[i++];
  return {begin + i, row.num_live, mass};
}

Draw draw_kept(const Candidate* kept, int64_t n, uint64_t u) {
  uint64_t mass = 0;
  for (int64_t i = 0; i < n; ++i) mass += kept[i].mass;
  uint64_t target = multiply_high(u, mass);
  int64_t i = 0;
  while (kept[i].mass <= target) target -= kept[i++].mass;
  return {kept[i].id, n, mass};
}

void write_top(const Sample& a, int64_t b, const Row& row, const Workspace& w, double log_total) {
  const int64_t n = a.num_logprobs < row.num_live ? a.num_logprobs : row.num_live;
  int64_t* ids = a.top_ids + b * a.num_logprobs;
  float* logprobs = a.top_logprobs + b * a.num_logprobs;
  list_first(row, n, w.y, w.work, w.kept);
  sort_by_order(w.kept, n);
  for (int64_t i = 0; i < n; ++i) {
    ids[i] = w.kept[i].id;
    logprobs[i] = static_cast<float>(static_cast<double>(w.kept[i].value - row.maximum) - log_total);
  }
  for (int64_t i = n; i < a.num_logprobs; ++i) {
    ids[i] = -1;
    logprobs[i] = -INFINITY;
  }
}

void write_invalid(const Sample& a, int64_t b) {
  a.token[b] = -1;
  a.logprob[b] = a.filtered_logprob[b] = a.entropy[b] = NAN;
  a.rank[b] = a.num_kept[b] = 0;
  for (int64_t i = b * a.num_logprobs; i < (b + 1) * a.num_logprobs; ++i) {
    a.top_ids[i] = -1;
    a.top_logprobs[i] = NAN;
  }
}

void sample_row(const Sample& a, int64_t b, const Workspace& w) {
  const SampleSettings& s = a.settings[b * a.settings_stride];
  Row row = {w.z, a.V, 0, 0};
  if (!logits_to_z(a, s, b, w, &row)) return write_invalid(a, b);
  const double wanted = is_greedy(s) ? 1 : s.top_k;
  const int64_t k = wanted < static_cast<double>(row.num_live) ? static_cast<int64_t>(wanted) : 0;
  const bool filtered = k > 0 || s.top_p < 1 || s.min_p > 0 || s.typical_p < 1;

  const Sums all = sum_masses(row, w.block_mass);
  const uint64_t u = philox_u64(static_cast<uint64_t>(a.seeds[b * a.seed_stride]), Purpose::kSample,
                                static_cast<uint64_t>(a.positions[b]));
  const Draw drawn =
      filtered ? draw_kept(w.kept, filter(row, s, w, k, all.mass), u) : draw_any(row, w.block_mass, u, all.mass);

  const double d = row.z[drawn.token] - row.maximum, log_total = log_mass(all.mass);
  a.token[b] = drawn.token;
  a.logprob[b] = static_cast<float>(d - log_total);
  a.filtered_logprob[b] = static_cast<float>(d - log_mass(drawn.mass));
  a.rank[b] = rank_of(row, drawn.token);
  a.num_kept[b] = drawn.num_kept;
  a.entropy[b] = static_cast<float>(log_total + static_cast<double>(all.weighted) / static_cast<double>(all.mass));
  if (a.num_logprobs > 0) write_top(a, b, row, w, log_total);
}

void execute(const Sample& a, const Parallel& parallel) {
  parallel(a.B, kGrainTokens / a.V + 1, [&](int64_t begin, int64_t end) {
    const Workspace w = workspace(a.V);
    for (int64_t b = begin; b < end; ++b) sample_row(a, b, w);
  });
}

}  // namespace

template <class Args>
void run(const Args& args, const Parallel& parallel) {
  execute(args, parallel);
}

template void run(const Sample&, const Parallel&);

}  // namespace llmkern::cpu::LLMKERN_ISA
