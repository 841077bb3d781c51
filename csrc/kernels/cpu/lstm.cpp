// SPDX-License-Identifier: Apache-2.0
// One LSTM layer on the CPU; the contract is kernels/lstm.h.
//
// Where the batch has rows enough, each thread runs some of them over the whole sequence by itself. Else a team of
// workers (team.h) stays for the whole sequence. Each owns some panels of hidden units and with them the columns of the
// weights that make these units' gates, so that its share of the weights stays in its own cache; they meet once a step,
// when h is complete.
//
// A step of a panel is one register tile: a few rows of the batch by the four gates of as many units as a vector has.
// It ends in the gate functions, which write h where the next step reads it: in tiles, one k after the other. Backward
// is the mirror image: the product that makes dh of a panel is followed by the gate gradients of the same units.
#include "kernels/lstm.h"

#include "kernels/cpu/lstm/backward.h"
#include "kernels/cpu/lstm/byte_gates.h"
#include "kernels/cpu/lstm/forward.h"
#include "kernels/cpu/lstm/products.h"
#include "kernels/run.h"

namespace llmkern::cpu::LLMKERN_ISA {

namespace {

template <class T, class F>
void with_operand([[maybe_unused]] bool quantised, [[maybe_unused]] int64_t I, [[maybe_unused]] int64_t P, const F& f) {
#ifdef __AVX512F__
  if constexpr (std::is_same_v<T, float>) {
    if (quantised && has_vnni() && I <= Bytes::kMostTerms && P <= Bytes::kMostTerms) return f(Bytes{});
  }
#endif
  with_operand<T>(f);
}

template <class Op>
LstmPackHeader header_of(bool quantised, int64_t I, int64_t H, int64_t P) {
  return {kLstmPackMagic, kVectorBytes, Op::kTerms, sizeof(Sum<Op>), quantised, I, H, P};
}

template <class Op>
bool is_packed(const void* packed, bool quantised, int64_t I, int64_t H, int64_t P) {
  const LstmPackHeader expected = header_of<Op>(quantised, I, H, P);
  return packed != nullptr && memcmp(packed, &expected, sizeof expected) == 0;
}

template <class Op>
int64_t packed_bytes(int64_t I, int64_t H, int64_t P) {
  const int64_t bytes = LayerWeights<Op>::size(I, H, P) * static_cast<int64_t>(sizeof(Word<Op>));
  return static_cast<int64_t>(sizeof(LstmPackHeader)) + round_up(bytes, 64);
}

template <class Op, class T>
void pack(const LstmPack<T>& a, const Parallel& parallel) {
  using S = Sum<Op>;
  const LstmPackHeader header = header_of<Op>(a.quantised, a.I, a.H, a.P);
  memcpy(a.packed, &header, sizeof header);
  const LayerWeights<Op> from = {nullptr, a.weight_ih, a.weight_hh, a.I, a.H, a.P};
  Word<Op>* inputs = reinterpret_cast<Word<Op>*>(static_cast<char*>(a.packed) + sizeof header);
  Word<Op>* hidden = inputs + panels_of<S>(a.H) * Gates<Op>::panel_words(a.I);
  const int64_t grain = (1 << 15) / ((a.I + a.P) * kGatesWidth<S>)+1;
  parallel(panels_of<S>(a.H), grain, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t units = units_of<S>(p, a.H);
      Gates<Op>::pack(from.input(p), a.I, units, a.quantised, inputs + p * Gates<Op>::panel_words(a.I));
      Gates<Op>::pack(from.hidden(p), a.P, units, a.quantised, hidden + p * Gates<Op>::panel_words(a.P));
    }
  });
}

// A layer's weights for a pass over so many steps: as they have been packed, or packed here, or, for a few steps, where
// they lie: a copy costs as much as reading them a few times. `own` holds the copy.
template <class Op, class T = typename Op::Storage>
LayerWeights<Op> weights_for(const LstmForward<T>& a, const Parallel& parallel, Scratch<char>* own) {
  constexpr int64_t kStepsInPlace = 2;
  const auto words_in = [](const void* packed) {
    return reinterpret_cast<const Word<Op>*>(static_cast<const char*>(packed) + sizeof(LstmPackHeader));
  };
  if (is_packed<Op>(a.packed, a.quantised, a.I, a.H, a.P)) {
    return {words_in(a.packed), nullptr, nullptr, a.I, a.H, a.P};
  }
  if (a.steps <= kStepsInPlace && !a.quantised) return {nullptr, a.weight_ih, a.weight_hh, a.I, a.H, a.P};
  *own = scratch<char>(Slot::kLstmForwardWeights, packed_bytes<Op>(a.I, a.H, a.P));
  pack<Op>(LstmPack<T>{a.weight_ih, a.weight_hh, a.quantised, own->get(), a.I, a.H, a.P}, parallel);
  return {words_in(own->get()), nullptr, nullptr, a.I, a.H, a.P};
}

