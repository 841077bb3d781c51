// SPDX-License-Identifier: Apache-2.0
// torch.ops.llmkern.linear_cross_entropy and its gradient: schema, checks, allocation, launch. The math is in
// kernels/cross_entropy.h.
#include "kernels/cross_entropy.h"

#include <tuple>

#include "ops/tensors.h"

namespace llmkern::ops {

namespace {

constexpr const char* kName = "linear_cross_entropy";

struct Sizes {
  int64_t N, D, V;
};

Sizes check_arguments(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const Tensor& target,
                      const OptionalTensor& class_weight, int64_t reduction, int64_t ignore_index,
                      double label_smoothing) {
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
  const Tensor targets = row_major(target);
  const int64_t* y = data<int64_t>(targets);
  for (int64_t i = 0; i < n.N; ++i) {
    if (y[i] == ignore_index || (y[i] >= 0 && y[i] < n.V)) continue;
    fail<std::out_of_range>(kName, "expected targets in [0, ", n.V, ") or ", ignore_index, ", got ", y[i],
                            " at position ", i, " of the flattened targets");
  }
  return n;
}

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_cpu(const Tensor& input_any, const Tensor& weight_any,
                                                            const OptionalTensor& bias_any, const Tensor& target_any,
                                                            const OptionalTensor& class_weight_any, int64_t reduction,
                                                            int64_t ignore_index, double label_smoothing) {
  const Sizes n = check_arguments(input_any, weight_any, bias_any, target_any, class_weight_any, reduction,
                                  ignore_index, label_smoothing);
  const Tensor input = row_major(input_any), weight = row_major(weight_any), target = row_major(target_any);
  const OptionalTensor bias = row_major(bias_any), class_weight = row_major(class_weight_any);
  const int64_t chunk_rows = cross_entropy_chunk_rows(n.N, n.V, input.element_size());
  const bool none = static_cast<Reduction>(reduction) == Reduction::kNone;
  Tensor workspace = empty(input, {chunk_rows, n.V}), total_weight = empty(input, {});
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

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_backward_cpu(
    const Tensor& grad_loss_any, const Tensor& input_any, const Tensor& weight_any, const OptionalTensor& bias_any,
    const Tensor& target_any, const OptionalTensor& class_weight_any, const Tensor& lse_any,
    const Tensor& total_weight_any, int64_t reduction, int64_t ignore_index, double label_smoothing) {
  const Sizes n = check_arguments(input_any, weight_any, bias_any, target_any, class_weight_any, reduction,
                                  ignore_index, label_smoothing);
  const bool none = static_cast<Reduction>(reduction) == Reduction::kNone;
  if (grad_loss_any.numel() != (none ? n.N : 1)) {
    fail(kName, "expected a gradient of ", none ? n.N : 1, " elements, got shape ", shape_text(grad_loss_any));
  }
  check_shape(kName, "lse", lse_any, {n.N});
  check_shape(kName, "total_weight", total_weight_any, {});
  check_dtype(kName, "lse", lse_any, ScalarType::Double);
  for (const Tensor* tensor : {&grad_loss_any, &total_weight_any}) {
    check_dtype(kName, "every tensor", *tensor, input_any.scalar_type());
  }
  const Tensor grad_loss = row_major(grad_loss_any), lse = row_major(lse_any),
               total_weight = row_major(total_weight_any);
  const Tensor input = row_major(input_any), weight = row_major(weight_any), target = row_major(target_any);
  const OptionalTensor bias = row_major(bias_any), class_weight = row_major(class_weight_any);
  const int64_t chunk_rows = cross_entropy_chunk_rows(n.N, n.V, input.element_size());
  Tensor workspace = empty(input, {chunk_rows, n.V}), grad_input = empty(input, {n.N, n.D});
  Tensor grad_weight = empty(input, {n.V, n.D}), grad_bias = empty(input, {bias ? n.V : 0});
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

}  // namespace

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
  m.impl("linear_cross_entropy", TORCH_BOX(&linear_cross_entropy_cpu));
  m.impl("linear_cross_entropy_backward", TORCH_BOX(&linear_cross_entropy_backward_cpu));
}

}  // namespace llmkern::ops
