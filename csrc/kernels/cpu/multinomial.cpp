// SPDX-License-Identifier: Apache-2.0
// Many draws from one row on the CPU; the contract is in kernels/decoding.h.
//
// Masses are not kept, only sums of them: of every 64 categories, of 64 of these, and so on. A draw walks down and
// computes the last 64 again; taking a category out sets its bit in a word that has one for each of the 64.
#include <cmath>
#include <cstring>
#include <type_traits>

#include "kernels/cpu/sampling/logit_rows.h"
#include "kernels/cpu/scratch.h"
#include "kernels/decoding.h"
#include "kernels/run.h"

namespace llmkern::cpu::LLMKERN_ISA {

namespace {

constexpr int64_t kFan = 64;    // categories a word of bits, and sums a sum
constexpr int kMostLevels = 6;  // 64^6 > kMaxCategories
constexpr int64_t kGrainDraws = 1 << 8;

// How elements of a row become masses. A value's key orders it as an integer: kNothing has no mass, and keys from kBad
// on are bad. Integers, because a maximum of floats is not vectorised: it would have to care about NaN.
template <class T>
struct Weights {
  using Value = Widened<T>;
  using Key = std::conditional_t<sizeof(Value) == 8, uint64_t, uint32_t>;
  static constexpr Key kNothing = 0, kBad = sizeof(Value) == 8 ? Key(0x7ff0000000000000ull) : Key(0x7f800000u);
  double scale, rest;  // mass = value * scale * rest: for a float64 2^(k-e) alone may be out of range

  void fit(Value maximum, int bits) {
    int e;
    std::frexp(static_cast<double>(maximum), &e);
    const int first = sizeof(Value) == 8 ? (bits - e) / 2 : bits - e;
    scale = std::ldexp(1.0, first);
    rest = std::ldexp(1.0, bits - e - first);
  }

  void masses(const Value (&values)[kFan], uint64_t (&out)[kFan]) const {
    for (int64_t i = 0; i < kFan; ++i) {
      double scaled = static_cast<double>(values[i]) * scale;
      if constexpr (sizeof(Value) == 8) scaled *= rest;
      out[i] = double_to_bits(scaled + 0x1p52) & 0xfffffffffffffull;  // the addition rounds
    }
  }

  static void load(const T* from, int64_t count, Value (&values)[kFan]) {
    convert(values, from, count);
    for (int64_t i = count; i < kFan; ++i) values[i] = 0;
    for (Value& w : values) w += 0;  // -0 becomes 0
  }

  // The bits: a negative number's are above infinity's.
  static Key key(Value w) {
    Key bits;
    memcpy(&bits, &w, sizeof bits);
    return bits;
  }
  static Value value(Key bits) {
    Value w;
    memcpy(&w, &bits, sizeof w);
    return w;
  }
};

template <class T>
struct Logits {
  using Value = float;
  using Key = int32_t;
  static constexpr Key kNothing = static_cast<Key>(0x807fffffu), kBad = 0x7f800001;  // -inf; above inf
  float maximum;

  void fit(Value largest, int) { maximum = largest; }
  void masses(const Value (&values)[kFan], uint64_t (&out)[kFan]) const {
    float mass[kFan];
    masses_of(values, maximum, mass);
    for (int64_t i = 0; i < kFan; ++i) out[i] = round_to_integer(mass[i]);
  }

  static void load(const T* from, int64_t count, Value (&values)[kFan]) { load_z(from, count, values); }
  static Key key(Value z) { return z == z ? ordered(z) : kBad; }
  static Value value(Key key) { return from_ordered(key); }
};

// Sums of the masses of a row: of kFan categories, of kFan such sums, ... of all.
struct Tree {
  uint64_t* level[kMostLevels];
  int64_t size[kMostLevels];
  int levels;
  uint64_t total;
};

int64_t tree_size(int64_t V) {
  int64_t total = 0;
  do {
    V = (V + kFan - 1) / kFan;
    total += V;
  } while (V > kFan);
  return total;
}

Tree make_tree(int64_t V, uint64_t* memory) {
  Tree tree = {};
  do {
    V = (V + kFan - 1) / kFan;
    tree.level[tree.levels] = memory;
    tree.size[tree.levels++] = V;
    memory += V;
  } while (V > kFan);
  return tree;
}

template <class T, class Kind>
class Row {
 public:
  using Value = typename Kind::Value;
  using Key = typename Kind::Key;

  // removed: a bit a category, or null when none ever is.
  Row(const T* from, int64_t V, int bits, uint64_t* memory, uint64_t* removed)
      : from_(from), V_(V), bits_(bits), tree_(make_tree(V, memory)), removed_(removed) {
    if (removed != nullptr) memset(removed, 0, static_cast<size_t>(tree_.size[0]) * sizeof(uint64_t));
  }

  uint64_t total() const { return tree_.total; }

  // Masses by the largest value that is left; `needed` values must have one.
  RowFault build(int64_t needed) {
    Key best[kFan];
    int32_t above[kFan] = {};
    for (Key& key : best) key = Kind::kNothing;
    for (int64_t block = 0; block < tree_.size[0]; ++block) {
      Value values[kFan];
      load(block, values);
      for (int64_t i = 0; i < kFan; ++i) {
        const Key key = Kind::key(values[i]);
        best[i] = key > best[i] ? key : best[i];
        above[i] += key > Kind::kNothing;
      }
    }
    int64_t count = 0;
    Key maximum = Kind::kNothing;
    for (int64_t i = 0; i < kFan; ++i) {
      count += above[i];
      maximum = best[i] > maximum ? best[i] : maximum;
    }
    if (maximum >= Kind::kBad) return RowFault::kBadValue;
    if (count == 0) return RowFault::kNothing;
    if (count < needed) return RowFault::kTooFew;
    kind_.fit(Kind::value(maximum), bits_);
    add_up();
    return RowFault::kNone;
  }

