// SPDX-License-Identifier: Apache-2.0
#include "kernels/embedding.h"

#include "bind.h"

BIND((EmbeddingForward<float, int32_t>), table, ids, out, N, V, D)
BIND((EmbeddingForward<float, int64_t>), table, ids, out, N, V, D)
BIND((EmbeddingForward<double, int32_t>), table, ids, out, N, V, D)
BIND((EmbeddingForward<double, int64_t>), table, ids, out, N, V, D)
BINDINGS
