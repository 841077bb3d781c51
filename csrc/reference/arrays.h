// SPDX-License-Identifier: Apache-2.0
// numpy arrays for the reference kernels: converted to C order, checked, never written in place.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <vector>

namespace llmkern::reference {

namespace py = pybind11;

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

template <class T>
Array<T> zeros(const std::vector<py::ssize_t>& shape) {
  Array<T> array(shape);
  std::fill_n(array.mutable_data(), array.size(), T{});
  return array;
}

template <class T>
void check_shape(const char* name, const Array<T>& array, const std::vector<py::ssize_t>& shape) {
  const std::vector<py::ssize_t> got(array.shape(), array.shape() + array.ndim());
  if (got == shape) return;
  const auto text = [](const std::vector<py::ssize_t>& sizes) {
    std::string joined;
    for (py::ssize_t size : sizes) joined += (joined.empty() ? "" : ", ") + std::to_string(size);
    return "[" + joined + "]";
  };
  throw std::invalid_argument(std::string("llmkern._reference: expected ") + name + " of shape " + text(shape) +
                              ", got " + text(got));
}

// One function a family, called by module.cpp.
void bind_cross_entropy(py::module_& m);
void bind_decoding(py::module_& m);
void bind_dropout(py::module_& m);
void bind_embedding(py::module_& m);
void bind_lstm(py::module_& m);
void bind_sampling(py::module_& m);

}  // namespace llmkern::reference
