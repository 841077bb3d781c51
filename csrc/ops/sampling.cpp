// SPDX-License-Identifier: Apache-2.0
// torch.ops.llmkern.sample: schema, checks, allocation, launch. The math is in kernels/sampling.h.
#include "kernels/sampling.h"

#include <type_traits>
#include <vector>

#include "ops/cuda.h"
#include "ops/tensors.h"

namespace llmkern::ops {

namespace {

constexpr const char* kName = "sample";

// token, valid, num_kept, filtered_logprob and, of logprob, entropy, rank, top_ids, top_logprobs, processed, the ones
// asked for. A list, because every tensor costs as much as the draw from a small vocabulary.
using Outputs = std::vector<Tensor>;

void check_settings(const SampleSettings& s, int64_t row) {
  const int column = wrong_setting(s);
  if (column < 0) return;
  const double got = reinterpret_cast<const double*>(&s)[column];
  fail(kName, "expected ", sample_setting_range(column), ", got ", got, " in row ", row);
}

// How far apart the rows are of a tensor whose first dimension is 1 or B: 0 where all share one.
int64_t row_stride(const char* name, const Tensor& tensor, int64_t B) {
  if (tensor.size(0) != 1 && tensor.size(0) != B) {
    fail(kName, "expected ", name, " with 1 or B = ", B, " rows, got shape ", shape_text(tensor));
  }
  return tensor.size(0) <= 1 ? 0 : tensor.numel() / tensor.size(0);
}

void check_per_row(const char* name, const Tensor& tensor, ScalarType dtype, int64_t dim) {
  check_dtype(kName, name, tensor, dtype);
  check_dim(kName, name, tensor, dim);
}

// A tensor [columns] or [B, columns]: the stride of its rows.
int64_t vocabulary_stride(const char* name, const Tensor& tensor, int64_t B, int64_t columns) {
  if (tensor.dim() == 1) {
    check_shape(kName, name, tensor, {columns});
    return 0;
  }
  check_shape(kName, name, tensor, {B, columns});
  return columns;
}

int64_t ids_length(const char* name, const OptionalTensor& ids, int64_t B) {
  if (!ids.has_value()) return 0;
  check_per_row(name, *ids, ScalarType::Long, 2);
  check_shape(kName, name, *ids, {B, ids->size(1)});
  return ids->size(1);
}

void check_sizes(const Tensor& logits, int64_t num_logprobs) {
  check_dim(kName, "logits", logits, 2);
  const int64_t V = logits.size(1);
  if (V < 1 || V >= kMaxSampleVocabulary) {
    fail(kName, "expected logits of 1 to ", kMaxSampleVocabulary - 1, " tokens, got shape ", shape_text(logits));
  }
  if (num_logprobs < 0 || num_logprobs > V) {
    fail(kName, "expected num_logprobs in [0, V = ", V, "], got ", num_logprobs);
  }
}

// Rows may lie any distance apart, their tokens may not.
Tensor dense_rows(const Tensor& logits) {
  return logits.stride(1) == 1 || logits.size(1) == 1 ? logits : row_major(logits);
}

struct Inputs {  // alive as long as the kernel's pointers
  Tensor logits;
  OptionalTensor bias, bias_ids, bias_values, allowed, prompt, output;
  Tensor settings, seeds;
  OptionalTensor positions;
};

struct Wanted {
  int64_t num_logprobs;
  bool logprob, entropy, rank, processed;
};

template <class T>
void set_bias(const Inputs& in, Sample<T>& a) {
  if (in.bias.has_value()) {
    check_dtype(kName, "logit_bias", *in.bias, ScalarType::Float);
    a.bias = data<float>(in.bias);
    a.bias_stride = vocabulary_stride("logit_bias", *in.bias, a.B, a.V);
  }
  if (!in.bias_ids.has_value() && !in.bias_values.has_value()) return;
  if (!in.bias_ids.has_value() || !in.bias_values.has_value()) {
    fail(kName, "expected the ids and the values of a sparse bias, got one of them");
  }
  check_per_row("bias_ids", *in.bias_ids, ScalarType::Long, 2);
  check_dtype(kName, "bias_values", *in.bias_values, ScalarType::Float);
  check_shape(kName, "bias_values", *in.bias_values, {in.bias_ids->size(0), in.bias_ids->size(1)});
  a.bias_ids = data<int64_t>(in.bias_ids);
  a.bias_values = data<float>(in.bias_values);
  a.num_bias_ids = in.bias_ids->size(1);
  a.bias_ids_stride = row_stride("bias_ids", *in.bias_ids, a.B);
}

template <class T>
void set_allowed(const OptionalTensor& allowed, Sample<T>& a) {
  if (!allowed.has_value()) return;
  const bool packed = allowed->scalar_type() == ScalarType::Int;
  if (!packed) check_dtype(kName, "allowed", *allowed, ScalarType::Bool);
  a.allowed = allowed->const_data_ptr();
  a.allowed_kind = packed ? AllowedKind::kBits : AllowedKind::kBytes;
  a.allowed_stride = vocabulary_stride("allowed", *allowed, a.B, packed ? (a.V + 31) / 32 : a.V);
}

template <class T>
void set_rows(const Inputs& in, Sample<T>& a) {
  check_per_row("settings", in.settings, ScalarType::Double, 2);
  check_shape(kName, "settings", in.settings, {in.settings.size(0), kSampleSettings});
  check_per_row("seeds", in.seeds, ScalarType::Long, 1);
  a.settings = static_cast<const SampleSettings*>(in.settings.const_data_ptr());
  a.settings_stride = row_stride("settings", in.settings, a.B) / kSampleSettings;
  a.seeds = data<int64_t>(in.seeds);
  a.seed_stride = row_stride("seeds", in.seeds, a.B);
  if (!in.positions.has_value()) return;
  check_per_row("positions", *in.positions, ScalarType::Long, 1);
  a.positions = data<int64_t>(in.positions);
  a.position_stride = row_stride("positions", *in.positions, a.B);
}

// Makes the outputs, and has the kernel write there.
template <class T>
Outputs make_outputs(const Tensor& like, const Wanted& wanted, Sample<T>& a) {
  Outputs out;
  const auto make = [&](auto*& pointer, std::initializer_list<int64_t> shape, ScalarType dtype) {
    out.push_back(empty(like, shape, dtype));
    pointer = mutable_data<std::remove_pointer_t<std::remove_reference_t<decltype(pointer)>>>(out.back());
  };
  constexpr ScalarType kId = ScalarType::Long, kValue = ScalarType::Float;
  make(a.token, {a.B}, kId);
  make(a.valid, {a.B}, ScalarType::Bool);
  make(a.num_kept, {a.B}, kId);
  make(a.filtered_logprob, {a.B}, kValue);
  if (wanted.logprob) make(a.logprob, {a.B}, kValue);
  if (wanted.entropy) make(a.entropy, {a.B}, kValue);
  if (wanted.rank) make(a.rank, {a.B}, kId);
  a.num_logprobs = wanted.num_logprobs;
  if (a.num_logprobs > 0) make(a.top_ids, {a.B, a.num_logprobs}, kId);
  if (a.num_logprobs > 0) make(a.top_logprobs, {a.B, a.num_logprobs}, kValue);
  if (wanted.processed) make(a.processed, {a.B, a.V}, kValue);
  return out;
}

template <class T>
Sample<T> arguments(const Inputs& in) {
  Sample<T> a = {};
  a.B = in.logits.size(0);
  a.V = in.logits.size(1);
  a.logits = data<T>(in.logits);
  a.logits_stride = in.logits.stride(0);
  set_bias(in, a);
  set_allowed(in.allowed, a);
  a.prompt_ids = data<int64_t>(in.prompt);
  a.prompt_length = ids_length("prompt_ids", in.prompt, a.B);
  a.output_ids = data<int64_t>(in.output);
  a.output_length = ids_length("output_ids", in.output, a.B);
  set_rows(in, a);
  return a;
}

// Returns f(T{}), T being the storage type of the logits.
template <class F>
Outputs for_logits_dtype(const Tensor& logits, const F& f) {
  switch (logits.scalar_type()) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::BFloat16:
      return f(bfloat16{});
    case ScalarType::Half:
      return f(float16{});
    default:
      fail(kName, "expected logits of dtype float32, bfloat16 or float16, got ",
           torch::headeronly::toString(logits.scalar_type()));
  }
}

template <class T>
void launch_cpu(const Inputs& in, const Sample<T>& a) {
  for (int64_t b = 0; b < in.settings.size(0); ++b) check_settings(a.settings[b], b);
  cpu::run(a, torch_parallel());
}

#ifdef LLMKERN_WITH_CUDA
template <class T>
void launch_cuda(const Inputs& in, Sample<T> a) {
  const OnCuda cuda(in.logits);
  const Tensor workspace = empty(in.logits, {sample_workspace_bytes(a.B, a.V, a.num_logprobs)}, ScalarType::Byte);
  a.workspace = workspace.mutable_data_ptr();
  a.error = cuda.error();
  cuda::run(a, cuda.stream());
}
#endif

template <bool kOnCuda>
Outputs sample(const Tensor& logits, const OptionalTensor& bias, const OptionalTensor& bias_ids,
               const OptionalTensor& bias_values, const OptionalTensor& allowed, const OptionalTensor& prompt_ids,
               const OptionalTensor& output_ids, const Tensor& settings, const Tensor& seeds,
               const OptionalTensor& positions, int64_t num_logprobs, bool return_logprob, bool return_entropy,
               bool return_rank, bool return_processed) {
  check_sizes(logits, num_logprobs);
  const Wanted wanted = {.num_logprobs = num_logprobs,
                         .logprob = return_logprob,
                         .entropy = return_entropy,
                         .rank = return_rank,
                         .processed = return_processed};
  const Inputs in = {.logits = dense_rows(logits),
                     .bias = row_major(bias),
                     .bias_ids = row_major(bias_ids),
                     .bias_values = row_major(bias_values),
                     .allowed = row_major(allowed),
                     .prompt = row_major(prompt_ids),
                     .output = row_major(output_ids),
                     .settings = row_major(settings),
                     .seeds = row_major(seeds),
                     .positions = row_major(positions)};
  return for_logits_dtype(in.logits, [&](auto type) {
    auto a = arguments<decltype(type)>(in);
    const Outputs out = make_outputs(in.logits, wanted, a);
#ifdef LLMKERN_WITH_CUDA
    if constexpr (kOnCuda) {
      launch_cuda(in, a);
      return out;
    }
#endif
    launch_cpu(in, a);
    return out;
  });
}

}  // namespace

#ifndef LLMKERN_SIMT
STABLE_TORCH_LIBRARY_FRAGMENT(llmkern, m) {
  m.def(
      "sample(Tensor logits, Tensor? bias, Tensor? bias_ids, Tensor? bias_values, Tensor? allowed, Tensor? prompt_ids, "
      "Tensor? output_ids, Tensor settings, Tensor seeds, Tensor? positions, SymInt num_logprobs, bool return_logprob, "
      "bool return_entropy, bool return_rank, bool return_processed) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(llmkern, CPU, m) { LLMKERN_OPERATOR(m, "sample", &sample<false>); }
#endif

#ifdef LLMKERN_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(llmkern, LLMKERN_CUDA_KEY, m) { LLMKERN_OPERATOR(m, "sample", &sample<true>); }
#endif

}  // namespace llmkern::ops
