// SPDX-License-Identifier: Apache-2.0
// torch.ops.llmkern.sample: schema, checks, allocation, launch. The math is in kernels/sampling.h.
#include "kernels/sampling.h"

#include <tuple>

#include "ops/cuda.h"
#include "ops/tensors.h"

namespace llmkern::ops {

namespace {

constexpr const char* kName = "sample";

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

void check_settings(const SampleSettings& s, int64_t row) {
  const int column = wrong_setting(s);
  if (column < 0) return;
  const double got = reinterpret_cast<const double*>(&s)[column];
  fail(kName, "expected ", sample_setting_range(column), ", got ", got, " in row ", row);
}

// How far apart the rows of a [1] or [B] tensor are, each of `size` values: 0 where all share one.
int64_t row_stride(const char* name, const Tensor& tensor, int64_t B, int64_t size) {
  if (tensor.size(0) != 1 && tensor.size(0) != B) {
    fail(kName, "expected ", name, " with 1 or B = ", B, " rows, got shape ", shape_text(tensor));
  }
  return tensor.size(0) == 1 ? 0 : size;
}

// A tensor [V] or [B, V], or nothing.
int64_t vocabulary_stride(const char* name, const OptionalTensor& tensor, ScalarType dtype, int64_t B, int64_t V) {
  if (!tensor.has_value()) return 0;
  check_dtype(kName, name, *tensor, dtype);
  if (tensor->dim() == 1) {
    check_shape(kName, name, *tensor, {V});
    return 0;
  }
  check_shape(kName, name, *tensor, {B, V});
  return V;
}

int64_t ids_length(const char* name, const OptionalTensor& ids, int64_t B) {
  if (!ids.has_value()) return 0;
  check_dtype(kName, name, *ids, ScalarType::Long);
  check_dim(kName, name, *ids, 2);
  check_shape(kName, name, *ids, {B, ids->size(1)});
  return ids->size(1);
}

void check_sizes(const Tensor& logits, int64_t num_logprobs) {
  check_dtype(kName, "logits", logits, ScalarType::Float);
  check_dim(kName, "logits", logits, 2);
  const int64_t V = logits.size(1);
  if (V < 1 || V >= kMaxSampleVocabulary) {
    fail(kName, "expected logits of 1 to ", kMaxSampleVocabulary - 1, " tokens, got shape ", shape_text(logits));
  }
  if (num_logprobs < 0 || num_logprobs > V) {
    fail(kName, "expected num_logprobs in [0, V = ", V, "], got ", num_logprobs);
  }
}

Outputs empty_outputs(const Tensor& like, int64_t B, int64_t n) {
  const auto make = [&](std::initializer_list<int64_t> shape, ScalarType dtype) { return empty(like, shape, dtype); };
  constexpr ScalarType kId = ScalarType::Long, kValue = ScalarType::Float;
  return {make({B}, kId), make({B}, kValue), make({B}, kValue), make({B}, kId),
          make({B}, kId), make({B}, kValue), make({B, n}, kId), make({B, n}, kValue)};
}

struct Inputs {  // row major, alive as long as the kernel's pointers
  Tensor logits;
  OptionalTensor bias, allowed, prompt, output;
  Tensor settings, seeds, positions;
};

Inputs check_inputs(const Tensor& logits, const OptionalTensor& bias, const OptionalTensor& allowed,
                    const OptionalTensor& prompt, const OptionalTensor& output, const Tensor& settings,
                    const Tensor& seeds, const Tensor& positions, int64_t num_logprobs) {
  check_sizes(logits, num_logprobs);
  check_dtype(kName, "settings", settings, ScalarType::Double);
  check_dim(kName, "settings", settings, 2);
  check_shape(kName, "settings", settings, {settings.size(0), kSampleSettings});
  check_dtype(kName, "seeds", seeds, ScalarType::Long);
  check_dim(kName, "seeds", seeds, 1);
  check_dtype(kName, "positions", positions, ScalarType::Long);
  check_shape(kName, "positions", positions, {logits.size(0)});
  return {row_major(logits), row_major(bias),     row_major(allowed), row_major(prompt),
          row_major(output), row_major(settings), row_major(seeds),   row_major(positions)};
}

Sample arguments(const Inputs& in, const Outputs& out, int64_t num_logprobs) {
  const int64_t B = in.logits.size(0), V = in.logits.size(1);
  const auto& [token, logprob, filtered_logprob, rank, num_kept, entropy, top_ids, top_logprobs] = out;
  Sample a = {};
  a.logits = data<float>(in.logits);
  a.bias = data<float>(in.bias);
  a.bias_stride = vocabulary_stride("logit_bias", in.bias, ScalarType::Float, B, V);
  a.allowed = data<bool>(in.allowed);
  a.allowed_stride = vocabulary_stride("allowed", in.allowed, ScalarType::Bool, B, V);
  a.prompt_ids = data<int64_t>(in.prompt);
  a.prompt_length = ids_length("prompt_ids", in.prompt, B);
  a.output_ids = data<int64_t>(in.output);
  a.output_length = ids_length("output_ids", in.output, B);
  a.settings = static_cast<const SampleSettings*>(in.settings.const_data_ptr());
  a.settings_stride = row_stride("settings", in.settings, B, 1);
  a.seeds = data<int64_t>(in.seeds);
  a.seed_stride = row_stride("seeds", in.seeds, B, 1);
  a.positions = data<int64_t>(in.positions);
  a.B = B;
  a.V = V;
  a.num_logprobs = num_logprobs;
  a.token = mutable_data<int64_t>(token);
  a.logprob = mutable_data<float>(logprob);
  a.filtered_logprob = mutable_data<float>(filtered_logprob);
  a.rank = mutable_data<int64_t>(rank);
  a.num_kept = mutable_data<int64_t>(num_kept);
  a.entropy = mutable_data<float>(entropy);
  a.top_ids = mutable_data<int64_t>(top_ids);
  a.top_logprobs = mutable_data<float>(top_logprobs);
  return a;
}

Outputs sample_cpu(const Tensor& logits, const OptionalTensor& bias, const OptionalTensor& allowed,
                   const OptionalTensor& prompt, const OptionalTensor& output, const Tensor& settings,
                   const Tensor& seeds, const Tensor& positions, int64_t num_logprobs) {
  const Inputs in = check_inputs(logits, bias, allowed, prompt, output, settings, seeds, positions, num_logprobs);
  const Outputs out = empty_outputs(logits, logits.size(0), num_logprobs);
  const Sample a = arguments(in, out, num_logprobs);
  for (int64_t b = 0; b < settings.size(0); ++b) check_settings(a.settings[b], b);
  cpu::run(a, torch_parallel());
  return out;
}

#ifdef LLMKERN_WITH_CUDA
Outputs sample_cuda(const Tensor& logits, const OptionalTensor& bias, const OptionalTensor& allowed,
                    const OptionalTensor& prompt, const OptionalTensor& output, const Tensor& settings,
                    const Tensor& seeds, const Tensor& positions, int64_t num_logprobs) {
  const OnCuda cuda(logits);
  const Inputs in = check_inputs(logits, bias, allowed, prompt, output, settings, seeds, positions, num_logprobs);
  const Outputs out = empty_outputs(logits, logits.size(0), num_logprobs);
  Sample a = arguments(in, out, num_logprobs);
  const Tensor workspace = empty(logits, {sample_workspace_bytes(a.B, a.V, num_logprobs)}, ScalarType::Byte);
  a.workspace = workspace.mutable_data_ptr();
  a.error = cuda.error();
  cuda::run(a, cuda.stream());
  return out;
}
#endif

}  // namespace

#ifndef LLMKERN_SIMT
STABLE_TORCH_LIBRARY_FRAGMENT(llmkern, m) {
  m.def(
      "sample(Tensor logits, Tensor? bias, Tensor? allowed, Tensor? prompt_ids, Tensor? output_ids, Tensor settings, "
      "Tensor seeds, Tensor positions, SymInt num_logprobs) -> (Tensor token, Tensor logprob, Tensor filtered_logprob, "
      "Tensor rank, Tensor num_kept, Tensor entropy, Tensor top_ids, Tensor top_logprobs)");
}

STABLE_TORCH_LIBRARY_IMPL(llmkern, CPU, m) { m.impl("sample", TORCH_BOX(&sample_cpu)); }
#endif

#ifdef LLMKERN_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(llmkern, LLMKERN_CUDA_KEY, m) { m.impl("sample", TORCH_BOX(&sample_cuda)); }
#endif

}  // namespace llmkern::ops
