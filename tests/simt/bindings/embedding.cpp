// SPDX-License-Identifier: Apache-2.0
#include "kernels/embedding.h"

#include "bind.h"

BIND((EmbeddingForward<float, int32_t>), table, ids, out, N, V, D, error)
BIND((EmbeddingForward<float, int64_t>), table, ids, out, N, V, D, error)
BIND((EmbeddingForward<double, int32_t>), table, ids, out, N, V, D, error)
BIND((EmbeddingForward<double, int64_t>), table, ids, out, N, V, D, error)
BIND((EmbeddingForward<bfloat16, int32_t>), table, ids, out, N, V, D, error)
BIND((EmbeddingForward<bfloat16, int64_t>), table, ids, out, N, V, D, error)
BIND((EmbeddingForward<float16, int32_t>), table, ids, out, N, V, D, error)
BIND((EmbeddingForward<float16, int64_t>), table, ids, out, N, V, D, error)
BIND((EmbeddingBackwardSorted<float, int32_t>), grad_out, sorted_ids, order, grad_table, workspace, N, V, D,
     padding_idx, scale_by_frequency, error)
BIND((EmbeddingBackwardSorted<float, int64_t>), grad_out, sorted_ids, order, grad_table, workspace, N, V, D,
     padding_idx, scale_by_frequency, error)
BIND((EmbeddingBackwardSorted<double, int32_t>), grad_out, sorted_ids, order, grad_table, workspace, N, V, D,
     padding_idx, scale_by_frequency, error)
BIND((EmbeddingBackwardSorted<double, int64_t>), grad_out, sorted_ids, order, grad_table, workspace, N, V, D,
     padding_idx, scale_by_frequency, error)
BIND((EmbeddingBackwardSorted<bfloat16, int32_t>), grad_out, sorted_ids, order, grad_table, workspace, N, V, D,
     padding_idx, scale_by_frequency, error)
BIND((EmbeddingBackwardSorted<bfloat16, int64_t>), grad_out, sorted_ids, order, grad_table, workspace, N, V, D,
     padding_idx, scale_by_frequency, error)
BIND((EmbeddingBackwardSorted<float16, int32_t>), grad_out, sorted_ids, order, grad_table, workspace, N, V, D,
     padding_idx, scale_by_frequency, error)
BIND((EmbeddingBackwardSorted<float16, int64_t>), grad_out, sorted_ids, order, grad_table, workspace, N, V, D,
     padding_idx, scale_by_frequency, error)
BINDINGS
