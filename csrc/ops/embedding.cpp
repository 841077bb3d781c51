// SPDX-License-Identifier: Apache-2.0
// torch.ops.llmkern.embedding and its gradient: schema, checks, allocation, launch. The math is in kernels/embedding.h.
#include "kernels/embedding.h"

#include "ops/cuda.h"
#include "ops/tensors.h"

namespace llmkern::ops {

namespace {

constexpr const char* kName = "embedding";

std::vector<int64_t> output_shape(const Tensor& ids, int64_t D) {
  std::vector<int64_t> shape(ids.sizes().begin(), ids.sizes().end());
  shape.push_back(D);
  return shape;
}

// "[1, 3]": where in a tensor of this shape the n-th element is.
std::string position_text(const Tensor& ids, int64_t n) {
  std::string text = "]";
  for (int64_t d = ids.dim() - 1; d >= 0; --d) {
    text = (d ? ", " : "") + std::to_string(n % ids.size(d)) + text;
    n /= ids.size(d);
  }
  return "[" + text;
}

template <class Index>
void check_ids(const Tensor& ids, int64_t V) {
  const Index* values = data<Index>(ids);
  const int64_t n = first_out_of_range(values, ids.numel(), V);
  if (n < 0) return;
  fail<std::out_of_range>(kName, "expected ids in [0, ", V, "), got ", static_cast<int64_t>(values[n]), " at position ",
                          position_text(ids, n));
}

Tensor embedding_cpu(const Tensor& ids_any, const Tensor& weight_any, int64_t, bool) {
  check_dim(kName, "weight", weight_any, 2);
  const Tensor ids = row_major(ids_any), weight = row_major(weight_any);
  const int64_t N = ids.numel(), V = weight.size(0), D = weight.size(1);
  Tensor out = empty(weight, output_shape(ids, D));
  for_index_dtype(kName, "ids", ids, [&](auto index) {
    using Index = decltype(index);
    check_ids<Index>(ids, V);
    for_storage_dtype(kName, "weight", weight, [&](auto value) {
      using T = decltype(value);
      cpu::run(EmbeddingForward<T, Index>{data<T>(weight), data<Index>(ids), mutable_data<T>(out), N, V, D},
               torch_parallel());
    });
  });
  return out;
}

template <class Index>
std::vector<int64_t> occurrences(const Tensor& ids, int64_t V) {
  std::vector<int64_t> counts(static_cast<size_t>(V));
  const Index* values = data<Index>(ids);
  for (int64_t n = 0; n < ids.numel(); ++n) ++counts[static_cast<size_t>(values[n])];
  return counts;
}

void check_gradient(const Tensor& grad, const Tensor& ids) {
  if (grad.dim() != ids.dim() + 1) {
    fail(kName, "expected a gradient of shape ids.shape + [D], got ", shape_text(grad), " for ids of shape ",
         shape_text(ids));
  }
  const int64_t expected = ids.numel() * grad.size(grad.dim() - 1);
  if (grad.numel() != expected) {
    fail(kName, "expected a gradient of ", expected, " elements, got shape ", shape_text(grad));
  }
}

Tensor embedding_backward_cpu(const Tensor& grad_any, const Tensor& ids_any, int64_t V, int64_t padding_idx,
                              bool scale_grad_by_freq) {
  check_gradient(grad_any, ids_any);
  const Tensor grad = row_major(grad_any), ids = row_major(ids_any);
  const int64_t N = ids.numel(), D = grad.size(grad.dim() - 1);
  Tensor grad_weight = empty_recycled(grad, {V, D});
  for_index_dtype(kName, "ids", ids, [&](auto index) {
    using Index = decltype(index);
    check_ids<Index>(ids, V);
    const std::vector<int64_t> counts = scale_grad_by_freq ? occurrences<Index>(ids, V) : std::vector<int64_t>{};
    for_storage_dtype(kName, "the gradient", grad, [&](auto value) {
      using T = decltype(value);
      const Tensor sums = sizeof(T) == 2 ? empty_recycled(grad, {V, D}, ScalarType::Float) : grad_weight;
      cpu::run(EmbeddingBackward<T, Index>{.grad_out = data<T>(grad),
                                           .ids = data<Index>(ids),
                                           .counts = counts.empty() ? nullptr : counts.data(),
                                           .sums = mutable_data<Widened<T>>(sums),
                                           .grad_table = mutable_data<T>(grad_weight),
                                           .N = N,
                                           .V = V,
                                           .D = D,
                                           .padding_idx = padding_idx},
               torch_parallel());
    });
  });
  return grad_weight;
}

#ifdef LLMKERN_WITH_CUDA
Tensor embedding_cuda(const Tensor& ids_any, const Tensor& weight_any, int64_t, bool) {
  check_dim(kName, "weight", weight_any, 2);
  const OnCuda cuda(weight_any);
  const Tensor ids = row_major(ids_any), weight = row_major(weight_any);
  const int64_t N = ids.numel(), V = weight.size(0), D = weight.size(1);
  Tensor out = empty(weight, output_shape(ids, D));
  for_index_dtype(kName, "ids", ids, [&](auto index) {
    using Index = decltype(index);
    for_storage_dtype(kName, "weight", weight, [&](auto value) {
      using T = decltype(value);
      cuda::run(
          EmbeddingForward<T, Index>{data<T>(weight), data<Index>(ids), mutable_data<T>(out), N, V, D, cuda.error()},
          cuda.stream());
    });
  });
  return out;
}

Tensor embedding_backward_cuda(const Tensor& grad_any, const Tensor& ids_any, int64_t V, int64_t padding_idx,
                               bool scale_grad_by_freq) {
  check_gradient(grad_any, ids_any);
  const OnCuda cuda(grad_any);
  const Tensor grad = row_major(grad_any), ids = row_major(ids_any);
  const int64_t N = ids.numel(), D = grad.size(grad.dim() - 1);
  const auto [sorted_ids, order] = stable_sort(torch::stable::view(ids, {N}));
  Tensor grad_weight = torch::stable::new_zeros(grad, {V, D});
  Tensor workspace = empty(grad, {embedding_workspace_bytes(N, D)}, ScalarType::Byte);
  for_index_dtype(kName, "ids", ids, [&](auto index) {
    using Index = decltype(index);
    for_storage_dtype(kName, "the gradient", grad, [&](auto value) {
      using T = decltype(value);
      cuda::run(EmbeddingBackwardSorted<T, Index>{data<T>(grad), data<Index>(sorted_ids), data<int64_t>(order),
                                                  mutable_data<T>(grad_weight), workspace.mutable_data_ptr(), N, V, D,
                                                  padding_idx, scale_grad_by_freq, cuda.error()},
                cuda.stream());
    });
  });
  return grad_weight;
}
#endif

}  // namespace

#ifndef LLMKERN_SIMT
STABLE_TORCH_LIBRARY_FRAGMENT(llmkern, m) {
  // The last two arguments matter to the gradient alone.
  m.def("embedding(Tensor ids, Tensor weight, int padding_idx, bool scale_grad_by_freq) -> Tensor");
  m.def(
      "embedding_backward(Tensor grad, Tensor ids, SymInt num_embeddings, int padding_idx, bool scale_grad_by_freq) -> "
      "Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(llmkern, CPU, m) {
  LLMKERN_OPERATOR(m, "embedding", &embedding_cpu);
  LLMKERN_OPERATOR(m, "embedding_backward", &embedding_backward_cpu);
}
#endif

#ifdef LLMKERN_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(llmkern, LLMKERN_CUDA_KEY, m) {
  LLMKERN_OPERATOR(m, "embedding", &embedding_cuda);
  LLMKERN_OPERATOR(m, "embedding_backward", &embedding_backward_cuda);
}
#endif

}  // namespace llmkern::ops
