// SPDX-License-Identifier: Apache-2.0
// One row on its way from logits to a token, by one worker or by a team that divides its blocks.
#pragma once

#include <cfloat>
#include <cmath>

#include "kernels/cpu/sampling/nucleus.h"
#include "kernels/cpu/scratch.h"
#include "kernels/cpu/team.h"
#include "kernels/sampling.h"

namespace llmkern::cpu::LLMKERN_ISA {

namespace {

struct Workspace {
  float *y, *mass;                        // [V]
  int32_t* occurrences;                   // [V]
  FloatVec *block_maxima, *block_minima;  // [blocks]
  uint64_t *block_mass, *block_weighted;  // [blocks]
  int32_t *block_count, *block_listed;    // [blocks]
  Candidate *kept, *work;                 // [V]

  // This thread's own memory.
  explicit Workspace(int64_t V) {
    const size_t blocks = static_cast<size_t>((V + kBlock - 1) / kBlock), whole = blocks * kBlock;
    const size_t per_token = 3 * sizeof(float) + 2 * sizeof(Candidate);
    const size_t per_block = 2 * sizeof(FloatVec) + 2 * sizeof(uint64_t) + 2 * sizeof(int32_t);
    memory_ = scratch<char>(Slot::kSampleRow, static_cast<int64_t>(whole * per_token + blocks * per_block));
    char* memory = memory_;
    const auto take = [&memory](auto*& array, size_t count) {
      array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(memory);
      memory += count * sizeof *array;
    };
    take(block_maxima, blocks);
    take(block_minima, blocks);
    take(y, whole);
    take(mass, whole);
    take(occurrences, whole);
    take(kept, whole);
    take(work, whole);
    take(block_mass, blocks);
    take(block_weighted, blocks);
    take(block_count, blocks);
    take(block_listed, blocks);
  }

 private:
  Scratch<char> memory_;
};

// The tokens that passed the filters: all, a list, or a prefix of the order.
struct Kept {
  enum Kind { kAll, kListed, kNucleus } kind;
  int64_t count;
  uint64_t mass;
  Prefix prefix;  // of a nucleus
};

template <class T>
class RowSampler {
 public:
  RowSampler(const Sample<T>& arguments, int64_t row, const Workspace& workspace)
      : a_(arguments), b_(row), s_(a_.settings[b_ * a_.settings_stride]), w_(workspace) {
    row_.y = copies() ? w_.y : as_float(a_.logits + b_ * a_.logits_stride);
    row_.V = a_.V;
    row_.block_maxima = w_.block_maxima;
    row_.temperature = effective_temperature(s_);
    row_.scale = falloff(row_.temperature);
    row_.next = reinterpret_cast<const char*>(a_.logits + (b_ + (b_ + 1 < a_.B)) * a_.logits_stride);
  }

  // Every worker of the team comes here, with blocks of its own.
  void run(const Share& share) {
    const bool leads = share.begin == 0;
    if (copies()) adjust(share);
    find_extremes(share);
    share.barrier.wait();
    if (leads) summarise();
    share.barrier.wait();
    if (valid_ && needs_total_) {
      sum_masses(share);
      share.barrier.wait();
      if (leads) total_ = block_total(w_.block_mass);
      share.barrier.wait();
    }
    if (valid_ && needs_nucleus()) {
      const NucleusWork work = {w_.mass, w_.block_mass, w_.block_count, w_.block_listed, w_.kept, w_.work, sizeof(T)};
      nucleus_.run(row_, fraction_of_mass(s_.top_p, total_), total_, work, share);
    }
    if (leads) finish();
  }

 private:
  static const float* as_float(const float* logits) { return logits; }
  template <class Half>
  static const float* as_float(const Half*) {
    return nullptr;  // never asked for: such logits are copied
  }

  // ---- step 1: from logits to y ----

  bool copies() const {
    return sizeof(T) != sizeof(float) || a_.bias != nullptr || a_.bias_ids != nullptr || a_.allowed != nullptr ||
           penalises(a_, s_);
  }

