// SPDX-License-Identifier: Apache-2.0
// What the variants of an LSTM layer add to a step: masks of zoneout, resets, moments of rows that lie in panels.
#pragma once

#include <cmath>

#include "kernels/cpu/mask_bits.h"
#include "kernels/cpu/schedule.h"
#include "kernels/cpu/scratch.h"
#include "kernels/cpu/team.h"
#include "kernels/cpu/tiles.h"
#include "kernels/lstm.h"

namespace llmkern::cpu::LLMKERN_ISA {

namespace {

template <class T>
int64_t units_of(int64_t panel, int64_t columns) {
  return columns - panel * kUnits<T> < kUnits<T> ? columns - panel * kUnits<T> : kUnits<T>;
}

template <class T>
bool resets(const LstmVariant<T>& variant, int64_t t, int64_t row, int64_t B) {
  return variant.reset != nullptr && variant.reset[t * B + row];
}

// What zoneout holds of h or of c, for the panels of one worker and the rows of one step.
template <class T>
class Zoneout {
 public:
  // `bits` has room for B * mask_groups(columns).
  Zoneout(const LstmVariant<T>& variant, Purpose purpose, double p, int64_t columns, const Share& panels,
          uint16_t* bits)
      : p_(p),
        drawn_(p > 0 && variant.seed != nullptr),
        mask_(make_mask(drawn_ ? *variant.seed : 0, purpose, p)),
        groups_of_row_(mask_groups(columns)),
        first_(panels.begin * kUnits<T> / kMaskGroup),
        bits_(bits) {
    const int64_t end = panels.end * kUnits<T> < columns ? panels.end * kUnits<T> : columns;
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
  Vec<T> at(int64_t i, int64_t panel) const {
    if (!drawn_) return broadcast(static_cast<T>(p_));
    return mask_lanes<T>(bits_ + i * groups_, panel * kUnits<T> - first_ * kMaskGroup) ? broadcast(T{1}) : Vec<T>{};
  }

 private:
  double p_;
  bool drawn_;
  Mask mask_;
  int64_t groups_of_row_, first_, groups_;
  uint16_t* bits_;
};

// A worker's share of the panels of the output: that of the panels of hidden units, without a projection.
template <class T>
Share projected(const Share& share, int64_t H, int64_t P) {
  const int64_t panels = panels_of<T>(H), projected_panels = panels_of<T>(P);
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
    return {Zoneout<T>(v, Purpose::kZoneoutHidden, v.zoneout_h, P, projected<T>(share, H, P), hidden),
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
template <class T>
Vec<T> only(Vec<T> v, int64_t n) {
  if (n == kLanes<T>) return v;
  T lane[kLanes<T>] = {};
  store(lane, v, n);
  return load(lane);
}

// Two numbers for each panel and row, written by the panel's worker and, after a barrier, read by all.
template <class T>
struct Pairs {
  T* memory;  // [panels][rows][2]
  int64_t rows;

  T* at(int64_t panel, int64_t row) const { return memory + (panel * rows + row) * 2; }
};

// Mean and sum of squared deviations of the n units' elements, one vector of them after the other.
template <class T, int count>
void put_moments(const Vec<T> (&values)[count], int64_t n, T* pair) {
  Vec<T> total = {}, squares = {};
  for (const Vec<T>& v : values) total += only<T>(v, n);
  pair[0] = sum<T>(total) / static_cast<T>(count * n);
  for (const Vec<T>& v : values) {
    const Vec<T> d = only<T>(v - pair[0], n);
    squares += d * d;
  }
  pair[1] = sum<T>(squares);
}

template <class T>
struct Moments {
  T mean, scale;  // scale: 1 / sqrt(variance + 1e-5)
};

// Of a whole row of `count` vectors a panel, from its panels' moments, always in the same order (Chan et al. 1979).
template <class T>
Moments<T> moments_of_row(const Pairs<T>& pairs, int64_t row, int64_t H, int count) {
  const int64_t panels = panels_of<T>(H);
  double total = 0, squares = 0;
  for (int64_t p = 0; p < panels; ++p) total += static_cast<double>(units_of<T>(p, H)) * pairs.at(p, row)[0];
  const double mean = total / static_cast<double>(H);
  for (int64_t p = 0; p < panels; ++p) {
    const double d = pairs.at(p, row)[0] - mean;
    squares += pairs.at(p, row)[1] + static_cast<double>(count * units_of<T>(p, H)) * d * d;
  }
  return {static_cast<T>(mean), static_cast<T>(1 / std::sqrt(squares / static_cast<double>(count * H) + 1e-5))};
}

// The gradient of a layer-normalised row: scale * (d - mean d - x mean(d x)) for d the gradient of x, x normalised.
template <class T>
struct NormGradient {
  T scale, mean, mean_x;

  Vec<T> of(Vec<T> d, Vec<T> x) const { return scale * (d - mean - x * mean_x); }
};

template <class T, int count>
void put_products(const Vec<T> (&d)[count], const Vec<T> (&x)[count], int64_t n, T* pair) {
  Vec<T> total = {}, products = {};
  for (int j = 0; j < count; ++j) {
    total += only<T>(d[j], n);
    products += only<T>(d[j] * x[j], n);
  }
  pair[0] = sum<T>(total);
  pair[1] = sum<T>(products);
}

template <class T>
NormGradient<T> norm_gradient_of_row(const Pairs<T>& pairs, int64_t row, int64_t H, int count, T scale) {
  double total = 0, products = 0;
  for (int64_t p = 0; p < panels_of<T>(H); ++p) {
    total += pairs.at(p, row)[0];
    products += pairs.at(p, row)[1];
  }
  const double elements = static_cast<double>(count * H);
  return {scale, static_cast<T>(total / elements), static_cast<T>(products / elements)};
}

template <class T>
void put_gate_moments(const T* gates, int64_t n, T* pair) {
  const Vec<T> values[4] = {load(gates), load(gates + kUnits<T>), load(gates + 2 * kUnits<T>),
                            load(gates + 3 * kUnits<T>)};
  put_moments<T>(values, n, pair);
}

// to = normalised gates of a panel * gain [4H]  (+ more); the normalised ones alone to `saved` [4H], if not null.
template <class T>
void scale_gates(const T* gates, const Moments<T>& moments, const T* gain, int64_t panel, int64_t H, const T* more,
                 T* saved, T* to) {
  const int64_t first = panel * kUnits<T>, n = units_of<T>(panel, H);
  for (int g = 0; g < 4; ++g) {
    const Vec<T> x = (load(gates + g * kUnits<T>) - moments.mean) * moments.scale;
    if (saved != nullptr) store(saved + g * H + first, x, n);
    const Vec<T> offset = more == nullptr ? Vec<T>{} : load(more + g * kUnits<T>);
    store(to + g * kUnits<T>, fma(x, load(gain + g * H + first, n), offset));
  }
}

// Zero in columns [begin, end) of one of M rows of K in tiles.
template <int64_t kRows, class T>
void clear_row(int64_t row, int64_t begin, int64_t end, int64_t M, int64_t K, T* tiles) {
  const int64_t height = tile_height<kRows>(row, M);
  T* to = in_tiles<kRows>(tiles, row, begin, M, K);
  for (int64_t k = begin; k < end; ++k, to += height) *to = T{};
}

// panels[panel][k][unit] = W[panel * kUnits + unit, k] for a weight [columns, K]; units beyond the columns are 0.
template <class T>
void pack_rows(const T* weight, int64_t columns, int64_t K, T* panels) {
  for (int64_t p = 0; p < panels_of<T>(columns); ++p) {
    for (int64_t k = 0; k < K; ++k, panels += kUnits<T>) {
      for (int64_t u = 0; u < kUnits<T>; ++u) {
        panels[u] = u < units_of<T>(p, columns) ? weight[(p * kUnits<T> + u) * K + k] : T{};
      }
    }
  }
}

// panels[panel][k][unit] = W[k, panel * kUnits + unit] for a weight [K, columns].
template <class T>
void pack_columns_of_panel(const T* weight, int64_t columns, int64_t K, int64_t panel, T* to) {
  const int64_t n = units_of<T>(panel, columns);
  for (int64_t k = 0; k < K; ++k, to += kUnits<T>) store(to, load(weight + k * columns + panel * kUnits<T>, n));
}

}  // namespace

}  // namespace llmkern::cpu::LLMKERN_ISA
