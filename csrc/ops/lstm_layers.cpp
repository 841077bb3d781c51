// SPDX-License-Identifier: Apache-2.0
// torch.ops.llmkern.lstm_pack: a copy of weights in the order in which the kernels read them; and lstm_layers: all
// layers of a module in one call, for steps that take less time than a call.
#include <cstring>
#include <tuple>

#include "ops/lstm.h"

#ifndef LLMKERN_SIMT

namespace llmkern::ops {

namespace {

struct Layout {
  LstmPackHeader header;
  int64_t bytes;
};

// That of packed weights under the instruction set in use.
Layout layout_of(ScalarType dtype, bool quantised, int64_t I, int64_t H, int64_t P) {
  Layout layout;
  const auto ask = [&](auto value) {
    cpu::run(LstmPackedLayout<decltype(value)>{quantised, I, H, P, &layout.header, &layout.bytes}, torch_parallel());
  };
  switch (dtype) {
    case ScalarType::Double:
      ask(double{});
      break;
    case ScalarType::Float:
      ask(float{});
      break;
    case ScalarType::BFloat16:
      ask(bfloat16{});
      break;
    default:
      ask(float16{});
  }
  return layout;
}

Tensor lstm_pack_cpu(const Tensor& weight_ih_any, const Tensor& weight_hh_any, bool quantised) {
  check_dim(kLstm, "weight_ih", weight_ih_any, 2);
  check_dim(kLstm, "weight_hh", weight_hh_any, 2);
  const int64_t I = weight_ih_any.size(1), H = weight_hh_any.size(0) / 4, P = weight_hh_any.size(1);
  const ScalarType dtype = weight_hh_any.scalar_type();
  check_shape(kLstm, "weight_hh", weight_hh_any, {4 * H, P});
  check_shape(kLstm, "weight_ih", weight_ih_any, {4 * H, I});
  check_dtype(kLstm, "weight_ih", weight_ih_any, dtype);
  if (quantised) check_dtype(kLstm, "weights of 8 bits made of one", weight_hh_any, ScalarType::Float);
  const Tensor weight_ih = row_major(weight_ih_any), weight_hh = row_major(weight_hh_any);
  Tensor packed;
  for_storage_dtype(kLstm, "weight_hh", weight_hh, [&](auto value) {
    using T = decltype(value);
    const ScalarType kept = quantised ? ScalarType::Char : dtype;
    packed = empty_recycled(weight_hh, {layout_of(dtype, quantised, I, H, P).bytes / element_bytes(kept)}, kept);
    cpu::run(LstmPack<T>{data<T>(weight_ih), data<T>(weight_hh), quantised, packed.mutable_data_ptr(), I, H, P},
             torch_parallel());
  });
  return packed;
}

LstmPackHeader header_in(const Tensor& packed) {
  LstmPackHeader header = {};
  const int64_t bytes = packed.numel() * element_bytes(packed.scalar_type());
  if (bytes >= static_cast<int64_t>(sizeof header)) std::memcpy(&header, packed.const_data_ptr(), sizeof header);
  return header;
}

using Tensors = std::vector<Tensor>;

// Plain layers, each on the outputs of the one below, with their parameters as torch.nn.LSTM lists them: weight_ih,
// weight_hh and, where there are biases, bias_ih, bias_hh of one layer after the other.
class Layers {
 public:
  Layers(const Tensors& parameters, const Tensors& packed, int64_t layers, const LstmSizes& first, ScalarType dtype)
      : dtype_(dtype) {
    const int64_t given = static_cast<int64_t>(parameters.size()), each = given == 4 * layers ? 4 : 2;
    if (given != each * layers) {
      fail(kLstm, "expected 2 or 4 parameters for each of ", layers, " layers, got ", given);
    }
    if (!packed.empty() && static_cast<int64_t>(packed.size()) != layers) {
      fail(kLstm, "expected packed weights for none or each of ", layers, " layers, got ", packed.size());
    }
    for (int64_t l = 0; l < layers; ++l) {
      const Tensor* of_layer = parameters.data() + l * each;
      const LstmSizes n = {first.T, first.B, l == 0 ? first.I : first.H, first.H, first.H};
      layers_.push_back(
          {.weight_ih = checked("weight_ih", of_layer[0], {4 * n.H, n.I}),
           .weight_hh = checked("weight_hh", of_layer[1], {4 * n.H, n.H}),
           .bias_ih = each == 4 ? OptionalTensor(checked("bias_ih", of_layer[2], {4 * n.H})) : std::nullopt,
           .bias_hh = each == 4 ? OptionalTensor(checked("bias_hh", of_layer[3], {4 * n.H})) : std::nullopt,
           .packed = packed.empty() ? std::nullopt : OptionalTensor(row_major(packed[l])),
           .n = n});
    }
  }

