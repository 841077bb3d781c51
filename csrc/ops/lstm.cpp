// SPDX-License-Identifier: Apache-2.0
// torch.ops.llmkern.lstm and its gradient: schema, checks, allocation, launch. The math is in kernels/lstm.h.
#include "kernels/lstm.h"

#include <tuple>

#include "ops/cuda.h"
#include "ops/lstm.h"

namespace llmkern::ops {

namespace {

constexpr const char* kName = kLstm;

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// A layer's parameters and what it runs with: the arguments that both passes share.
struct Layer {
  Tensor input, h_0, c_0, weight_ih, weight_hh;
  OptionalTensor bias_ih, bias_hh, weight_hr, norm_gates, norm_cell, lengths, reset, seed;
  double zoneout_h, zoneout_c;

  LstmSizes check() const;
  Layer contiguous() const;
  bool is_plain() const { return !weight_hr && !norm_gates && !reset && zoneout_h == 0 && zoneout_c == 0; }

  template <class T>
  LstmVariant<T> variant() const {
    return {
        .weight_hr = data<T>(weight_hr),
        .norm_gates = data<T>(norm_gates),
        .norm_cell = data<T>(norm_cell),
        .reset = data<bool>(reset),
        .zoneout_h = zoneout_h,
        .zoneout_c = zoneout_c,
        .seed = data<int64_t>(seed),
    };
  }
};

LstmSizes Layer::check() const {
  check_dim(kName, "input", input, 3);
  check_dim(kName, "weight_hh", weight_hh, 2);
  const LstmSizes n = {input.size(0), input.size(1), input.size(2), weight_hh.size(0) / 4, weight_hh.size(1)};
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
  return {
      .input = row_major(input),
      .h_0 = row_major(h_0),
      .c_0 = row_major(c_0),
      .weight_ih = row_major(weight_ih),
      .weight_hh = row_major(weight_hh),
      .bias_ih = row_major(bias_ih),
      .bias_hh = row_major(bias_hh),
      .weight_hr = row_major(weight_hr),
      .norm_gates = row_major(norm_gates),
      .norm_cell = row_major(norm_cell),
      .lengths = row_major(lengths),
      .reset = row_major(reset),
      .seed = seed,
      .zoneout_h = zoneout_h,
      .zoneout_c = zoneout_c,
  };
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

  void check(const LstmSizes& n, ScalarType dtype, ScalarType wide, bool has_norm) const;
  Saved contiguous() const;
  bool has_gates() const { return gates.numel() > 0; }
};

void Saved::check(const LstmSizes& n, ScalarType dtype, ScalarType wide, bool has_norm) const {
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
  return {
      .grad_output = row_major(grad_output),
      .grad_h_n = row_major(grad_h_n),
      .grad_c_n = row_major(grad_c_n),
      .grad_cells = row_major(grad_cells),
      .output = row_major(output),
      .cells = row_major(cells),
      .gates = row_major(gates),
      .normalized = row_major(normalized),
      .scales = row_major(scales),
  };
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
  const Tensor grad_weight_ih = empty_recycled(input[0], {4 * H, I}),
               grad_weight_hh = empty_recycled(input[0], {4 * H, P});
  const Tensor grad_bias = empty(input[0], {4 * H});
  for_storage_dtype(kName, "grad_gates", grad_gates[0], [&](auto value) {
    using T = decltype(value);
    const auto gates_at = pointers<T>("grad_gates", grad_gates, rows, 4 * H, dtype);
    const auto input_at = pointers<T>("input", input, rows, I, dtype);
    const auto previous_at = pointers<T>("previous", previous, rows, P, dtype);
    const LstmWeightGradients<T> gradients = {
        .grad_gates = gates_at.data(),
        .input = input_at.data(),
        .previous = previous_at.data(),
        .rows = rows.data(),
        .grad_weight_ih = mutable_data<T>(grad_weight_ih),
        .grad_weight_hh = mutable_data<T>(grad_weight_hh),
        .grad_bias = mutable_data<T>(grad_bias),
        .steps = static_cast<int64_t>(rows.size()),
        .I = I,
        .H = H,
        .P = P,
    };
    cpu::run(gradients, torch_parallel());
  });
  return {grad_weight_ih, grad_weight_hh, grad_bias};
}

// A result that is only there `if` somebody needs it; otherwise empty.
Tensor empty_if(bool wanted, const Tensor& like, std::initializer_list<int64_t> shape,
                std::optional<ScalarType> dtype = std::nullopt) {
  return wanted ? empty(like, shape, dtype) : empty(like, {0}, dtype);
}

Tensor empty_recycled_if(bool wanted, const Tensor& like, std::initializer_list<int64_t> shape,
                         std::optional<ScalarType> dtype = std::nullopt) {
  return wanted ? empty_recycled(like, shape, dtype) : empty(like, {0}, dtype);
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
  const Layer given = {
      .input = input_any,
      .h_0 = h_0_any,
      .c_0 = c_0_any,
      .weight_ih = weight_ih_any,
      .weight_hh = weight_hh_any,
      .bias_ih = bias_ih_any,
      .bias_hh = bias_hh_any,
      .weight_hr = weight_hr_any,
      .norm_gates = norm_gates_any,
      .norm_cell = norm_cell_any,
      .lengths = lengths_any,
      .reset = reset_any,
      .seed = seed,
      .zoneout_h = zoneout_h,
      .zoneout_c = zoneout_c,
  };
  const LstmSizes n = given.check();
  const OptionalTensor packed = row_major(packed_any);
  const ScalarType given_dtype = input_any.scalar_type();
  const bool quantised = is_quantised(packed, given_dtype);
  const void* panels = packed_weights(packed, n, given_dtype);
  const Layer layer = given.contiguous();
  check_values(layer.lengths, n.T);
  const Tensor& input = layer.input;
  const ScalarType wide = widened(input.scalar_type());
  const bool norm = save_gates && layer.norm_gates;
  // Nobody resizes the output of a recorded pass: torch refuses that to what needs a gradient.
  const Tensor output = save_cells ? empty_recycled(input, {n.T, n.B, n.P}) : empty(input, {n.T, n.B, n.P});
  const Tensor h_n = empty(input, {n.B, n.P}), c_n = empty(input, {n.B, n.H});
  const Tensor cells = empty_recycled_if(save_cells, input, {n.T, n.B, n.H}, wide);
  const Tensor gates = empty_recycled_if(save_gates, input, {n.T, n.B, 4 * n.H});
  const Tensor normalized = empty_recycled_if(norm, input, {2, n.T, n.B, 4 * n.H});
  const Tensor scales = empty_recycled_if(norm, input, {n.T, n.B, 4}, wide);
  for_storage_dtype(kName, "input", input, [&](auto value) {
    using T = decltype(value);
    cpu::run(
        LstmForward<T>{
            .input = data<T>(input),
            .h_0 = data<T>(layer.h_0),
            .c_0 = data<T>(layer.c_0),
            .weight_ih = data<T>(layer.weight_ih),
            .weight_hh = data<T>(layer.weight_hh),
            .bias_ih = data<T>(layer.bias_ih),
            .bias_hh = data<T>(layer.bias_hh),
            .variant = layer.variant<T>(),
            .lengths = data<int64_t>(layer.lengths),
            .packed = panels,
            .quantised = quantised,
            .output = mutable_data<T>(output),
            .cells = data_if<Widened<T>>(save_cells, cells),
            .gates = data_if<T>(save_gates, gates),
            .normalized = data_if<T>(norm, normalized),
            .scales = data_if<Widened<T>>(norm, scales),
            .h_n = mutable_data<T>(h_n),
            .c_n = mutable_data<T>(c_n),
            .steps = n.T,
            .B = n.B,
            .I = n.I,
            .H = n.H,
            .P = n.P,
            .reverse = reverse,
        },
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
                           bool reverse, bool weights, bool need_input) {
  const Layer given = {
      .input = input_any,
      .h_0 = h_0_any,
      .c_0 = c_0_any,
      .weight_ih = weight_ih_any,
      .weight_hh = weight_hh_any,
      .bias_ih = bias_ih_any,
      .bias_hh = bias_hh_any,
      .weight_hr = weight_hr_any,
      .norm_gates = norm_gates_any,
      .norm_cell = norm_cell_any,
      .lengths = lengths_any,
      .reset = reset_any,
      .seed = seed,
      .zoneout_h = zoneout_h,
      .zoneout_c = zoneout_c,
  };
  const Saved saved_any = {
      .grad_output = grad_output,
      .grad_h_n = grad_h_n,
      .grad_c_n = grad_c_n,
      .grad_cells = grad_cells,
      .output = output,
      .cells = cells,
      .gates = gates,
      .normalized = normalized,
      .scales = scales,
  };
  const LstmSizes n = given.check();
  const ScalarType dtype = input_any.scalar_type(), wide = widened(dtype);
  const bool norm = given.norm_gates.has_value(), projection = given.weight_hr.has_value();
  saved_any.check(n, dtype, wide, norm);
  const bool by_step = given.is_plain() && !given.lengths;
  const Layer layer = given.contiguous();
  const Saved saved = saved_any.contiguous();
  check_values(layer.lengths, n.T);
  const Tensor& input = layer.input;
  const Tensor grad_input = empty_recycled_if(need_input, input, {n.T, n.B, n.I});
  const Tensor grad_h_0 = empty(input, {n.B, n.P}), grad_c_0 = empty(input, {n.B, n.H});
  const Tensor grad_gates = empty_recycled_if(!weights && by_step, input, {n.T, n.B, 4 * n.H});
  const Tensor grad_weight_ih = empty_recycled_if(weights, input, {4 * n.H, n.I});
  const Tensor grad_weight_hh = empty_recycled_if(weights, input, {4 * n.H, n.P});
  const Tensor grad_bias = empty_if(weights, input, {4 * n.H});
  const Tensor grad_weight_hr = empty_recycled_if(weights && projection, input, {n.P, n.H});
  const Tensor grad_norm_gates = empty_if(weights && norm, input, {2, 4 * n.H});
  const Tensor grad_norm_cell = empty_if(weights && norm, input, {2, n.H});
  for_storage_dtype(kName, "input", input, [&](auto value) {
    using T = decltype(value);
    cpu::run(
        LstmBackward<T>{
            .grad_output = data<T>(saved.grad_output),
            .grad_h_n = data<T>(saved.grad_h_n),
            .grad_c_n = data<T>(saved.grad_c_n),
            .grad_cells = data<Widened<T>>(saved.grad_cells),
            .input = data<T>(input),
            .h_0 = data<T>(layer.h_0),
            .c_0 = data<T>(layer.c_0),
            .weight_ih = data<T>(layer.weight_ih),
            .weight_hh = data<T>(layer.weight_hh),
            .bias_ih = data<T>(layer.bias_ih),
            .bias_hh = data<T>(layer.bias_hh),
            .variant = layer.variant<T>(),
            .lengths = data<int64_t>(layer.lengths),
            .output = data<T>(saved.output),
            .cells = data<Widened<T>>(saved.cells),
            .gates = saved.has_gates() ? data<T>(saved.gates) : nullptr,
            .normalized = saved.has_gates() && norm ? data<T>(saved.normalized) : nullptr,
            .scales = saved.has_gates() && norm ? data<Widened<T>>(saved.scales) : nullptr,
            .grad_gates = data_if<T>(!weights && by_step, grad_gates),
            .grad_input = data_if<T>(need_input, grad_input),
            .grad_h_0 = mutable_data<T>(grad_h_0),
            .grad_c_0 = mutable_data<T>(grad_c_0),
            .grad_weight_ih = data_if<T>(weights, grad_weight_ih),
            .grad_weight_hh = data_if<T>(weights, grad_weight_hh),
            .grad_bias = data_if<T>(weights, grad_bias),
            .grad_weight_hr = data_if<T>(weights && projection, grad_weight_hr),
            .grad_norm_gates = data_if<T>(weights && norm, grad_norm_gates),
            .grad_norm_cell = data_if<T>(weights && norm, grad_norm_cell),
            .steps = n.T,
            .B = n.B,
            .I = n.I,
            .H = n.H,
            .P = n.P,
            .reverse = reverse,
        },
        torch_parallel());
  });
  return {grad_input,     grad_h_0,  grad_c_0,       grad_gates,      grad_weight_ih,
          grad_weight_hh, grad_bias, grad_weight_hr, grad_norm_gates, grad_norm_cell};
}

#ifdef LLMKERN_WITH_CUDA
Tensor rows_of(const Tensor& steps) {  // [T, B, X] as [T * B, X]
  return torch::stable::view(steps, {steps.size(0) * steps.size(1), steps.size(2)});
}

LstmSizes check_cuda(const Layer& layer, const OptionalTensor& grad_cells) {
  const LstmSizes n = layer.check();
  for (const OptionalTensor& tensor :
       {OptionalTensor(layer.h_0), OptionalTensor(layer.c_0), OptionalTensor(layer.weight_ih),
        OptionalTensor(layer.weight_hh), layer.bias_ih, layer.bias_hh, layer.lengths}) {
    if (tensor && !same_device(*tensor, layer.input)) fail(kName, "expected every tensor on one device");
  }
  if (!layer.is_plain() || grad_cells.has_value()) {
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
  const Layer given = {
      .input = input_any,
      .h_0 = h_0_any,
      .c_0 = c_0_any,
      .weight_ih = weight_ih_any,
      .weight_hh = weight_hh_any,
      .bias_ih = bias_ih_any,
      .bias_hh = bias_hh_any,
      .weight_hr = weight_hr,
      .norm_gates = norm_gates,
      .norm_cell = norm_cell,
      .lengths = lengths_any,
      .reset = reset,
      .seed = seed,
      .zoneout_h = zoneout_h,
      .zoneout_c = zoneout_c,
  };
  const LstmSizes n = check_cuda(given, std::nullopt);
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
        LstmRecurrence<T>{
            .input_gates = data<Widened<T>>(input_gates),
            .h_0 = data<T>(layer.h_0),
            .c_0 = data<T>(layer.c_0),
            .weight_hh = data<T>(layer.weight_hh),
            .bias_ih = data<T>(layer.bias_ih),
            .bias_hh = data<T>(layer.bias_hh),
            .lengths = data<int64_t>(layer.lengths),
            .output = mutable_data<T>(output),
            .cells = mutable_data<Widened<T>>(cells),
            .gates = mutable_data<T>(gates),
            .h_n = mutable_data<T>(h_n),
            .c_n = mutable_data<T>(c_n),
            .steps = n.T,
            .B = n.B,
            .H = n.H,
            .reverse = reverse,
        },
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
                            bool need_input) {
  const Layer given = {
      .input = input_any,
      .h_0 = h_0_any,
      .c_0 = c_0_any,
      .weight_ih = weight_ih_any,
      .weight_hh = weight_hh_any,
      .bias_ih = bias_ih_any,
      .bias_hh = bias_hh_any,
      .weight_hr = weight_hr,
      .norm_gates = norm_gates,
      .norm_cell = norm_cell,
      .lengths = lengths_any,
      .reset = reset,
      .seed = seed,
      .zoneout_h = zoneout_h,
      .zoneout_c = zoneout_c,
  };
  const LstmSizes n = check_cuda(given, grad_cells);
  const ScalarType dtype = input_any.scalar_type(), wide = widened(dtype);
  const Saved saved_any = {
      .grad_output = grad_output,
      .grad_h_n = grad_h_n,
      .grad_c_n = grad_c_n,
      .grad_cells = grad_cells,
      .output = output,
      .cells = cells,
      .gates = gates,
      .normalized = normalized,
      .scales = scales,
  };
  saved_any.check(n, dtype, wide, false);
  check_shape(kName, "gates", gates, {n.T, n.B, 4 * n.H});
  const OnCuda cuda(input_any);
  const Layer layer = given.contiguous();
  const Saved saved = saved_any.contiguous();
  const Tensor& input = layer.input;
  const Tensor grad_gates = empty(input, {n.T, n.B, 4 * n.H}), grad_cell = empty(input, {n.B, n.H}, wide);
  const Tensor grad_h_0 = empty(input, {n.B, n.H}), grad_c_0 = empty(input, {n.B, n.H});
  const Tensor previous = empty_if(weights, input, {n.T, n.B, n.H});
  for_storage_dtype(kName, "input", input, [&](auto value) {
    using T = decltype(value);
    cuda::run(
        LstmRecurrenceBackward<T>{
            .grad_output = data<T>(saved.grad_output),
            .grad_h_n = data<T>(saved.grad_h_n),
            .grad_c_n = data<T>(saved.grad_c_n),
            .c_0 = data<T>(layer.c_0),
            .weight_hh = data<T>(layer.weight_hh),
            .cells = data<Widened<T>>(saved.cells),
            .gates = data<T>(saved.gates),
            .lengths = data<int64_t>(layer.lengths),
            .grad_cell = mutable_data<Widened<T>>(grad_cell),
            .grad_gates = mutable_data<T>(grad_gates),
            .grad_h_0 = mutable_data<T>(grad_h_0),
            .grad_c_0 = mutable_data<T>(grad_c_0),
            .steps = n.T,
            .B = n.B,
            .H = n.H,
            .reverse = reverse,
        },
        cuda.stream());
    if (!weights) return;
    cuda::run(
        LstmPrevious<T>{
            .h_0 = data<T>(layer.h_0),
            .output = data<T>(saved.output),
            .lengths = data<int64_t>(layer.lengths),
            .previous = mutable_data<T>(previous),
            .steps = n.T,
            .B = n.B,
            .H = n.H,
            .reverse = reverse,
        },
        cuda.stream());
  });
  const Tensor rows = rows_of(grad_gates), none = empty(input, {0});
  const Tensor grad_input =
      need_input ? torch::stable::view(product(rows, layer.weight_ih), {n.T, n.B, n.I}) : empty(input, {0});
  if (!weights)
    return {grad_input, grad_h_0, grad_c_0, layer.lengths ? none : grad_gates, none, none, none, none, none, none};
  const Tensor columns = transposed(rows);
  return {grad_input,
          grad_h_0,
          grad_c_0,
          none,
          product(columns, rows_of(input)),
          product(columns, rows_of(previous)),
          sum_rows(rows, dtype),
          none,
          none,
          none};
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
  m.def(
      "lstm_weight_gradients(Tensor[] grad_gates, Tensor[] input, Tensor[] previous) -> (Tensor grad_weight_ih, "
      "Tensor grad_weight_hh, Tensor grad_bias)");
  m.def(
      "lstm_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor? grad_cells, Tensor input, "
      "Tensor h_0, Tensor c_0, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh, "
      "Tensor? weight_hr, Tensor? norm_gates, Tensor? norm_cell, Tensor? lengths, Tensor? reset, Tensor? seed, "
      "Tensor output, Tensor cells, Tensor gates, Tensor normalized, Tensor scales, float zoneout_h=0.0, "
      "float zoneout_c=0.0, bool reverse=False, bool weights=True, bool need_input=True) -> (Tensor grad_input, Tensor "
      "grad_h_0, "
      "Tensor grad_c_0, Tensor grad_gates, Tensor grad_weight_ih, Tensor grad_weight_hh, Tensor grad_bias, "
      "Tensor grad_weight_hr, Tensor grad_norm_gates, Tensor grad_norm_cell)");
}

STABLE_TORCH_LIBRARY_IMPL(llmkern, CPU, m) {
  LLMKERN_OPERATOR(m, "lstm", &lstm_cpu);
  LLMKERN_OPERATOR(m, "lstm_weight_gradients", &lstm_weight_gradients_cpu);
  LLMKERN_OPERATOR(m, "lstm_backward", &lstm_backward_cpu);
}
#endif

#ifdef LLMKERN_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(llmkern, LLMKERN_CUDA_KEY, m) {
  LLMKERN_OPERATOR(m, "lstm", &lstm_cuda);
  LLMKERN_OPERATOR(m, "lstm_backward", &lstm_backward_cuda);
}
#endif

}  // namespace llmkern::ops
