// SPDX-License-Identifier: Apache-2.0
// What the two passes of the LSTM's reference share: the layer, and what a row's steps compute. Letters as in
// kernels/lstm.h.
#pragma once

#include <pybind11/stl.h>

#include <optional>
#include <vector>

#include "kernels/philox.h"
#include "reference/arrays.h"

namespace llmkern::reference {

using Vector = std::vector<double>;
using OptionalArray = std::optional<Array<double>>;

struct Layer {
  Array<double> input, h_0, c_0, weight_ih, weight_hh;
  OptionalArray bias_ih, bias_hh, weight_hr, norm_gates, norm_cell;
  std::optional<Array<int64_t>> lengths;
  std::optional<Array<bool>> reset;
  std::optional<int64_t> seed;
  double zoneout_h, zoneout_c;
  bool reverse;
  int64_t T = input.shape(0), B = input.shape(1), I = input.shape(2);
  int64_t H = weight_hh.shape(0) / 4, P = weight_hh.shape(1);

  void check() const;

  int64_t steps(int64_t b) const { return lengths ? lengths->at(b) : T; }
  bool is_reset(int64_t t, int64_t b) const { return reset && reset->at(t, b); }

  // The share of the value before that element j keeps under zoneout with probability p: 0 or 1, or p without a seed.
  double kept(Purpose purpose, double p, int64_t t, int64_t b, int64_t j) const;
};

// LN(v), and 1 / sqrt(variance v + 1e-5); v itself without layer norm.
struct Normalized {
  Vector values;
  double scale;
};

// One step of one row: c and h before zoneout, and what is carried on.
struct Step {
  int64_t t;
  Vector x, h_before, c_before;
  Normalized from_input, from_hidden;  // W_ih x_t and W_hh h_{t-1}
  Vector gates;                        // [4H], activated
  Vector c;
  Normalized from_cell;
  Vector tanh_cell, cell_output;  // tanh of what the cell shows, and o times that
  Vector h_after, c_after;
};

// The steps of row b, in the order in which they run.
std::vector<Step> run_row(const Layer& layer, int64_t b);

// The gradients of results and of arguments; the former may be missing, the latter are there for what the layer has.
struct OutputGradients {
  OptionalArray output, h_n, c_n, cells;
};

struct Gradients {
  Array<double> input, h_0, c_0, weight_ih, weight_hh, bias;
  OptionalArray weight_hr, norm_gates, norm_cell;
};

Gradients backward(const Layer& layer, const OutputGradients& above);

}  // namespace llmkern::reference