  // Where they run for one step, the outputs below are their h_n; else they lie in `between`, [T, B, H] each.
  template <class T>
  void run(const T* input, const T* h_0, const T* c_0, T* output, T* h_n, T* c_n, T* const (&between)[2]) const {
    const T* from = input;
    for (size_t l = 0; l < layers_.size(); ++l) {
      const Layer& layer = layers_[l];
      const LstmSizes& n = layer.n;
      const int64_t state = static_cast<int64_t>(l) * n.B * n.H;
      LstmForward<T> a = {};
      a.input = from;
      a.h_0 = h_0 + state;
      a.c_0 = c_0 + state;
      a.weight_ih = data<T>(layer.weight_ih);
      a.weight_hh = data<T>(layer.weight_hh);
      a.bias_ih = data<T>(layer.bias_ih);
      a.bias_hh = data<T>(layer.bias_hh);
      a.packed = packed_weights(layer.packed, n, dtype_);
      a.quantised = is_quantised(layer.packed, dtype_);
      a.h_n = h_n + state;
      a.c_n = c_n + state;
      a.output = l + 1 == layers_.size() ? output : n.T == 1 ? a.h_n : between[l % 2];
      a.steps = n.T, a.B = n.B, a.I = n.I, a.H = a.P = n.H;
      cpu::run(a, torch_parallel());
      from = a.output;
    }
  }

 private:
  struct Layer {
    Tensor weight_ih, weight_hh;
    OptionalTensor bias_ih, bias_hh, packed;
    LstmSizes n;
  };

  Tensor checked(const char* name, const Tensor& parameter, std::initializer_list<int64_t> shape) const {
    check_parameter(name, parameter, dtype_, shape);
    return row_major(parameter);
  }

