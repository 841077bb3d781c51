// SPDX-License-Identifier: Apache-2.0
// One LSTM layer on the CPU; the contract is kernels/lstm.h.
//
// A team of workers (team.h) stays for the whole sequence. Each owns some panels of hidden units and with them the
// columns of the weights that make these units' gates, so that its share of the weights stays in its own cache. A step
// of a panel is one register tile: a few rows of the batch by the four gates of as many units as a vector has. It ends
// in the gate functions, which write h where the next step reads it: in tiles, one k after the other. Workers meet once
// a step, when h is complete. Backward is the mirror image: the product that makes dh of a panel is followed by the
// gate gradients of the same units.
#include "kernels/lstm.h"

#include "kernels/cpu/lstm_backward.h"
#include "kernels/cpu/lstm_forward.h"
#include "kernels/cpu/lstm_products.h"
#include "kernels/run.h"

namespace llmkern::cpu::LLMKERN_ISA {

namespace {

template <class T>
void execute(const LstmPack<T>& a, const Parallel& parallel) {
  const int64_t size = (a.I + a.P) * kGatesWidth<T>;
  T* panels = a.packed + kLstmPackHeader<T>;
  a.packed[0] = kVectorBytes;
  parallel(panels_of<T>(a.H), (1 << 15) / size + 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) pack_panel(a.weight_ih, a.weight_hh, a.I, a.H, a.P, p, panels + p * size);
  });
}

template <class T>
void execute(const LstmForward<T>& a, const Parallel& parallel) {
  const Schedule schedule(a.steps, a.B, a.lengths, a.reverse);
  copy_or_zero(a.h_n, a.h_0, a.B * a.P);  // of rows without a step
  copy_or_zero(a.c_n, a.c_0, a.B * a.H);
  if (schedule.ragged()) clear(a);
  if (schedule.tokens() == 0) return;
  const bool is_packed = a.packed != nullptr && a.packed[0] == kVectorBytes, projects = a.variant.weight_hr != nullptr;
  const int64_t packed_size = is_packed ? 0 : lstm_packed_elements<T>(a.I, a.H, a.P);
  const int64_t packed_hr_size = projects ? panels_of<T>(a.P) * a.H * kUnits<T> : 0;
  const int64_t pairs = a.variant.norm_gates != nullptr ? 2 * panels_of<T>(a.H) * a.B : 0;
  const int64_t together = Forward<T>::steps_together(a.B, schedule.steps());
  const auto [packed, before, after, packed_hr, unprojected, of_inputs, of_hidden, of_cells] = carve<T>(
      Slot::kKernel,
      {packed_size, a.B * a.P, a.B * a.P, packed_hr_size, projects ? a.B * a.H : 0, together * pairs, pairs, pairs});
  if (!is_packed) execute(LstmPack<T>{a.weight_ih, a.weight_hh, packed, a.I, a.H, a.P}, parallel);
  if (projects) pack_rows(a.variant.weight_hr, a.P, a.H, packed_hr);
  if (schedule.ragged()) {  // tiles are multiplied whole
    copy_or_zero<T>(before, nullptr, a.B * a.P);
    copy_or_zero<T>(after, nullptr, a.B * a.P);
    if (projects) copy_or_zero<T>(unprojected, nullptr, a.B * a.H);
  }
  const T* panels = (is_packed ? a.packed : packed) + kLstmPackHeader<T>;
  const Forward<T> forward = {a,
                              schedule,
                              panels,
                              {before, after},
                              packed_hr,
                              unprojected,
                              {of_inputs, together * a.B},
                              {of_hidden, a.B},
                              {of_cells, a.B}};
  const bool worth_it = schedule.tokens() * a.H * (a.I + a.P) * 8 >= kTeamFlops;
  run_team(parallel, panels_of<T>(a.H), worth_it, [&](const Share& share) { forward.run(share); });
}

