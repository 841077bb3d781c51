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

using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

struct Sizes {
  int64_t N, D, V;
};

// Given probabilities, [N, V], as against classes, int64 [N].
bool is_soft(const Tensor& target) { return target.scalar_type() != ScalarType::Long; }

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
  if (is_soft(target)) {
    const ScalarType wide = widened(input.scalar_type());
    if (target.scalar_type() != wide) {
      fail(kName, "expected target of dtype Long or ", torch::headeronly::toString(wide), ", got ",
           torch::headeronly::toString(target.scalar_type()));
    }
    check_shape(kName, "target", target, {n.N, n.V});
  } else {
    check_shape(kName, "target", target, {n.N});
  }
  if (reduction < 0 || reduction > 2) fail(kName, "expected reduction 0, 1 or 2, got ", reduction);
  if (!(label_smoothing >= 0 && label_smoothing <= 1)) {
    fail(kName, "expected label_smoothing in [0, 1], got ", label_smoothing);
  }
  return n;
}

void check_targets(const Tensor& target, int64_t V, int64_t ignore_index) {
  if (is_soft(target)) return;
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

void check_wanted(const Tensor& target, bool needs_target) {
  if (needs_target && !is_soft(target)) fail(kName, "expected a gradient of probabilities alone, got classes");
}

// A gradient that was summed in more bits than its argument has.
Tensor narrowed(const Tensor& sum, const Tensor& like) {
  return sum.scalar_type() == like.scalar_type() ? sum : torch::stable::to(sum, like.scalar_type());
}

// The arguments of a call on the CPU, checked, as the kernels read them.
struct CpuCall {
  Sizes n;
  Tensor input, weight, target;
  OptionalTensor bias, class_weight;
  int64_t ignore_index;
  double label_smoothing;
  Reduction reduction;
  ScalarType wide;
  int64_t chunk_rows;

  CpuCall(const Tensor& input_any, const Tensor& weight_any, const OptionalTensor& bias_any, const Tensor& target_any,
          const OptionalTensor& class_weight_any, int64_t reduction_code, int64_t ignored, double smoothing)
      : n(check_arguments(input_any, weight_any, bias_any, target_any, class_weight_any, reduction_code, smoothing)),
        input(row_major(input_any)),
        weight(row_major(weight_any)),
        target(row_major(target_any)),
        bias(row_major(bias_any)),
        class_weight(row_major(class_weight_any)),
        ignore_index(ignored),
        label_smoothing(smoothing),
        reduction(static_cast<Reduction>(reduction_code)),
        wide(widened(input.scalar_type())),
        chunk_rows(kCpuChunks.rows(n.N, n.V, element_bytes(wide))) {
    check_targets(target, n.V, ignore_index);
  }

  template <class T>
  CrossEntropyProblem<T> problem() const {
    return {.input = data<T>(input),
            .weight = data<T>(weight),
            .bias = data<T>(bias),
            .class_weight = data<T>(class_weight),
            .target = is_soft(target) ? nullptr : data<int64_t>(target),
            .probabilities = is_soft(target) ? data<Widened<T>>(target) : nullptr,
            .N = n.N,
            .D = n.D,
            .V = n.V,
            .chunk_rows = chunk_rows,
            .ignore_index = ignore_index,
            .label_smoothing = label_smoothing,
            .reduction = reduction};
  }

  // The logits of a chunk, and their gradient: the same memory where the types are the same.
  Tensor logits() const { return empty_recycled(input, {chunk_rows, n.V}, wide); }
  Tensor gradient_beside(const Tensor& logits) const {
    return wide == input.scalar_type() ? logits : empty_recycled(input, {chunk_rows, n.V});
  }
};

Four linear_cross_entropy_cpu(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                              const Tensor& target, const OptionalTensor& class_weight, int64_t reduction,
                              int64_t ignore_index, double label_smoothing, bool save_gradient) {
  const CpuCall call(input, weight, bias, target, class_weight, reduction, ignore_index, label_smoothing);
  const auto [N, D, V] = call.n;
  const Tensor logits = call.logits(), gradient = save_gradient ? call.gradient_beside(logits) : logits;
  const Tensor loss = call.reduction == Reduction::kNone ? empty(input, {N}, call.wide) : empty(input, {}, call.wide);
  const Tensor lse = empty(input, {N}, ScalarType::Double), total_weight = empty(input, {}, call.wide);
  const Tensor input_gradient = save_gradient ? empty_recycled(input, {N, D}, call.wide) : empty(input, {0}, call.wide);
  for_storage_dtype(kName, "input", input, [&](auto value) {
    using T = decltype(value);
    using W = Widened<T>;
    cpu::run(CrossEntropyForward<T>{.problem = call.problem<T>(),
                                    .workspace = mutable_data<W>(logits),
                                    .gradient = mutable_data<T>(gradient),
                                    .loss = mutable_data<W>(loss),
                                    .lse = mutable_data<double>(lse),
                                    .total_weight = mutable_data<W>(total_weight),
                                    .input_gradient = save_gradient ? mutable_data<W>(input_gradient) : nullptr},
             torch_parallel());
  });
  return {loss, lse, total_weight, input_gradient};
}

Four linear_cross_entropy_backward_cpu(const Tensor& grad_loss_any, const Tensor& input, const Tensor& weight,
                                       const OptionalTensor& bias, const Tensor& target,
                                       const OptionalTensor& class_weight, const Tensor& lse_any,
                                       const Tensor& total_weight_any, int64_t reduction, int64_t ignore_index,
                                       double label_smoothing, bool needs_input, bool needs_weight, bool needs_bias,
                                       bool needs_target) {
  const CpuCall call(input, weight, bias, target, class_weight, reduction, ignore_index, label_smoothing);
  const auto [N, D, V] = call.n;
  check_saved(grad_loss_any, lse_any, total_weight_any, N, call.reduction == Reduction::kNone, call.wide);
  check_wanted(target, needs_target);
  const Tensor grad_loss = row_major(grad_loss_any), lse = row_major(lse_any),
               total_weight = row_major(total_weight_any);
  const Tensor logits = call.logits(), gradient = call.gradient_beside(logits);
  const Tensor grad_input = needs_input ? empty_recycled(input, {N, D}) : empty(input, {0});
  const Tensor grad_weight = needs_weight ? empty_recycled(input, {V, D}, call.wide) : empty(input, {0}, call.wide);
  const Tensor grad_bias = empty(input, {needs_bias ? V : 0}, call.wide);
  const Tensor grad_target = needs_target ? empty_recycled(input, {N, V}, call.wide) : empty(input, {0}, call.wide);
  for_storage_dtype(kName, "input", input, [&](auto value) {
    using T = decltype(value);
    using W = Widened<T>;
    cpu::run(CrossEntropyBackward<T>{.problem = call.problem<T>(),
                                     .grad_loss = data<W>(grad_loss),
                                     .lse = data<double>(lse),
                                     .total_weight = data<W>(total_weight),
                                     .workspace = mutable_data<W>(logits),
                                     .gradient = mutable_data<T>(gradient),
                                     .grad_input = needs_input ? mutable_data<T>(grad_input) : nullptr,
                                     .grad_weight = needs_weight ? mutable_data<W>(grad_weight) : nullptr,
                                     .grad_bias = needs_bias ? mutable_data<W>(grad_bias) : nullptr,
                                     .grad_probabilities = needs_target ? mutable_data<W>(grad_target) : nullptr},
             torch_parallel());
  });
  return {grad_input, narrowed(grad_weight, input), narrowed(grad_bias, input), grad_target};
}

Tensor linear_logits_cpu(const Tensor& input_any, const Tensor& weight_any, const OptionalTensor& bias_any) {
  check_dim("linear_logits", "input", input_any, 2);
  check_dim("linear_logits", "weight", weight_any, 2);
  const int64_t N = input_any.size(0), D = input_any.size(1), V = weight_any.size(0);
  const ScalarType dtype = input_any.scalar_type();
  check_shape("linear_logits", "weight", weight_any, {V, D});
  check_dtype("linear_logits", "weight", weight_any, dtype);
  if (bias_any) {
    check_shape("linear_logits", "bias", *bias_any, {V});
    check_dtype("linear_logits", "bias", *bias_any, dtype);
  }
  const Tensor input = row_major(input_any), weight = row_major(weight_any);
  const OptionalTensor bias = row_major(bias_any);
  const Tensor logits = empty(input, {N, V}, widened(dtype));
  for_storage_dtype("linear_logits", "input", input, [&](auto value) {
    using T = decltype(value);
    cpu::run(
        LinearLogits<T>{
            .input = data<T>(input),
            .weight = data<T>(weight),
            .bias = data<T>(bias),
            .logits = mutable_data<Widened<T>>(logits),
            .N = N,
            .D = D,
            .V = V,
        },
        torch_parallel());
  });
  return logits;
}

#ifdef LLMKERN_WITH_CUDA
void check_hard(const Tensor& target) {
  if (is_soft(target)) fail(kName, "expected classes on CUDA, got probabilities");
}

// The sum of the class weights, [1], where label smoothing needs it; nothing otherwise.
OptionalTensor sum_of(const OptionalTensor& class_weight, double label_smoothing) {
  if (!class_weight.has_value() || label_smoothing == 0) return std::nullopt;
  return sum_rows(*class_weight, ScalarType::Double);
}

// Its backward pass makes the gradient of the input: `save_gradient` is for the CPU.
Four linear_cross_entropy_cuda(const Tensor& input, const Tensor& weight, const OptionalTensor& bias_any,
                               const Tensor& target_any, const OptionalTensor& class_weight_any, int64_t reduction,
                               int64_t ignore_index, double label_smoothing, bool) {
  const Sizes n = check_arguments(input, weight, bias_any, target_any, class_weight_any, reduction, label_smoothing);
  check_hard(target_any);
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
  return {loss, lse, total_weight, empty(input, {0}, wide)};
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

Four linear_cross_entropy_backward_cuda(const Tensor& grad_loss_any, const Tensor& input, const Tensor& weight,
                                        const OptionalTensor& bias_any, const Tensor& target_any,
                                        const OptionalTensor& class_weight_any, const Tensor& lse_any,
                                        const Tensor& total_weight, int64_t reduction, int64_t ignore_index,
                                        double label_smoothing, bool needs_input, bool needs_weight, bool needs_bias,
                                        bool needs_target) {
  const Sizes n = check_arguments(input, weight, bias_any, target_any, class_weight_any, reduction, label_smoothing);
  check_hard(target_any);
  check_wanted(target_any, needs_target);
  const bool none = static_cast<Reduction>(reduction) == Reduction::kNone;
  const ScalarType dtype = input.scalar_type(), wide = widened(dtype);
  check_saved(grad_loss_any, lse_any, total_weight, n.N, none, wide);
  const OnCuda cuda(input);
  const Tensor grad_loss = row_major(grad_loss_any), target = row_major(target_any), lse = row_major(lse_any);
  const OptionalTensor bias = row_major(bias_any), class_weight = row_major(class_weight_any);
  const OptionalTensor sum_class_weight = sum_of(class_weight, label_smoothing);
  const Tensor grad_input = needs_input ? empty(input, {n.N, n.D}) : empty(input, {0});
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
      if (needs_input) product_into(gradient, weight, torch::stable::narrow(to, 0, row, rows));
      if (needs_weight) accumulate<Widened<T>>(grad_weight, product(transposed(gradient), x, wide), cuda.stream());
      if (needs_bias) accumulate<Widened<T>>(grad_bias, sum_rows(gradient, wide), cuda.stream());
    }
  });
  // Without rows there is no sum yet.
  if (needs_weight && !grad_weight) grad_weight = torch::stable::new_zeros(input, {n.V, n.D});
  if (needs_bias && !grad_bias) grad_bias = torch::stable::new_zeros(input, {n.V});
  return {grad_input, grad_weight ? narrowed(*grad_weight, input) : empty(input, {0}),
          grad_bias ? narrowed(*grad_bias, input) : empty(input, {0}), empty(input, {0}, wide)};
}
#endif

}  // namespace

