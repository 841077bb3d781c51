// SPDX-License-Identifier: Apache-2.0
// torch.ops.llmkern.lstm and its gradient: schema, checks, allocation, launch. The math is in kernels/lstm.h.
#include "kernels/lstm.h"

#include <cstring>
#include <tuple>

#include "ops/cuda.h"
#include "ops/tensors.h"

namespace llmkern::ops {

namespace {

constexpr const char* kName = "lstm";

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

struct Sizes {
  int64_t T, B, I, H, P;
};

// A layer's parameters and what it runs with: the arguments that both passes share.
struct Layer {
  Tensor input, h_0, c_0, weight_ih, weight_hh;
  OptionalTensor bias_ih, bias_hh, weight_hr, norm_gates, norm_cell, lengths, reset, seed;
  double zoneout_h, zoneout_c;

  Sizes check() const;
  Layer contiguous() const;
  bool is_plain() const { return !weight_hr && !norm_gates && !reset && zoneout_h == 0 && zoneout_c == 0; }

  template <class T>
  LstmVariant<T> variant() const {
    return {data<T>(weight_hr), data<T>(norm_gates), data<T>(norm_cell), data<bool>(reset),
            zoneout_h,          zoneout_c,           data<int64_t>(seed)};
  }
};

void check_parameter(const char* name, const OptionalTensor& tensor, ScalarType dtype,
                     std::initializer_list<int64_t> shape) {
  if (!tensor.has_value()) return;
  check_shape(kName, name, *tensor, shape);
  check_dtype(kName, name, *tensor, dtype);
}

Sizes Layer::check() const {
  check_dim(kName, "input", input, 3);
  check_dim(kName, "weight_hh", weight_hh, 2);
  const Sizes n = {input.size(0), input.size(1), input.size(2), weight_hh.size(0) / 4, weight_hh.size(1)};
  const ScalarType dtype = input.scalar_type();
  if (n.T == 0) fail(kName, "expected at least one time step, got input of shape ", shape_text(input));
  if (n.H == 0 || n.P == 0) {
    fail(kName, "expected at least one hidden unit, got weight_hh of shape ", shape_text(weight_hh));
  }
  if (!weight_hr && n.P != n.H) fail(kName, "expected weight_hh of shape [4*H, H], got ", shape_text(weight_hh));
  check_parameter("weight_hh", weight_hh, dtype, {4 * n.H, n.P});
  check_parameter("weight_ih", weight_ih, dtype, {4 * n.H, n.I});
  check_parameter("h_0", h_0, dtype, {n.B, n.P});
  check_parameter("c_0", c_0, dtype, {n.B, n.H});
  if (bias_ih.has_value() != bias_hh.has_value()) fail(kName, "expected both biases or neither, got one");
  check_parameter("bias_ih", bias_ih, dtype, {4 * n.H});
  check_parameter("bias_hh", bias_hh, dtype, {4 * n.H});
  check_parameter("weight_hr", weight_hr, dtype, {n.P, n.H});
  if (norm_gates.has_value() != norm_cell.has_value()) {
    fail(kName, "expected both norm_gates and norm_cell or neither, got one");
  }
  check_parameter("norm_gates", norm_gates, dtype, {2, 4 * n.H});
  check_parameter("norm_cell", norm_cell, dtype, {2, n.H});
  check_parameter("lengths", lengths, ScalarType::Long, {n.B});
  check_parameter("reset", reset, ScalarType::Bool, {n.T, n.B});
  check_parameter("seed", seed, ScalarType::Long, {});
  for (double p : {zoneout_h, zoneout_c}) {
    if (!(p >= 0 && p <= 1)) fail(kName, "expected zoneout probabilities in [0, 1], got ", p);
  }
  return n;
}

Layer Layer::contiguous() const {
  return {row_major(input),
          row_major(h_0),
          row_major(c_0),
          row_major(weight_ih),
          row_major(weight_hh),
          row_major(bias_ih),
          row_major(bias_hh),
          row_major(weight_hr),
          row_major(norm_gates),
          row_major(norm_cell),
          row_major(lengths),
          row_major(reset),
          seed,
          zoneout_h,
          zoneout_c};
}

// The kernels count with them; on CUDA nobody looks.
void check_values(const OptionalTensor& lengths, int64_t T) {
  if (!lengths.has_value()) return;
  const int64_t* values = data<int64_t>(*lengths);
  for (int64_t b = 0; b < lengths->size(0); ++b) {
    if (values[b] < 0 || values[b] > T)
      fail(kName, "expected lengths in [0, T = ", T, "], got ", values[b], " in row ", b);
  }
}

// What the forward pass saved, and the gradients of its results.
struct Saved {
  OptionalTensor grad_output, grad_h_n, grad_c_n, grad_cells;
  Tensor output, cells, gates, normalized, scales;