  void adjust(const Share& share) {
    const int64_t begin = share.begin * kBlock, end = row_.block_end(share.end - 1);
    add_bias(begin, end);
    if (a_.bias_ids != nullptr) add_sparse_bias(begin, end);
    if (a_.allowed_kind == AllowedKind::kBytes) mask_bytes(begin, end);
    if (a_.allowed_kind == AllowedKind::kBits) mask_bits(begin, end);
    if (!penalises(a_, s_)) return;
    share.barrier.wait();
    if (share.begin == 0) penalise();
    share.barrier.wait();
  }

  void add_bias(int64_t begin, int64_t end) {
    const T* logits = a_.logits + b_ * a_.logits_stride;
    if (a_.bias == nullptr) return convert(w_.y + begin, logits + begin, end - begin);
    const float* bias = a_.bias + b_ * a_.bias_stride;
    for_lanes<float>(begin, end,
                     [&](int64_t v, int64_t n) { store(w_.y + v, load_wide(logits + v, n) + load(bias + v, n), n); });
  }

  void add_sparse_bias(int64_t begin, int64_t end) {
    const int64_t first = b_ * a_.bias_ids_stride;
    for (int64_t i = first; i < first + a_.num_bias_ids; ++i) {
      const int64_t v = a_.bias_ids[i];
      if (v >= begin && v < end) w_.y[v] += a_.bias_values[i];
    }
  }

  void mask_bytes(int64_t begin, int64_t end) {
    const bool* allowed = static_cast<const bool*>(a_.allowed) + b_ * a_.allowed_stride;
    for (int64_t v = begin; v < end; ++v) w_.y[v] = allowed[v] ? w_.y[v] : -INFINITY;
  }

  void mask_bits(int64_t begin, int64_t end) {
    constexpr int64_t kWord = 32;
    const uint32_t* words = static_cast<const uint32_t*>(a_.allowed) + b_ * a_.allowed_stride;
    for (int64_t v = begin; v < end; v += kWord) {
      const uint32_t word = words[v / kWord];
      const int64_t n = end - v < kWord ? end - v : kWord;
      for (int64_t j = 0; j < n; ++j) w_.y[v + j] = word >> j & 1 ? w_.y[v + j] : -INFINITY;
    }
  }

  // f(v) for every id of the row that is in the vocabulary.
  template <class F>
  void for_each_id(const int64_t* ids, int64_t length, const F& f) const {
    if (ids == nullptr) return;
    for (int64_t i = b_ * length; i < (b_ + 1) * length; ++i) {
      if (ids[i] >= 0 && ids[i] < a_.V) f(ids[i]);
    }
  }

  // Three passes over the ids, none over the vocabulary: forget, count, apply once.
  void penalise() {
    int32_t* occurrences = w_.occurrences;
    const auto forget = [&](int64_t v) { occurrences[v] = 0; };
    const auto apply = [&](int64_t v) {
      const int32_t count = occurrences[v];
      occurrences[v] = -1;
      if (count >= 0 && w_.y[v] != -INFINITY) w_.y[v] = penalised(w_.y[v], s_, count);
    };
    for_each_id(a_.prompt_ids, a_.prompt_length, forget);
    for_each_id(a_.output_ids, a_.output_length, forget);
    for_each_id(a_.output_ids, a_.output_length, [&](int64_t v) { ++occurrences[v]; });
    for_each_id(a_.prompt_ids, a_.prompt_length, apply);
    for_each_id(a_.output_ids, a_.output_length, apply);
  }

  // ---- step 2: the maximum and the masses ----

  // By blocks and lanes; a block with a NaN has nothing but NaN as its maxima.
  void find_extremes(const Share& share) {
    for (int64_t block = share.begin; block < share.end; ++block) {
      FloatVec high = broadcast(-INFINITY), low = broadcast(INFINITY);
      LaneMask wrong = {};
      for_block(row_.y, block * kBlock, row_.block_end(block), [&](int64_t, FloatVec y) {
        high = max(y, high);
        low = min(y, low);
        wrong |= unordered(y, y);
      });
      w_.block_maxima[block] = lane_bits(wrong) != 0 ? broadcast(NAN) : high;
      w_.block_minima[block] = low;
    }
  }

