// SPDX-License-Identifier: Apache-2.0
#include "kernels/cross_entropy.h"

#include "bind.h"

// A gradient that takes the place of its logits, which the harness cannot say: it gives every field its own memory.
struct CrossEntropyInPlace {
  float* logits;
  const float* grad_loss;
  const int64_t* target;
  const double* lse;
  int64_t N, V;
};

template <>
void llmkern::cuda::run(const CrossEntropyInPlace& a, void* stream) {
  CrossEntropyLogitsBackward<float> args = {};
  args.grad_loss = a.grad_loss;
  args.logits = args.gradient = a.logits;
  args.target = a.target;
  args.lse = a.lse;
  args.N = a.N;
  args.V = a.V;
  args.ignore_index = -100;
  args.reduction = Reduction::kSum;
  run(args, stream);
}

BIND((CrossEntropyRows<float>), logits, bias, class_weight, target, loss, lse, sum_class_weight, N, V, first_row,
     ignore_index, label_smoothing, error)
BIND((CrossEntropyRows<double>), logits, bias, class_weight, target, loss, lse, sum_class_weight, N, V, first_row,
     ignore_index, label_smoothing, error)
BIND((CrossEntropyRows<bfloat16>), logits, bias, class_weight, target, loss, lse, sum_class_weight, N, V, first_row,
     ignore_index, label_smoothing, error)
BIND((CrossEntropyRows<float16>), logits, bias, class_weight, target, loss, lse, sum_class_weight, N, V, first_row,
     ignore_index, label_smoothing, error)
BIND((CrossEntropyReduce<float>), row_loss, class_weight, target, loss, total_weight, N, V, ignore_index, reduction)
BIND((CrossEntropyReduce<double>), row_loss, class_weight, target, loss, total_weight, N, V, ignore_index, reduction)
BIND((CrossEntropyReduce<bfloat16>), row_loss, class_weight, target, loss, total_weight, N, V, ignore_index, reduction)
BIND((CrossEntropyReduce<float16>), row_loss, class_weight, target, loss, total_weight, N, V, ignore_index, reduction)
BIND((CrossEntropyLogitsBackward<float>), grad_loss, total_weight, logits, bias, class_weight, target, lse,
     sum_class_weight, gradient, N, V, ignore_index, label_smoothing, reduction)
BIND((CrossEntropyLogitsBackward<double>), grad_loss, total_weight, logits, bias, class_weight, target, lse,
     sum_class_weight, gradient, N, V, ignore_index, label_smoothing, reduction)
BIND((CrossEntropyLogitsBackward<bfloat16>), grad_loss, total_weight, logits, bias, class_weight, target, lse,
     sum_class_weight, gradient, N, V, ignore_index, label_smoothing, reduction)
BIND((CrossEntropyLogitsBackward<float16>), grad_loss, total_weight, logits, bias, class_weight, target, lse,
     sum_class_weight, gradient, N, V, ignore_index, label_smoothing, reduction)
BIND((Accumulate<float>), sum, x, count)
BIND((Accumulate<double>), sum, x, count)
BIND((CrossEntropyInPlace), logits, grad_loss, target, lse, N, V)
BINDINGS
