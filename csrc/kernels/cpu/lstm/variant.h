// SPDX-License-Identifier: Apache-2.0
// What the variants of an LSTM layer add to a step: masks of zoneout, resets, moments of rows that lie in panels.
#pragma once

#include <cmath>

#include "kernels/cpu/lstm/schedule.h"
#include "kernels/cpu/lstm/tiles.h"
#include "kernels/cpu/mask_bits.h"
#include "kernels/cpu/scratch.h"
#include "kernels/cpu/team.h"
#include "kernels/lstm.h"

namespace llmkern::cpu::LLMKERN_ISA {

namespace {

template <class T>
bool resets(const LstmVariant<T>& variant, int64_t t, int64_t row, int64_t B) {
  return variant.reset != nullptr && variant.reset[t * B + row];
}

// What zoneout holds of h or of c, for the panels of one worker and the rows of one step.
template <class T>
class Zoneout {
 public:
  using S = Widened<T>;

  // `bits` has room for B * mask_groups(columns).
  Zoneout(const LstmVariant<T>& variant, Purpose purpose, double p, int64_t columns, const Share& panels,
          uint16_t* bits)
      : p_(p),
        drawn_(p > 0 && variant.seed != nullptr),
        mask_(make_mask(drawn_ ? *variant.seed : 0, purpose, p)),
        groups_of_row_(mask_groups(columns)),
        first_(panels.begin * kUnits<S> / kMaskGroup),
        bits_(bits) {
    const int64_t end = panels.end * kUnits<S> < columns ? panels.end * kUnits<S> : columns;
    groups_ = mask_groups(end) - first_;
  }

  bool any() const { return p_ > 0; }

  // Masks of the rows of time t, which at() then takes by i.
  void draw(const Schedule& schedule, int64_t B, int64_t t) const {
    if (!drawn_) return;
    for (int64_t i = 0; i < schedule.active(t); ++i) {
      const int64_t row = t * B + schedule.row(i);
      draw_mask(mask_, row * groups_of_row_ + first_, groups_, bits_ + i * groups_);
    }
  }

  // 1 where an element keeps its value of the step before, 0 where it does not; p everywhere without a seed.
  Vec<S> at(int64_t i, int64_t panel) const {
    if (!drawn_) return broadcast(static_cast<S>(p_));
    return mask_lanes<S>(bits_ + i * groups_, panel * kUnits<S> - first_ * kMaskGroup) ? broadcast(S{1}) : Vec<S>{};
  }

 private:
  double p_;
  bool drawn_;
  Mask mask_;
  int64_t groups_of_row_, first_, groups_;
  uint16_t* bits_;
};

// A worker's share of the panels of the output: that of the panels of hidden units, without a projection.
template <class S>
Share projected(const Share& share, int64_t H, int64_t P) {
  const int64_t panels = panels_of<S>(H), projected_panels = panels_of<S>(P);
  return {share.begin * projected_panels / panels, share.end * projected_panels / panels, share.barrier};
}

// Both masks of zoneout.
template <class T>
struct Zoneouts {
  Zoneout<T> hidden, cell;

  static Zoneouts of(const LstmVariant<T>& v, int64_t B, int64_t H, int64_t P, const Share& share) {
    const int64_t of_hidden = v.zoneout_h > 0 ? B * mask_groups(P) : 0,
                  of_cell = v.zoneout_c > 0 ? B * mask_groups(H) : 0;
    const auto [hidden, cell] = carve<uint16_t>(Slot::kMasks, {of_hidden, of_cell});
    return {Zoneout<T>(v, Purpose::kZoneoutHidden, v.zoneout_h, P, projected<Widened<T>>(share, H, P), hidden),
            Zoneout<T>(v, Purpose::kZoneoutCell, v.zoneout_c, H, share, cell)};
  }

  void draw(const Schedule& schedule, int64_t B, int64_t t) const {
    hidden.draw(schedule, B, t);
    cell.draw(schedule, B, t);
  }
};

// z * before + (1 - z) * after, and exactly one of the two where z is 1 or 0.
template <class V>
V mix(V z, V before, V after) {
  return z == 0 ? after : (z == 1 ? before : z * before + (1 - z) * after);
}

// The first n lanes; the others 0.
template <class S>
Vec<S> only(Vec<S> v, int64_t n) {
  if (n == kLanes<S>) return v;
  typename IndexOf<S>::type lane;
  for (int i = 0; i < kLanes<S>; ++i) lane[i] = i;
  return lane < static_cast<decltype(+lane[0])>(n) ? v : Vec<S>{};
}

// Two numbers for each panel and row, written by the panel's worker and, after a barrier, read by all.
template <class S>
struct Pairs {
  S* memory;  // [panels][rows][2]
  int64_t rows;

