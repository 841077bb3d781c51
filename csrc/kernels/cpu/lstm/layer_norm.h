// SPDX-License-Identifier: Apache-2.0
// Layer norm of rows that lie in panels: moments, gains, and the gradients of both.
#pragma once

#include <cmath>

#include "kernels/cpu/lstm/tiles.h"

namespace llmkern::cpu::LLMKERN_ISA {

namespace {

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

}  // namespace

}  // namespace llmkern::cpu::LLMKERN_ISA