#ifndef LLMKERN_SIMT
STABLE_TORCH_LIBRARY_FRAGMENT(llmkern, m) {
  m.def(
      "linear_cross_entropy(Tensor input, Tensor weight, Tensor? bias, Tensor target, Tensor? class_weight, "
      "int reduction, int ignore_index, float label_smoothing, bool save_gradient=False) "
      "-> (Tensor loss, Tensor lse, Tensor total_weight, Tensor input_gradient)");
  m.def("linear_logits(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor");
  m.def(
      "linear_cross_entropy_backward(Tensor grad_loss, Tensor input, Tensor weight, Tensor? bias, Tensor target, "
      "Tensor? class_weight, Tensor lse, Tensor total_weight, int reduction, int ignore_index, float label_smoothing, "
      "bool needs_input, bool needs_weight, bool needs_bias, bool needs_target) "
      "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias, Tensor grad_target)");
}

STABLE_TORCH_LIBRARY_IMPL(llmkern, CPU, m) {
  LLMKERN_OPERATOR(m, "linear_cross_entropy", &linear_cross_entropy_cpu);
  LLMKERN_OPERATOR(m, "linear_cross_entropy_backward", &linear_cross_entropy_backward_cpu);
  LLMKERN_OPERATOR(m, "linear_logits", &linear_logits_cpu);
}
#endif

#ifdef LLMKERN_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(llmkern, LLMKERN_CUDA_KEY, m) {
  LLMKERN_OPERATOR(m, "linear_cross_entropy", &linear_cross_entropy_cuda);
  LLMKERN_OPERATOR(m, "linear_cross_entropy_backward", &linear_cross_entropy_backward_cuda);
}
#endif

}  // namespace llmkern::ops