template <class Op>
void clear_tiles(Word<Op>* tiles, int64_t rows, int64_t K) {
  copy_or_zero<Word<Op>>(tiles, nullptr, rows * words_of<Op>(K));
}

// The threads for that many multiplications and additions.
Parallel threads_for(int64_t operations, const Parallel& parallel) {
  return operations < kTeamFlops ? Parallel::alone() : parallel;
}

// Calls f(schedule, threads) for parts of the rows, each on a thread of its own, where all get enough of them to read
// the weights by themselves; else for the whole batch. Rows know nothing of each other: parts neither wait nor fetch
// from another core what that has just written.
template <class F>
void run_rows(const Schedule& whole, const int64_t* lengths, bool reverse, bool apart, const Parallel& threads,
              const F& f) {
  constexpr int64_t kRowsOfAPart = 8;
  const int64_t parts = threads.threads();
  if (!apart || parts <= 1 || whole.rows() < kRowsOfAPart * parts) return f(whole, threads);
  threads(parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      f(Schedule(whole.steps(), whole.rows(), lengths, reverse, part, parts), Parallel::alone());
    }
  });
}

// The steps of some rows, `cell` [B, H] being the running c.
template <class Op, class T = typename Op::Storage>
void run_forward(const LstmForward<T>& a, const LayerWeights<Op>& weights, Sum<Op>* cell, const Schedule& schedule,
                 const Parallel& threads) {
  using S = Sum<Op>;
  using Projection = typename Op::Projection;
  const bool projects = a.variant.weight_hr != nullptr;
  const int64_t rows = schedule.rows(), handed = rows * round_up(a.P, Op::kTerms);
  const auto [before, after] = carve<typename Op::Handed>(Slot::kLstmHidden, {handed, handed});
  const auto [packed_hr, unprojected] = carve<Word<Projection>>(
      Slot::kLstmProjection, {projects ? panels_of<S>(a.P) * words_of<Projection>(a.H) * kUnits<S> : 0,
                              projects ? rows * words_of<Projection>(a.H) : 0});
  const int64_t pairs = a.variant.norm_gates != nullptr ? 2 * panels_of<S>(a.H) * rows : 0;
  const int64_t together = Forward<Op>::steps_together(rows, schedule.steps());
  const auto [of_inputs, of_hidden, of_cells] = carve<S>(Slot::kLstmMoments, {together * pairs, pairs, pairs});
  if (projects) pack_rows<Projection>(a.variant.weight_hr, a.P, a.H, packed_hr);
  if (schedule.ragged()) {  // tiles are multiplied whole
    copy_or_zero<typename Op::Handed>(before, nullptr, handed);
    copy_or_zero<typename Op::Handed>(after, nullptr, handed);
    if (projects) clear_tiles<Projection>(unprojected, rows, a.H);
  }
  const Forward<Op> layer = {a,
                             schedule,
                             weights,
                             {before, after},
                             packed_hr,
                             unprojected,
                             cell,
                             {of_inputs, together * rows},
                             {of_hidden, rows},
                             {of_cells, rows}};
  run_team(threads, panels_of<S>(a.H), [&](const Share& share) { layer.run(share); });
}

template <class Op, class T = typename Op::Storage>
void forward(const LstmForward<T>& a, const Schedule& schedule, const Parallel& parallel) {
  Scratch<char> own;
  const LayerWeights<Op> weights = weights_for<Op>(a, parallel, &own);
  const Running<T> cell(Slot::kLstmCell, a.c_n, a.c_0, a.B * a.H);
  const Parallel threads = threads_for(schedule.tokens() * a.H * (a.I + a.P) * 8, parallel);
  // With layer norm a thread walks along rows, from panel to panel: its own ones alone stay in its cache. Weights where
  // they lie are transposed by one thread each.
  const bool apart = a.variant.norm_gates == nullptr && weights.words != nullptr;
  run_rows(schedule, a.lengths, a.reverse, apart, threads,
           [&](const Schedule& rows, const Parallel& team) { run_forward<Op>(a, weights, cell.values(), rows, team); });
  cell.finish();
}

