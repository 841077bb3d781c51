// SPDX-License-Identifier: Apache-2.0
// torch.ops.llmkern.lstm_step and its gradient: what a Python loop over a cell calls at every step, with as few tensors
// as a step needs, because each costs as much as some rows of the product.
#include <tuple>

#include "ops/lstm.h"

#ifndef LLMKERN_SIMT

namespace llmkern::ops {

namespace {

// What the backward pass of a step needs of the forward pass, in one buffer: the cell state, [B, H] of Widened<T>, then
// the activated gates, [B, 4H] of T.
template <class T>
struct SavedStep {
  Widened<T>* cells;
  T* gates;

  SavedStep(const Tensor& saved, int64_t B, int64_t H)
      : cells(static_cast<Widened<T>*>(saved.mutable_data_ptr())), gates(reinterpret_cast<T*>(cells + B * H)) {}
  static int64_t bytes(int64_t B, int64_t H) {
    return B * H * static_cast<int64_t>(sizeof(Widened<T>) + 4 * sizeof(T));
  }
};

LstmSizes check_step(const Tensor& state, const Tensor& weight_ih, const Tensor& weight_hh) {
  check_dim(kLstm, "c_0", state, 2);
  check_dim(kLstm, "weight_ih", weight_ih, 2);
  const int64_t B = state.size(0), H = state.size(1), I = weight_ih.size(1);
  if (H == 0) fail(kLstm, "expected at least one hidden unit, got c_0 of shape ", shape_text(state));
  check_parameter("weight_ih", weight_ih, state.scalar_type(), {4 * H, I});
  check_parameter("weight_hh", weight_hh, state.scalar_type(), {4 * H, H});
  return {1, B, I, H, H};
}

std::tuple<Tensor, Tensor, Tensor> lstm_step_cpu(const Tensor& input_any, const Tensor& h_0_any, const Tensor& c_0_any,
                                                 const Tensor& weight_ih_any, const Tensor& weight_hh_any,
                                                 const OptionalTensor& bias_ih_any, const OptionalTensor& bias_hh_any) {
  const LstmSizes n = check_step(c_0_any, weight_ih_any, weight_hh_any);
  const ScalarType dtype = c_0_any.scalar_type();
  check_parameter("input", input_any, dtype, {n.B, n.I});
  check_parameter("h_0", h_0_any, dtype, {n.B, n.H});
  if (bias_ih_any.has_value() != bias_hh_any.has_value()) fail(kLstm, "expected both biases or neither, got one");
  check_parameter("bias_ih", bias_ih_any, dtype, {4 * n.H});
  check_parameter("bias_hh", bias_hh_any, dtype, {4 * n.H});
  const Tensor input = row_major(input_any), h_0 = row_major(h_0_any), c_0 = row_major(c_0_any);
  const Tensor weight_ih = row_major(weight_ih_any), weight_hh = row_major(weight_hh_any);
  const OptionalTensor bias_ih = row_major(bias_ih_any), bias_hh = row_major(bias_hh_any);
  const Tensor h_1 = empty(input, {n.B, n.H}), c_1 = empty(input, {n.B, n.H});
  Tensor saved;
  for_storage_dtype(kLstm, "input", input, [&](auto value) {
    using T = decltype(value);
    saved = empty_recycled(input, {SavedStep<T>::bytes(n.B, n.H)}, ScalarType::Byte);
    const SavedStep<T> step(saved, n.B, n.H);
    LstmForward<T> a = {};
    a.input = data<T>(input);
    a.h_0 = data<T>(h_0);
    a.c_0 = data<T>(c_0);
    a.weight_ih = data<T>(weight_ih);
    a.weight_hh = data<T>(weight_hh);
    a.bias_ih = data<T>(bias_ih);
    a.bias_hh = data<T>(bias_hh);
    a.output = a.h_n = mutable_data<T>(h_1);
    a.c_n = mutable_data<T>(c_1);
    a.cells = step.cells;
    a.gates = step.gates;
    a.steps = 1, a.B = n.B, a.I = n.I, a.H = a.P = n.H;
    cpu::run(a, torch_parallel());
  });
  return {h_1, c_1, saved};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lstm_step_backward_cpu(const OptionalTensor& grad_h_any,
                                                                  const OptionalTensor& grad_c_any,
                                                                  const Tensor& c_0_any, const Tensor& weight_ih_any,
                                                                  const Tensor& weight_hh_any,
                                                                  const Tensor& saved_any) {
  const LstmSizes n = check_step(c_0_any, weight_ih_any, weight_hh_any);
  const ScalarType dtype = c_0_any.scalar_type();
  check_parameter("grad_h", grad_h_any, dtype, {n.B, n.H});
  check_parameter("grad_c", grad_c_any, dtype, {n.B, n.H});
  const OptionalTensor grad_h = row_major(grad_h_any), grad_c = row_major(grad_c_any);
  const Tensor c_0 = row_major(c_0_any), saved = row_major(saved_any);
  const Tensor weight_ih = row_major(weight_ih_any), weight_hh = row_major(weight_hh_any);
  const Tensor grad_input = empty(c_0, {n.B, n.I}), grad_h_0 = empty(c_0, {n.B, n.H});
  const Tensor grad_c_0 = empty(c_0, {n.B, n.H}), grad_gates = empty_recycled(c_0, {n.B, 4 * n.H});
  for_storage_dtype(kLstm, "c_0", c_0, [&](auto value) {
    using T = decltype(value);
    check_parameter("saved", saved, ScalarType::Byte, {SavedStep<T>::bytes(n.B, n.H)});
    const SavedStep<T> step(saved, n.B, n.H);
    LstmBackward<T> a = {};
    a.grad_output = data<T>(grad_h);
    a.grad_c_n = data<T>(grad_c);
    a.c_0 = data<T>(c_0);
    a.weight_ih = data<T>(weight_ih);
    a.weight_hh = data<T>(weight_hh);
    a.cells = step.cells;
    a.gates = step.gates;
    a.grad_gates = mutable_data<T>(grad_gates);
    a.grad_input = mutable_data<T>(grad_input);
    a.grad_h_0 = mutable_data<T>(grad_h_0);
    a.grad_c_0 = mutable_data<T>(grad_c_0);
    a.steps = 1, a.B = n.B, a.I = n.I, a.H = a.P = n.H;
    cpu::run(a, torch_parallel());
  });
  return {grad_input, grad_h_0, grad_c_0, grad_gates};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llmkern, m) {
  m.def(
      "lstm_step(Tensor input, Tensor h_0, Tensor c_0, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? "
      "bias_hh) -> (Tensor h_1, Tensor c_1, Tensor saved)");
  m.def(
      "lstm_step_backward(Tensor? grad_h, Tensor? grad_c, Tensor c_0, Tensor weight_ih, Tensor weight_hh, Tensor "
      "saved) -> (Tensor grad_input, Tensor grad_h_0, Tensor grad_c_0, Tensor grad_gates)");
}

STABLE_TORCH_LIBRARY_IMPL(llmkern, CPU, m) {
  LLMKERN_OPERATOR(m, "lstm_step", &lstm_step_cpu);
  LLMKERN_OPERATOR(m, "lstm_step_backward", &lstm_step_backward_cpu);
}

}  // namespace llmkern::ops

#endif