  // The category whose running mass is the first to exceed the target, and its mass.
  int64_t find(uint64_t target, uint64_t* mass) const {
    int64_t at = 0;
    for (int l = tree_.levels - 1; l >= 0; --l) {
      at *= kFan;
      const uint64_t* sums = tree_.level[l];
      while (sums[at] <= target) target -= sums[at++];
    }
    uint64_t in_block[kFan];
    masses(at, in_block);
    int64_t i = 0;
    while (in_block[i] <= target) target -= in_block[i++];
    *mass = in_block[i];
    return at * kFan + i;
  }

  void remove(int64_t v, uint64_t mass) {
    removed_[v / kFan] |= uint64_t{1} << (v % kFan);
    for (int l = 0; l < tree_.levels; ++l) tree_.level[l][v /= kFan] -= mass;
    tree_.total -= mass;
  }

 private:
  void load(int64_t block, Value (&values)[kFan]) const {
    const int64_t begin = block * kFan, count = V_ - begin < kFan ? V_ - begin : kFan;
    Kind::load(from_ + begin, count, values);
    if (removed_ == nullptr) return;
    for (uint64_t bits = removed_[block]; bits != 0; bits &= bits - 1)
      values[__builtin_ctzll(bits)] = Kind::value(Kind::kNothing);
  }

  void masses(int64_t block, uint64_t (&out)[kFan]) const {
    Value values[kFan];
    load(block, values);
    kind_.masses(values, out);
  }

  void add_up() {
    for (int64_t block = 0; block < tree_.size[0]; ++block) {
      uint64_t mass[kFan], sum = 0;
      masses(block, mass);
      for (uint64_t m : mass) sum += m;
      tree_.level[0][block] = sum;
    }
    for (int l = 1; l < tree_.levels; ++l) {
      for (int64_t i = 0; i < tree_.size[l]; ++i) tree_.level[l][i] = sum_of(l - 1, i * kFan);
    }
    tree_.total = sum_of(tree_.levels - 1, 0);
  }

  uint64_t sum_of(int l, int64_t begin) const {
    const int64_t end = begin + kFan < tree_.size[l] ? begin + kFan : tree_.size[l];
    uint64_t sum = 0;
    for (int64_t i = begin; i < end; ++i) sum += tree_.level[l][i];
    return sum;
  }

  const T* from_;
  int64_t V_;
  int bits_;
  Kind kind_;
  Tree tree_;
  uint64_t* removed_;
};

template <class T>
uint64_t random(const Multinomial<T>& a, int64_t b, int64_t i) {
  const uint64_t seed = static_cast<uint64_t>(a.seeds[b * a.seed_stride]);
  return multinomial_u64(seed, static_cast<uint64_t>(a.positions[b]), i);
}

template <class Kind, class T>
void draw_with_replacement(const Multinomial<T>& a, int bits, const Parallel& parallel) {
  const int64_t size = tree_size(a.V);
  const Buffer<uint64_t> trees(a.B * size);
  const Buffer<Row<T, Kind>> rows(a.B);
  parallel(a.B, kGrainTokens / a.V + 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      Row<T, Kind> row(a.input + b * a.stride, a.V, bits, trees.data() + b * size, nullptr);
      a.fault[b] = row.build(1);
      rows[b] = row;
    }
  });
  parallel(a.B * a.n, kGrainDraws, [&](int64_t begin, int64_t end) {
    for (int64_t draw = begin; draw < end; ++draw) {
      const int64_t b = draw / a.n;
      if (a.fault[b] != RowFault::kNone) continue;
      uint64_t mass;
      a.token[draw] = rows[b].find(multiply_high(random(a, b, draw - b * a.n), rows[b].total()), &mass);
    }
  });
}

template <class Kind, class T>
RowFault draw_without_replacement(const Multinomial<T>& a, int64_t b, int bits) {
  const int64_t size = tree_size(a.V);
  const auto memory = scratch<uint64_t>(Slot::kMultinomialTree, size + (a.V + kFan - 1) / kFan);
  Row<T, Kind> row(a.input + b * a.stride, a.V, bits, memory, memory + size);
  const RowFault fault = row.build(a.n);
  if (fault != RowFault::kNone) return fault;
  for (int64_t i = 0; i < a.n; ++i) {
    if (row.total() < uint64_t{1} << (bits - 8)) row.build(1);
    uint64_t mass;
    const int64_t v = row.find(multiply_high(random(a, b, i), row.total()), &mass);
    row.remove(v, mass);
    a.token[b * a.n + i] = v;
  }
  return RowFault::kNone;
}

template <class Kind, class T>
void draw(const Multinomial<T>& a, int bits, const Parallel& parallel) {
  if (a.replacement || a.n == 1) return draw_with_replacement<Kind>(a, bits, parallel);
  parallel(a.B, kGrainTokens / (a.V + a.n) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) a.fault[b] = draw_without_replacement<Kind>(a, b, bits);
  });
}

template <class T>
void execute(const Multinomial<T>& a, const Parallel& parallel) {
  if (a.from_logits) return draw<Logits<T>>(a, kMassBits, parallel);
  draw<Weights<T>>(a, multinomial_bits(a.V), parallel);
}

}  // namespace

template <class Args>
void run(const Args& args, const Parallel& parallel) {
  execute(args, parallel);
}

template void run(const Multinomial<float>&, const Parallel&);
template void run(const Multinomial<double>&, const Parallel&);
template void run(const Multinomial<bfloat16>&, const Parallel&);
template void run(const Multinomial<float16>&, const Parallel&);

}  // namespace llmkern::cpu::LLMKERN_ISA
