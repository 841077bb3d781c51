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

#include "kernels/cpu/bytes.h"
#include "kernels/cpu/lstm_backward.h"
#include "kernels/cpu/lstm_forward.h"
#include "kernels/run.h"

namespace llmkern::cpu::LLMKERN_ISA {

namespace {

// Calls f with what multiplies T here.
template <class T, class F>
void with_operand(const F& f) {
#ifdef __AVX512F__
  if constexpr (std::is_same_v<T, bfloat16>) {
    if (has_bf16()) return f(Pairs{});
  }
#endif
  f(Wide<T>{});
}

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
int64_t packed_bytes(int64_t I, int64_t H, int64_t P) {
  return static_cast<int64_t>(sizeof(LstmPackHeader)) +
         round_up(PackedWeights<Op>::size(I, H, P) * static_cast<int64_t>(sizeof(Word<Op>)), 64);
}

template <class Op>
PackedWeights<Op> weights_in(const void* packed, int64_t I, int64_t H, int64_t P) {
  return {reinterpret_cast<const Word<Op>*>(static_cast<const char*>(packed) + sizeof(LstmPackHeader)), I, H, P};
}

template <class Op, class T>
void pack(const LstmPack<T>& a, const Parallel& parallel) {
  const LstmPackHeader header = header_of<Op>(a.quantised, a.I, a.H, a.P);
  memcpy(a.packed, &header, sizeof header);
  const PackedWeights<Op> weights = weights_in<Op>(a.packed, a.I, a.H, a.P);
  const int64_t grain = (1 << 15) / ((a.I + a.P) * kGatesWidth<Op>)+1;
  parallel(panels_of<Op>(a.H), grain, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      Gates<Op>::pack(a.weight_ih, a.I, a.H, p * kUnits<Op>, a.quantised, const_cast<Word<Op>*>(weights.input(p)));
      Gates<Op>::pack(a.weight_hh, a.P, a.H, p * kUnits<Op>, a.quantised, const_cast<Word<Op>*>(weights.hidden(p)));
    }
  });
}

template <class Op, class T>
void forward(const LstmForward<T>& a, const Schedule& schedule, const Parallel& parallel) {
  const Running<T> cell(Slot::kCell, a.c_n, a.c_0, a.B * a.H);
  if (schedule.tokens() > 0) {
    const LstmPackHeader expected = header_of<Op>(a.quantised, a.I, a.H, a.P);
    const void* packed = a.packed;
    if (packed == nullptr || memcmp(packed, &expected, sizeof expected) != 0) {
      void* own = scratch<char>(Slot::kKernel, packed_bytes<Op>(a.I, a.H, a.P));
      pack<Op>(LstmPack<T>{a.weight_ih, a.weight_hh, a.quantised, own, a.I, a.H, a.P}, parallel);
      packed = own;
    }
    using Shared = typename Op::Shared;
    const int64_t elements = round_up(a.B * round_up(a.H, Op::kTerms), kLanes<float>);
    Shared* hidden = scratch<Shared>(Slot::kHidden, 2 * elements);
    if (schedule.ragged()) copy_or_zero<Shared>(hidden, nullptr, 2 * elements);  // tiles are multiplied whole
    const Forward<Op> layer = {
        a, schedule, weights_in<Op>(packed, a.I, a.H, a.P), {hidden, hidden + elements}, cell.values()};
    const bool worth_it = schedule.tokens() * a.H * (a.I + a.H) * 8 >= kTeamFlops;
    run_team(parallel, panels_of<Op>(a.H), worth_it, [&](const Share& share) { layer.run(share); });
  }
  cell.finish();
}

template <class T>
void execute(const LstmPackedBytes<T>& a, const Parallel&) {
  with_operand<T>(a.quantised, a.I, a.P, [&](auto op) { *a.bytes = packed_bytes<decltype(op)>(a.I, a.H, a.P); });
}

template <class T>
void execute(const LstmPack<T>& a, const Parallel& parallel) {
  with_operand<T>(a.quantised, a.I, a.P, [&](auto op) { pack<decltype(op)>(a, parallel); });
}

template <class T>
void execute(const LstmForward<T>& a, const Parallel& parallel) {
  const Schedule schedule(a.steps, a.B, a.lengths, a.reverse);
  copy_or_zero(a.h_n, a.h_0, a.B * a.H);  // of rows without a step
  if (schedule.ragged()) clear(a);
  with_operand<T>(a.quantised, a.I, a.P, [&](auto op) { forward<decltype(op)>(a, schedule, parallel); });
}

template <class T>
void execute(const LstmBackward<T>& given, const Parallel& parallel) {
  LstmBackward<T> a = given;
  if (a.grad_gates == nullptr) a.grad_gates = scratch<T>(Slot::kGates, a.steps * a.B * 4 * a.H);
  const Schedule schedule(a.steps, a.B, a.lengths, a.reverse);
  with_operand<T>([&](auto op) {
    backward_through_time<decltype(op)>(a, schedule, parallel);
    input_product<decltype(op)>(a, schedule, parallel);
    if (a.grad_weight_ih != nullptr) weight_products<decltype(op)>(a, schedule, parallel);
  });
  if (a.grad_bias != nullptr) sum_rows(schedule.tokens(), 4 * a.H, a.grad_gates, a.grad_bias, false, parallel);
}

}  // namespace

template <class Args>
void run(const Args& args, const Parallel& parallel) {
  execute(args, parallel);
}

template void run(const LstmPackedBytes<float>&, const Parallel&);
template void run(const LstmPackedBytes<double>&, const Parallel&);
template void run(const LstmPackedBytes<bfloat16>&, const Parallel&);
template void run(const LstmPackedBytes<float16>&, const Parallel&);
template void run(const LstmPack<float>&, const Parallel&);
template void run(const LstmPack<double>&, const Parallel&);
template void run(const LstmPack<bfloat16>&, const Parallel&);
template void run(const LstmPack<float16>&, const Parallel&);
template void run(const LstmForward<float>&, const Parallel&);
template void run(const LstmForward<double>&, const Parallel&);
template void run(const LstmForward<bfloat16>&, const Parallel&);
template void run(const LstmForward<float16>&, const Parallel&);
template void run(const LstmBackward<float>&, const Parallel&);
template void run(const LstmBackward<double>&, const Parallel&);
template void run(const LstmBackward<bfloat16>&, const Parallel&);
template void run(const LstmBackward<float16>&, const Parallel&);

}  // namespace llmkern::cpu::LLMKERN_ISA
