// SPDX-License-Identifier: Apache-2.0
// Masks and dropout, as readable as kernels/mask.h and kernels/dropout.h state them.
#include "reference/arrays.h"
#include "reference/masks.h"

namespace llmkern::reference {

namespace {

Array<bool> mask(int64_t seed, int64_t purpose, int64_t rows, int64_t columns, double p) {
  Array<bool> set = zeros<bool>({rows, columns});
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      set.mutable_at(row, column) = is_set(seed, static_cast<Purpose>(purpose), row, column, columns, p);
    }
  }
  return set;
}

// x [N, D]; mask [R, D]
Array<double> dropout(const Array<double>& x, int64_t seed, double p, int64_t R) {
  const int64_t N = x.shape(0), D = x.shape(1);
  Array<double> out = zeros<double>({N, D});
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t d = 0; d < D; ++d) {
      if (!is_set(seed, Purpose::kDropout, n % R, d, D, p)) out.mutable_at(n, d) = x.at(n, d) / (1 - p);
    }
  }
  return out;
}

}  // namespace

void bind_dropout(py::module_& m) {
  m.def("mask", &mask, py::arg("seed"), py::arg("purpose"), py::arg("rows"), py::arg("columns"), py::arg("p"));
  m.def("dropout", &dropout, py::arg("x"), py::arg("seed"), py::arg("p"), py::arg("mask_rows"));
}

}  // namespace llmkern::reference
