// SPDX-License-Identifier: Apache-2.0
// torch.ops.llmkern.beam_search_step, speculative_verify and multinomial: schema, checks, allocation, launch. The math
// is in kernels/decoding.h. On the CPU alone.
#include "kernels/decoding.h"

#include <cmath>
#include <tuple>

#include "ops/tensors.h"

namespace llmkern::ops {

namespace {

// Rows with contiguous elements keep their strides; others are copied.
Tensor contiguous_rows(const Tensor& tensor) {
  return tensor.stride(tensor.dim() - 1) == 1 ? tensor : row_major(tensor);
}

template <class T>
RowGrid<T> row_grid(const Tensor& tensor) {
  return {data<T>(tensor), tensor.stride(0), tensor.stride(1)};
}

void check_vocabulary(const char* what, const char* name, const Tensor& tensor) {
  const int64_t V = tensor.size(tensor.dim() - 1);
  if (V < 1 || V >= kMaxSampleVocabulary) {
    fail(what, "expected ", name, " of 1 to ", kMaxSampleVocabulary - 1, " tokens, got shape ", shape_text(tensor));
  }
}

// Seeds [1] or [B], positions [B].
void check_draws(const char* what, const Tensor& seeds, const Tensor& positions, int64_t B) {
  check_dtype(what, "seeds", seeds, ScalarType::Long);
  check_dim(what, "seeds", seeds, 1);
  if (seeds.size(0) != 1 && seeds.size(0) != B) {
    fail(what, "expected seeds with 1 or B = ", B, " rows, got shape ", shape_text(seeds));
  }
  check_dtype(what, "positions", positions, ScalarType::Long);
  check_shape(what, "positions", positions, {B});
}

int64_t seed_stride(const Tensor& seeds) { return seeds.size(0) == 1 ? 0 : 1; }

// ---- beam search ----

using Candidates = std::tuple<Tensor, Tensor, Tensor>;

Candidates beam_search_step_cpu(const Tensor& logits_any, const Tensor& scores_any, int64_t n) {
  constexpr const char* kName = "beam_search_step";
  check_dim(kName, "logits", logits_any, 3);
  check_vocabulary(kName, "logits", logits_any);
  const int64_t B = logits_any.size(0), K = logits_any.size(1), V = logits_any.size(2);
  check_dtype(kName, "scores", scores_any, ScalarType::Float);
  check_shape(kName, "scores", scores_any, {B, K});
  if (n < 1) fail(kName, "expected num_candidates of at least 1, got ", n);
  const Tensor logits = contiguous_rows(logits_any), scores = row_major(scores_any);
  const Candidates out = {empty(scores, {B, n}), empty(scores, {B, n}, ScalarType::Long),
                          empty(scores, {B, n}, ScalarType::Long)};
  const auto& [score, beam, token] = out;
  for_storage_dtype(kName, "logits", logits, [&](auto value) {
    using T = decltype(value);
    cpu::run(BeamSearchStep<T>{.logits = row_grid<T>(logits),
                               .scores = data<float>(scores),
                               .B = B,
                               .K = K,
                               .V = V,
                               .n = n,
                               .score = mutable_data<float>(score),
                               .beam = mutable_data<int64_t>(beam),
                               .token = mutable_data<int64_t>(token)},
             torch_parallel());
  });
  return out;
}

// ---- speculative sampling ----

constexpr const char* kVerify = "speculative_verify";

using Verified = std::tuple<Tensor, Tensor, Tensor>;

// Every id before the first -1 is a token that the draft could have drawn.
template <class T>
void check_draft_ids(const SpeculativeVerify<T>& a) {
  for (int64_t b = 0; b < a.B; ++b) {
    for (int64_t i = 0; i < a.n && a.draft_ids[b * a.n + i] != -1; ++i) {
      const int64_t id = a.draft_ids[b * a.n + i];
      if (id < 0 || id >= a.V) {
        fail<std::out_of_range>(kVerify, "expected draft_ids in [0, V) = [0, ", a.V, ") or -1, got ", id,
                                " at position [", b, ", ", i, "]");
      }
      if (a.draft.data != nullptr && widen(a.draft.row(b, i)[id]) == -INFINITY) {
        fail(kVerify, "expected draft_ids that draft_logits can draw, got ", id, " with logit -inf at position [", b,
             ", ", i, "]");
      }
    }
  }
}

Verified speculative_verify_cpu(const Tensor& ids_any, const OptionalTensor& draft_any, const Tensor& target_any,
                                const Tensor& seeds_any, const Tensor& positions_any) {
  check_dtype(kVerify, "draft_ids", ids_any, ScalarType::Long);
  check_dim(kVerify, "draft_ids", ids_any, 2);
  check_dim(kVerify, "target_logits", target_any, 3);
  check_vocabulary(kVerify, "target_logits", target_any);
  const int64_t B = ids_any.size(0), n = ids_any.size(1), V = target_any.size(2);
  check_shape(kVerify, "target_logits", target_any, {B, n + 1, V});
  if (draft_any) {
    check_dtype(kVerify, "draft_logits", *draft_any, target_any.scalar_type());
    check_shape(kVerify, "draft_logits", *draft_any, {B, n, V});
  }
  check_draws(kVerify, seeds_any, positions_any, B);
  const Tensor ids = row_major(ids_any), target = contiguous_rows(target_any);
  const Tensor seeds = row_major(seeds_any), positions = row_major(positions_any);
  const OptionalTensor draft = draft_any ? OptionalTensor(contiguous_rows(*draft_any)) : std::nullopt;
  const Verified out = {empty(ids, {B, n + 1}), empty(ids, {B}), empty(ids, {B, n + 1}, ScalarType::Float)};
  const auto& [token, num_accepted, logprob] = out;
  for_storage_dtype(kVerify, "target_logits", target, [&](auto value) {
    using T = decltype(value);
    const SpeculativeVerify<T> a = {.draft_ids = data<int64_t>(ids),
                                    .draft = draft ? row_grid<T>(*draft) : RowGrid<T>{},
                                    .target = row_grid<T>(target),
                                    .seeds = data<int64_t>(seeds),
                                    .seed_stride = seed_stride(seeds),
                                    .positions = data<int64_t>(positions),
                                    .B = B,
                                    .n = n,
                                    .V = V,
                                    .token = mutable_data<int64_t>(token),
                                    .num_accepted = mutable_data<int64_t>(num_accepted),
                                    .logprob = mutable_data<float>(logprob)};
    check_draft_ids(a);
    cpu::run(a, torch_parallel());
  });
  return out;
}

// ---- multinomial ----

constexpr const char* kMultinomialName = "multinomial";

// The first element of a row that makes it bad.
template <class T>
[[noreturn]] void fail_with_bad_value(const Multinomial<T>& a, int64_t b) {
  const T* row = a.input + b * a.stride;
  int64_t v = 0;
  const auto is_good = [&](double x) { return a.from_logits ? !std::isnan(x) : x >= 0 && x < INFINITY; };
  while (is_good(static_cast<double>(widen(row[v])))) ++v;
  fail(kMultinomialName, "expected ", a.from_logits ? "logits that are not NaN" : "finite weights of at least 0",
       ", got ", static_cast<double>(widen(row[v])), " at position [", b, ", ", v, "]");
}

template <class T>
void check_faults(const Multinomial<T>& a) {
  const char* value = a.from_logits ? "logit above -inf" : "weight above 0";
  for (int64_t b = 0; b < a.B; ++b) {
    switch (a.fault[b]) {
      case RowFault::kNone:
        break;
      case RowFault::kBadValue:
        fail_with_bad_value(a, b);
      case RowFault::kNothing:
        fail(kMultinomialName, "expected a ", value, " in every row, got none in row ", b);
      case RowFault::kTooFew:
        fail(kMultinomialName, "expected num_samples = ", a.n, " categories with a ", value,
             " to draw without replacement, got fewer in row ", b);
    }
  }
}

Tensor multinomial_cpu(const Tensor& input_any, int64_t n, bool replacement, bool from_logits, const Tensor& seeds_any,
                       const Tensor& positions_any) {
  check_dim(kMultinomialName, "input", input_any, 2);
  const int64_t B = input_any.size(0), V = input_any.size(1);
  const int64_t limit = from_logits ? kMaxSampleVocabulary : kMaxCategories;
  if (V < 1 || V >= limit) {
    fail(kMultinomialName, "expected input of 1 to ", limit - 1, " categories, got shape ", shape_text(input_any));
  }
  if (n < 1 || n >= kMaxDraws) fail(kMultinomialName, "expected num_samples in [1, 2^32), got ", n);
  if (!replacement && n > V) {
    fail(kMultinomialName, "expected num_samples of at most V = ", V, " without replacement, got ", n);
  }
  check_draws(kMultinomialName, seeds_any, positions_any, B);
  const Tensor input = contiguous_rows(input_any), seeds = row_major(seeds_any), positions = row_major(positions_any);
  const Tensor token = empty(input, {B, n}, ScalarType::Long);
  std::vector<RowFault> faults(static_cast<size_t>(B));
  for_storage_dtype(kMultinomialName, "input", input, [&](auto value) {
    using T = decltype(value);
    const Multinomial<T> a = {.input = data<T>(input),
                              .stride = input.stride(0),
                              .from_logits = from_logits,
                              .replacement = replacement,
                              .seeds = data<int64_t>(seeds),
                              .seed_stride = seed_stride(seeds),
                              .positions = data<int64_t>(positions),
                              .B = B,
                              .V = V,
                              .n = n,
                              .token = mutable_data<int64_t>(token),
                              .fault = faults.data()};
    cpu::run(a, torch_parallel());
    check_faults(a);
  });
  return token;
}

}  // namespace

#ifndef LLMKERN_SIMT
STABLE_TORCH_LIBRARY_FRAGMENT(llmkern, m) {
  m.def(
      "beam_search_step(Tensor logits, Tensor scores, SymInt num_candidates) -> (Tensor score, Tensor beam, Tensor "
      "token)");
  m.def(
      "speculative_verify(Tensor draft_ids, Tensor? draft_logits, Tensor target_logits, Tensor seeds, Tensor "
      "positions) "
      "-> (Tensor token, Tensor num_accepted, Tensor logprob)");
  m.def(
      "multinomial(Tensor input, SymInt num_samples, bool replacement, bool from_logits, Tensor seeds, Tensor "
      "positions) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(llmkern, CPU, m) {
  LLMKERN_OPERATOR(m, "beam_search_step", &beam_search_step_cpu);
  LLMKERN_OPERATOR(m, "speculative_verify", &speculative_verify_cpu);
  LLMKERN_OPERATOR(m, "multinomial", &multinomial_cpu);
}
#endif

}  // namespace llmkern::ops
