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
  copy_or_zero(a.h_n, a.h_0, a.B * a.H);  // of rows without a step
  copy_or_zero(a.c_n, a.c_0, a.B * a.H);
  if (schedule.ragged()) clear(a);
  if (schedule.tokens() == 0) return;
  const bool is_packed = a.packed != nullptr && a.packed[0] == kVectorBytes;
  const int64_t packed_elements = is_packed ? 0 : lstm_packed_elements<T>(a.I, a.H, a.P);
  const int64_t tiles = round_up(a.B * a.H, kLanes<T>);
  T* memory = scratch<T>(Slot::kKernel, packed_elements + 2 * tiles);
  if (!is_packed) execute(LstmPack<T>{a.weight_ih, a.weight_hh, memory, a.I, a.H, a.P}, parallel);
  T* hidden = memory + packed_elements;
  if (schedule.ragged()) copy_or_zero<T>(hidden, nullptr, 2 * tiles);  // tiles are multiplied whole
  const T* panels = (is_packed ? a.packed : memory) + kLstmPackHeader<T>;
  const Forward<T> forward = {a, schedule, panels, {hidden, hidden + tiles}};
  const bool worth_it = schedule.tokens() * a.H * (a.I + a.H) * 8 >= kTeamFlops;
  run_team(parallel, panels_of<T>(a.H), worth_it, [&](const Share& share) { forward.run(share); });
}

template <class T>
void execute(const LstmPackBackward<T>& a, const Parallel& parallel) {
  const int64_t size = 4 * a.H * kUnits<T>, recurrent = panels_of<T>(a.P), grain = (1 << 15) / (size + 1) + 1;
  T* panels = a.packed + kLstmPackHeader<T>;
  a.packed[0] = kVectorBytes;
  parallel(recurrent + panels_of<T>(a.I), grain, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      if (p < recurrent) {
        pack_column_panel(a.weight_hh, 4 * a.H, a.P, p, panels + p * size);
      } else {
        pack_column_panel(a.weight_ih, 4 * a.H, a.I, p - recurrent, panels + p * size);
      }
    }
  });
}

template <class T>
void execute(const LstmWeightGradients<T>& a, const Parallel& parallel) {
  stacked_products(a, parallel);
}

template <class T>
void execute(const LstmBackward<T>& given, const Parallel& parallel) {
  LstmBackward<T> a = given;
  if (a.grad_gates == nullptr) a.grad_gates = scratch<T>(Slot::kGates, a.steps * a.B * 4 * a.H);
  const Schedule schedule(a.steps, a.B, a.lengths, a.reverse);
  backward_through_time(a, schedule, parallel);
  if (schedule.ragged()) {
    ragged_products(a, schedule, parallel);
  } else {
    whole_products(a, schedule, parallel);
  }
  if (a.grad_bias != nullptr) sum_rows(schedule.tokens(), 4 * a.H, a.grad_gates, a.grad_bias, false, parallel);
}

}  // namespace

template <class Args>
void run(const Args& args, const Parallel& parallel) {
  execute(args, parallel);
}

template void run(const LstmPack<float>&, const Parallel&);
template void run(const LstmPack<double>&, const Parallel&);
template void run(const LstmPackBackward<float>&, const Parallel&);
template void run(const LstmPackBackward<double>&, const Parallel&);
template void run(const LstmWeightGradients<float>&, const Parallel&);
template void run(const LstmWeightGradients<double>&, const Parallel&);
template void run(const LstmForward<float>&, const Parallel&);
template void run(const LstmForward<double>&, const Parallel&);
template void run(const LstmBackward<float>&, const Parallel&);
template void run(const LstmBackward<double>&, const Parallel&);

}  // namespace llmkern::cpu::LLMKERN_ISA