  S* at(int64_t panel, int64_t row) const { return memory + (panel * rows + row) * 2; }
};

// Mean and sum of squared deviations of the n units' elements, one vector of them after the other.
template <class S, int count>
[[gnu::always_inline]] inline void put_moments(const Vec<S> (&values)[count], int64_t n, S* pair) {
  Vec<S> total = {}, squares = {};
  for (const Vec<S>& v : values) total += only<S>(v, n);
  pair[0] = sum<S>(total) / static_cast<S>(count * n);
  for (const Vec<S>& v : values) {
    const Vec<S> d = only<S>(v - pair[0], n);
    squares += d * d;
  }
  pair[1] = sum<S>(squares);
}

template <class S>
struct Moments {
  S mean, scale;  // scale: 1 / sqrt(variance + 1e-5)
};

// Of a whole row of `count` vectors a panel, from its panels' moments, always in the same order (Chan et al. 1979).
template <class S>
Moments<S> moments_of_row(const Pairs<S>& pairs, int64_t row, int64_t H, int count) {
  const int64_t panels = panels_of<S>(H);
  double total = 0, squares = 0;
  for (int64_t p = 0; p < panels; ++p) total += static_cast<double>(units_of<S>(p, H)) * pairs.at(p, row)[0];
  const double mean = total / static_cast<double>(H);
  for (int64_t p = 0; p < panels; ++p) {
    const double d = pairs.at(p, row)[0] - mean;
    squares += pairs.at(p, row)[1] + static_cast<double>(count * units_of<S>(p, H)) * d * d;
  }
  return {static_cast<S>(mean), static_cast<S>(1 / std::sqrt(squares / static_cast<double>(count * H) + 1e-5))};
}

// The gradient of a layer-normalised row: scale * (d - mean d - x mean(d x)) for d the gradient of x, x normalised.
template <class S>
struct NormGradient {
  S scale, mean, mean_x;

  Vec<S> of(Vec<S> d, Vec<S> x) const { return scale * (d - mean - x * mean_x); }
};

template <class S, int count>
[[gnu::always_inline]] inline void put_products(const Vec<S> (&d)[count], const Vec<S> (&x)[count], int64_t n,
                                                S* pair) {
  Vec<S> total = {}, products = {};
  for (int j = 0; j < count; ++j) {
    total += only<S>(d[j], n);
    products += only<S>(d[j] * x[j], n);
  }
  pair[0] = sum<S>(total);
  pair[1] = sum<S>(products);
}

template <class S>
NormGradient<S> norm_gradient_of_row(const Pairs<S>& pairs, int64_t row, int64_t H, int count, S scale) {
  double total = 0, products = 0;
  for (int64_t p = 0; p < panels_of<S>(H); ++p) {
    total += pairs.at(p, row)[0];
    products += pairs.at(p, row)[1];
  }
  const double elements = static_cast<double>(count * H);
  return {scale, static_cast<S>(total / elements), static_cast<S>(products / elements)};
}

template <class S>
[[gnu::always_inline]] inline void put_gate_moments(const S* gates, int64_t n, S* pair) {
  const Vec<S> values[4] = {load(gates), load(gates + kUnits<S>), load(gates + 2 * kUnits<S>),
                            load(gates + 3 * kUnits<S>)};
  put_moments<S>(values, n, pair);
}

// to = normalised gates of a panel * gain [4H]  (+ more); the normalised ones alone to `saved` [4H], if not null.
template <class T, class S = Widened<T>>
void scale_gates(const S* gates, const Moments<S>& moments, const T* gain, int64_t panel, int64_t H, const S* more,
                 T* saved, S* to) {
  const int64_t first = panel * kUnits<S>, n = units_of<S>(panel, H);
  for (int g = 0; g < 4; ++g) {
    const Vec<S> x = (load(gates + g * kUnits<S>) - moments.mean) * moments.scale;
    if (saved != nullptr) store_narrow(saved + g * H + first, x, n);
    const Vec<S> offset = more == nullptr ? Vec<S>{} : load(more + g * kUnits<S>);
    store(to + g * kUnits<S>, fma(x, load_wide(gain + g * H + first, n), offset));
  }
}

// panels[panel][word of k][unit] = W[panel * kUnits + unit, k] for a weight [columns, K]; units beyond the columns are
// 0.
template <class Op>
void pack_rows(const typename Op::Storage* weight, int64_t columns, int64_t K, Word<Op>* panels) {
  using S = Sum<Op>;
  const int64_t size = words_of<Op>(K) * kUnits<S>;
  for (int64_t p = 0; p < panels_of<S>(columns); ++p, panels += size) {
    const int64_t n = units_of<S>(p, columns);
    if (n < kUnits<S>) memset(panels, 0, static_cast<size_t>(size) * sizeof(Word<Op>));
    transpose_words<Op>(weight + p * kUnits<S> * K, K, K, kUnits<S>, n, panels);
  }
}

// to[word of k][unit] = W[k, panel * kUnits + unit] for a weight [K, columns].
template <class Op>
void pack_columns_of_panel(const typename Op::Storage* weight, int64_t columns, int64_t K, int64_t panel,
                           Word<Op>* to) {
  using S = Sum<Op>;
  const int64_t n = units_of<S>(panel, columns);
  for (int64_t k = 0; k < K; k += Op::kTerms, to += kUnits<S>) {
    if (n < kUnits<S>) memset(to, 0, kUnits<S> * sizeof(Word<Op>));
    Op::line(weight + k * columns + panel * kUnits<S>, columns, K - k, n, to);
  }
}

}  // namespace

}  // namespace llmkern::cpu::LLMKERN_ISA
