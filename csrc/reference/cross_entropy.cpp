// SPDX-License-Identifier: Apache-2.0
// Linear cross entropy and its gradient, as readable as kernels/cross_entropy.h states them.
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <variant>

#include "reference/arrays.h"

namespace llmkern::reference {

namespace {

using OptionalArray = std::optional<Array<double>>;
using Target = std::variant<Array<int64_t>, Array<double>>;  // classes [N], or probabilities [N, V]

struct Loss {
  Array<double> input, weight;
  OptionalArray bias;
  Target target;
  OptionalArray class_weight;
  std::string reduction;
  int64_t ignore_index;
  double label_smoothing;
  int64_t N = input.shape(0), D = input.shape(1), V = weight.shape(0);

  void check() const {
    check_shape("weight", weight, {V, D});
    if (bias) check_shape("bias", *bias, {V});
    if (class_weight) check_shape("class_weight", *class_weight, {V});
    if (V == 0) throw std::invalid_argument("llmkern._reference: expected at least one class");
    if (reduction != "none" && reduction != "mean" && reduction != "sum") {
      throw std::invalid_argument("llmkern._reference: expected reduction none, mean or sum, got " + reduction);
    }
    if (is_soft()) return check_shape("target", std::get<1>(target), {N, V});
    check_shape("target", std::get<0>(target), {N});
    for (int64_t n = 0; n < N; ++n) {
      if (counts(n) && (y(n) < 0 || y(n) >= V)) throw py::index_error("llmkern._reference: target outside [0, V)");
    }
  }

  bool is_soft() const { return target.index() == 1; }
  int64_t y(int64_t n) const { return std::get<0>(target).at(n); }
  bool counts(int64_t n) const { return is_soft() || y(n) != ignore_index; }
  double w(int64_t v) const { return class_weight ? class_weight->at(v) : 1; }

  double p(int64_t n, int64_t v) const { return is_soft() ? std::get<1>(target).at(n, v) : v == y(n); }
  // The smoothed target.
  double t(int64_t n, int64_t v) const {
    return (1 - label_smoothing) * p(n, v) + label_smoothing / static_cast<double>(V);
  }

  double total_weight() const {
    if (is_soft()) return static_cast<double>(N);
    double sum = 0;
    for (int64_t n = 0; n < N; ++n) sum += counts(n) ? w(y(n)) : 0;
    return sum;
  }

