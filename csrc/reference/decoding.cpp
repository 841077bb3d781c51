// SPDX-License-Identifier: Apache-2.0
// Decoding as kernels/decoding.h states it: whole rows, sorted orders, running sums, integers wide enough.
#include "kernels/decoding.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <optional>
#include <utility>

#include "reference/arrays.h"

namespace llmkern::reference {

namespace {

using Wide = unsigned __int128;

uint64_t bits_of(int64_t x) { return static_cast<uint64_t>(x); }

struct Distribution {
  std::vector<float> d;
  std::vector<uint64_t> mass;
  uint64_t total = 0;

  double logprob(int64_t v) const { return static_cast<double>(d[static_cast<size_t>(v)]) - log_mass(total); }
};

bool has_nan(const float* logits, int64_t V) {
  return std::any_of(logits, logits + V, [](float x) { return std::isnan(x); });
}

// Nothing for a row that is invalid or empty.
std::optional<Distribution> distribution(const float* logits, int64_t V) {
  if (has_nan(logits, V)) return std::nullopt;
  const float maximum = std::min(*std::max_element(logits, logits + V), FLT_MAX);
  if (maximum == -INFINITY) return std::nullopt;
  Distribution row;
  for (int64_t v = 0; v < V; ++v) {
    row.d.push_back(std::min(logits[v], FLT_MAX) - maximum);
    row.mass.push_back(static_cast<uint64_t>(std::nearbyint(exp_mass(row.d.back(), unit_falloff()))));
    row.total += row.mass.back();
  }
  return row;
}

// floor(u * total / 2^64): the schoolbook product of 64-bit digits.
Wide scaled(uint64_t u, Wide total) {
  const Wide low = Wide{u} * static_cast<uint64_t>(total), high = Wide{u} * static_cast<uint64_t>(total >> 64);
  return high + (low >> 64);
}

template <class Weight>
int64_t draw(uint64_t u, const std::vector<Weight>& weights) {
  Wide total = 0, running = 0;
  for (Weight w : weights) total += w;
  const Wide target = scaled(u, total);
  for (size_t v = 0; v < weights.size(); ++v) {
    running += weights[v];
    if (running > target) return static_cast<int64_t>(v);
  }
  throw std::logic_error("llmkern._reference: the weights never exceeded the target");
}

// logits [B, K, V], scores [B, K]; returns score, beam, token [B, n].
py::tuple beam_search_step(const Array<float>& logits, const Array<float>& scores, int64_t n) {
  const int64_t B = logits.shape(0), K = logits.shape(1), V = logits.shape(2);
  check_shape("scores", scores, {B, K});
  Array<float> score({B, n});
  Array<int64_t> beam({B, n}), token({B, n});
  for (int64_t b = 0; b < B; ++b) {
    bool valid = true;
    std::vector<std::pair<float, int64_t>> continuations;  // score, k * V + v
    for (int64_t k = 0; k < K; ++k) {
      const float before = scores.at(b, k);
      if (before == -INFINITY) continue;
      if (!(before < INFINITY) || has_nan(logits.data(b, k, 0), V)) valid = false;
      const auto row = distribution(logits.data(b, k, 0), V);
      for (int64_t v = 0; row && v < V; ++v) {
        const float sum = static_cast<float>(static_cast<double>(before) + row->logprob(v));
        if (sum > -INFINITY) continuations.emplace_back(sum, k * V + v);
      }
    }
    if (!valid) continuations.clear();
    const auto first = [](const auto& x, const auto& y) {
      return x.first > y.first || (x.first == y.first && x.second < y.second);
    };
    const int64_t size = std::min(n, static_cast<int64_t>(continuations.size()));
    std::partial_sort(continuations.begin(), continuations.begin() + size, continuations.end(), first);
    for (int64_t i = 0; i < n; ++i) {
      const auto& [sum, index] = i < size ? continuations[static_cast<size_t>(i)] : std::pair(0.0f, int64_t{-1});
      score.mutable_at(b, i) = i < size ? sum : valid ? -INFINITY : NAN;
      beam.mutable_at(b, i) = i < size ? index / V : -1;
      token.mutable_at(b, i) = i < size ? index % V : -1;
    }
  }
  return py::make_tuple(score, beam, token);
}

// mp * Mq - mq * Mp where it is above 0, for every token; p's masses when it nowhere is.
std::vector<Wide> rest(const Distribution& p, const Distribution& q) {
  std::vector<Wide> weights;
  for (size_t v = 0; v < p.mass.size(); ++v) {
    const Wide mine = Wide{p.mass[v]} * q.total, theirs = Wide{q.mass[v]} * p.total;
    weights.push_back(mine > theirs ? mine - theirs : 0);
  }
  const bool is_empty = std::all_of(weights.begin(), weights.end(), [](Wide w) { return w == 0; });
  return is_empty ? std::vector<Wide>(p.mass.begin(), p.mass.end()) : weights;
}

// draft_ids [B, n], draft [B, n, V] or None, target [B, n + 1, V], seeds and positions [B]; returns token [B, n + 1],
// num_accepted [B], logprob [B, n + 1].
py::tuple speculative_verify(const Array<int64_t>& draft_ids, const std::optional<Array<float>>& draft,
                             const Array<float>& target, const Array<int64_t>& seeds, const Array<int64_t>& positions) {
  const int64_t B = draft_ids.shape(0), n = draft_ids.shape(1), V = target.shape(2);
  check_shape("target", target, {B, n + 1, V});
  if (draft) check_shape("draft", *draft, {B, n, V});
  check_shape("seeds", seeds, {B});
  check_shape("positions", positions, {B});
  Array<int64_t> token({B, n + 1}), num_accepted({B});
  Array<float> logprob({B, n + 1});
  std::fill_n(token.mutable_data(), token.size(), -1);
  std::fill_n(logprob.mutable_data(), logprob.size(), 0.0f);
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t i = 0; i <= n; ++i) {
      num_accepted.mutable_at(b) = i;
      const auto random = [&](Purpose purpose) {
        return philox_u64(bits_of(seeds.at(b)), purpose, bits_of(positions.at(b)) + bits_of(i));
      };
      const auto p = distribution(target.data(b, i, 0), V);
      if (!p) break;
      const auto emit = [&](int64_t v) {
        token.mutable_at(b, i) = v;
        logprob.mutable_at(b, i) = static_cast<float>(p->logprob(v));
      };
      if (i == n || draft_ids.at(b, i) == -1) {
        emit(draw(random(Purpose::kDraftReplacement), p->mass));
        break;
      }
      const size_t x = static_cast<size_t>(draft_ids.at(b, i));
      Distribution certain;
      certain.mass.assign(static_cast<size_t>(V), 0);
      certain.mass.at(x) = certain.total = 1;
      const auto q = draft ? distribution(draft->data(b, i, 0), V) : std::optional(certain);
      if (!q) break;
      const Wide tested = scaled(random(Purpose::kDraftTest), Wide{q->mass[x]} * p->total);
      if (tested < Wide{p->mass[x]} * q->total) {
        emit(draft_ids.at(b, i));
        continue;
      }
      emit(draw(random(Purpose::kDraftReplacement), rest(*p, *q)));
      break;
    }
  }
  return py::make_tuple(token, num_accepted, logprob);
}

