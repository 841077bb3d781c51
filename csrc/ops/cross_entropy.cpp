// SPDX-License-Identifier: Apache-2.0
// torch.ops.llmkern.linear_cross_entropy and its gradient: schema, checks, allocation, launch. The math is in
// kernels/cross_entropy.h.
#include "kernels/cross_entropy.h"

#include <algorithm>
#include <tuple>

#include "ops/cuda.h"
#include "ops/tensors.h"

namespace llmkern::ops {

namespace {

constexpr const char* kName = "linear_cross_entropy";

using Three = std::tuple<Tensor, Tensor, Tensor>;

struct Sizes {
  int64_t N, D, V;
};

Sizes check_arguments(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const Tensor& target,
                      const OptionalTensor& class_weight, int64_t reduction, double label_smoothing) {
  check_dim(kName, "input", input, 2);
  check_dim(kName, "weight", weight, 2);
  const Sizes n = {input.size(0), input.size(1), weight.size(0)};
  if (n.V == 0) fail(kName, "expected at least one class, got weight of shape ", shape_text(weight));
  check_shape(kName, "weight", weight, {n.V, n.D});
  check_dtype(kName, "weight", weight, input.scalar_type());
  for (const OptionalTensor* vector : {&bias, &class_weight}) {
    if (!vector->has_value()) continue;
    check_shape(kName, "bias and class weights", **vector, {n.V});
    check_dtype(kName, "bias and class weights", **vector, input.scalar_type());
  }
  check_shape(kName, "target", target, {n.N});
  check_dtype(kName, "target", target, ScalarType::Long);
  if (reduction < 0 || reduction > 2) fail(kName, "expected reduction 0, 1 or 2, got ", reduction);
  if (!(label_smoothing >= 0 && label_smoothing <= 1)) {
    fail(kName, "expected label_smoothing in [0, 1], got ", label_smoothing);
  }
  return n;
}

void check_targets(const Tensor& target, int64_t V, int64_t ignore_index) {
  const int64_t* y = data<int64_t>(target);
  for (int64_t i = 0; i < target.numel(); ++i) {
    if (y[i] == ignore_index || (y[i] >= 0 && y[i] < V)) continue;
    fail<std::out_of_range>(kName, "expected targets in [0, ", V, ") or ", ignore_index, ", got ", y[i],
                            " at position ", i, " of the flattened targets");
  }
}

// What the forward pass saved, and the gradient of the loss.
void check_saved(const Tensor& grad_loss, const Tensor& lse, const Tensor& total_weight, int64_t N, bool none,
                 ScalarType dtype) {
  if (grad_loss.numel() != (none ? N : 1)) {
    fail(kName, "expected a gradient of ", none ? N : 1, " elements, got shape ", shape_text(grad_loss));
  }
  check_shape(kName, "lse", lse, {N});
  check_shape(kName, "total_weight", total_weight, {});
  check_dtype(kName, "lse", lse, ScalarType::Double);
  for (const Tensor* tensor : {&grad_loss, &total_weight}) check_dtype(kName, "every tensor", *tensor, dtype);
}

Three linear_cross_entropy_cpu(const Tensor& input_any, const Tensor& weight_any, const OptionalTensor& bias_any,
                               const Tensor& target_any, const OptionalTensor& class_weight_any, int64_t reduction,
                               int64_t ignore_index, double label_smoothing) {
  const Sizes n =
      check_arguments(input_any, weight_any, bias_any, target_any, class_weight_any, reduction, label_smoothing);
  const Tensor input = row_major(input_any), weight = row_major(weight_any), target = row_major(target_any);
  check_targets(target, n.V, ignore_index);
  const OptionalTensor bias = row_major(bias_any), class_weight = row_major(class_weight_any);
  const int64_t chunk_rows = kCpuChunks.rows(n.N, n.V, input.element_size());
  const bool none = static_cast<Reduction>(reduction) == Reduction::kNone;
  Tensor workspace = empty_recycled(input, {chunk_rows, n.V}), total_weight = empty(input, {});
  Tensor lse = empty(input, {n.N}, ScalarType::Double);
  Tensor loss = none ? empty(input, {n.N}) : empty(input, {});
  for_float_dtype(kName, "input", input, [&](auto value) {
    using T = decltype(value);
    cpu::run(CrossEntropyForward<T>{data<T>(input), data<T>(weight), data<T>(bias), data<T>(class_weight),
                                    data<int64_t>(target), mutable_data<T>(workspace), mutable_data<T>(loss),
                                    mutable_data<double>(lse), mutable_data<T>(total_weight), n.N, n.D, n.V, chunk_rows,
                                    ignore_index, label_smoothing, static_cast<Reduction>(reduction)},
             torch_parallel());
  });
  return {loss, lse, total_weight};
}

Three linear_cross_entropy_backward_cpu(const Tensor& grad_loss_any, const Tensor& input_any, const Tensor& weight_any,
                                        const OptionalTensor& bias_any, const Tensor& target_any,
                                        const OptionalTensor& class_weight_any, const Tensor& lse_any,
                                        const Tensor& total_weight_any, int64_t reduction, int64_t ignore_index,
                                        double label_smoothing) {
  const Sizes n =
      check_arguments(input_any, weight_any, bias_any, target_any, class_weight_any, reduction, label_smoothing);
  const bool none = static_cast<Reduction>(reduction) == Reduction::kNone;
  check_saved(grad_loss_any, lse_any, total_weight_any, n.N, none, input_any.scalar_type());
  const Tensor grad_loss = row_major(grad_loss_any), lse = row_major(lse_any),
               total_weight = row_major(total_weight_any);
  const Tensor input = row_major(input_any), weight = row_major(weight_any), target = row_major(target_any);
  check_targets(target, n.V, ignore_index);
  const OptionalTensor bias = row_major(bias_any), class_weight = row_major(class_weight_any);
  const int64_t chunk_rows = kCpuChunks.rows(n.N, n.V, input.element_size());
  Tensor workspace = empty_recycled(input, {chunk_rows, n.V}), grad_input = empty_recycled(input, {n.N, n.D});
  Tensor grad_weight = empty_recycled(input, {n.V, n.D}), grad_bias = empty(input, {bias ? n.V : 0});
  for_float_dtype(kName, "input", input, [&](auto value) {
    using T = decltype(value);
    cpu::run(
        CrossEntropyBackward<T>{data<T>(grad_loss), data<T>(input), data<T>(weight), data<T>(bias),
                                data<T>(class_weight), data<int64_t>(target), data<double>(lse), data<T>(total_weight),
                                mutable_data<T>(workspace), mutable_data<T>(grad_input), mutable_data<T>(grad_weight),
                                bias ? mutable_data<T>(grad_bias) : nullptr, n.N, n.D, n.V, chunk_rows, ignore_index,
                                label_smoothing, static_cast<Reduction>(reduction)},
        torch_parallel());
  });
  return {grad_input, grad_weight, grad_bias};
}

#ifdef LLMKERN_WITH_CUDA
// The sum of the class weights, [1], where label smoothing needs it; nothing otherwise.
OptionalTensor sum_of(const OptionalTensor& class_weight, double label_smoothing) {
  if (!class_weight.has_value() || label_smoothing == 0) return std::nullopt;
  return sum_rows(*class_weight, ScalarType::Double);
}

Three linear_cross_entropy_cuda(const Tensor& input, const Tensor& weight, const OptionalTensor& bias_any,
                                const Tensor& target_any, const OptionalTensor& class_weight_any, int64_t reduction,
                                int64_t ignore_index, double label_smoothing) {
  const Sizes n = check_arguments(input, weight, bias_any, target_any, class_weight_any, reduction, label_smoothing);
  const OnCuda cuda(input);
  const ScalarType wide = widened(input.scalar_type());
  const Tensor target = row_major(target_any);
  const OptionalTensor bias = row_major(bias_any), class_weight = row_major(class_weight_any);
  const OptionalTensor sum_class_weight = sum_of(class_weight, label_smoothing);
  const bool none = static_cast<Reduction>(reduction) == Reduction::kNone;
  const Tensor loss = none ? empty(input, {n.N}, wide) : empty(input, {}, wide);
  const Tensor row_loss = empty(input, {n.N}, ScalarType::Double), lse = empty(input, {n.N}, ScalarType::Double);
  const Tensor total_weight = empty(input, {}, wide);
  const int64_t chunk_rows = kCudaChunks.rows(n.N, n.V, wide == ScalarType::Double ? 8 : 4);
  for_storage_dtype(kName, "input", input, [&](auto value) {
    using T = decltype(value);
    for (int64_t row = 0; row < n.N; row += chunk_rows) {
      const int64_t rows = std::min(chunk_rows, n.N - row);
      Tensor from = input;
      const Tensor logits = product(torch::stable::narrow(from, 0, row, rows), transposed(weight), wide);
      cuda::run(CrossEntropyRows<T>{data<Widened<T>>(logits), data<T>(bias), data<T>(class_weight),
                                    data<int64_t>(target) + row, mutable_data<double>(row_loss) + row,
                                    mutable_data<double>(lse) + row, data<double>(sum_class_weight), rows, n.V, row,
                                    ignore_index, label_smoothing, cuda.error()},
                cuda.stream());
    }
    cuda::run(CrossEntropyReduce<T>{data<double>(row_loss), data<T>(class_weight), data<int64_t>(target),
                                    mutable_data<Widened<T>>(loss), mutable_data<Widened<T>>(total_weight), n.N, n.V,
                                    ignore_index, static_cast<Reduction>(reduction)},
              cuda.stream());
  });
  return {loss, lse, total_weight};
}

// sum += x, or x itself where there is no sum yet.
template <class T>
void accumulate(OptionalTensor& sum, const Tensor& x, void* stream) {
  if (!sum.has_value()) {
    sum = x;
  } else {
    cuda::run(Accumulate<T>{mutable_data<T>(*sum), data<T>(x), x.numel()}, stream);
  }
}

Three linear_cross_entropy_backward_cuda(const Tensor& grad_loss_any, const Tensor& input, const Tensor& weight,
                                         const OptionalTensor& bias_any, const Tensor& target_any,
                                         const OptionalTensor& class_weight_any, const Tensor& lse_any,
                                         const Tensor& total_weight, int64_t reduction, int64_t ignore_index,
                                         double label_smoothing) {
  const Sizes n = check_arguments(input, weight, bias_any, target_any, class_weight_any, reduction, label_smoothing);
  const bool none = static_cast<Reduction>(reduction) == Reduction::kNone;
  const ScalarType dtype = input.scalar_type(), wide = widened(dtype);
  check_saved(grad_loss_any, lse_any, total_weight, n.N, none, wide);
  const OnCuda cuda(input);
  const Tensor grad_loss = row_major(grad_loss_any), target = row_major(target_any), lse = row_major(lse_any);
  const OptionalTensor bias = row_major(bias_any), class_weight = row_major(class_weight_any);
  const OptionalTensor sum_class_weight = sum_of(class_weight, label_smoothing);
  const Tensor grad_input = empty(input, {n.N, n.D});
  OptionalTensor grad_weight, grad_bias;
  const int64_t chunk_rows = kCudaChunks.rows(n.N, n.V, wide == ScalarType::Double ? 8 : 4);
  for_storage_dtype(kName, "input", input, [&](auto value) {
    using T = decltype(value);
    for (int64_t row = 0; row < n.N; row += chunk_rows) {
      const int64_t rows = std::min(chunk_rows, n.N - row);
      Tensor from = input, to = grad_input;
      const Tensor x = torch::stable::narrow(from, 0, row, rows);
      const Tensor logits = product(x, transposed(weight), wide);
      const Tensor gradient = wide == dtype ? logits : empty(input, {rows, n.V});
      cuda::run(
          CrossEntropyLogitsBackward<T>{data<Widened<T>>(grad_loss) + (none ? row : 0), data<Widened<T>>(total_weight),
                                        data<Widened<T>>(logits), data<T>(bias), data<T>(class_weight),
                                        data<int64_t>(target) + row, data<double>(lse) + row,
                                        data<double>(sum_class_weight), mutable_data<T>(gradient), rows, n.V,
                                        ignore_index, label_smoothing, static_cast<Reduction>(reduction)},
          cuda.stream());
      product_into(gradient, weight, torch::stable::narrow(to, 0, row, rows));
      accumulate<Widened<T>>(grad_weight, product(transposed(gradient), x, wide), cuda.stream());
      if (bias) accumulate<Widened<T>>(grad_bias, sum_rows(gradient, wide), cuda.stream());
    }
  });
  if (!grad_weight) grad_weight = torch::stable::new_zeros(input, {n.V, n.D});
  if (!grad_bias) grad_bias = torch::stable::new_zeros(input, {bias ? n.V : 0});
  return {grad_input, torch::stable::to(*grad_weight, dtype), torch::stable::to(*grad_bias, dtype)};
}
#endif

}  // namespace

#ifndef LLMKERN_SIMT
STABLE_TORCH_LIBRARY_FRAGMENT(llmkern, m) {
  m.def(
      "linear_cross_entropy(Tensor input, Tensor weight, Tensor? bias, Tensor target, Tensor? class_weight, "
      "int reduction, int ignore_index, float label_smoothing) -> (Tensor loss, Tensor lse, Tensor total_weight)");
  m.def(
      "linear_cross_entropy_backward(Tensor grad_loss, Tensor input, Tensor weight, Tensor? bias, Tensor target, "
      "Tensor? class_weight, Tensor lse, Tensor total_weight, int reduction, int ignore_index, float label_smoothing) "
      "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");
}

STABLE_TORCH_LIBRARY_IMPL(llmkern, CPU, m) {
  LLMKERN_OPERATOR(m, "linear_cross_entropy", &linear_cross_entropy_cpu);
  LLMKERN_OPERATOR(m, "linear_cross_entropy_backward", &linear_cross_entropy_backward_cpu);
}
#endif

#ifdef LLMKERN_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(llmkern, LLMKERN_CUDA_KEY, m) {
  LLMKERN_OPERATOR(m, "linear_cross_entropy", &linear_cross_entropy_cuda);
  LLMKERN_OPERATOR(m, "linear_cross_entropy_backward", &linear_cross_entropy_backward_cuda);
}
#endif

}  // namespace llmkern::ops
