// SPDX-License-Identifier: Apache-2.0
// One LSTM layer in one direction with its variants, as readable as kernels/lstm.h states it: the forward pass, row by
// row, and what Python sees.
#include "reference/lstm.h"

#include <cmath>

#include "reference/masks.h"

namespace llmkern::reference {

void Layer::check() const {
  if (input.ndim() != 3 || weight_hh.ndim() != 2 || input.shape(0) == 0) {
    throw std::invalid_argument("llmkern._reference: expected input [T, B, I] with T > 0 and weight_hh [4H, P]");
  }
  check_shape("h_0", h_0, {B, P});
  check_shape("c_0", c_0, {B, H});
  check_shape("weight_ih", weight_ih, {4 * H, I});
  check_shape("weight_hh", weight_hh, {4 * H, weight_hr ? P : H});
  if (bias_ih) check_shape("bias_ih", *bias_ih, {4 * H});
  if (bias_hh) check_shape("bias_hh", *bias_hh, {4 * H});
  if (weight_hr) check_shape("weight_hr", *weight_hr, {P, H});
  if (norm_gates) check_shape("norm_gates", *norm_gates, {2, 4 * H});
  if (norm_gates.has_value() != norm_cell.has_value()) {
    throw std::invalid_argument("llmkern._reference: expected both norm_gates and norm_cell or neither");
  }
  if (norm_cell) check_shape("norm_cell", *norm_cell, {2, H});
  if (lengths) check_shape("lengths", *lengths, {B});
  for (int64_t b = 0; b < B; ++b) {
    if (steps(b) < 0 || steps(b) > T) throw std::invalid_argument("llmkern._reference: expected lengths in [0, T]");
  }
  if (reset) check_shape("reset", *reset, {T, B});
}

double Layer::kept(Purpose purpose, double p, int64_t t, int64_t b, int64_t j) const {
  if (!seed) return p;
  return is_set(*seed, purpose, t * B + b, j, purpose == Purpose::kZoneoutCell ? H : P, p) ? 1 : 0;
}

namespace {

double sigmoid(double a) { return 1 / (1 + std::exp(-a)); }

Vector row_of(const double* first, int64_t n) { return Vector(first, first + n); }

Vector product(const Array<double>& matrix, const Vector& v) {
  Vector result;
  for (int64_t j = 0; j < matrix.shape(0); ++j) {
    const double* row = matrix.data(j, 0);
    double sum = 0;
    for (size_t k = 0; k < v.size(); ++k) sum += row[k] * v[k];
    result.push_back(sum);
  }
  return result;
}

Normalized normalize(Vector v) {
  const double n = static_cast<double>(v.size());
  double mean = 0, variance = 0;
  for (double x : v) mean += x / n;
  for (double x : v) variance += (x - mean) * (x - mean) / n;
  const double scale = 1 / std::sqrt(variance + 1e-5);
  for (double& x : v) x = (x - mean) * scale;
  return {v, scale};
}

Normalized normalize_if(bool norm, const Vector& v) { return norm ? normalize(v) : Normalized{v, 1}; }

Vector activated_gates(const Layer& l, const Step& step) {
  Vector gates;
  for (int64_t j = 0; j < 4 * l.H; ++j) {
    const size_t k = static_cast<size_t>(j);
    double a = step.from_input.values[k] * (l.norm_gates ? l.norm_gates->at(0, j) : 1);
    a += step.from_hidden.values[k] * (l.norm_gates ? l.norm_gates->at(1, j) : 1);
    a += (l.bias_ih ? l.bias_ih->at(j) : 0) + (l.bias_hh ? l.bias_hh->at(j) : 0);
    gates.push_back(j / l.H == 2 ? std::tanh(a) : sigmoid(a));
  }
  return gates;
}

// c_t, and o * tanh of it.
void run_cell(const Layer& l, Step& step) {
  const size_t H = static_cast<size_t>(l.H);
  const double *i = step.gates.data(), *f = i + H, *g = f + H, *o = g + H;
  for (size_t k = 0; k < H; ++k) step.c.push_back(f[k] * step.c_before[k] + i[k] * g[k]);
  step.from_cell = normalize_if(l.norm_cell.has_value(), step.c);
  for (size_t k = 0; k < H; ++k) {
    double shown = step.from_cell.values[k];
    if (l.norm_cell) shown = shown * l.norm_cell->at(0, k) + l.norm_cell->at(1, k);
    step.tanh_cell.push_back(std::tanh(shown));
    step.cell_output.push_back(o[k] * step.tanh_cell[k]);
  }
}

Vector zone_out(const Layer& l, Purpose purpose, double p, int64_t t, int64_t b, const Vector& before,
                const Vector& now) {
  Vector after;
  for (size_t j = 0; j < now.size(); ++j) {
    const double kept = l.kept(purpose, p, t, b, static_cast<int64_t>(j));
    after.push_back(kept * before[j] + (1 - kept) * now[j]);
  }
  return after;
}

Step run_step(const Layer& l, int64_t t, int64_t b, const Vector& h_before, const Vector& c_before) {
  Step step = {};
  step.t = t;
  step.x = row_of(l.input.data(t, b, 0), l.I);
  step.h_before = l.is_reset(t, b) ? Vector(h_before.size()) : h_before;
  step.c_before = l.is_reset(t, b) ? Vector(c_before.size()) : c_before;
  step.from_input = normalize_if(l.norm_gates.has_value(), product(l.weight_ih, step.x));
  step.from_hidden = normalize_if(l.norm_gates.has_value(), product(l.weight_hh, step.h_before));
  step.gates = activated_gates(l, step);
  run_cell(l, step);
  const Vector h = l.weight_hr ? product(*l.weight_hr, step.cell_output) : step.cell_output;
  step.h_after = zone_out(l, Purpose::kZoneoutHidden, l.zoneout_h, t, b, step.h_before, h);
  step.c_after = zone_out(l, Purpose::kZoneoutCell, l.zoneout_c, t, b, step.c_before, step.c);
  return step;
}

}  // namespace

std::vector<Step> run_row(const Layer& l, int64_t b) {
  std::vector<Step> steps;
  Vector h = row_of(l.h_0.data(b, 0), l.P), c = row_of(l.c_0.data(b, 0), l.H);
  for (int64_t s = 0; s < l.steps(b); ++s) {
    steps.push_back(run_step(l, l.reverse ? l.steps(b) - 1 - s : s, b, h, c));
    h = steps.back().h_after;
    c = steps.back().c_after;
  }
  return steps;
}

namespace {

struct Outputs {
  Array<double> output, h_n, c_n, cells;
};

Outputs forward(const Layer& l) {
  Outputs out = {zeros<double>({l.T, l.B, l.P}), zeros<double>({l.B, l.P}), zeros<double>({l.B, l.H}),
                 zeros<double>({l.T, l.B, l.H})};
  std::copy_n(l.h_0.data(), l.B * l.P, out.h_n.mutable_data());
  std::copy_n(l.c_0.data(), l.B * l.H, out.c_n.mutable_data());
  for (int64_t b = 0; b < l.B; ++b) {
    for (const Step& step : run_row(l, b)) {
      for (double* to : {out.output.mutable_data(step.t, b, 0), out.h_n.mutable_data(b, 0)}) {
        std::copy(step.h_after.begin(), step.h_after.end(), to);
      }
      for (double* to : {out.cells.mutable_data(step.t, b, 0), out.c_n.mutable_data(b, 0)}) {
        std::copy(step.c_after.begin(), step.c_after.end(), to);
      }
    }
  }
  return out;
}

using A = Array<double>;
using Lengths = std::optional<Array<int64_t>>;
using Reset = std::optional<Array<bool>>;
using Seed = std::optional<int64_t>;

Layer layer(A input, A h_0, A c_0, A weight_ih, A weight_hh, OptionalArray bias_ih, OptionalArray bias_hh,
            OptionalArray weight_hr, OptionalArray norm_gates, OptionalArray norm_cell, Lengths lengths, Reset reset,
            Seed seed, double zoneout_h, double zoneout_c, bool reverse) {
  const Layer l = {input,      h_0,       c_0,     weight_ih, weight_hh, bias_ih,   bias_hh,   weight_hr,
                   norm_gates, norm_cell, lengths, reset,     seed,      zoneout_h, zoneout_c, reverse};
  l.check();
  return l;
}

py::tuple lstm(A input, A h_0, A c_0, A weight_ih, A weight_hh, OptionalArray bias_ih, OptionalArray bias_hh,
               OptionalArray weight_hr, OptionalArray norm_gates, OptionalArray norm_cell, Lengths lengths, Reset reset,
               Seed seed, double zoneout_h, double zoneout_c, bool reverse, bool return_cells) {
  const Outputs out = forward(layer(input, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, norm_gates,
                                    norm_cell, lengths, reset, seed, zoneout_h, zoneout_c, reverse));
  if (return_cells) return py::make_tuple(out.output, out.h_n, out.c_n, out.cells);
  return py::make_tuple(out.output, out.h_n, out.c_n);
}

py::tuple lstm_backward(OptionalArray grad_output, OptionalArray grad_h_n, OptionalArray grad_c_n, A input, A h_0,
                        A c_0, A weight_ih, A weight_hh, OptionalArray bias_ih, OptionalArray bias_hh,
                        OptionalArray weight_hr, OptionalArray norm_gates, OptionalArray norm_cell, Lengths lengths,
                        Reset reset, Seed seed, double zoneout_h, double zoneout_c, bool reverse,
                        OptionalArray grad_cells) {
  const Layer l = layer(input, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, norm_gates, norm_cell,
                        lengths, reset, seed, zoneout_h, zoneout_c, reverse);
  if (grad_output) check_shape("grad_output", *grad_output, {l.T, l.B, l.P});
  if (grad_h_n) check_shape("grad_h_n", *grad_h_n, {l.B, l.P});
  if (grad_c_n) check_shape("grad_c_n", *grad_c_n, {l.B, l.H});
  if (grad_cells) check_shape("grad_cells", *grad_cells, {l.T, l.B, l.H});
  const Gradients d = backward(l, {grad_output, grad_h_n, grad_c_n, grad_cells});
  py::list all(py::make_tuple(d.input, d.h_0, d.c_0, d.weight_ih, d.weight_hh, d.bias));
  for (const OptionalArray& variant : {d.weight_hr, d.norm_gates, d.norm_cell}) {
    if (variant) all.append(*variant);
  }
  return py::tuple(all);
}

}  // namespace

void bind_lstm(py::module_& m) {
  using py::arg, py::none;
  m.def("lstm", &lstm, arg("input"), arg("h_0"), arg("c_0"), arg("weight_ih"), arg("weight_hh"),
        arg("bias_ih") = none(), arg("bias_hh") = none(), py::kw_only(), arg("weight_hr") = none(),
        arg("norm_gates") = none(), arg("norm_cell") = none(), arg("lengths") = none(), arg("reset") = none(),
        arg("seed") = none(), arg("zoneout_h") = 0.0, arg("zoneout_c") = 0.0, arg("reverse") = false,
        arg("return_cells") = false, "(output [T, B, P], h_n [B, P], c_n [B, H]), and cells [T, B, H] on request");
  m.def("lstm_backward", &lstm_backward, arg("grad_output"), arg("grad_h_n"), arg("grad_c_n"), arg("input"), arg("h_0"),
        arg("c_0"), arg("weight_ih"), arg("weight_hh"), arg("bias_ih") = none(), arg("bias_hh") = none(), py::kw_only(),
        arg("weight_hr") = none(), arg("norm_gates") = none(), arg("norm_cell") = none(), arg("lengths") = none(),
        arg("reset") = none(), arg("seed") = none(), arg("zoneout_h") = 0.0, arg("zoneout_c") = 0.0,
        arg("reverse") = false, arg("grad_cells") = none(),
        "Gradients of input, h_0, c_0, weight_ih, weight_hh, of either bias, and of those that are given among "
        "weight_hr, norm_gates, norm_cell");
}

}  // namespace llmkern::reference