  std::vector<double> logits(int64_t n) const {
    const auto w = weight.unchecked<2>(), x = input.unchecked<2>();
    std::vector<double> l(static_cast<size_t>(V));
    for (int64_t v = 0; v < V; ++v) {
      double sum = bias ? bias->at(v) : 0;
      for (int64_t d = 0; d < D; ++d) sum += w(v, d) * x(n, d);
      l[static_cast<size_t>(v)] = sum;
    }
    return l;
  }
};

double log_sum_exp(const std::vector<double>& l) {
  const double m = *std::max_element(l.begin(), l.end());
  double sum = 0;
  for (double logit : l) sum += std::exp(logit - m);
  return m + std::log(sum);
}

double row_loss(const Loss& a, int64_t n) {
  if (!a.counts(n)) return 0;
  const std::vector<double> l = a.logits(n);
  const double lse = log_sum_exp(l);
  double loss = 0;
  for (int64_t v = 0; v < a.V; ++v) {
    if (a.t(n, v) != 0) loss += a.w(v) * a.t(n, v) * (lse - l[static_cast<size_t>(v)]);
  }
  return loss;
}

// [N] for "none", else [].
Array<double> forward(const Loss& a) {
  Array<double> losses = zeros<double>({a.N});
  double sum = 0;
  for (int64_t n = 0; n < a.N; ++n) sum += *losses.mutable_data(n) = row_loss(a, n);
  if (a.reduction == "none") return losses;
  Array<double> loss = zeros<double>({});
  *loss.mutable_data() = a.reduction == "mean" ? sum / a.total_weight() : sum;
  return loss;
}

struct Gradients {
  Array<double> input, weight, bias, target;
};

// What row n, whose loss has the gradient s, adds to the gradients.
void add_row(const Loss& a, int64_t n, double s, Gradients& d) {
  auto dx = d.input.mutable_unchecked<2>(), dw = d.weight.mutable_unchecked<2>();
  auto db = d.bias.mutable_unchecked<1>();
  const auto x = a.input.unchecked<2>(), w = a.weight.unchecked<2>();
  const std::vector<double> l = a.logits(n);
  const double lse = log_sum_exp(l);
  double all = 0;
  for (int64_t v = 0; v < a.V; ++v) all += a.w(v) * a.t(n, v);
  for (int64_t v = 0; v < a.V; ++v) {
    const double l_v = l[static_cast<size_t>(v)], dl = s * (all * std::exp(l_v - lse) - a.w(v) * a.t(n, v));
    db(v) += dl;
    for (int64_t k = 0; k < a.D; ++k) dx(n, k) += dl * w(v, k);
    for (int64_t k = 0; k < a.D; ++k) dw(v, k) += dl * x(n, k);
    if (a.is_soft()) *d.target.mutable_data(n, v) = s * (1 - a.label_smoothing) * a.w(v) * (lse - l_v);
  }
}

Gradients backward(const Loss& a, const Array<double>& grad_loss) {
  Gradients d = {zeros<double>({a.N, a.D}), zeros<double>({a.V, a.D}), zeros<double>({a.V}),
                 a.is_soft() ? zeros<double>({a.N, a.V}) : zeros<double>({0})};
  const double divisor = a.reduction == "mean" ? a.total_weight() : 1;
  for (int64_t n = 0; n < a.N; ++n) {
    if (a.counts(n)) add_row(a, n, grad_loss.data()[a.reduction == "none" ? n : 0] / divisor, d);
  }
  return d;
}

Target classes_or_probabilities(const py::array& target) {
  if (target.dtype().kind() == 'f') return Array<double>(target);
  return Array<int64_t>(target);
}

Loss arguments(Array<double> input, Array<double> weight, OptionalArray bias, const py::array& target,
               OptionalArray class_weight, std::string reduction, int64_t ignore_index, double label_smoothing) {
  if (input.ndim() != 2 || weight.ndim() != 2) {
    throw std::invalid_argument("llmkern._reference: expected input [N, D] and weight [V, D]");
  }
  const Loss a = {input,        weight,    bias,         classes_or_probabilities(target),
                  class_weight, reduction, ignore_index, label_smoothing};
  a.check();
  return a;
}

}  // namespace

void bind_cross_entropy(py::module_& m) {
  using A = Array<double>;
  m.def(
      "linear_cross_entropy",
      [](A input, A weight, const py::array& target, OptionalArray bias, OptionalArray class_weight,
         std::string reduction, int64_t ignore_index, double label_smoothing) {
        return forward(arguments(input, weight, bias, target, class_weight, reduction, ignore_index, label_smoothing));
      },
      py::arg("input"), py::arg("weight"), py::arg("target"), py::kw_only(), py::arg("bias") = py::none(),
      py::arg("class_weight") = py::none(), py::arg("reduction") = "mean", py::arg("ignore_index") = -100,
      py::arg("label_smoothing") = 0.0, "The loss: [N] for reduction none, else []");
  m.def(
      "linear_cross_entropy_backward",
      [](A grad_loss, A input, A weight, const py::array& target, OptionalArray bias, OptionalArray class_weight,
         std::string reduction, int64_t ignore_index, double label_smoothing) {
        const Loss a = arguments(input, weight, bias, target, class_weight, reduction, ignore_index, label_smoothing);
        if (grad_loss.size() != (reduction == "none" ? a.N : 1)) {
          throw std::invalid_argument("llmkern._reference: expected a gradient of the loss's shape");
        }
        const Gradients d = backward(a, grad_loss);
        return std::make_tuple(d.input, d.weight, d.bias, d.target);
      },
      py::arg("grad_loss"), py::arg("input"), py::arg("weight"), py::arg("target"), py::kw_only(),
      py::arg("bias") = py::none(), py::arg("class_weight") = py::none(), py::arg("reduction") = "mean",
      py::arg("ignore_index") = -100, py::arg("label_smoothing") = 0.0,
      "Gradients of input, weight, bias, and probabilities where target has them, else [0]");
}

}  // namespace llmkern::reference