  void summarise() {
    FloatVec high = broadcast(-INFINITY), low = broadcast(INFINITY);
    LaneMask wrong = {};
    for (int64_t block = 0; block < row_.blocks(); ++block) {
      high = max(w_.block_maxima[block], high);
      low = min(w_.block_minima[block], low);
      wrong |= unordered(w_.block_maxima[block], w_.block_maxima[block]);
    }
    row_.maximum = maximum<float>(high);
    valid_ = lane_bits(wrong) == 0 && row_.maximum > -INFINITY;
    if (row_.maximum == INFINITY) limit();
    // The last vector of the row may have been filled up with -inf.
    const bool all_live = -maximum<float>(-low) > -INFINITY;
    row_.num_live = all_live ? row_.V : count_live();
    const double wanted = is_greedy(s_) ? 1 : s_.top_k;
    top_k_ = wanted < static_cast<double>(row_.num_live) ? static_cast<int64_t>(wanted) : 0;
    needs_total_ = a_.logprob != nullptr || a_.entropy != nullptr || a_.num_logprobs > 0 || needs_nucleus() ||
                   (top_k_ == 0 && (s_.top_p < 1 || (s_.min_p == 0 && s_.typical_p == 1)));
  }

  // +inf counts as FLT_MAX.
  void limit() {
    const FloatVec largest = broadcast(FLT_MAX);
    const float* y = row_.y;
    for_lanes<float>(0, row_.V, [&](int64_t v, int64_t n) { store(w_.y + v, min(load(y + v, n), largest), n); });
    for (int64_t block = 0; block < row_.blocks(); ++block) {
      w_.block_maxima[block] = min(w_.block_maxima[block], largest);
    }
    row_.y = w_.y;
    row_.maximum = FLT_MAX;
  }

  int64_t count_live() const {
    int32_t count = 0;
    for (int64_t v = 0; v < row_.V; ++v) count += row_.y[v] > -INFINITY;
    return count;
  }

  bool needs_nucleus() const { return top_k_ == 0 && s_.top_p < 1 && s_.min_p == 0; }

  void sum_masses(const Share& share) {
    if (a_.entropy != nullptr) return needs_nucleus() ? sum_blocks<true, true>(share) : sum_blocks<false, true>(share);
    return needs_nucleus() ? sum_blocks<true, false>(share) : sum_blocks<false, false>(share);
  }

  template <bool kStores, bool kWeighs>
  void sum_blocks(const Share& share) {
    const Weigher weigher = row_.weigher();
    for (int64_t block = share.begin; block < share.end; ++block) {
      const FloatVec least = w_.block_minima[block] - weigher.maximum;
      const bool raises = lane_bits(at_least(weigher.lowest, least)) != 0;
      raises ? sum_block<kStores, kWeighs, true>(weigher, block) : sum_block<kStores, kWeighs, false>(weigher, block);
    }
  }

  template <bool kStores, bool kWeighs, bool kRaises>
  void sum_block(const Weigher& weigher, int64_t block) {
    ExactSum sum, weighted;
    for_block(row_.y, block * kBlock, row_.block_end(block), [&](int64_t i, FloatVec y) {
      const FloatVec mass = weigher.mass<kRaises>(y);
      sum.add(mass);
      if constexpr (kStores) store(w_.mass + i, mass);
      if constexpr (!kStores) prefetch_next(row_, i, sizeof(T));  // else when the masses are read again
      if constexpr (kWeighs) weighted.add(weigher.weighted(mass, y));
    });
    w_.block_mass[block] = sum.total();
    if constexpr (kWeighs) w_.block_weighted[block] = weighted.total();
  }

  uint64_t block_total(const uint64_t* sums) const {
    uint64_t total = 0;
    for (int64_t block = 0; block < row_.blocks(); ++block) total += sums[block];
    return total;
  }

  // ---- step 3: filters ----

  int64_t keep_mass(int64_t n, uint64_t needed) {
    return keep_prefix(w_.kept, n, needed, w_.work, [](const Candidate& c) { return c; });
  }

  int64_t keep_min_p(int64_t n) {
    const uint64_t least = fraction_of_mass(s_.min_p, kFullMass);
    int64_t size = 0;
    for (int64_t i = 0; i < n; ++i) {
      const Candidate c = w_.kept[i];
      w_.kept[size] = c;
      size += c.mass >= least;
    }
    return size;
  }