// grad_gates of every token, and the gradients of the initial states.
template <class T>
void backward_through_time(const LstmBackward<T>& a, const Schedule& schedule, const BackwardState<T>& state,
                           double* norm_cell, const Parallel& parallel) {
  const bool projects = a.variant.weight_hr != nullptr, norm = a.variant.norm_gates != nullptr;
  const int64_t panels = panels_of<T>(a.H), weights = panels_of<T>(a.P) * 4 * a.H * kUnits<T>;
  const int64_t pairs = norm ? 2 * panels * a.B : 0;
  const auto [packed, packed_hr, before, after, dh, of_cells, of_gates] =
      carve<T>(Slot::kKernel, {weights, projects ? panels * a.P * kUnits<T> : 0, a.B * 4 * a.H, a.B * 4 * a.H,
                               projects ? a.B * a.P : 0, pairs, pairs});
  if (schedule.ragged()) {  // tiles are multiplied whole
    copy_or_zero<T>(before, nullptr, a.B * 4 * a.H);
    copy_or_zero<T>(after, nullptr, a.B * 4 * a.H);
    if (projects) copy_or_zero<T>(dh, nullptr, a.B * a.P);
  }
  const Backward<T> backward = {a,  schedule,        state,           packed,   packed_hr, {before, after},
                                dh, {of_cells, a.B}, {of_gates, a.B}, norm_cell};
  const bool worth_it = schedule.tokens() * a.H * a.P * 8 >= kTeamFlops;
  run_team(parallel, panels, worth_it, [&](const Share& share) { backward.run(share); });
}

template <class T>
void copy_narrowed(T* to, const Buffer<double>& from, int64_t count) {
  for (int64_t j = 0; j < count; ++j) to[j] = static_cast<T>(from[j]);
}

template <class T>
void execute(const LstmBackward<T>& a, const Parallel& parallel) {
  const Schedule schedule(a.steps, a.B, a.lengths, a.reverse);
  const Tokens<T> tokens(a, schedule);
  const bool projects = a.variant.weight_hr != nullptr, norm = a.variant.norm_gates != nullptr;
  const bool recompute = a.gates == nullptr;
  const int64_t N = tokens.count(), width = 4 * a.H;
  copy_or_zero(a.grad_h_0, a.grad_h_n, a.B * a.P);
  copy_or_zero(a.grad_c_0, a.grad_c_n, a.B * a.H);
  const auto [own_gates, grad_hidden, unprojected, grad_projected, normalized, scales] = carve<T>(
      Slot::kGates, {a.grad_gates == nullptr ? N * width : 0, norm ? N * width : 0, projects ? N * a.H : 0,
                     projects ? N * a.P : 0, recompute && norm ? 2 * N * width : 0, recompute && norm ? 4 * N : 0});
  T* grad_gates = a.grad_gates == nullptr ? own_gates : a.grad_gates;
  const BackwardState<T> state = {recompute ? grad_gates : a.gates,
                                  recompute ? normalized : a.normalized,
                                  recompute ? scales : a.scales,
                                  recompute,
                                  grad_gates,
                                  grad_hidden,
                                  unprojected,
                                  grad_projected};
  const Buffer<double> norm_cell(norm ? 2 * a.H : 0);
  for (int64_t j = 0; norm && j < 2 * a.H; ++j) norm_cell[j] = 0;
  if (recompute) Recomputation<T>{a, schedule, grad_gates, normalized, scales}.run(tokens, parallel);
  if (N > 0) backward_through_time(a, schedule, state, norm_cell.data(), parallel);
  if (a.grad_bias != nullptr) sum_rows(N, width, grad_gates, a.grad_bias, false, parallel);
  if (a.grad_norm_gates != nullptr) {
    gain_gradients(a, schedule, state, parallel);
    copy_narrowed(a.grad_norm_cell, norm_cell, 2 * a.H);
  }
  if (norm) normalized_input_gradients(a, schedule, state, parallel);
  input_gradient(a, schedule, grad_gates, parallel);
  if (a.grad_weight_ih != nullptr) {
    weight_gradients(a, tokens, state, grad_gates, norm ? grad_hidden : grad_gates, parallel);
  }
}

}  // namespace

template <class Args>
void run(const Args& args, const Parallel& parallel) {
  execute(args, parallel);
}

template void run(const LstmPack<float>&, const Parallel&);
template void run(const LstmPack<double>&, const Parallel&);
template void run(const LstmForward<float>&, const Parallel&);
template void run(const LstmForward<double>&, const Parallel&);
template void run(const LstmBackward<float>&, const Parallel&);
template void run(const LstmBackward<double>&, const Parallel&);

}  // namespace llmkern::cpu::LLMKERN_ISA