  void check(const Sizes& n, ScalarType dtype, ScalarType wide, bool has_norm) const;
  Saved contiguous() const;
  bool has_gates() const { return gates.numel() > 0; }
};

void Saved::check(const Sizes& n, ScalarType dtype, ScalarType wide, bool has_norm) const {
  check_parameter("output", output, dtype, {n.T, n.B, n.P});
  check_parameter("cells", cells, wide, {n.T, n.B, n.H});
  if (has_gates()) check_parameter("gates", gates, dtype, {n.T, n.B, 4 * n.H});
  if (has_gates() && has_norm) {
    check_parameter("normalized", normalized, dtype, {2, n.T, n.B, 4 * n.H});
    check_parameter("scales", scales, wide, {n.T, n.B, 4});
  }
  check_parameter("grad_output", grad_output, dtype, {n.T, n.B, n.P});
  check_parameter("grad_h_n", grad_h_n, dtype, {n.B, n.P});
  check_parameter("grad_c_n", grad_c_n, dtype, {n.B, n.H});
  check_parameter("grad_cells", grad_cells, wide, {n.T, n.B, n.H});
}

Saved Saved::contiguous() const {
  return {row_major(grad_output), row_major(grad_h_n), row_major(grad_c_n),   row_major(grad_cells), row_major(output),
          row_major(cells),       row_major(gates),    row_major(normalized), row_major(scales)};
}

int64_t bytes_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return 8;
    case ScalarType::Float:
      return 4;
    case ScalarType::Char:
      return 1;
    default:
      return 2;
  }
}

