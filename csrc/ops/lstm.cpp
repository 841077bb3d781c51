// SPDX-License-Identifier: Apache-2.0
// torch.ops.llmkern.lstm and its gradient: schema, checks, allocation, launch. The math is in kernels/lstm.h.
#include "kernels/lstm.h"

#include <tuple>

#include "ops/tensors.h"

namespace llmkern::ops {

namespace {

constexpr const char* kName = "lstm";

struct Sizes {
  int64_t T, B, I, H;
};

Sizes check_layer(const Tensor& input, const Tensor& h_0, const Tensor& c_0, const Tensor& weight_ih,
                  const Tensor& weight_hh) {
  check_dim(kName, "input", input, 3);
  check_dim(kName, "weight_hh", weight_hh, 2);
  const Sizes n = {input.size(0), input.size(1), input.size(2), weight_hh.size(1)};
  if (n.T == 0) fail(kName, "expected at least one time step, got input of shape ", shape_text(input));
  if (n.H == 0) fail(kName, "expected at least one hidden unit, got weight_hh of shape ", shape_text(weight_hh));
  check_shape(kName, "weight_hh", weight_hh, {4 * n.H, n.H});
  check_shape(kName, "weight_ih", weight_ih, {4 * n.H, n.I});
  check_shape(kName, "h_0", h_0, {n.B, n.H});
  check_shape(kName, "c_0", c_0, {n.B, n.H});
  for (const Tensor* tensor : {&h_0, &c_0, &weight_ih, &weight_hh}) {
    check_dtype(kName, "every tensor", *tensor, input.scalar_type());
  }
  return n;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lstm_cpu(const Tensor& input_any, const Tensor& h_0_any,
                                                            const Tensor& c_0_any, const Tensor& weight_ih_any,
                                                            const Tensor& weight_hh_any,
                                                            const OptionalTensor& bias_ih_any,
                                                            const OptionalTensor& bias_hh_any, bool reverse) {
  const Sizes n = check_layer(input_any, h_0_any, c_0_any, weight_ih_any, weight_hh_any);
  if (bias_ih_any.has_value() != bias_hh_any.has_value()) fail(kName, "expected both biases or neither, got one");
  for (const OptionalTensor* bias : {&bias_ih_any, &bias_hh_any}) {
    if (!bias->has_value()) continue;
    check_shape(kName, "every bias", **bias, {4 * n.H});
    check_dtype(kName, "every bias", **bias, input_any.scalar_type());
  }
  const Tensor input = row_major(input_any), h_0 = row_major(h_0_any), c_0 = row_major(c_0_any);
  const Tensor weight_ih = row_major(weight_ih_any), weight_hh = row_major(weight_hh_any);
  const OptionalTensor bias_ih = row_major(bias_ih_any), bias_hh = row_major(bias_hh_any);
  Tensor output = empty(input, {n.T, n.B, n.H}), cells = empty(input, {n.T, n.B, n.H});
  Tensor gates = empty(input, {n.T, n.B, 4 * n.H});
  for_float_dtype(kName, "input", input, [&](auto value) {
    using T = decltype(value);
    cpu::run(LstmForward<T>{data<T>(input), data<T>(h_0), data<T>(c_0), data<T>(weight_ih), data<T>(weight_hh),
                            data<T>(bias_ih), data<T>(bias_hh), mutable_data<T>(output), mutable_data<T>(cells),
                            mutable_data<T>(gates), n.T, n.B, n.I, n.H, reverse},
             torch_parallel());
  });
  const int64_t last = reverse ? 0 : n.T - 1;
  return {output, torch::stable::clone(torch::stable::select(output, 0, last)),
          torch::stable::clone(torch::stable::select(cells, 0, last)), cells, gates};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lstm_backward_cpu(
    const OptionalTensor& grad_output_any, const OptionalTensor& grad_h_n_any, const OptionalTensor& grad_c_n_any,
    const Tensor& input_any, const Tensor& h_0_any, const Tensor& c_0_any, const Tensor& weight_ih_any,
    const Tensor& weight_hh_any, const Tensor& output_any, const Tensor& cells_any, const Tensor& gates_any,
    bool reverse) {
  const Sizes n = check_layer(input_any, h_0_any, c_0_any, weight_ih_any, weight_hh_any);
  check_shape(kName, "output", output_any, {n.T, n.B, n.H});
  check_shape(kName, "cells", cells_any, {n.T, n.B, n.H});
  check_shape(kName, "gates", gates_any, {n.T, n.B, 4 * n.H});
  if (grad_output_any) check_shape(kName, "grad_output", *grad_output_any, {n.T, n.B, n.H});
  if (grad_h_n_any) check_shape(kName, "grad_h_n", *grad_h_n_any, {n.B, n.H});
  if (grad_c_n_any) check_shape(kName, "grad_c_n", *grad_c_n_any, {n.B, n.H});
  for (const OptionalTensor* gradient : {&grad_output_any, &grad_h_n_any, &grad_c_n_any}) {
    if (gradient->has_value()) check_dtype(kName, "every gradient", **gradient, input_any.scalar_type());
  }
  for (const Tensor* saved : {&output_any, &cells_any, &gates_any}) {
    check_dtype(kName, "every saved tensor", *saved, input_any.scalar_type());
  }
  const OptionalTensor grad_output = row_major(grad_output_any), grad_h_n = row_major(grad_h_n_any);
  const OptionalTensor grad_c_n = row_major(grad_c_n_any);
  const Tensor input = row_major(input_any), h_0 = row_major(h_0_any), c_0 = row_major(c_0_any);
  const Tensor weight_ih = row_major(weight_ih_any), weight_hh = row_major(weight_hh_any);
  const Tensor output = row_major(output_any), cells = row_major(cells_any), gates = row_major(gates_any);
  Tensor grad_gates = empty(input, {n.T, n.B, 4 * n.H}), grad_input = empty(input, {n.T, n.B, n.I});
  Tensor grad_h_0 = empty(input, {n.B, n.H}), grad_c_0 = empty(input, {n.B, n.H});
  Tensor grad_weight_ih = empty(input, {4 * n.H, n.I}), grad_weight_hh = empty(input, {4 * n.H, n.H});
  Tensor grad_bias = empty(input, {4 * n.H});
  for_float_dtype(kName, "input", input, [&](auto value) {
    using T = decltype(value);
    cpu::run(LstmBackward<T>{data<T>(grad_output),
                             data<T>(grad_h_n),
                             data<T>(grad_c_n),
                             data<T>(input),
                             data<T>(h_0),
                             data<T>(c_0),
                             data<T>(weight_ih),
                             data<T>(weight_hh),
                             data<T>(output),
                             data<T>(cells),
                             data<T>(gates),
                             mutable_data<T>(grad_gates),
                             mutable_data<T>(grad_input),
                             mutable_data<T>(grad_h_0),
                             mutable_data<T>(grad_c_0),
                             mutable_data<T>(grad_weight_ih),
                             mutable_data<T>(grad_weight_hh),
                             mutable_data<T>(grad_bias),
                             n.T,
                             n.B,
                             n.I,
                             n.H,
                             reverse},
             torch_parallel());
  });
  return {grad_input, grad_h_0, grad_c_0, grad_weight_ih, grad_weight_hh, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llmkern, m) {
  m.def(
      "lstm(Tensor input, Tensor h_0, Tensor c_0, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, "
      "Tensor? bias_hh, bool reverse) -> (Tensor output, Tensor h_n, Tensor c_n, Tensor cells, Tensor gates)");
  m.def(
      "lstm_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor input, Tensor h_0, Tensor c_0, "
      "Tensor weight_ih, Tensor weight_hh, Tensor output, Tensor cells, Tensor gates, bool reverse) -> (Tensor "
      "grad_input, Tensor grad_h_0, Tensor grad_c_0, Tensor grad_weight_ih, Tensor grad_weight_hh, Tensor grad_bias)");
}

STABLE_TORCH_LIBRARY_IMPL(llmkern, CPU, m) {
  m.impl("lstm", TORCH_BOX(&lstm_cpu));
  m.impl("lstm_backward", TORCH_BOX(&lstm_backward_cpu));
}

}  // namespace llmkern::ops
