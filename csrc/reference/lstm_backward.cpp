// SPDX-License-Identifier: Apache-2.0
// The backward pass of the LSTM's reference: the chain rule, step by step and row by row, latest step first.
#include "reference/lstm.h"

namespace llmkern::reference {

namespace {

void add(double* to, const Vector& v) {
  for (size_t k = 0; k < v.size(); ++k) to[k] += v[k];
}

// matrix += rows * columns^T
void add_outer(Array<double>& matrix, const Vector& rows, const Vector& columns) {
  for (size_t j = 0; j < rows.size(); ++j) {
    double* row = matrix.mutable_data(static_cast<py::ssize_t>(j), 0);
    for (size_t k = 0; k < columns.size(); ++k) row[k] += rows[j] * columns[k];
  }
}

// matrix^T v
Vector transposed_product(const Array<double>& matrix, const Vector& v) {
  Vector result(static_cast<size_t>(matrix.shape(1)));
  for (size_t j = 0; j < v.size(); ++j) {
    const double* row = matrix.data(static_cast<py::ssize_t>(j), 0);
    for (size_t k = 0; k < result.size(); ++k) result[k] += row[k] * v[j];
  }
  return result;
}

// From the gradient of LN(v) that of v: it has no part along the mean or along LN(v), which v's scale does not change.
Vector normalize_backward(const Normalized& forward, const Vector& grad) {
  const double n = static_cast<double>(grad.size());
  double mean = 0, along = 0;
  for (size_t k = 0; k < grad.size(); ++k) {
    mean += grad[k] / n;
    along += grad[k] * forward.values[k] / n;
  }
  Vector result;
  for (size_t k = 0; k < grad.size(); ++k) {
    result.push_back(forward.scale * (grad[k] - mean - forward.values[k] * along));
  }
  return result;
}

// Gradients on their way from a step to the one before it; all of one row.
struct Carried {
  Vector h, c;
};

// What zoneout held goes to the value before; the rest, which is returned, to the value of this step.
Vector zone_out_backward(const Layer& l, Purpose purpose, double p, int64_t t, int64_t b, const Vector& grad,
                         Vector& grad_before) {
  Vector grad_now;
  for (size_t j = 0; j < grad.size(); ++j) {
    const double kept = l.kept(purpose, p, t, b, static_cast<int64_t>(j));
    grad_before.push_back(kept * grad[j]);
    grad_now.push_back((1 - kept) * grad[j]);
  }
  return grad_now;
}

// From the gradient of o * tanh(...): that of o is returned, that of the cell state is added.
Vector show_backward(const Layer& l, const Step& step, const Vector& grad, Vector& grad_c, Gradients& d) {
  const size_t H = static_cast<size_t>(l.H);
  const double* o = step.gates.data() + 3 * H;
  Vector grad_o, grad_shown;
  for (size_t k = 0; k < H; ++k) {
    grad_o.push_back(grad[k] * step.tanh_cell[k]);
    grad_shown.push_back(grad[k] * o[k] * (1 - step.tanh_cell[k] * step.tanh_cell[k]));
  }
  if (!l.norm_cell) {
    add(grad_c.data(), grad_shown);
    return grad_o;
  }
  Vector grad_norm;
  for (size_t k = 0; k < H; ++k) {
    d.norm_cell->mutable_at(0, k) += grad_shown[k] * step.from_cell.values[k];
    d.norm_cell->mutable_at(1, k) += grad_shown[k];
    grad_norm.push_back(grad_shown[k] * l.norm_cell->at(0, k));
  }
  add(grad_c.data(), normalize_backward(step.from_cell, grad_norm));
  return grad_o;
}

// da, [4H].
Vector gate_gradients(const Layer& l, const Step& step, const Vector& grad_c, const Vector& grad_o) {
  const size_t H = static_cast<size_t>(l.H);
  const double *i = step.gates.data(), *f = i + H, *g = f + H, *o = g + H;
  Vector da(4 * H);
  for (size_t k = 0; k < H; ++k) {
    da[k] = grad_c[k] * g[k] * i[k] * (1 - i[k]);
    da[H + k] = grad_c[k] * step.c_before[k] * f[k] * (1 - f[k]);
    da[2 * H + k] = grad_c[k] * i[k] * (1 - g[k] * g[k]);
    da[3 * H + k] = grad_o[k] * o[k] * (1 - o[k]);
  }
  return da;
}

// The gradient of a product from that of the gates; `which` is 0 for W_ih x_t, 1 for W_hh h_{t-1}.
Vector product_gradient(const Layer& l, int64_t which, const Normalized& forward, const Vector& da, Gradients& d) {
  if (!l.norm_gates) return da;
  Vector grad_norm;
  for (size_t j = 0; j < da.size(); ++j) {
    d.norm_gates->mutable_at(which, j) += da[j] * forward.values[j];
    grad_norm.push_back(da[j] * l.norm_gates->at(which, j));
  }
  return normalize_backward(forward, grad_norm);
}

// Takes the gradients of h_after and c_after; returns those of the states before the step.
Carried step_backward(const Layer& l, int64_t b, const Step& step, const Carried& after, Gradients& d) {
  Carried before;
  const Vector grad_h = zone_out_backward(l, Purpose::kZoneoutHidden, l.zoneout_h, step.t, b, after.h, before.h);
  Vector grad_c = zone_out_backward(l, Purpose::kZoneoutCell, l.zoneout_c, step.t, b, after.c, before.c);
  if (l.weight_hr) add_outer(*d.weight_hr, grad_h, step.cell_output);
  const Vector grad_cell_output = l.weight_hr ? transposed_product(*l.weight_hr, grad_h) : grad_h;
  const Vector grad_o = show_backward(l, step, grad_cell_output, grad_c, d);
  const Vector da = gate_gradients(l, step, grad_c, grad_o);
  for (int64_t k = 0; k < l.H; ++k) before.c[static_cast<size_t>(k)] += grad_c[k] * step.gates[l.H + k];

  add(d.bias.mutable_data(), da);
  const Vector of_input = product_gradient(l, 0, step.from_input, da, d);
  const Vector of_hidden = product_gradient(l, 1, step.from_hidden, da, d);
  add_outer(d.weight_ih, of_input, step.x);
  add_outer(d.weight_hh, of_hidden, step.h_before);
  add(d.input.mutable_data(step.t, b, 0), transposed_product(l.weight_ih, of_input));
  add(before.h.data(), transposed_product(l.weight_hh, of_hidden));
  if (l.is_reset(step.t, b)) before = {Vector(before.h.size()), Vector(before.c.size())};
  return before;
}

void row_backward(const Layer& l, int64_t b, const OutputGradients& above, Gradients& d) {
  Carried carried = {Vector(static_cast<size_t>(l.P)), Vector(static_cast<size_t>(l.H))};
  const auto add_above = [](Vector& to, const double* from) {
    for (size_t k = 0; k < to.size(); ++k) to[k] += from[k];
  };
  if (above.h_n) add_above(carried.h, above.h_n->data(b, 0));
  if (above.c_n) add_above(carried.c, above.c_n->data(b, 0));
  const std::vector<Step> steps = run_row(l, b);
  for (auto step = steps.rbegin(); step != steps.rend(); ++step) {
    if (above.output) add_above(carried.h, above.output->data(step->t, b, 0));
    if (above.cells) add_above(carried.c, above.cells->data(step->t, b, 0));
    carried = step_backward(l, b, *step, carried, d);
  }
  add(d.h_0.mutable_data(b, 0), carried.h);
  add(d.c_0.mutable_data(b, 0), carried.c);
}

Array<double> zeros_like(const Array<double>& array) {
  return zeros<double>(std::vector<py::ssize_t>(array.shape(), array.shape() + array.ndim()));
}

OptionalArray zeros_like(const OptionalArray& array) {
  return array ? OptionalArray(zeros_like(*array)) : std::nullopt;
}

}  // namespace

Gradients backward(const Layer& l, const OutputGradients& above) {
  Gradients d = {zeros_like(l.input),     zeros_like(l.h_0),        zeros_like(l.c_0),
                 zeros_like(l.weight_ih), zeros_like(l.weight_hh),  zeros<double>({4 * l.H}),
                 zeros_like(l.weight_hr), zeros_like(l.norm_gates), zeros_like(l.norm_cell)};
  for (int64_t b = 0; b < l.B; ++b) row_backward(l, b, above, d);
  return d;
}

}  // namespace llmkern::reference
