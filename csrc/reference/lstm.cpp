// SPDX-License-Identifier: Apache-2.0
// One LSTM layer in one direction, forward and backward, as readable as kernels/lstm.h states it.
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>

#include "reference/arrays.h"

namespace llmkern::reference {

namespace {

using OptionalArray = std::optional<Array<double>>;

struct Layer {
  Array<double> input, h_0, c_0, weight_ih, weight_hh;
  OptionalArray bias_ih, bias_hh;
  bool reverse;
  int64_t T = input.shape(0), B = input.shape(1), I = input.shape(2), H = weight_hh.shape(1);

  void check() const {
    check_shape("h_0", h_0, {B, H});
    check_shape("c_0", c_0, {B, H});
    check_shape("weight_ih", weight_ih, {4 * H, I});
    check_shape("weight_hh", weight_hh, {4 * H, H});
    if (bias_ih) check_shape("bias_ih", *bias_ih, {4 * H});
    if (bias_hh) check_shape("bias_hh", *bias_hh, {4 * H});
  }

  // The time of the s-th step that runs.
  int64_t time(int64_t s) const { return reverse ? T - 1 - s : s; }

  double bias(int64_t j) const { return (bias_ih ? bias_ih->at(j) : 0) + (bias_hh ? bias_hh->at(j) : 0); }