// What packed weights take under the instruction set in use.
int64_t packed_bytes(ScalarType dtype, LstmPacking packing, int64_t I, int64_t H, int64_t P) {
  int64_t bytes = 0;
  const auto ask = [&](auto value) {
    cpu::run(LstmPackedBytes<decltype(value)>{packing, I, H, P, &bytes}, torch_parallel());
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
  return bytes;
}

Tensor packed_for(LstmPacking packing, const Tensor& weight_ih_any, const Tensor& weight_hh_any) {
  check_dim(kName, "weight_ih", weight_ih_any, 2);
  check_dim(kName, "weight_hh", weight_hh_any, 2);
  const int64_t I = weight_ih_any.size(1), H = weight_hh_any.size(0) / 4, P = weight_hh_any.size(1);
  const ScalarType dtype = weight_hh_any.scalar_type();
  check_shape(kName, "weight_hh", weight_hh_any, {4 * H, P});
  check_shape(kName, "weight_ih", weight_ih_any, {4 * H, I});
  check_dtype(kName, "weight_ih", weight_ih_any, dtype);
  const bool quantised = packing == LstmPacking::kQuantised;
  if (quantised) check_dtype(kName, "weights of 8 bits made of one", weight_hh_any, ScalarType::Float);
  const Tensor weight_ih = row_major(weight_ih_any), weight_hh = row_major(weight_hh_any);
  Tensor packed;
  for_storage_dtype(kName, "weight_hh", weight_hh, [&](auto value) {
    using T = decltype(value);
    const ScalarType kept = quantised ? ScalarType::Char : dtype;
    packed = empty(weight_hh, {packed_bytes(dtype, packing, I, H, P) / bytes_of(kept)}, kept);
    cpu::run(LstmPack<T>{data<T>(weight_ih), data<T>(weight_hh), packing, packed.mutable_data_ptr(), I, H, P},
             torch_parallel());
  });
  return packed;
}

Tensor lstm_pack_cpu(const Tensor& weight_ih, const Tensor& weight_hh, bool quantised) {
  return packed_for(quantised ? LstmPacking::kQuantised : LstmPacking::kForward, weight_ih, weight_hh);
}

Tensor lstm_pack_backward_cpu(const Tensor& weight_ih, const Tensor& weight_hh) {
  return packed_for(LstmPacking::kBackward, weight_ih, weight_hh);
}

// The packed weights, or null where another instruction set has packed them. Their header is the caller's promise that
// they are of this layer; their size is not.
const void* usable(const OptionalTensor& packed, LstmPacking packing, const Sizes& n, ScalarType dtype) {
  if (!packed.has_value()) return nullptr;
  if (packing != LstmPacking::kQuantised) check_dtype(kName, "packed", *packed, dtype);
  const int64_t bytes = packed->numel() * bytes_of(packed->scalar_type());
  LstmPackHeader header = {};
  if (bytes >= static_cast<int64_t>(sizeof header)) std::memcpy(&header, packed->const_data_ptr(), sizeof header);
  if (header.magic != kLstmPackMagic || header.I != n.I || header.H != n.H || header.P != n.P) {
    fail(kName, "expected packed to be what lstm_pack makes of weights with I, H, P = ", n.I, ", ", n.H, ", ", n.P,
         ", got another tensor of shape ", shape_text(*packed));
  }
  return bytes == packed_bytes(dtype, packing, n.I, n.H, n.P) ? packed->const_data_ptr() : nullptr;
}

using Steps = std::vector<Tensor>;

// Row-major, each with as many rows as `rows` says; what is not row-major is replaced by a copy.
template <class T>
std::vector<const T*> pointers(const char* name, Steps& steps, const std::vector<int64_t>& rows, int64_t columns,
                               ScalarType dtype) {
  if (steps.size() != rows.size()) fail(kName, "expected ", rows.size(), " steps of ", name, ", got ", steps.size());
  std::vector<const T*> result;
  for (size_t s = 0; s < steps.size(); ++s) {
    check_parameter(name, steps[s], dtype, {rows[s], columns});
    steps[s] = row_major(steps[s]);
    result.push_back(data<T>(steps[s]));
  }
  return result;
}

std::tuple<Tensor, Tensor, Tensor> lstm_weight_gradients_cpu(Steps grad_gates, Steps input, Steps previous) {
  if (grad_gates.empty() || input.empty() || previous.empty()) fail(kName, "expected at least one step, got none");
  check_dim(kName, "input", input[0], 2);
  check_dim(kName, "previous", previous[0], 2);
  check_dim(kName, "grad_gates", grad_gates[0], 2);
  const int64_t I = input[0].size(1), P = previous[0].size(1), H = grad_gates[0].size(1) / 4;
  const ScalarType dtype = grad_gates[0].scalar_type();
  std::vector<int64_t> rows;
  for (const Tensor& step : grad_gates) rows.push_back(step.dim() == 2 ? step.size(0) : -1);
  const Tensor grad_weight_ih = empty(input[0], {4 * H, I}), grad_weight_hh = empty(input[0], {4 * H, P});
  const Tensor grad_bias = empty(input[0], {4 * H});
  for_storage_dtype(kName, "grad_gates", grad_gates[0], [&](auto value) {
    using T = decltype(value);
    const auto gates_at = pointers<T>("grad_gates", grad_gates, rows, 4 * H, dtype);
    const auto input_at = pointers<T>("input", input, rows, I, dtype);
    const auto previous_at = pointers<T>("previous", previous, rows, P, dtype);
    const LstmWeightGradients<T> gradients = {gates_at.data(),
                                              input_at.data(),
                                              previous_at.data(),
                                              rows.data(),
                                              mutable_data<T>(grad_weight_ih),
                                              mutable_data<T>(grad_weight_hh),
                                              mutable_data<T>(grad_bias),
                                              static_cast<int64_t>(rows.size()),
                                              I,
                                              H,
                                              P};
    cpu::run(gradients, torch_parallel());
  });
  return {grad_weight_ih, grad_weight_hh, grad_bias};
}

// A result that is only there `if` somebody needs it; otherwise empty.
Tensor empty_if(bool wanted, const Tensor& like, std::initializer_list<int64_t> shape,
                std::optional<ScalarType> dtype = std::nullopt) {
  return wanted ? empty(like, shape, dtype) : empty(like, {0}, dtype);
}

template <class T>
T* data_if(bool wanted, const Tensor& tensor) {
  return wanted ? mutable_data<T>(tensor) : nullptr;
}

Forward lstm_cpu(const Tensor& input_any, const Tensor& h_0_any, const Tensor& c_0_any, const Tensor& weight_ih_any,
                 const Tensor& weight_hh_any, const OptionalTensor& bias_ih_any, const OptionalTensor& bias_hh_any,
                 const OptionalTensor& weight_hr_any, const OptionalTensor& norm_gates_any,
                 const OptionalTensor& norm_cell_any, const OptionalTensor& lengths_any,
                 const OptionalTensor& reset_any, const OptionalTensor& seed, const OptionalTensor& packed_any,
                 double zoneout_h, double zoneout_c, bool reverse, bool save_cells, bool save_gates) {
  const Layer given = {input_any,   h_0_any,     c_0_any,       weight_ih_any,  weight_hh_any,
                       bias_ih_any, bias_hh_any, weight_hr_any, norm_gates_any, norm_cell_any,
                       lengths_any, reset_any,   seed,          zoneout_h,      zoneout_c};
  const Sizes n = given.check();
  const OptionalTensor packed = row_major(packed_any);
  const ScalarType given_dtype = input_any.scalar_type();
  const bool quantised = packed && packed->scalar_type() == ScalarType::Char && given_dtype == ScalarType::Float;
  const LstmPacking packing = quantised ? LstmPacking::kQuantised : LstmPacking::kForward;
  const void* packed_weights = usable(packed, packing, n, given_dtype);
  const Layer layer = given.contiguous();
  check_values(layer.lengths, n.T);
  const Tensor& input = layer.input;
  const ScalarType wide = widened(input.scalar_type());
  const bool norm = save_gates && layer.norm_gates;
  const Tensor output = empty(input, {n.T, n.B, n.P}), h_n = empty(input, {n.B, n.P}), c_n = empty(input, {n.B, n.H});
  const Tensor cells = empty_if(save_cells, input, {n.T, n.B, n.H}, wide);
  const Tensor gates = empty_if(save_gates, input, {n.T, n.B, 4 * n.H});
  const Tensor normalized = empty_if(norm, input, {2, n.T, n.B, 4 * n.H});
  const Tensor scales = empty_if(norm, input, {n.T, n.B, 4}, wide);
  for_storage_dtype(kName, "input", input, [&](auto value) {
    using T = decltype(value);
    cpu::run(LstmForward<T>{data<T>(input),
                            data<T>(layer.h_0),
                            data<T>(layer.c_0),
                            data<T>(layer.weight_ih),
                            data<T>(layer.weight_hh),
                            data<T>(layer.bias_ih),
                            data<T>(layer.bias_hh),
                            layer.variant<T>(),
                            data<int64_t>(layer.lengths),
                            packed_weights,
                            quantised,
                            mutable_data<T>(output),
                            data_if<Widened<T>>(save_cells, cells),
                            data_if<T>(save_gates, gates),
                            data_if<T>(norm, normalized),
                            data_if<Widened<T>>(norm, scales),
                            mutable_data<T>(h_n),
                            mutable_data<T>(c_n),
                            n.T,
                            n.B,
                            n.I,
                            n.H,
                            n.P,
                            reverse},
             torch_parallel());
  });
  return {output, h_n, c_n, cells, gates, normalized, scales};
}

Backward lstm_backward_cpu(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                           const OptionalTensor& grad_c_n, const OptionalTensor& grad_cells, const Tensor& input_any,
                           const Tensor& h_0_any, const Tensor& c_0_any, const Tensor& weight_ih_any,
                           const Tensor& weight_hh_any, const OptionalTensor& bias_ih_any,
                           const OptionalTensor& bias_hh_any, const OptionalTensor& weight_hr_any,
                           const OptionalTensor& norm_gates_any, const OptionalTensor& norm_cell_any,
                           const OptionalTensor& lengths_any, const OptionalTensor& reset_any,
                           const OptionalTensor& seed, const Tensor& output, const Tensor& cells, const Tensor& gates,
                           const Tensor& normalized, const Tensor& scales, double zoneout_h, double zoneout_c,
                           bool reverse, bool weights, const OptionalTensor& packed_any) {
  const Layer given = {input_any,   h_0_any,     c_0_any,       weight_ih_any,  weight_hh_any,
                       bias_ih_any, bias_hh_any, weight_hr_any, norm_gates_any, norm_cell_any,
                       lengths_any, reset_any,   seed,          zoneout_h,      zoneout_c};
  const Saved saved_any = {grad_output, grad_h_n, grad_c_n, grad_cells, output, cells, gates, normalized, scales};
  const Sizes n = given.check();
  const ScalarType dtype = input_any.scalar_type(), wide = widened(dtype);
  const bool norm = given.norm_gates.has_value(), projection = given.weight_hr.has_value();
  saved_any.check(n, dtype, wide, norm);
  if ((!weights || packed_any) && (given.lengths || !given.is_plain())) {
    fail(kName, "expected weights=True and no packed weights beside lengths and variants");
  }
  const OptionalTensor packed = row_major(packed_any);
  const void* packed_weights = usable(packed, LstmPacking::kBackward, n, dtype);
  const Layer layer = given.contiguous();
  const Saved saved = saved_any.contiguous();
  check_values(layer.lengths, n.T);
  const Tensor& input = layer.input;
  const Tensor grad_input = empty(input, {n.T, n.B, n.I}), grad_h_0 = empty(input, {n.B, n.P});
  const Tensor grad_c_0 = empty(input, {n.B, n.H}), grad_gates = empty_if(!weights, input, {n.T, n.B, 4 * n.H});
  const Tensor grad_weight_ih = empty_if(weights, input, {4 * n.H, n.I});
  const Tensor grad_weight_hh = empty_if(weights, input, {4 * n.H, n.P});
  const Tensor grad_bias = empty_if(weights, input, {4 * n.H});
  const Tensor grad_weight_hr = empty_if(weights && projection, input, {n.P, n.H});
  const Tensor grad_norm_gates = empty_if(weights && norm, input, {2, 4 * n.H});
  const Tensor grad_norm_cell = empty_if(weights && norm, input, {2, n.H});
  for_storage_dtype(kName, "input", input, [&](auto value) {
    using T = decltype(value);
    cpu::run(LstmBackward<T>{data<T>(saved.grad_output),
                             data<T>(saved.grad_h_n),
                             data<T>(saved.grad_c_n),
                             data<Widened<T>>(saved.grad_cells),
                             data<T>(input),
                             data<T>(layer.h_0),
                             data<T>(layer.c_0),
                             data<T>(layer.weight_ih),
                             data<T>(layer.weight_hh),
                             data<T>(layer.bias_ih),
                             data<T>(layer.bias_hh),
                             layer.variant<T>(),
                             data<int64_t>(layer.lengths),
                             data<T>(saved.output),
                             data<Widened<T>>(saved.cells),
                             saved.has_gates() ? data<T>(saved.gates) : nullptr,
                             saved.has_gates() && norm ? data<T>(saved.normalized) : nullptr,
                             saved.has_gates() && norm ? data<Widened<T>>(saved.scales) : nullptr,
                             packed_weights,
                             data_if<T>(!weights, grad_gates),
                             mutable_data<T>(grad_input),
                             mutable_data<T>(grad_h_0),
                             mutable_data<T>(grad_c_0),
                             data_if<T>(weights, grad_weight_ih),
                             data_if<T>(weights, grad_weight_hh),
                             data_if<T>(weights, grad_bias),
                             data_if<T>(weights && projection, grad_weight_hr),
                             data_if<T>(weights && norm, grad_norm_gates),
                             data_if<T>(weights && norm, grad_norm_cell),
                             n.T,
                             n.B,
                             n.I,
                             n.H,
                             n.P,
                             reverse},
             torch_parallel());
  });
  return {grad_input,     grad_h_0,  grad_c_0,       grad_gates,      grad_weight_ih,
          grad_weight_hh, grad_bias, grad_weight_hr, grad_norm_gates, grad_norm_cell};
}

#ifdef LLMKERN_WITH_CUDA
Tensor rows_of(const Tensor& steps) {  // [T, B, X] as [T * B, X]
  return torch::stable::view(steps, {steps.size(0) * steps.size(1), steps.size(2)});
}

Sizes check_cuda(const Layer& layer, const OptionalTensor& grad_cells, bool weights) {
  const Sizes n = layer.check();
  for (const OptionalTensor& tensor :
       {OptionalTensor(layer.h_0), OptionalTensor(layer.c_0), OptionalTensor(layer.weight_ih),
        OptionalTensor(layer.weight_hh), layer.bias_ih, layer.bias_hh, layer.lengths}) {
    if (tensor && !same_device(*tensor, layer.input)) fail(kName, "expected every tensor on one device");
  }
  if (!layer.is_plain() || grad_cells.has_value() || !weights) {
    fail(kName, "expected a layer without projection, layer norm, zoneout, reset and cell states on CUDA");
  }
  return n;
}

Forward lstm_cuda(const Tensor& input_any, const Tensor& h_0_any, const Tensor& c_0_any, const Tensor& weight_ih_any,
                  const Tensor& weight_hh_any, const OptionalTensor& bias_ih_any, const OptionalTensor& bias_hh_any,
                  const OptionalTensor& weight_hr, const OptionalTensor& norm_gates, const OptionalTensor& norm_cell,
                  const OptionalTensor& lengths_any, const OptionalTensor& reset, const OptionalTensor& seed,
                  const OptionalTensor&, double zoneout_h, double zoneout_c, bool reverse, bool save_cells,
                  bool save_gates) {
  const Layer given = {input_any,   h_0_any,     c_0_any,   weight_ih_any, weight_hh_any,
                       bias_ih_any, bias_hh_any, weight_hr, norm_gates,    norm_cell,
                       lengths_any, reset,       seed,      zoneout_h,     zoneout_c};
  const Sizes n = check_cuda(given, std::nullopt, true);
  const OnCuda cuda(input_any);
  const Layer layer = given.contiguous();
  const Tensor& input = layer.input;
  const ScalarType dtype = input.scalar_type(), wide = widened(dtype);
  const Tensor input_gates =
      torch::stable::view(product(rows_of(input), transposed(layer.weight_ih), wide), {n.T, n.B, 4 * n.H});
  // The activated gates take the place of the others where they are as wide.
  const Tensor gates = wide == dtype ? input_gates : empty(input, {n.T, n.B, 4 * n.H});
  const Tensor output = empty(input, {n.T, n.B, n.H}), cells = empty(input, {n.T, n.B, n.H}, wide);
  const Tensor h_n = empty(input, {n.B, n.H}), c_n = empty(input, {n.B, n.H});
  for_storage_dtype(kName, "input", input, [&](auto value) {
    using T = decltype(value);
    cuda::run(
        LstmRecurrence<T>{data<Widened<T>>(input_gates), data<T>(layer.h_0), data<T>(layer.c_0),
                          data<T>(layer.weight_hh), data<T>(layer.bias_ih), data<T>(layer.bias_hh),
                          data<int64_t>(layer.lengths), mutable_data<T>(output), mutable_data<Widened<T>>(cells),
                          mutable_data<T>(gates), mutable_data<T>(h_n), mutable_data<T>(c_n), n.T, n.B, n.H, reverse},
        cuda.stream());
  });
  const Tensor none = empty(input, {0}), none_wide = empty(input, {0}, wide);
  return {output, h_n,      c_n, save_cells ? cells : empty(input, {0}, wide), save_gates ? gates : empty(input, {0}),
          none,   none_wide};
}

Backward lstm_backward_cuda(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                            const OptionalTensor& grad_c_n, const OptionalTensor& grad_cells, const Tensor& input_any,
                            const Tensor& h_0_any, const Tensor& c_0_any, const Tensor& weight_ih_any,
                            const Tensor& weight_hh_any, const OptionalTensor& bias_ih_any,
                            const OptionalTensor& bias_hh_any, const OptionalTensor& weight_hr,
                            const OptionalTensor& norm_gates, const OptionalTensor& norm_cell,
                            const OptionalTensor& lengths_any, const OptionalTensor& reset, const OptionalTensor& seed,
                            const Tensor& output, const Tensor& cells, const Tensor& gates, const Tensor& normalized,
                            const Tensor& scales, double zoneout_h, double zoneout_c, bool reverse, bool weights,
                            const OptionalTensor&) {
  const Layer given = {input_any,   h_0_any,     c_0_any,   weight_ih_any, weight_hh_any,
                       bias_ih_any, bias_hh_any, weight_hr, norm_gates,    norm_cell,
                       lengths_any, reset,       seed,      zoneout_h,     zoneout_c};
  const Sizes n = check_cuda(given, grad_cells, weights);
  const ScalarType dtype = input_any.scalar_type(), wide = widened(dtype);
  const Saved saved_any = {grad_output, grad_h_n, grad_c_n, grad_cells, output, cells, gates, normalized, scales};
  saved_any.check(n, dtype, wide, false);
  check_shape(kName, "gates", gates, {n.T, n.B, 4 * n.H});
  const OnCuda cuda(input_any);
  const Layer layer = given.contiguous();
  const Saved saved = saved_any.contiguous();
  const Tensor& input = layer.input;
  const Tensor grad_gates = empty(input, {n.T, n.B, 4 * n.H}), grad_cell = empty(input, {n.B, n.H}, wide);
  const Tensor grad_h_0 = empty(input, {n.B, n.H}), grad_c_0 = empty(input, {n.B, n.H});
  const Tensor previous = empty(input, {n.T, n.B, n.H});
  for_storage_dtype(kName, "input", input, [&](auto value) {
    using T = decltype(value);
    cuda::run(LstmRecurrenceBackward<T>{data<T>(saved.grad_output), data<T>(saved.grad_h_n), data<T>(saved.grad_c_n),
                                        data<T>(layer.c_0), data<T>(layer.weight_hh), data<Widened<T>>(saved.cells),
                                        data<T>(saved.gates), data<int64_t>(layer.lengths),
                                        mutable_data<Widened<T>>(grad_cell), mutable_data<T>(grad_gates),
                                        mutable_data<T>(grad_h_0), mutable_data<T>(grad_c_0), n.T, n.B, n.H, reverse},
              cuda.stream());
    cuda::run(LstmPrevious<T>{data<T>(layer.h_0), data<T>(saved.output), data<int64_t>(layer.lengths),
                              mutable_data<T>(previous), n.T, n.B, n.H, reverse},
              cuda.stream());
  });
  const Tensor rows = rows_of(grad_gates), columns = transposed(rows);
  return {torch::stable::view(product(rows, layer.weight_ih), {n.T, n.B, n.I}),
          grad_h_0,
          grad_c_0,
          empty(input, {0}),
          product(columns, rows_of(input)),
          product(columns, rows_of(previous)),
          sum_rows(rows, dtype),
          empty(input, {0}),
          empty(input, {0}),
          empty(input, {0})};
}
#endif

}  // namespace

