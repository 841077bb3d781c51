// SPDX-License-Identifier: Apache-2.0
// llmkern._reference: the specification of every kernel, scalar and in float64, over numpy arrays.
#include "reference/arrays.h"

PYBIND11_MODULE(_reference, m) {
  m.doc() = "Scalar float64 reference kernels: what parity tests and `llmkern check` compare with.";
  llmkern::reference::bind_cross_entropy(m);
  llmkern::reference::bind_decoding(m);
  llmkern::reference::bind_dropout(m);
  llmkern::reference::bind_embedding(m);
  llmkern::reference::bind_lstm(m);
  llmkern::reference::bind_sampling(m);
}