  // What step s finds: the initial state [B, H], or what the step before it left in `values` [T, B, H].
  template <class Initial, class Values>
  double before(int64_t s, const Initial& initial, const Values& values, int64_t b, int64_t k) const {
    return s == 0 ? initial(b, k) : values(time(s - 1), b, k);
  }
};

struct Activations {
  Array<double> output, cells, gates;  // [T, B, H], [T, B, H], [T, B, 4H]
};

double sigmoid(double a) { return 1 / (1 + std::exp(-a)); }

Activations forward(const Layer& l) {
  const int64_t T = l.T, B = l.B, I = l.I, H = l.H;
  Activations saved = {zeros<double>({T, B, H}), zeros<double>({T, B, H}), zeros<double>({T, B, 4 * H})};
  auto h = saved.output.mutable_unchecked<3>(), c = saved.cells.mutable_unchecked<3>();
  auto gate = saved.gates.mutable_unchecked<3>();
  const auto x = l.input.unchecked<3>();
  const auto h_0 = l.h_0.unchecked<2>(), c_0 = l.c_0.unchecked<2>();
  const auto w_ih = l.weight_ih.unchecked<2>(), w_hh = l.weight_hh.unchecked<2>();
  for (int64_t s = 0; s < T; ++s) {
    const int64_t t = l.time(s);
    for (int64_t b = 0; b < B; ++b) {
      for (int64_t j = 0; j < 4 * H; ++j) {
        double a = l.bias(j);
        for (int64_t i = 0; i < I; ++i) a += w_ih(j, i) * x(t, b, i);
        for (int64_t k = 0; k < H; ++k) a += w_hh(j, k) * l.before(s, h_0, h, b, k);
        gate(t, b, j) = j / H == 2 ? std::tanh(a) : sigmoid(a);
      }
      for (int64_t k = 0; k < H; ++k) {
        const double i = gate(t, b, k), f = gate(t, b, H + k), g = gate(t, b, 2 * H + k), o = gate(t, b, 3 * H + k);
        c(t, b, k) = f * l.before(s, c_0, c, b, k) + i * g;
        h(t, b, k) = o * std::tanh(c(t, b, k));
      }
    }
  }
  return saved;
}

struct Gradients {
  Array<double> input, h_0, c_0, weight_ih, weight_hh, bias;
};

// da of every step, [T, B, 4H]. dh and dc [B, H] start as the gradients of h_n and c_n and end as those of h_0 and c_0.
Array<double> gate_gradients(const Layer& l, const Activations& saved, const OptionalArray& grad_output,
                             Array<double>& grad_h, Array<double>& grad_c) {
  const int64_t H = l.H;
  Array<double> grad_gates = zeros<double>({l.T, l.B, 4 * H});
  auto da = grad_gates.mutable_unchecked<3>();
  auto dh = grad_h.mutable_unchecked<2>(), dc = grad_c.mutable_unchecked<2>();
  const auto c = saved.cells.unchecked<3>(), gate = saved.gates.unchecked<3>();
  const auto c_0 = l.c_0.unchecked<2>(), w_hh = l.weight_hh.unchecked<2>();
  for (int64_t s = l.T - 1; s >= 0; --s) {
    const int64_t t = l.time(s);
    for (int64_t b = 0; b < l.B; ++b) {
      for (int64_t k = 0; k < H; ++k) {
        const double i = gate(t, b, k), f = gate(t, b, H + k), g = gate(t, b, 2 * H + k), o = gate(t, b, 3 * H + k);
        const double tanh_c = std::tanh(c(t, b, k));
        const double dh_t = dh(b, k) + (grad_output ? *grad_output->data(t, b, k) : 0);
        const double dc_t = dc(b, k) + dh_t * o * (1 - tanh_c * tanh_c);
        da(t, b, k) = dc_t * g * i * (1 - i);
        da(t, b, H + k) = dc_t * l.before(s, c_0, c, b, k) * f * (1 - f);
        da(t, b, 2 * H + k) = dc_t * i * (1 - g * g);
        da(t, b, 3 * H + k) = dh_t * tanh_c * o * (1 - o);
        dc(b, k) = dc_t * f;
      }
      for (int64_t k = 0; k < H; ++k) {
        dh(b, k) = 0;
        for (int64_t j = 0; j < 4 * H; ++j) dh(b, k) += da(t, b, j) * w_hh(j, k);
      }
    }
  }
  return grad_gates;
}

Gradients backward(const Layer& l, const OptionalArray& grad_output, const OptionalArray& grad_h_n,
                   const OptionalArray& grad_c_n) {
  const int64_t T = l.T, B = l.B, I = l.I, H = l.H;
  const Activations saved = forward(l);
  Gradients d = {zeros<double>({T, B, I}),  zeros<double>({B, H}),     zeros<double>({B, H}),
                 zeros<double>({4 * H, I}), zeros<double>({4 * H, H}), zeros<double>({4 * H})};
  if (grad_h_n) std::copy_n(grad_h_n->data(), B * H, d.h_0.mutable_data());
  if (grad_c_n) std::copy_n(grad_c_n->data(), B * H, d.c_0.mutable_data());
  const Array<double> grad_gates = gate_gradients(l, saved, grad_output, d.h_0, d.c_0);

  const auto da = grad_gates.unchecked<3>(), x = l.input.unchecked<3>(), h = saved.output.unchecked<3>();
  const auto h_0 = l.h_0.unchecked<2>(), w_ih = l.weight_ih.unchecked<2>();
  auto dx = d.input.mutable_unchecked<3>();
  auto dw_ih = d.weight_ih.mutable_unchecked<2>(), dw_hh = d.weight_hh.mutable_unchecked<2>();
  auto db = d.bias.mutable_unchecked<1>();
  for (int64_t s = 0; s < T; ++s) {
    const int64_t t = l.time(s);
    for (int64_t b = 0; b < B; ++b) {
      for (int64_t j = 0; j < 4 * H; ++j) {
        for (int64_t i = 0; i < I; ++i) dw_ih(j, i) += da(t, b, j) * x(t, b, i);
        for (int64_t i = 0; i < I; ++i) dx(t, b, i) += da(t, b, j) * w_ih(j, i);
        for (int64_t k = 0; k < H; ++k) dw_hh(j, k) += da(t, b, j) * l.before(s, h_0, h, b, k);
        db(j) += da(t, b, j);
      }
    }
  }
  return d;
}

Layer layer(Array<double> input, Array<double> h_0, Array<double> c_0, Array<double> weight_ih, Array<double> weight_hh,
            OptionalArray bias_ih, OptionalArray bias_hh, bool reverse) {
  if (input.ndim() != 3 || weight_hh.ndim() != 2 || input.shape(0) == 0) {
    throw std::invalid_argument("llmkern._reference: expected input [T, B, I] with T > 0 and weight_hh [4H, H]");
  }
  const Layer l = {input, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh, reverse};
  l.check();
  return l;
}

}  // namespace

void bind_lstm(py::module_& m) {
  using A = Array<double>;
  m.def(
      "lstm",
      [](A input, A h_0, A c_0, A weight_ih, A weight_hh, OptionalArray bias_ih, OptionalArray bias_hh, bool reverse) {
        const Layer l = layer(input, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh, reverse);
        const Activations saved = forward(l);
        const py::int_ last(l.time(l.T - 1));
        return py::make_tuple(saved.output, saved.output[last], saved.cells[last]);
      },
      py::arg("input"), py::arg("h_0"), py::arg("c_0"), py::arg("weight_ih"), py::arg("weight_hh"),
      py::arg("bias_ih") = py::none(), py::arg("bias_hh") = py::none(), py::arg("reverse") = false,
      "(output [T, B, H], h_n [B, H], c_n [B, H])");
  m.def(
      "lstm_backward",
      [](OptionalArray grad_output, OptionalArray grad_h_n, OptionalArray grad_c_n, A input, A h_0, A c_0, A weight_ih,
         A weight_hh, OptionalArray bias_ih, OptionalArray bias_hh, bool reverse) {
        const Layer l = layer(input, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh, reverse);
        if (grad_output) check_shape("grad_output", *grad_output, {l.T, l.B, l.H});
        if (grad_h_n) check_shape("grad_h_n", *grad_h_n, {l.B, l.H});
        if (grad_c_n) check_shape("grad_c_n", *grad_c_n, {l.B, l.H});
        const Gradients d = backward(l, grad_output, grad_h_n, grad_c_n);
        return std::make_tuple(d.input, d.h_0, d.c_0, d.weight_ih, d.weight_hh, d.bias);
      },
      py::arg("grad_output"), py::arg("grad_h_n"), py::arg("grad_c_n"), py::arg("input"), py::arg("h_0"),
      py::arg("c_0"), py::arg("weight_ih"), py::arg("weight_hh"), py::arg("bias_ih") = py::none(),
      py::arg("bias_hh") = py::none(), py::arg("reverse") = false,
      "Gradients of input, h_0, c_0, weight_ih, weight_hh and of either bias");
}

}  // namespace llmkern::reference
