// SPDX-License-Identifier: Apache-2.0
// Sampling as kernels/sampling.h states it: sorted orders, running sums, 128-bit products.
#include <pybind11/stl.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <map>
#include <numeric>
#include <optional>

#include "kernels/sampling.h"
#include "reference/arrays.h"

namespace llmkern::reference {

namespace {

template <class T>
using OptionalArray = std::optional<Array<T>>;
using Ids = std::vector<int64_t>;

struct Distribution {
  std::vector<float> y, d;
  std::vector<uint64_t> mass, weighted;  // weighted: mass * information in bits, rounded
  Ids order;                             // the tokens that are not -inf, y descending, then id ascending
  Falloff scale;
};

template <class T>
uint64_t sum(const std::vector<T>& values, const Ids& ids) {
  uint64_t total = 0;
  for (int64_t v : ids) total += values[static_cast<size_t>(v)];
  return total;
}

// max(1, ceil(p * mass)), p truncated to a multiple of 2^-62.
uint64_t fraction(double p, uint64_t mass) {
  using Wide = unsigned __int128;
  const Wide product = static_cast<Wide>(std::floor(std::ldexp(p, 62))) * mass;
  return std::max<uint64_t>(1, static_cast<uint64_t>((product + (Wide{1} << 62) - 1) >> 62));
}

struct Adjustments {                // of logits [B, V]
  OptionalArray<float> bias;        // [B, V]
  OptionalArray<int64_t> bias_ids;  // [B, any], and the values that go with them
  OptionalArray<float> bias_values;
  OptionalArray<bool> allowed;                    // [B, V]
  OptionalArray<int64_t> prompt_ids, output_ids;  // [B, any]
};

// Step 1.
std::vector<float> adjusted_logits(const Array<float>& logits, const Adjustments& a, const SampleSettings& s,
                                   int64_t b) {
  const int64_t V = logits.shape(1);
  std::vector<float> y(static_cast<size_t>(V));
  for (int64_t v = 0; v < V; ++v) {
    y[static_cast<size_t>(v)] = a.bias ? logits.at(b, v) + a.bias->at(b, v) : logits.at(b, v);
  }
  for (py::ssize_t i = 0; a.bias_ids && i < a.bias_ids->shape(1); ++i) {
    const int64_t v = a.bias_ids->at(b, i);
    if (v >= 0 && v < V) y[static_cast<size_t>(v)] += a.bias_values->at(b, i);
  }
  for (int64_t v = 0; v < V; ++v) {
    if (a.allowed && !a.allowed->at(b, v)) y[static_cast<size_t>(v)] = -INFINITY;
  }
  std::map<int64_t, int64_t> seen;  // how often in the output
  for (const auto* ids : {&a.prompt_ids, &a.output_ids}) {
    if (!ids->has_value()) continue;
    for (py::ssize_t i = 0; i < (*ids)->shape(1); ++i) {
      const int64_t v = (*ids)->at(b, i);
      if (v >= 0 && v < V) seen[v] += ids == &a.output_ids;
    }
  }
  const float repetition = static_cast<float>(s.repetition_penalty);
  const float presence = static_cast<float>(s.presence_penalty), frequency = static_cast<float>(s.frequency_penalty);
  for (const auto& [v, count] : seen) {
    float& value = y[static_cast<size_t>(v)];
    if (value == -INFINITY) continue;
    value = value > 0 ? value / repetition : value * repetition;
    if (count > 0) value = (value - frequency * static_cast<float>(count)) - presence;
  }
  return y;
}

// The rest of step 1, and step 2; nothing when the row is invalid.
std::optional<Distribution> distribution(const std::vector<float>& y, const SampleSettings& s) {
  Distribution row;
  row.scale = falloff(effective_temperature(s));
  for (float value : y) {
    if (std::isnan(value)) return std::nullopt;
    row.y.push_back(std::min(value, FLT_MAX));
  }
  const float maximum = *std::max_element(row.y.begin(), row.y.end());
  if (maximum == -INFINITY) return std::nullopt;
  for (size_t v = 0; v < row.y.size(); ++v) {
    const float d = (row.y[v] - maximum) + 0.0f, mass = std::nearbyint(exp_mass(d, row.scale));
    row.d.push_back(d);
    row.mass.push_back(static_cast<uint64_t>(mass));
    row.weighted.push_back(round_to_integer(weighted_mass(mass, d, row.scale)));
    if (row.y[v] != -INFINITY) row.order.push_back(static_cast<int64_t>(v));
  }
  const auto above = [&](int64_t a, int64_t b) {
    return row.y[static_cast<size_t>(a)] > row.y[static_cast<size_t>(b)];
  };
  std::stable_sort(row.order.begin(), row.order.end(), above);
  return row;
}

// The shortest prefix of an order with mass >= needed.
Ids prefix(const Ids& order, const std::vector<uint64_t>& mass, uint64_t needed) {
  Ids kept;
  for (uint64_t running = 0; running < needed; running += mass[static_cast<size_t>(kept.back())]) {
    kept.push_back(order.at(kept.size()));
  }
  return kept;
}

// Step 3: the tokens that are kept, in no order that matters.
Ids filter(const Distribution& row, const SampleSettings& s) {
  Ids kept = row.order;
  const double k = s.temperature < kGreedyTemperature ? 1 : s.top_k;
  if (k > 0 && k < static_cast<double>(kept.size())) kept.resize(static_cast<size_t>(k));
  if (s.top_p < 1) kept = prefix(kept, row.mass, fraction(s.top_p, sum(row.mass, kept)));
  if (s.min_p > 0) {
    const uint64_t least = fraction(s.min_p, kFullMass);
    std::erase_if(kept, [&](int64_t v) { return row.mass[static_cast<size_t>(v)] < least; });
  }
  if (s.typical_p < 1) {
    const uint64_t total = sum(row.mass, kept);
    const double mean = static_cast<double>(sum(row.weighted, kept)) / static_cast<double>(total);
    std::vector<float> deviation;
    for (float d : row.d) {
      const double information = -static_cast<double>(d * row.scale.scale);
      deviation.push_back(static_cast<float>(std::fabs(information - mean)));
    }
    std::sort(kept.begin(), kept.end());
    std::stable_sort(kept.begin(), kept.end(), [&](int64_t a, int64_t b) {
      return deviation[static_cast<size_t>(a)] < deviation[static_cast<size_t>(b)];
    });
    kept = prefix(kept, row.mass, fraction(s.typical_p, total));
  }
  return kept;
}

// Step 4.
int64_t draw(const Distribution& row, Ids kept, uint64_t u) {
  std::sort(kept.begin(), kept.end());
  const uint64_t target = static_cast<uint64_t>((static_cast<unsigned __int128>(u) * sum(row.mass, kept)) >> 64);
  uint64_t running = 0;
  for (int64_t v : kept) {
    running += row.mass[static_cast<size_t>(v)];
    if (running > target) return v;
  }
  throw std::logic_error("llmkern._reference: the kept mass never exceeded the target");
}

// logits, bias and allowed [B, V], ids [B, any], settings [B, 8] (SampleSettings), seeds and positions [B].
// Returns a dictionary: token, num_kept, filtered_logprob, logprob, entropy, rank [B], top_ids, top_logprobs
// [B, num_logprobs], processed and kept [B, V].
py::dict sample(const Array<float>& logits, const Array<double>& settings, const Array<int64_t>& seeds,
                const Array<int64_t>& positions, const OptionalArray<float>& bias,
                const OptionalArray<int64_t>& bias_ids, const OptionalArray<float>& bias_values,
                const OptionalArray<bool>& allowed, const OptionalArray<int64_t>& prompt_ids,
                const OptionalArray<int64_t>& output_ids, int64_t num_logprobs) {
  const int64_t B = logits.shape(0), V = logits.shape(1);
  check_shape("settings", settings, {B, kSampleSettings});
  check_shape("seeds", seeds, {B});
  check_shape("positions", positions, {B});
  if (bias) check_shape("bias", *bias, {B, V});
  if (allowed) check_shape("allowed", *allowed, {B, V});
  for (const auto* ids : {&prompt_ids, &output_ids, &bias_ids}) {
    if (ids->has_value()) check_shape("ids", **ids, {B, (*ids)->shape((*ids)->ndim() - 1)});
  }
  if (bias_ids) check_shape("bias_values", bias_values.value(), {B, bias_ids->shape(1)});
  const Adjustments adjustments = {bias, bias_ids, bias_values, allowed, prompt_ids, output_ids};
  Array<int64_t> token({B}), rank({B}), num_kept({B}), top_ids({B, num_logprobs});
  Array<float> logprob({B}), filtered_logprob({B}), entropy({B}), top_logprobs({B, num_logprobs}), processed({B, V});
  Array<bool> kept_mask = zeros<bool>({B, V});
  std::fill(processed.mutable_data(), processed.mutable_data() + processed.size(), -INFINITY);
  for (int64_t b = 0; b < B; ++b) {
    const SampleSettings& s = *reinterpret_cast<const SampleSettings*>(settings.data(b, 0));
    const auto row = distribution(adjusted_logits(logits, adjustments, s, b), s);
    token.mutable_at(b) = -1;
    rank.mutable_at(b) = num_kept.mutable_at(b) = 0;
    logprob.mutable_at(b) = filtered_logprob.mutable_at(b) = entropy.mutable_at(b) = NAN;
    for (int64_t i = 0; i < num_logprobs; ++i) {
      top_ids.mutable_at(b, i) = -1;
      top_logprobs.mutable_at(b, i) = row ? -INFINITY : NAN;
    }
    if (!row) continue;
    const Ids kept = filter(*row, s);
    const uint64_t u =
        philox_u64(static_cast<uint64_t>(seeds.at(b)), Purpose::kSample, static_cast<uint64_t>(positions.at(b)));
    const int64_t v = draw(*row, kept, u);
    const uint64_t total = sum(row->mass, row->order);
    const double temperature = effective_temperature(s), log_total = log_mass(total);
    const auto scaled = [&](int64_t id) { return row->d[static_cast<size_t>(id)] / temperature; };
    token.mutable_at(b) = v;
    logprob.mutable_at(b) = static_cast<float>(scaled(v) - log_total);
    filtered_logprob.mutable_at(b) = static_cast<float>(scaled(v) - log_mass(sum(row->mass, kept)));
    rank.mutable_at(b) = std::find(row->order.begin(), row->order.end(), v) - row->order.begin();
    num_kept.mutable_at(b) = static_cast<int64_t>(kept.size());
    const double bits = static_cast<double>(sum(row->weighted, row->order)) / static_cast<double>(total);
    entropy.mutable_at(b) = static_cast<float>(log_total + kLn2 * bits);
    for (int64_t id : kept) {
      kept_mask.mutable_at(b, id) = true;
      processed.mutable_at(b, id) = static_cast<float>(row->y[static_cast<size_t>(id)] / temperature);
    }
    for (size_t i = 0; i < std::min(row->order.size(), static_cast<size_t>(num_logprobs)); ++i) {
      const int64_t id = row->order[i];
      top_ids.mutable_at(b, i) = id;
      top_logprobs.mutable_at(b, i) = static_cast<float>(scaled(id) - log_total);
    }
  }
  using py::arg;
  return py::dict(arg("token") = token, arg("num_kept") = num_kept, arg("filtered_logprob") = filtered_logprob,
                  arg("logprob") = logprob, arg("entropy") = entropy, arg("rank") = rank, arg("top_ids") = top_ids,
                  arg("top_logprobs") = top_logprobs, arg("processed") = processed, arg("kept") = kept_mask);
}

// The primitives, elementwise, so that they can be tested by themselves.
Array<uint64_t> exp_mass_of(const Array<float>& d, double temperature) {
  Array<uint64_t> out(std::vector<py::ssize_t>{d.size()});
  const Falloff scale = falloff(temperature);
  for (py::ssize_t i = 0; i < d.size(); ++i) out.mutable_at(i) = round_to_integer(exp_mass(d.data()[i], scale));
  return out;
}

Array<double> log_mass_of(const Array<uint64_t>& mass) {
  Array<double> out(std::vector<py::ssize_t>{mass.size()});
  for (py::ssize_t i = 0; i < mass.size(); ++i) out.mutable_at(i) = log_mass(mass.data()[i]);
  return out;
}

py::tuple philox_of(uint64_t key, const std::vector<uint32_t>& counter) {
  const Philox out = philox(key, Philox{{counter.at(0), counter.at(1), counter.at(2), counter.at(3)}});
  return py::make_tuple(out.words[0], out.words[1], out.words[2], out.words[3]);
}

}  // namespace

void bind_sampling(py::module_& m) {
  using py::arg;
  m.def("sample", &sample, arg("logits"), arg("settings"), arg("seeds"), arg("positions"), arg("bias") = py::none(),
        arg("bias_ids") = py::none(), arg("bias_values") = py::none(), arg("allowed") = py::none(),
        arg("prompt_ids") = py::none(), arg("output_ids") = py::none(), arg("num_logprobs") = 0);
  m.def("exp_mass", &exp_mass_of, arg("d"), arg("temperature") = 1.0);
  m.def("log_mass", &log_mass_of, arg("mass"));
  m.def("philox", &philox_of, arg("key"), arg("counter"));
}

}  // namespace llmkern::reference
