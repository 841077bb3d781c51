// SPDX-License-Identifier: Apache-2.0
// Everything that bindings share: tensors of the stable ABI, checks with the house's error text, allocation, threads.
//
// Python validates first (llmkern/ops); these checks are the backstop for callers of torch.ops.llmkern, so that no
// argument whatever makes a kernel read or write where it should not.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/half.h"
#include "kernels/pages.h"
#include "kernels/parallel.h"
#include "kernels/run.h"
#include "kernels/thread_memory.h"

namespace llmkern::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Throws "llmkern.<what>: <text>"; the parts of the text are streamed, so numbers need no formatting. torch hands
// std::invalid_argument to Python as ValueError, std::out_of_range as IndexError and any other as RuntimeError.
template <class Exception = std::invalid_argument, class... Parts>
[[noreturn]] void fail(const char* what, const Parts&... parts) {
  std::ostringstream text;
  text << "llmkern." << what << ": ";
  (text << ... << parts);
  throw Exception(text.str());
}

// Turns an OutOfMemory into the error that Python gets: a RuntimeError, as torch's own.
[[noreturn]] void fail_for_memory(const char* what, const OutOfMemory& error);

template <size_t n>
struct Name {
  char text[n];
  constexpr Name(const char (&name)[n]) {
    for (size_t i = 0; i < n; ++i) text[i] = name[i];
  }
};

template <Name name, auto f>
struct Operator;

template <Name name, class Result, class... Args, Result (*f)(Args...)>
struct Operator<name, f> {
  static Result call(Args... args) {
    const AtWork work;
    try {
      return f(std::forward<Args>(args)...);
    } catch (const OutOfMemory& error) {
      fail_for_memory(name.text, error);
    }
  }
};

// How every binding is registered: f runs at work (kernels/thread_memory.h), and lack of memory has the operator's
// name.
#define LLMKERN_OPERATOR(library, name, f) library.impl(name, TORCH_BOX((&::llmkern::ops::Operator<name, f>::call)))

inline std::string shape_text(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t d = 0; d < tensor.dim(); ++d) text += (d ? ", " : "") + std::to_string(tensor.size(d));
  return text + "]";
}

inline void check_shape(const char* what, const char* name, const Tensor& tensor,
                        std::initializer_list<int64_t> shape) {
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  int64_t d = 0;
  for (int64_t size : shape) same = same && tensor.size(d++) == size;
  if (same) return;
  std::string expected;
  for (int64_t size : shape) expected += (expected.empty() ? "" : ", ") + std::to_string(size);
  fail(what, "expected ", name, " of shape [", expected, "], got ", shape_text(tensor));
}

inline void check_dim(const char* what, const char* name, const Tensor& tensor, int64_t dim) {
  if (tensor.dim() != dim) fail(what, "expected ", name, " of ", dim, " dimensions, got shape ", shape_text(tensor));
}

inline void check_dtype(const char* what, const char* name, const Tensor& tensor, ScalarType dtype) {
  if (tensor.scalar_type() != dtype) {
    fail(what, "expected ", name, " of dtype ", torch::headeronly::toString(dtype), ", got ",
         torch::headeronly::toString(tensor.scalar_type()));
  }
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cuda() == b.is_cuda() && a.is_cpu() == b.is_cpu() && a.get_device_index() == b.get_device_index();
}

// Bytes of an element of these dtypes, which are all that bindings allocate.
inline int64_t element_bytes(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
    case ScalarType::Long:
      return 8;
    case ScalarType::Float:
    case ScalarType::Int:
      return 4;
    case ScalarType::BFloat16:
    case ScalarType::Half:
      return 2;
    default:
      return 1;
  }
}

// The kernels index with plain row-major arithmetic. An expanded gradient (stride 0, from .sum()) is the classic trap.
Tensor contiguous_copy(const Tensor& tensor);

inline Tensor row_major(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : contiguous_copy(tensor); }

inline OptionalTensor row_major(const OptionalTensor& tensor) {
  if (!tensor.has_value()) return std::nullopt;
  return row_major(*tensor);
}