  int64_t keep_typical(int64_t n) {
    uint64_t mass = 0, weighted = 0;
    for (int64_t i = 0; i < n; ++i) {
      const Candidate& c = w_.kept[i];
      mass += c.mass;
      weighted += round_to_integer(weighted_mass(static_cast<float>(c.mass), c.value - row_.maximum, row_.scale));
    }
    const double mean = static_cast<double>(weighted) / static_cast<double>(mass);
    return keep_prefix(w_.kept, n, fraction_of_mass(s_.typical_p, mass), w_.work, [&](const Candidate& c) {
      const double information = -static_cast<double>((c.value - row_.maximum) * row_.scale.scale);
      return Candidate{0.0f - static_cast<float>(std::fabs(information - mean)), c.id, c.mass};
    });
  }

  // The first top_k of the order and, of these, top_p.
  int64_t list_top_k() {
    if (top_k_ == 1) {
      w_.kept[0] = {row_.maximum, first_of_order(row_), kFullMass};
      return 1;
    }
    const int64_t n = list_first(row_, top_k_, w_.work, w_.kept);
    return s_.top_p < 1 ? keep_mass(n, fraction_of_mass(s_.top_p, list_sum(w_.kept, n))) : n;
  }

  // The tokens that min_p keeps are a prefix of the order too: if the nucleus is not longer, it ends there.
  int64_t list_min_p() {
    const int64_t n = gather(row_, reached_by_mass(row_, fraction_of_mass(s_.min_p, kFullMass)), w_.kept);
    if (s_.top_p == 1) return n;
    const uint64_t needed = fraction_of_mass(s_.top_p, total_);
    return list_sum(w_.kept, n) < needed ? n : keep_mass(n, needed);
  }

  int64_t list_prefix(const Prefix& prefix) {
    const int64_t n = gather(row_, prefix.value, w_.kept);
    int64_t size = 0;
    for (int64_t i = 0; i < n; ++i) {
      const Candidate c = w_.kept[i];
      w_.kept[size] = c;
      size += prefix.keeps(c);
    }
    return size;
  }

  Kept filter() {
    int64_t n;
    if (top_k_ > 0) {
      n = list_top_k();
    } else if (s_.min_p > 0) {
      n = list_min_p();
    } else if (s_.top_p < 1) {
      const Nucleus& nucleus = nucleus_.found();
      if (s_.typical_p == 1) return {Kept::kNucleus, nucleus.count, nucleus.mass, nucleus.prefix};
      n = list_prefix(nucleus.prefix);
    } else if (s_.typical_p < 1) {
      n = gather(row_, kLeastLive, w_.kept);
    } else {
      return {Kept::kAll, row_.num_live, total_, {}};
    }
    if (s_.min_p > 0) n = keep_min_p(n);
    if (s_.typical_p < 1) n = keep_typical(n);
    return {Kept::kListed, n, list_sum(w_.kept, n), {}};
  }

  bool keeps(const Kept& kept, int64_t v) const {
    return kept.kind == Kept::kAll ? row_.y[v] > -INFINITY : kept.prefix.keeps({row_.y[v], static_cast<int32_t>(v), 0});
  }

  // ---- step 4: the draw ----

  int64_t draw(const Kept& kept) const {
    uint64_t target = multiply_high(sample_u64(a_, b_), kept.mass);
    if (kept.kind == Kept::kListed) {
      const Candidate* c = w_.kept;
      for (; c->mass <= target; ++c) target -= c->mass;
      return c->id;
    }
    int64_t block = 0;
    while (w_.block_mass[block] <= target) target -= w_.block_mass[block++];
    return draw_in_block(kept, block, target);
  }

  int64_t draw_in_block(const Kept& kept, int64_t block, uint64_t target) const {
    const int64_t begin = block * kBlock, end = row_.block_end(block);
    alignas(64) float mass[kBlock];
    const Weigher weigher = row_.weigher();
    for_block(row_.y, begin, end, [&](int64_t i, FloatVec y) { store(mass + (i - begin), weigher.mass(y)); });
    for (int64_t i = (end - begin + kLanes<float> - 1) / kLanes<float> * kLanes<float>; i < kBlock; ++i) mass[i] = 0;
    if (kept.kind == Kept::kNucleus) {
      for (int64_t v = begin; v < end; ++v) mass[v - begin] = keeps(kept, v) ? mass[v - begin] : 0.0f;
    }
    constexpr int64_t kGroup = 64;
    int64_t i = 0;
    for (;; i += kGroup) {
      uint64_t sum = 0;
      for (int64_t j = i; j < i + kGroup; ++j) sum += round_to_integer(mass[j]);
      if (sum > target) break;
      target -= sum;
    }
    for (uint64_t m; (m = round_to_integer(mass[i])) <= target; ++i) target -= m;
    return begin + i;
  }