template <class T>
void execute(const LstmPackedLayout<T>& a, const Parallel&) {
  with_operand<T>(a.quantised, a.I, a.P, [&](auto op) {
    *a.header = header_of<decltype(op)>(a.quantised, a.I, a.H, a.P);
    *a.bytes = packed_bytes<decltype(op)>(a.I, a.H, a.P);
  });
}

template <class T>
void execute(const LstmPack<T>& a, const Parallel& parallel) {
  with_operand<T>(a.quantised, a.I, a.P, [&](auto op) { pack<decltype(op)>(a, parallel); });
}

template <class T>
void execute(const LstmForward<T>& a, const Parallel& parallel) {
  const Schedule schedule(a.steps, a.B, a.lengths, a.reverse);
  copy_or_zero(a.h_n, a.h_0, a.B * a.P);  // of rows without a step
  copy_or_zero(a.c_n, a.c_0, a.B * a.H);
  if (schedule.ragged()) clear(a);
  if (schedule.tokens() == 0) return;
  with_operand<T>(a.quantised, a.I, a.P, [&](auto op) { forward<decltype(op)>(a, schedule, parallel); });
}

template <class T>
void execute(const LstmWeightGradients<T>& a, const Parallel& parallel) {
  with_operand<T>([&](auto op) { stacked_products<decltype(op)>(a, parallel); });
}

// The steps of some rows, backwards; grad_h [B, P] and grad_c [B, H] are the running dh and dc.
template <class Op, class T = typename Op::Storage>
void run_backward(const LstmBackward<T>& a, const BackwardState<T>& state, Sum<Op>* grad_h, Sum<Op>* grad_c,
                  double* norm_cell, const Schedule& schedule, const Parallel& threads) {
  using S = Sum<Op>;
  const int64_t rows = schedule.rows();
  const bool projects = a.variant.weight_hr != nullptr, norm = a.variant.norm_gates != nullptr;
  const int64_t panels = panels_of<S>(a.H), gates = rows * 4 * words_of<Op>(a.H), pairs = norm ? 2 * panels * rows : 0;
  // A single step multiplies by the weights once: where they lie.
  const int64_t weights = a.steps > 1 ? panels_of<S>(a.P) * backward_panel_words<Op>(a.H) : 0;
  const auto [recurrent, packed_hr, before, after, dh] =
      carve<Word<Op>>(Slot::kLstmBackwardWeights, {weights, projects ? panels * words_of<Op>(a.P) * kUnits<S> : 0,
                                                   gates, gates, projects ? rows * words_of<Op>(a.P) : 0});
  const auto [of_cells, of_gates] = carve<S>(Slot::kLstmBackwardMoments, {pairs, pairs});
  if (schedule.ragged()) {  // tiles are multiplied whole
    copy_or_zero<Word<Op>>(before, nullptr, gates);
    copy_or_zero<Word<Op>>(after, nullptr, gates);
    if (projects) clear_tiles<Op>(dh, rows, a.P);
  }
  const Backward<Op> backward = {a,
                                 schedule,
                                 state,
                                 weights > 0 ? recurrent : nullptr,
                                 packed_hr,
                                 {before, after},
                                 dh,
                                 grad_h,
                                 grad_c,
                                 {of_cells, rows},
                                 {of_gates, rows},
                                 norm_cell};
  run_team(threads, panels, [&](const Share& share) { backward.run(share); });
}

// grad_gates of every token, and the gradients of the initial states.
template <class Op, class T = typename Op::Storage>
void backward_through_time(const LstmBackward<T>& a, const Schedule& schedule, const BackwardState<T>& state,
                           double* norm_cell, const Parallel& parallel) {
  const Running<T> grad_h(Slot::kLstmGradHidden, a.grad_h_0, a.grad_h_n, a.B * a.P);
  const Running<T> grad_c(Slot::kLstmGradCell, a.grad_c_0, a.grad_c_n, a.B * a.H);
  const Parallel threads = threads_for(schedule.tokens() * a.H * a.P * 8, parallel);
  // The gradients of the gains of layer norm are sums over all rows of a step, in one order.
  const bool apart = a.variant.norm_gates == nullptr && a.steps > 1;
  run_rows(schedule, a.lengths, a.reverse, apart, threads, [&](const Schedule& rows, const Parallel& team) {
    run_backward<Op>(a, state, grad_h.values(), grad_c.values(), norm_cell, rows, team);
  });
  grad_h.finish();
  grad_c.finish();
}

