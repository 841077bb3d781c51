// SPDX-License-Identifier: Apache-2.0
// torch.ops.llmkern.lstm and its gradient: schema, checks, allocation, launch. The math is in kernels/lstm.h.
#include "kernels/lstm.h"

#include <tuple>

#include "ops/cuda.h"
#include "ops/tensors.h"

namespace llmkern::ops {

namespace {

constexpr const char* kName = "lstm";

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

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

void check_biases(const OptionalTensor& bias_ih, const OptionalTensor& bias_hh, int64_t H, ScalarType dtype) {
  if (bias_ih.has_value() != bias_hh.has_value()) fail(kName, "expected both biases or neither, got one");
  for (const OptionalTensor* bias : {&bias_ih, &bias_hh}) {
    if (!bias->has_value()) continue;
    check_shape(kName, "every bias", **bias, {4 * H});
    check_dtype(kName, "every bias", **bias, dtype);
  }
}

// What the forward pass saved, and the gradients of its results.
void check_saved(const Sizes& n, ScalarType dtype, ScalarType cell_dtype, const OptionalTensor& grad_output,
                 const OptionalTensor& grad_h_n, const OptionalTensor& grad_c_n, const Tensor& output,
                 const Tensor& cells, const Tensor& gates) {
  check_shape(kName, "output", output, {n.T, n.B, n.H});
  check_shape(kName, "cells", cells, {n.T, n.B, n.H});
  check_shape(kName, "gates", gates, {n.T, n.B, 4 * n.H});
  if (grad_output) check_shape(kName, "grad_output", *grad_output, {n.T, n.B, n.H});
  if (grad_h_n) check_shape(kName, "grad_h_n", *grad_h_n, {n.B, n.H});
  if (grad_c_n) check_shape(kName, "grad_c_n", *grad_c_n, {n.B, n.H});
  for (const OptionalTensor* gradient : {&grad_output, &grad_h_n, &grad_c_n}) {
    if (gradient->has_value()) check_dtype(kName, "every gradient", **gradient, dtype);
  }
  check_dtype(kName, "output", output, dtype);
  check_dtype(kName, "gates", gates, dtype);
  check_dtype(kName, "cells", cells, cell_dtype);
}

void check_lengths(const OptionalTensor& lengths, int64_t B) {
  if (!lengths.has_value()) return;
  check_shape(kName, "lengths", *lengths, {B});
  check_dtype(kName, "lengths", *lengths, ScalarType::Long);
}

// The kernels count with them; on CUDA nobody looks.
void check_values(const OptionalTensor& lengths, int64_t T) {
  if (!lengths.has_value()) return;
  const int64_t* values = data<int64_t>(*lengths);
  for (int64_t b = 0; b < lengths->size(0); ++b) {
    if (values[b] < 0 || values[b] > T)
      fail(kName, "expected lengths in [0, T = ", T, "], got ", values[b], " in row ", b);
  }
}

int64_t packed_elements(ScalarType dtype, int64_t I, int64_t H) {
  return dtype == ScalarType::Double ? lstm_packed_elements<double>(I, H) : lstm_packed_elements<float>(I, H);
}

Tensor lstm_pack_cpu(const Tensor& weight_ih_any, const Tensor& weight_hh_any) {
  check_dim(kName, "weight_ih", weight_ih_any, 2);
  check_dim(kName, "weight_hh", weight_hh_any, 2);
  const int64_t I = weight_ih_any.size(1), H = weight_hh_any.size(1);
  check_shape(kName, "weight_hh", weight_hh_any, {4 * H, H});
  check_shape(kName, "weight_ih", weight_ih_any, {4 * H, I});
  check_dtype(kName, "weight_ih", weight_ih_any, weight_hh_any.scalar_type());
  const Tensor weight_ih = row_major(weight_ih_any), weight_hh = row_major(weight_hh_any);
  const Tensor packed = empty(weight_hh, {packed_elements(weight_hh.scalar_type(), I, H)});
  for_float_dtype(kName, "weight_hh", weight_hh, [&](auto value) {
    using T = decltype(value);
    cpu::run(LstmPack<T>{data<T>(weight_ih), data<T>(weight_hh), mutable_data<T>(packed), I, H}, torch_parallel());
  });
  return packed;
}

Forward lstm_cpu(const Tensor& input_any, const Tensor& h_0_any, const Tensor& c_0_any, const Tensor& weight_ih_any,
                 const Tensor& weight_hh_any, const OptionalTensor& bias_ih_any, const OptionalTensor& bias_hh_any,
                 const OptionalTensor& lengths_any, const OptionalTensor& packed, bool reverse, bool save) {
  const Sizes n = check_layer(input_any, h_0_any, c_0_any, weight_ih_any, weight_hh_any);
  check_biases(bias_ih_any, bias_hh_any, n.H, input_any.scalar_type());
  check_lengths(lengths_any, n.B);
  if (packed) {
    check_shape(kName, "packed", *packed, {packed_elements(input_any.scalar_type(), n.I, n.H)});
    check_dtype(kName, "packed", *packed, input_any.scalar_type());
  }
  const Tensor input = row_major(input_any), h_0 = row_major(h_0_any), c_0 = row_major(c_0_any);
  const Tensor weight_ih = row_major(weight_ih_any), weight_hh = row_major(weight_hh_any);
  const OptionalTensor bias_ih = row_major(bias_ih_any), bias_hh = row_major(bias_hh_any);
  const OptionalTensor lengths = row_major(lengths_any);
  check_values(lengths, n.T);
  const Tensor output = empty(input, {n.T, n.B, n.H}), h_n = empty(input, {n.B, n.H}), c_n = empty(input, {n.B, n.H});
  const Tensor cells = save ? empty(input, {n.T, n.B, n.H}) : empty(input, {0, n.B, n.H});
  const Tensor gates = save ? empty(input, {n.T, n.B, 4 * n.H}) : empty(input, {0, n.B, 4 * n.H});
  for_float_dtype(kName, "input", input, [&](auto value) {
    using T = decltype(value);
    cpu::run(LstmForward<T>{data<T>(input), data<T>(h_0), data<T>(c_0), data<T>(weight_ih), data<T>(weight_hh),
                            data<T>(bias_ih), data<T>(bias_hh), data<int64_t>(lengths), data<T>(packed),
                            mutable_data<T>(output), save ? mutable_data<T>(cells) : nullptr,
                            save ? mutable_data<T>(gates) : nullptr, mutable_data<T>(h_n), mutable_data<T>(c_n), n.T,
                            n.B, n.I, n.H, reverse},
             torch_parallel());
  });
  return {output, h_n, c_n, cells, gates};
}

Backward lstm_backward_cpu(const OptionalTensor& grad_output_any, const OptionalTensor& grad_h_n_any,
                           const OptionalTensor& grad_c_n_any, const Tensor& input_any, const Tensor& h_0_any,
                           const Tensor& c_0_any, const Tensor& weight_ih_any, const Tensor& weight_hh_any,
                           const OptionalTensor& lengths_any, const Tensor& output_any, const Tensor& cells_any,
                           const Tensor& gates_any, bool reverse) {
  const Sizes n = check_layer(input_any, h_0_any, c_0_any, weight_ih_any, weight_hh_any);
  check_lengths(lengths_any, n.B);
  const OptionalTensor lengths = row_major(lengths_any);
  check_values(lengths, n.T);
  check_saved(n, input_any.scalar_type(), input_any.scalar_type(), grad_output_any, grad_h_n_any, grad_c_n_any,
              output_any, cells_any, gates_any);
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
                             data<int64_t>(lengths),
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

#ifdef LLMKERN_WITH_CUDA
Tensor rows_of(const Tensor& steps) {  // [T, B, X] as [T * B, X]
  return torch::stable::view(steps, {steps.size(0) * steps.size(1), steps.size(2)});
}

Forward lstm_cuda(const Tensor& input_any, const Tensor& h_0_any, const Tensor& c_0_any, const Tensor& weight_ih,
                  const Tensor& weight_hh_any, const OptionalTensor& bias_ih_any, const OptionalTensor& bias_hh_any,
                  const OptionalTensor& lengths_any, const OptionalTensor&, bool reverse, bool save) {
  const Sizes n = check_layer(input_any, h_0_any, c_0_any, weight_ih, weight_hh_any);
  check_biases(bias_ih_any, bias_hh_any, n.H, input_any.scalar_type());
  check_lengths(lengths_any, n.B);
  const OnCuda cuda(input_any);
  const ScalarType dtype = input_any.scalar_type(), wide = widened(dtype);
  const Tensor input = row_major(input_any), h_0 = row_major(h_0_any), c_0 = row_major(c_0_any);
  const Tensor weight_hh = row_major(weight_hh_any);
  const OptionalTensor bias_ih = row_major(bias_ih_any), bias_hh = row_major(bias_hh_any);
  const OptionalTensor lengths = row_major(lengths_any);
  const Tensor input_gates =
      torch::stable::view(product(rows_of(input), transposed(weight_ih), wide), {n.T, n.B, 4 * n.H});
  // The activated gates take the place of the others where they are as wide.
  const Tensor gates = wide == dtype ? input_gates : empty(input, {n.T, n.B, 4 * n.H});
  const Tensor output = empty(input, {n.T, n.B, n.H}), cells = empty(input, {n.T, n.B, n.H}, wide);
  const Tensor h_n = empty(input, {n.B, n.H}), c_n = empty(input, {n.B, n.H});
  for_cuda_dtype(kName, "input", input, [&](auto value) {
    using T = decltype(value);
    cuda::run(LstmRecurrence<T>{data<Widened<T>>(input_gates), data<T>(h_0), data<T>(c_0), data<T>(weight_hh),
                                data<T>(bias_ih), data<T>(bias_hh), data<int64_t>(lengths), mutable_data<T>(output),
                                mutable_data<Widened<T>>(cells), mutable_data<T>(gates), mutable_data<T>(h_n),
                                mutable_data<T>(c_n), n.T, n.B, n.H, reverse},
              cuda.stream());
  });
  if (!save) return {output, h_n, c_n, empty(input, {0, n.B, n.H}, wide), empty(input, {0, n.B, 4 * n.H})};
  return {output, h_n, c_n, cells, gates};
}

Backward lstm_backward_cuda(const OptionalTensor& grad_output_any, const OptionalTensor& grad_h_n_any,
                            const OptionalTensor& grad_c_n_any, const Tensor& input_any, const Tensor& h_0_any,
                            const Tensor& c_0_any, const Tensor& weight_ih, const Tensor& weight_hh_any,
                            const OptionalTensor& lengths_any, const Tensor& output_any, const Tensor& cells_any,
                            const Tensor& gates_any, bool reverse) {
  const Sizes n = check_layer(input_any, h_0_any, c_0_any, weight_ih, weight_hh_any);
  check_lengths(lengths_any, n.B);
  const ScalarType dtype = input_any.scalar_type(), wide = widened(dtype);
  check_saved(n, dtype, wide, grad_output_any, grad_h_n_any, grad_c_n_any, output_any, cells_any, gates_any);
  const OnCuda cuda(input_any);
  const OptionalTensor grad_output = row_major(grad_output_any), grad_h_n = row_major(grad_h_n_any);
  const OptionalTensor grad_c_n = row_major(grad_c_n_any);
  const Tensor input = row_major(input_any), c_0 = row_major(c_0_any), weight_hh = row_major(weight_hh_any);
  const Tensor h_0 = row_major(h_0_any), output = row_major(output_any);
  const Tensor cells = row_major(cells_any), gates = row_major(gates_any);
  const OptionalTensor lengths = row_major(lengths_any);
  const Tensor grad_gates = empty(input, {n.T, n.B, 4 * n.H}), grad_cell = empty(input, {n.B, n.H}, wide);
  const Tensor grad_h_0 = empty(input, {n.B, n.H}), grad_c_0 = empty(input, {n.B, n.H});
  const Tensor previous = empty(input, {n.T, n.B, n.H});
  for_cuda_dtype(kName, "input", input, [&](auto value) {
    using T = decltype(value);
    cuda::run(
        LstmRecurrenceBackward<T>{data<T>(grad_output), data<T>(grad_h_n), data<T>(grad_c_n), data<T>(c_0),
                                  data<T>(weight_hh), data<Widened<T>>(cells), data<T>(gates), data<int64_t>(lengths),
                                  mutable_data<Widened<T>>(grad_cell), mutable_data<T>(grad_gates),
                                  mutable_data<T>(grad_h_0), mutable_data<T>(grad_c_0), n.T, n.B, n.H, reverse},
        cuda.stream());
    cuda::run(LstmPrevious<T>{data<T>(h_0), data<T>(output), data<int64_t>(lengths), mutable_data<T>(previous), n.T,
                              n.B, n.H, reverse},
              cuda.stream());
  });
  const Tensor rows = rows_of(grad_gates), columns = transposed(rows);
  return {torch::stable::view(product(rows, weight_ih), {n.T, n.B, n.I}),
          grad_h_0,
          grad_c_0,
          product(columns, rows_of(input)),
          product(columns, rows_of(previous)),
          sum_rows(rows, dtype)};
}
#endif

}  // namespace

#ifndef LLMKERN_SIMT
STABLE_TORCH_LIBRARY_FRAGMENT(llmkern, m) {
  m.def(
      "lstm(Tensor input, Tensor h_0, Tensor c_0, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, "
      "Tensor? bias_hh, Tensor? lengths, Tensor? packed, bool reverse, bool save) -> (Tensor output, Tensor h_n, "
      "Tensor c_n, Tensor cells, Tensor gates)");
  m.def("lstm_pack(Tensor weight_ih, Tensor weight_hh) -> Tensor");
  m.def(
      "lstm_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor input, Tensor h_0, Tensor c_0, "
      "Tensor weight_ih, Tensor weight_hh, Tensor? lengths, Tensor output, Tensor cells, Tensor gates, bool reverse) "
      "-> (Tensor "
      "grad_input, Tensor grad_h_0, Tensor grad_c_0, Tensor grad_weight_ih, Tensor grad_weight_hh, Tensor grad_bias)");
}

STABLE_TORCH_LIBRARY_IMPL(llmkern, CPU, m) {
  m.impl("lstm", TORCH_BOX(&lstm_cpu));
  m.impl("lstm_pack", TORCH_BOX(&lstm_pack_cpu));
  m.impl("lstm_backward", TORCH_BOX(&lstm_backward_cpu));
}
#endif

#ifdef LLMKERN_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(llmkern, LLMKERN_CUDA_KEY, m) {
  m.impl("lstm", TORCH_BOX(&lstm_cuda));
  m.impl("lstm_backward", TORCH_BOX(&lstm_backward_cuda));
}
#endif

}  // namespace llmkern::ops