  // ---- results ----

  void finish() {
    if (!valid_) return write_invalid();
    const uint64_t weighted = a_.entropy == nullptr ? 0 : block_total(w_.block_weighted);
    const Kept kept = filter();
    const int64_t token = draw(kept);
    const double log_total = needs_total_ ? log_mass(total_) : 0;
    a_.token[b_] = token;
    a_.valid[b_] = true;
    a_.num_kept[b_] = kept.count;
    a_.filtered_logprob[b_] = static_cast<float>(scaled_distance(row_.y[token]) - log_mass(kept.mass));
    if (a_.logprob != nullptr) a_.logprob[b_] = static_cast<float>(scaled_distance(row_.y[token]) - log_total);
    if (a_.entropy != nullptr) {
      const double bits = static_cast<double>(weighted) / static_cast<double>(total_);
      a_.entropy[b_] = static_cast<float>(log_total + kLn2 * bits);
    }
    if (a_.rank != nullptr) a_.rank[b_] = rank_of(row_, token);
    if (a_.processed != nullptr) write_processed(kept);
    if (a_.num_logprobs > 0) write_top(log_total);
  }

  double scaled_distance(float y) const { return static_cast<double>((y - row_.maximum) + 0.0f) / row_.temperature; }

  float scaled(int64_t v) const { return static_cast<float>(static_cast<double>(row_.y[v]) / row_.temperature); }

  void write_processed(const Kept& kept) {
    float* out = a_.processed + b_ * row_.V;
    if (kept.kind != Kept::kListed) {
      for (int64_t v = 0; v < row_.V; ++v) out[v] = keeps(kept, v) ? scaled(v) : -INFINITY;
      return;
    }
    for (int64_t v = 0; v < row_.V; ++v) out[v] = -INFINITY;
    for (int64_t i = 0; i < kept.count; ++i) out[w_.kept[i].id] = scaled(w_.kept[i].id);
  }

  void write_top(double log_total) {
    const int64_t wanted = a_.num_logprobs, n = wanted < row_.num_live ? wanted : row_.num_live;
    int64_t* ids = a_.top_ids + b_ * wanted;
    float* logprobs = a_.top_logprobs + b_ * wanted;
    list_first(row_, n, w_.work, w_.kept);
    sort_by_order(w_.kept, n);
    for (int64_t i = 0; i < n; ++i) {
      ids[i] = w_.kept[i].id;
      logprobs[i] = static_cast<float>(scaled_distance(w_.kept[i].value) - log_total);
    }
    for (int64_t i = n; i < wanted; ++i) {
      ids[i] = -1;
      logprobs[i] = -INFINITY;
    }
  }

  void write_invalid() {
    a_.token[b_] = -1;
    a_.valid[b_] = false;
    a_.num_kept[b_] = 0;
    a_.filtered_logprob[b_] = NAN;
    if (a_.logprob != nullptr) a_.logprob[b_] = NAN;
    if (a_.entropy != nullptr) a_.entropy[b_] = NAN;
    if (a_.rank != nullptr) a_.rank[b_] = 0;
    for (int64_t v = 0; a_.processed != nullptr && v < row_.V; ++v) a_.processed[b_ * row_.V + v] = -INFINITY;
    for (int64_t i = b_ * a_.num_logprobs; i < (b_ + 1) * a_.num_logprobs; ++i) {
      a_.top_ids[i] = -1;
      a_.top_logprobs[i] = NAN;
    }
  }

  const Sample<T>& a_;
  const int64_t b_;
  const SampleSettings& s_;
  const Workspace& w_;
  Row row_ = {};
  bool valid_ = false, needs_total_ = false;
  int64_t top_k_ = 0;  // 0: off
  NucleusSearch nucleus_;
  uint64_t total_ = 0;  // of all masses
};

}  // namespace

}  // namespace llmkern::cpu::LLMKERN_ISA
