// SPDX-License-Identifier: Apache-2.0
// Beam search and speculative sampling on the CPU; the contract is kernels/decoding.h.
//
// A row is read block by block from where it lies: once for its maximum, once for its masses, and then only the blocks
// that a result comes from.
#include "kernels/decoding.h"

#include <cmath>

#include "kernels/cpu/sampling/logit_rows.h"
#include "kernels/cpu/scratch.h"
#include "kernels/run.h"

namespace llmkern::cpu::LLMKERN_ISA {

namespace {

// ---- beam search ----

// A beam, and the numbers that turn one of its logits into a score.
struct Beam {
  double score;  // -inf: no continuation
  float maximum;
  double log_total;
  bool valid;
};

// Increases with z, and never falls: every operation rounds monotonically.
float continued(const Beam& beam, float z) {
  return static_cast<float>(beam.score + (static_cast<double>(z - beam.maximum) - beam.log_total));
}

struct Continuation {
  float score;
  int64_t index;

  bool before(const Continuation& other) const {
    return score > other.score || (score == other.score && index < other.index);
  }
};

// The best so far, in a heap whose root is the last of them.
class Best {
 public:
  Best(Continuation* items, int64_t capacity) : items_(items), capacity_(capacity) {}

  bool full() const { return size_ == capacity_; }
  int64_t size() const { return size_; }
  const Continuation& last() const { return items_[0]; }

  void offer(const Continuation& item) {
    if (full()) {
      if (item.before(last())) sink(item, size_);
      return;
    }
    int64_t at = size_++;
    for (int64_t parent; at > 0 && items_[parent = (at - 1) / 2].before(item); at = parent) items_[at] = items_[parent];
    items_[at] = item;
  }

  // From the heap to the order; nothing may be offered any more.
  void sort() {
    for (int64_t size = size_ - 1; size > 0; --size) {
      const Continuation moving = items_[size];
      items_[size] = items_[0];
      sink(moving, size);
    }
  }

 private:
  // Puts an item where the root was.
  void sink(const Continuation& item, int64_t size) {
    int64_t at = 0;
    for (int64_t child; (child = 2 * at + 1) < size; at = child) {
      if (child + 1 < size && items_[child].before(items_[child + 1])) ++child;
      if (!item.before(items_[child])) break;
      items_[at] = items_[child];
    }
    items_[at] = item;
  }

  Continuation* items_;
  int64_t capacity_, size_ = 0;
};

// One batch entry at work: its beams, and the maximum of every block of their rows.
struct Entry {
  const Beam* beams;
  const float* block_maxima;  // [K, blocks]
  int64_t K, V, blocks;
};

template <class T>
Beam read_beam(const BeamSearchStep<T>& a, int64_t b, int64_t k, float* block_maxima) {
  const float score = a.scores[b * a.K + k];
  Beam beam = {score, -INFINITY, 0, score < INFINITY};
  if (!beam.valid || score == -INFINITY) return beam;
  const T* logits = a.logits.row(b, k);
  beam.maximum = maximum_of_row(logits, a.V, block_maxima);
  beam.valid = beam.maximum == beam.maximum;
  if (beam.maximum == -INFINITY) beam.score = -INFINITY;
  if (!beam.valid || beam.score == -INFINITY) return beam;
  beam.log_total = log_mass(mass_of_row(logits, a.V, beam.maximum, nullptr));
  return beam;
}

// A score that n continuations reach: that of the n-th best of the blocks' maxima. Else the lowest finite one.
float reached_by_blocks(const Entry& e, Best best) {
  for (int64_t k = 0; k < e.K; ++k) {
    const Beam& beam = e.beams[k];
    if (beam.score == -INFINITY) continue;
    for (int64_t i = 0; i < e.blocks; ++i) best.offer({continued(beam, e.block_maxima[k * e.blocks + i]), i});
  }
  return best.full() && best.last().score > -FLT_MAX ? best.last().score : -FLT_MAX;
}

// The least z whose score reaches `least`, by bisection of the floats; +inf when none does.
float least_z(const Beam& beam, float least) {
  if (continued(beam, beam.maximum) < least) return INFINITY;
  int64_t low = int64_t{ordered(-INFINITY)}, high = ordered(beam.maximum);  // low does not reach it, high does
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (continued(beam, from_ordered(static_cast<int32_t>(middle))) >= least ? high : low) = middle;
  }
  return from_ordered(static_cast<int32_t>(high));
}

// Offers the continuations that can be among the best, in ascending order of the index: of equal scores, later ones
// never are.
template <class T>
void offer_continuations(const BeamSearchStep<T>& a, int64_t b, const Entry& e, float least, Best* best) {
  for (int64_t k = 0; k < e.K; ++k) {
    const Beam& beam = e.beams[k];
    if (beam.score == -INFINITY) continue;
    const T* logits = a.logits.row(b, k);
    float threshold = least_z(beam, least);
    for (int64_t i = 0; i < e.blocks; ++i) {
      if (!(e.block_maxima[k * e.blocks + i] >= threshold)) continue;
      float z[kRowBlock];
      load_z(logits + i * kRowBlock, row_block_size(i, e.V), z);
      for (int64_t j = 0; j < kRowBlock; ++j) {
        if (z[j] >= threshold) best->offer({continued(beam, z[j]), k * e.V + i * kRowBlock + j});
      }
      if (!best->full() || best->last().score < least) continue;
      least = std::nextafter(best->last().score, INFINITY);
      threshold = least_z(beam, least);
    }
  }
}

template <class T>
void write_best(const BeamSearchStep<T>& a, int64_t b, const Continuation* best, int64_t size, float beyond) {
  for (int64_t i = 0; i < a.n; ++i) {
    const int64_t at = b * a.n + i;
    a.score[at] = i < size ? best[i].score : beyond;
    a.beam[at] = i < size ? best[i].index / a.V : -1;
    a.token[at] = i < size ? best[i].index % a.V : -1;
  }
}

template <class T>
void step_entry(const BeamSearchStep<T>& a, int64_t b, const Entry& e) {
  for (int64_t k = 0; k < e.K; ++k) {
    if (!e.beams[k].valid) return write_best(a, b, nullptr, 0, NAN);
  }
  const int64_t most = a.n < a.K * a.V ? a.n : a.K * a.V;
  const auto items = scratch<Continuation>(Slot::kBeamCandidates, most);
  const float least = reached_by_blocks(e, Best(items, most));
  Best best(items, most);
  offer_continuations(a, b, e, least, &best);
  best.sort();
  write_best(a, b, items, best.size(), -INFINITY);
}

template <class T>
void execute(const BeamSearchStep<T>& a, const Parallel& parallel) {
  const int64_t rows = a.B * a.K, blocks = row_blocks(a.V);
  const Buffer<Beam> beams(rows);
  const Buffer<float> block_maxima(rows * blocks);
  parallel(rows, kGrainTokens / a.V + 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      beams[r] = read_beam(a, r / a.K, r % a.K, block_maxima.data() + r * blocks);
    }
  });
  parallel(a.B, kGrainTokens / (a.K * blocks + a.n) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      step_entry(a, b, {beams.data() + b * a.K, block_maxima.data() + b * a.K * blocks, a.K, a.V, blocks});
    }
  });
}