// Masses of weights by the largest of them, and the bits of that one.
std::vector<uint64_t> weight_masses(const std::vector<double>& weights, int bits) {
  int e;
  std::frexp(*std::max_element(weights.begin(), weights.end()), &e);
  std::vector<uint64_t> masses;
  for (double w : weights) masses.push_back(static_cast<uint64_t>(std::nearbyint(std::ldexp(w, bits - e))));
  return masses;
}

std::vector<uint64_t> logit_masses(const std::vector<double>& logits) {
  const std::vector<float> row(logits.begin(), logits.end());  // they were float32
  return distribution(row.data(), static_cast<int64_t>(row.size())).value().mass;
}

// input [B, V], valid; seeds and positions [B]; returns tokens [B, n].
Array<int64_t> multinomial(const Array<double>& input, int64_t n, bool replacement, bool from_logits,
                           const Array<int64_t>& seeds, const Array<int64_t>& positions) {
  const int64_t B = input.shape(0), V = input.shape(1);
  check_shape("seeds", seeds, {B});
  check_shape("positions", positions, {B});
  const int bits = from_logits ? kMassBits : multinomial_bits(V);
  Array<int64_t> token({B, n});
  for (int64_t b = 0; b < B; ++b) {
    std::vector<double> row(input.data(b, 0), input.data(b, 0) + V);
    const auto masses_of_row = [&] { return from_logits ? logit_masses(row) : weight_masses(row, bits); };
    std::vector<uint64_t> mass = masses_of_row();
    for (int64_t i = 0; i < n; ++i) {
      const int64_t v = draw(multinomial_u64(bits_of(seeds.at(b)), bits_of(positions.at(b)), i), mass);
      token.mutable_at(b, i) = v;
      if (replacement) continue;
      row[static_cast<size_t>(v)] = from_logits ? -INFINITY : 0;
      mass[static_cast<size_t>(v)] = 0;
      uint64_t left = 0;
      for (uint64_t m : mass) left += m;
      if (left < uint64_t{1} << (bits - 8) && i + 1 < n) mass = masses_of_row();
    }
  }
  return token;
}

}  // namespace

void bind_decoding(py::module_& m) {
  using py::arg;
  m.def("beam_search_step", &beam_search_step, arg("logits"), arg("scores"), arg("num_candidates"));
  m.def("speculative_verify", &speculative_verify, arg("draft_ids"), arg("draft_logits"), arg("target_logits"),
        arg("seeds"), arg("positions"));
  m.def("multinomial", &multinomial, arg("input"), arg("num_samples"), arg("replacement"), arg("from_logits"),
        arg("seeds"), arg("positions"));
}

}  // namespace llmkern::reference
