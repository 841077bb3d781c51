// SPDX-License-Identifier: Apache-2.0
// What the bindings of the LSTM share: lstm.cpp, lstm_layers.cpp, lstm_step.cpp.
#pragma once

#include "kernels/lstm.h"
#include "ops/tensors.h"

namespace llmkern::ops {

constexpr const char* kLstm = "lstm";

struct LstmSizes {
  int64_t T, B, I, H, P;
};

inline void check_parameter(const char* name, const OptionalTensor& tensor, ScalarType dtype,
                            std::initializer_list<int64_t> shape) {
  if (!tensor.has_value()) return;
  check_shape(kLstm, name, *tensor, shape);
  check_dtype(kLstm, name, *tensor, dtype);
}

// Whether these packed weights have 8 bits, for float32 input.
inline bool is_quantised(const OptionalTensor& packed, ScalarType input) {
  return packed.has_value() && packed->scalar_type() == ScalarType::Char && input == ScalarType::Float;
}

// What lstm_pack has made of a layer's weights, or null where that was for another instruction set than the one in use.
// Its header is the caller's promise that these are the layer's weights; its size is not.
const void* packed_weights(const OptionalTensor& packed, const LstmSizes& n, ScalarType input);

}  // namespace llmkern::ops