// ---- speculative sampling ----

using Wide = unsigned __int128;

// floor(u * total / 2^64).
Wide scaled(uint64_t u, Wide total) {
  const uint64_t high = static_cast<uint64_t>(total >> 64), low = static_cast<uint64_t>(total);
  return Wide{u} * high + multiply_high(u, low);
}

// One row as a distribution.
template <class T>
struct Distribution {
  const T* logits;
  float maximum;
  uint64_t total;

  float d(int64_t v) const { return z_of(logits[v]) - maximum; }
  uint64_t mass(int64_t v) const { return mass_of(z_of(logits[v]), maximum); }
};

// False when the row has none. block_mass: null, or one for every block.
template <class T>
bool read(const T* logits, int64_t V, uint64_t* block_mass, Distribution<T>* row) {
  row->logits = logits;
  row->maximum = maximum_of_row<T>(logits, V, nullptr);
  if (!(row->maximum > -INFINITY)) return false;
  row->total = mass_of_row(logits, V, row->maximum, block_mass);
  return true;
}

template <class T>
int64_t draw(const Distribution<T>& p, uint64_t u, const uint64_t* block_mass) {
  uint64_t target = multiply_high(u, p.total);
  int64_t block = 0;
  while (block_mass[block] <= target) target -= block_mass[block++];
  int64_t v = block * kRowBlock;
  for (uint64_t mass; (mass = p.mass(v)) <= target; ++v) target -= mass;
  return v;
}

// The masses of p and q that stand on the side of p: sums over the tokens with mp * Mq > mq * Mp. What is left of p
// there, sum (mp * Mq - mq * Mp), is two products of these.
struct Rest {
  uint64_t p, q;
};

// Which side a token is on is decided in float64, whose products err by less than 2^-51, and exactly where that cannot
// tell.
template <class T>
Rest rest_of_block(const Distribution<T>& p, const Distribution<T>& q, int64_t block, int64_t V) {
  const int64_t begin = block * kRowBlock, count = row_block_size(block, V);
  float z[kRowBlock];
  float p_mass[kRowBlock], q_mass[kRowBlock];
  load_z(p.logits + begin, count, z);
  masses_of(z, p.maximum, p_mass);
  load_z(q.logits + begin, count, z);
  masses_of(z, q.maximum, q_mass);
  const double p_total = static_cast<double>(p.total), q_total = static_cast<double>(q.total);
  Rest sum = {0, 0};
  int64_t in_doubt = 0;
  for (int64_t i = 0; i < kRowBlock; ++i) {
    const double mine = p_mass[i] * q_total, theirs = q_mass[i] * p_total;
    const uint64_t kept = mine > theirs ? ~uint64_t{0} : 0;
    sum.p += round_to_integer(p_mass[i]) & kept;
    sum.q += round_to_integer(q_mass[i]) & kept;
    in_doubt += std::fabs(mine - theirs) < mine * 0x1p-50;
  }
  if (in_doubt == 0) return sum;
  sum = {0, 0};
  for (int64_t i = 0; i < kRowBlock; ++i) {
    const uint64_t mp = round_to_integer(p_mass[i]), mq = round_to_integer(q_mass[i]);
    if (Wide{mp} * q.total <= Wide{mq} * p.total) continue;
    sum.p += mp;
    sum.q += mq;
  }
  return sum;
}

