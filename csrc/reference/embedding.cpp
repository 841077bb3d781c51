// SPDX-License-Identifier: Apache-2.0
// Embedding gather and its gradient, as readable as kernels/embedding.h states them.
#include "reference/arrays.h"

namespace llmkern::reference {

namespace {

void check_ids(const Array<int64_t>& ids, int64_t V) {
  for (py::ssize_t n = 0; n < ids.size(); ++n) {
    if (ids.at(n) < 0 || ids.at(n) >= V) throw py::index_error("llmkern._reference: id outside [0, V)");
  }
}

// table [V, D], ids [N] -> [N, D]
Array<double> embedding(const Array<int64_t>& ids, const Array<double>& table) {
  const int64_t N = ids.shape(0), V = table.shape(0), D = table.shape(1);
  check_ids(ids, V);
  Array<double> out = zeros<double>({N, D});
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t d = 0; d < D; ++d) out.mutable_at(n, d) = table.at(ids.at(n), d);
  }
  return out;
}

// grad_out [N, D], ids [N] -> grad_table [V, D]
Array<double> embedding_backward(const Array<double>& grad_out, const Array<int64_t>& ids, int64_t V,
                                 int64_t padding_idx, bool scale_grad_by_freq) {
  const int64_t N = ids.shape(0), D = grad_out.shape(1);
  check_shape("grad_out", grad_out, {N, D});
  check_ids(ids, V);
  std::vector<int64_t> counts(static_cast<size_t>(V));
  for (int64_t n = 0; n < N; ++n) ++counts[static_cast<size_t>(ids.at(n))];
  Array<double> grad_table = zeros<double>({V, D});
  for (int64_t n = 0; n < N; ++n) {
    const int64_t v = ids.at(n);
    if (v == padding_idx) continue;
    const double scale = scale_grad_by_freq ? 1.0 / static_cast<double>(counts[static_cast<size_t>(v)]) : 1.0;
    for (int64_t d = 0; d < D; ++d) grad_table.mutable_at(v, d) += scale * grad_out.at(n, d);
  }
  return grad_table;
}

}  // namespace

void bind_embedding(py::module_& m) {
  m.def("embedding", &embedding, py::arg("ids"), py::arg("table"));
  m.def("embedding_backward", &embedding_backward, py::arg("grad_out"), py::arg("ids"), py::arg("num_embeddings"),
        py::arg("padding_idx") = -1, py::arg("scale_grad_by_freq") = false);
}

}  // namespace llmkern::reference