// Throws OutOfMemory for a tensor of that shape.
[[noreturn]] void fail_to_make(const int64_t* sizes, size_t dimensions, int64_t element_size);

// On the device of `like`, row-major. Not torch::stable::new_empty: it looks the operator up by its name every time, a
// microsecond for each result of a step that takes ten.
inline Tensor empty(const Tensor& like, const int64_t* sizes, size_t dimensions,
                    std::optional<ScalarType> dtype = std::nullopt) {
  constexpr size_t kMostDimensions = 64;  // of any tensor
  int64_t strides[kMostDimensions], count = 1;
  if (dimensions > kMostDimensions) fail("tensors", "expected at most 64 dimensions, got ", dimensions);
  for (size_t d = dimensions; d-- > 0; count *= sizes[d]) strides[d] = count;
  int32_t device_type, element;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &element));
  if (dtype) element = torch::stable::detail::to<int32_t>(torch::stable::detail::from(*dtype));
  AtenTensorHandle made;
  if (aoti_torch_empty_strided(static_cast<int64_t>(dimensions), sizes, strides, element, device_type,
                               like.get_device_index(), &made) != TORCH_SUCCESS) {
    fail_to_make(sizes, dimensions, element_bytes(dtype.value_or(like.scalar_type())));
  }
  const Tensor fresh(made);
  const size_t bytes = static_cast<size_t>(fresh.numel()) * static_cast<size_t>(fresh.element_size());
  if (bytes >= 2 * kHugePageBytes && fresh.is_cpu()) advise_huge_pages(fresh.mutable_data_ptr(), bytes);
  return fresh;
}

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape,
                    std::optional<ScalarType> dtype = std::nullopt) {
  return empty(like, shape.begin(), shape.size(), dtype);
}

inline Tensor empty(const Tensor& like, const std::vector<int64_t>& shape) {
  return empty(like, shape.data(), shape.size());
}

inline Tensor empty_as(const Tensor& like) { return empty(like, like.sizes().data(), static_cast<size_t>(like.dim())); }

// As `empty`, for gradients, results of a recorded forward pass, and tensors between kernels: none of them gets
// resized, which torch would refuse. Large ones lie in memory that was used before (block_cache.h) and costs no page
// faults.
Tensor empty_recycled(const Tensor& like, std::initializer_list<int64_t> shape,
                      std::optional<ScalarType> dtype = std::nullopt);

// The dtype of Widened<T>.
inline ScalarType widened(ScalarType dtype) { return dtype == ScalarType::Double ? dtype : ScalarType::Float; }

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
const T* data(const OptionalTensor& tensor) {
  return tensor.has_value() ? data<T>(*tensor) : nullptr;
}

template <class T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// Calls f(T{}) with the element type of a float32 or float64 tensor.
template <class F>
void for_float_dtype(const char* what, const char* name, const Tensor& tensor, const F& f) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    default:
      fail(what, "expected ", name, " of dtype float32 or float64, got ",
           torch::headeronly::toString(tensor.scalar_type()));
  }
}

// Calls f(T{}) with the storage type of a float32, float64, bfloat16 or float16 tensor.
template <class F>
void for_storage_dtype(const char* what, const char* name, const Tensor& tensor, const F& f) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::BFloat16:
      return f(bfloat16{});
    case ScalarType::Half:
      return f(float16{});
    default:
      fail(what, "expected ", name, " of dtype float32, float64, bfloat16 or float16, got ",
           torch::headeronly::toString(tensor.scalar_type()));
  }
}

template <class F>
void for_index_dtype(const char* what, const char* name, const Tensor& tensor, const F& f) {
  switch (tensor.scalar_type()) {
    case ScalarType::Int:
      return f(int32_t{});
    case ScalarType::Long:
      return f(int64_t{});
    default:
      fail(what, "expected ", name, " of dtype int32 or int64, got ",
           torch::headeronly::toString(tensor.scalar_type()));
  }
}

// torch's own pool; never a second one.
Parallel torch_parallel();

}  // namespace llmkern::ops