// A token of what p has more than q.
template <class T>
int64_t draw_rest(const Distribution<T>& p, const Distribution<T>& q, int64_t V, uint64_t u,
                  const uint64_t* block_mass) {
  const int64_t blocks = row_blocks(V);
  const auto rest = scratch<Rest>(Slot::kDraftRest, blocks);
  const auto weight = [&](const Rest& r) { return Wide{r.p} * q.total - Wide{r.q} * p.total; };
  Wide total = 0;
  for (int64_t i = 0; i < blocks; ++i) {
    rest[i] = rest_of_block(p, q, i, V);
    total += weight(rest[i]);
  }
  if (total == 0) return draw(p, u, block_mass);
  Wide target = scaled(u, total);
  int64_t block = 0;
  for (Wide w; (w = weight(rest[block])) <= target; ++block) target -= w;
  for (int64_t v = block * kRowBlock;; ++v) {
    const Wide mine = Wide{p.mass(v)} * q.total, theirs = Wide{q.mass(v)} * p.total;
    if (mine <= theirs) continue;
    if (mine - theirs > target) return v;
    target -= mine - theirs;
  }
}

// A token of p that is not `excluded`.
template <class T>
int64_t draw_other(const Distribution<T>& p, int64_t excluded, uint64_t u, uint64_t* block_mass) {
  const uint64_t without = p.mass(excluded);
  block_mass[excluded / kRowBlock] -= without;
  uint64_t target = multiply_high(u, p.total - without);
  int64_t block = 0;
  while (block_mass[block] <= target) target -= block_mass[block++];
  for (int64_t v = block * kRowBlock;; ++v) {
    const uint64_t mass = v == excluded ? 0 : p.mass(v);
    if (mass > target) return v;
    target -= mass;
  }
}

template <class T>
void verify_entry(const SpeculativeVerify<T>& a, int64_t b) {
  int64_t* token = a.token + b * (a.n + 1);
  float* logprob = a.logprob + b * (a.n + 1);
  for (int64_t i = 0; i <= a.n; ++i) {
    token[i] = -1;
    logprob[i] = 0;
  }
  const uint64_t seed = static_cast<uint64_t>(a.seeds[b * a.seed_stride]);
  const auto block_mass = scratch<uint64_t>(Slot::kDraftBlockMass, row_blocks(a.V));
  for (int64_t i = 0;; ++i) {
    a.num_accepted[b] = i;
    const uint64_t index = static_cast<uint64_t>(a.positions[b]) + static_cast<uint64_t>(i);
    Distribution<T> p, q = {nullptr, 0, 1};
    if (!read(a.target.row(b, i), a.V, block_mass, &p)) return;
    const auto emit = [&](int64_t v) {
      token[i] = v;
      logprob[i] = static_cast<float>(static_cast<double>(p.d(v)) - log_mass(p.total));
    };
    const int64_t id = i < a.n ? a.draft_ids[b * a.n + i] : -1;
    const bool is_certain = a.draft.data == nullptr;
    if (id >= 0) {
      if (!is_certain && !read<T>(a.draft.row(b, i), a.V, nullptr, &q)) return;
      const uint64_t q_mass = is_certain ? 1 : q.mass(id);
      const Wide bound = scaled(philox_u64(seed, Purpose::kDraftTest, index), Wide{q_mass} * p.total);
      if (bound < Wide{p.mass(id)} * q.total) {
        emit(id);
        continue;
      }
    }
    const uint64_t u = philox_u64(seed, Purpose::kDraftReplacement, index);
    if (id < 0) return emit(draw(p, u, block_mass));
    return emit(is_certain ? draw_other(p, id, u, block_mass) : draw_rest(p, q, a.V, u, block_mass));
  }
}

template <class T>
void execute(const SpeculativeVerify<T>& a, const Parallel& parallel) {
  parallel(a.B, kGrainTokens / a.V + 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) verify_entry(a, b);
  });
}

}  // namespace

template <class Args>
void run(const Args& args, const Parallel& parallel) {
  execute(args, parallel);
}

template void run(const BeamSearchStep<float>&, const Parallel&);
template void run(const BeamSearchStep<double>&, const Parallel&);
template void run(const BeamSearchStep<bfloat16>&, const Parallel&);
template void run(const BeamSearchStep<float16>&, const Parallel&);
template void run(const SpeculativeVerify<float>&, const Parallel&);
template void run(const SpeculativeVerify<double>&, const Parallel&);
template void run(const SpeculativeVerify<bfloat16>&, const Parallel&);
template void run(const SpeculativeVerify<float16>&, const Parallel&);

}  // namespace llmkern::cpu::LLMKERN_ISA