template <class T>
void copy_narrowed(T* to, const Buffer<double>& from, int64_t count) {
  for (int64_t j = 0; j < count; ++j) to[j] = narrow<T>(static_cast<Widened<T>>(from[j]));
}

template <class Op, class T = typename Op::Storage>
void backward(const LstmBackward<T>& a, const Schedule& schedule, const Parallel& parallel) {
  using S = Sum<Op>;
  const Tokens<T> tokens(a, schedule);
  const bool projects = a.variant.weight_hr != nullptr, norm = a.variant.norm_gates != nullptr;
  const bool recompute = a.gates == nullptr;
  const int64_t N = tokens.count(), width = 4 * a.H;
  const auto [own_gates, grad_hidden, unprojected, grad_projected, normalized] =
      carve<T>(Slot::kLstmGates, {a.grad_gates == nullptr ? N * width : 0, norm ? N * width : 0, projects ? N * a.H : 0,
                                  projects ? N * a.P : 0, recompute && norm ? 2 * N * width : 0});
  const auto own_scales = scratch<S>(Slot::kLstmScales, recompute && norm ? 4 * N : 0);
  S* scales = own_scales;
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
  if (recompute) Recomputation<Op>{a, schedule, grad_gates, normalized, scales}.run(tokens, parallel);
  if (N > 0) backward_through_time<Op>(a, schedule, state, norm_cell.data(), parallel);
  if (a.grad_bias != nullptr) sum_rows(N, width, grad_gates, a.grad_bias, false, parallel);
  if (a.grad_norm_gates != nullptr) {
    gain_gradients(a, schedule, state, parallel);
    copy_narrowed(a.grad_norm_cell, norm_cell, 2 * a.H);
  }
  if (norm) normalized_input_gradients(a, schedule, state, parallel);
  if (a.grad_input != nullptr) input_gradient<Op>(a, schedule, grad_gates, parallel);
  if (a.grad_weight_hh != nullptr) {
    weight_gradients<Op>(a, tokens, state, grad_gates, norm ? grad_hidden : grad_gates, parallel);
  }
}

template <class T>
void execute(const LstmBackward<T>& a, const Parallel& parallel) {
  const Schedule schedule(a.steps, a.B, a.lengths, a.reverse);
  copy_or_zero(a.grad_h_0, a.grad_h_n, a.B * a.P);  // where no step runs
  copy_or_zero(a.grad_c_0, a.grad_c_n, a.B * a.H);
  with_operand<T>([&](auto op) { backward<decltype(op)>(a, schedule, parallel); });
}

}  // namespace

template <class Args>
void run(const Args& args, const Parallel& parallel) {
  execute(args, parallel);
}

template void run(const LstmPackedLayout<float>&, const Parallel&);
template void run(const LstmPackedLayout<double>&, const Parallel&);
template void run(const LstmPackedLayout<bfloat16>&, const Parallel&);
template void run(const LstmPackedLayout<float16>&, const Parallel&);
template void run(const LstmPack<float>&, const Parallel&);
template void run(const LstmPack<double>&, const Parallel&);
template void run(const LstmPack<bfloat16>&, const Parallel&);
template void run(const LstmPack<float16>&, const Parallel&);
template void run(const LstmWeightGradients<float>&, const Parallel&);
template void run(const LstmWeightGradients<double>&, const Parallel&);
template void run(const LstmWeightGradients<bfloat16>&, const Parallel&);
template void run(const LstmWeightGradients<float16>&, const Parallel&);
template void run(const LstmForward<float>&, const Parallel&);
template void run(const LstmForward<double>&, const Parallel&);
template void run(const LstmForward<bfloat16>&, const Parallel&);
template void run(const LstmForward<float16>&, const Parallel&);
template void run(const LstmBackward<float>&, const Parallel&);
template void run(const LstmBackward<double>&, const Parallel&);
template void run(const LstmBackward<bfloat16>&, const Parallel&);
template void run(const LstmBackward<float16>&, const Parallel&);

}  // namespace llmkern::cpu::LLMKERN_ISA