  ScalarType dtype_;
  std::vector<Layer> layers_;
};

void check_states(const char* name, const Tensor& states, const Tensor& input, int64_t layers, int64_t B, int64_t H) {
  if (input.dim() == 2) return check_parameter(name, states, input.scalar_type(), {layers, H});
  check_parameter(name, states, input.scalar_type(), {layers, B, H});
}

Tensor empty_states(const Tensor& input, int64_t layers, int64_t B, int64_t H) {
  return input.dim() == 2 ? empty(input, {layers, H}) : empty(input, {layers, B, H});
}

std::tuple<Tensor, Tensor, Tensor> lstm_layers_cpu(const Tensor& input_any, const Tensor& h_0_any,
                                                   const Tensor& c_0_any, Tensors parameters, Tensors packed,
                                                   bool batch_first) {
  const bool batched = input_any.dim() == 3;
  if (!batched) check_dim(kLstm, "input", input_any, 2);
  check_dim(kLstm, "h_0", h_0_any, batched ? 3 : 2);
  const int64_t layers = h_0_any.size(0), H = h_0_any.size(batched ? 2 : 1), I = input_any.size(batched ? 2 : 1);
  const int64_t first = input_any.size(0), second = batched ? input_any.size(1) : 1;
  const bool rows_first = batched && batch_first;
  const LstmSizes n = {rows_first ? second : first, rows_first ? first : second, I, H, H};
  const ScalarType dtype = input_any.scalar_type();
  if (n.T == 0) fail(kLstm, "expected at least one time step, got input of shape ", shape_text(input_any));
  if (layers * H == 0) fail(kLstm, "expected at least one hidden unit, got h_0 of shape ", shape_text(h_0_any));
  check_states("h_0", h_0_any, input_any, layers, n.B, H);
  check_states("c_0", c_0_any, input_any, layers, n.B, H);
  // Steps and rows lie in memory the same either way round where there is one of either.
  const bool swapped = rows_first && n.T > 1 && n.B > 1;
  const Tensor input = row_major(swapped ? torch::stable::transpose(input_any, 0, 1) : input_any);
  const Tensor h_0 = row_major(h_0_any), c_0 = row_major(c_0_any);
  const Tensor output = swapped   ? empty(input, {n.T, n.B, H})
                        : batched ? empty(input, {first, second, H})
                                  : empty(input, {first, H});
  const Tensor h_n = empty_states(input, layers, n.B, H), c_n = empty_states(input, layers, n.B, H);
  std::optional<Tensor> between[2];
  for (int64_t l = 0; n.T > 1 && l < layers - 1 && l < 2; ++l) between[l] = empty_recycled(input, {n.T, n.B, H});
  for_storage_dtype(kLstm, "input", input, [&](auto value) {
    using T = decltype(value);
    const auto memory = [](const OptionalTensor& tensor) { return tensor ? mutable_data<T>(*tensor) : nullptr; };
    Layers(parameters, packed, layers, n, dtype)
        .run<T>(data<T>(input), data<T>(h_0), data<T>(c_0), mutable_data<T>(output), mutable_data<T>(h_n),
                mutable_data<T>(c_n), {memory(between[0]), memory(between[1])});
  });
  return {swapped ? torch::stable::transpose(output, 0, 1) : output, h_n, c_n};
}

}  // namespace

const void* packed_weights(const OptionalTensor& packed, const LstmSizes& n, ScalarType input) {
  if (!packed.has_value()) return nullptr;
  const bool quantised = is_quantised(packed, input);
  if (!quantised) check_dtype(kLstm, "packed", *packed, input);
  const LstmPackHeader header = header_in(*packed);
  if (header.magic != kLstmPackMagic || header.I != n.I || header.H != n.H || header.P != n.P) {
    fail(kLstm, "expected packed to be what lstm_pack makes of weights with I, H, P = ", n.I, ", ", n.H, ", ", n.P,
         ", got another tensor of shape ", shape_text(*packed));
  }
  const Layout layout = layout_of(input, quantised, n.I, n.H, n.P);
  const bool same = packed->numel() * element_bytes(packed->scalar_type()) == layout.bytes && packed->is_contiguous();
  return same && std::memcmp(&header, &layout.header, sizeof header) == 0 ? packed->const_data_ptr() : nullptr;
}

STABLE_TORCH_LIBRARY_FRAGMENT(llmkern, m) {
  m.def("lstm_pack(Tensor weight_ih, Tensor weight_hh, bool quantised=False) -> Tensor");
  m.def(
      "lstm_layers(Tensor input, Tensor h_0, Tensor c_0, Tensor[] parameters, Tensor[] packed, bool batch_first=False) "
      "-> "
      "(Tensor output, Tensor h_n, Tensor c_n)");
}

STABLE_TORCH_LIBRARY_IMPL(llmkern, CPU, m) {
  LLMKERN_OPERATOR(m, "lstm_pack", &lstm_pack_cpu);
  LLMKERN_OPERATOR(m, "lstm_layers", &lstm_layers_cpu);
}

}  // namespace llmkern::ops

#endif