#ifndef LLMKERN_SIMT
STABLE_TORCH_LIBRARY_FRAGMENT(llmkern, m) {
  m.def(
      "lstm(Tensor input, Tensor h_0, Tensor c_0, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih=None, "
      "Tensor? bias_hh=None, Tensor? weight_hr=None, Tensor? norm_gates=None, Tensor? norm_cell=None, "
      "Tensor? lengths=None, Tensor? reset=None, Tensor? seed=None, Tensor? packed=None, float zoneout_h=0.0, "
      "float zoneout_c=0.0, bool reverse=False, bool save_cells=False, bool save_gates=False) -> (Tensor output, "
      "Tensor h_n, Tensor c_n, Tensor cells, Tensor gates, Tensor normalized, Tensor scales)");
  m.def("lstm_pack(Tensor weight_ih, Tensor weight_hh, bool quantised=False) -> Tensor");
  m.def("lstm_pack_backward(Tensor weight_ih, Tensor weight_hh) -> Tensor");
  m.def(
      "lstm_weight_gradients(Tensor[] grad_gates, Tensor[] input, Tensor[] previous) -> (Tensor grad_weight_ih, "
      "Tensor grad_weight_hh, Tensor grad_bias)");
  m.def(
      "lstm_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor? grad_cells, Tensor input, "
      "Tensor h_0, Tensor c_0, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh, "
      "Tensor? weight_hr, Tensor? norm_gates, Tensor? norm_cell, Tensor? lengths, Tensor? reset, Tensor? seed, "
      "Tensor output, Tensor cells, Tensor gates, Tensor normalized, Tensor scales, float zoneout_h=0.0, "
      "float zoneout_c=0.0, bool reverse=False, bool weights=True, Tensor? packed=None) -> (Tensor grad_input, Tensor "
      "grad_h_0, "
      "Tensor grad_c_0, Tensor grad_gates, Tensor grad_weight_ih, Tensor grad_weight_hh, Tensor grad_bias, "
      "Tensor grad_weight_hr, Tensor grad_norm_gates, Tensor grad_norm_cell)");
}

STABLE_TORCH_LIBRARY_IMPL(llmkern, CPU, m) {
  m.impl("lstm", TORCH_BOX(&lstm_cpu));
  m.impl("lstm_pack", TORCH_BOX(&lstm_pack_cpu));
  m.impl("lstm_pack_backward", TORCH_BOX(&lstm_pack_backward_cpu));
  m.impl("lstm_weight_gradients", TORCH_BOX(&lstm_weight_gradients_cpu));
  m.impl("lstm_backward", TORCH_BOX(&lstm_backward_cpu));
}
#endif

#ifdef LLMKERN_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(llmkern, LLMKERN_CUDA_KEY, m) {
  m.impl("lstm", TORCH_BOX(&lstm_cuda));
  m.impl("lstm_backward", TORCH_BOX(&lstm_backward_cuda));
}
#endif

}  // namespace llmkern::ops
