// SPDX-License-Identifier: Apache-2.0
// One LSTM layer in one direction (Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000).
//
// With h_{-1} = h_0, c_{-1} = c_0, and t running over the steps (backwards when `reverse` is set):
//
//   a_t = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh         [B, 4H], the gates in torch's order i, f, g, o
//   i, f, o = sigmoid(a_t)   g = tanh(a_t)
//   c_t = f * c_{t-1} + i * g
//   h_t = o * tanh(c_t)
//
// A row whose length is given runs over its first lengths[b] steps alone (backwards from step lengths[b] - 1 when
// `reverse` is set): output and cells are 0 beyond them, h_n and c_n are the states after its last step.
//
// input [T, B, I], output and cells [T, B, H], gates [T, B, 4H], weight_ih [4H, I], weight_hh [4H, H], biases [4H],
// states [B, H]; row-major, contiguous. output[t] and cells[t] belong to input[t] in both directions.
//
// Saved for the backward pass: output, cells and the activated gates. Without the gates it computes them again.
//
// Variants (LstmVariant), each on its own or with the others:
//
//   projection (Sak et al. 2014)       h_t = W_hr (o * tanh(c_t))        h, h_0, output: P instead of H columns
//   layer norm (Ba et al. 2016, as in  a_t = LN(W_ih x_t) * u_ih + b_ih + LN(W_hh h_{t-1}) * u_hh + b_hh
//     Haste)                           h_t = o * tanh(LN(c_t) * u_c + v_c)
//   zoneout (Krueger et al. 2017)      c'_t = z_c ? c'_{t-1} : c_t       h'_t = z_h ? h'_{t-1} : h_t
//   reset                              h_{t-1} and c_{t-1} of a row are 0 for a step t at which its reset[t, b] is set
//
// with LN(v) = (v - mean v) / sqrt(variance v + 1e-5) over the 4H or H elements of a row. Under zoneout the primed
// values are what is output, saved and carried on; h_t is made from the new c_t; z are masks of mask.h, purposes
// kZoneoutCell and kZoneoutHidden, rows t * B + b. Without a seed their expectation takes the place of a draw:
// c'_t = p c'_{t-1} + (1 - p) c_t.
//
// Backward, with dh_t the gradient of h_t from above and from the next step:
//
//   do = dh * tanh(c)           dc = dc_next + dh * o * (1 - tanh(c)^2)
//   di = dc * g                 df = dc * c_{t-1}           dg = dc * i        dc_{t-1} = dc * f
//   da = [di * i(1-i), df * f(1-f), dg * (1-g^2), do * o(1-o)]                 dh_{t-1} = da W_hh
//
// and, over all steps at once: dW_ih = da^T x, dW_hh = da^T h_{t-1}, dx = da W_ih, db = sum of da.
//
// Where T has 16 bits, sums, gates before activation and cells are float32 (Widened<T>), and h is rounded once a step.
//
// On CUDA the products over all steps are the framework's; LstmRecurrence and its gradient are what is left.
#pragma once

#include <cstdint>

#include "kernels/half.h"

namespace llmkern {

// Null or 0: not this variant.
template <class T>
struct LstmVariant {
  const T* weight_hr;   // [P, H]
  const T* norm_gates;  // [2, 4H]: u_ih, u_hh
  const T* norm_cell;   // [2, H]: u_c, v_c
  const bool* reset;    // [steps, B]
  double zoneout_h, zoneout_c;
  const int64_t* seed;  // null: the expectation
};

template <class T>
struct LstmForward {
  const T *input, *h_0, *c_0;
  const T *weight_ih, *weight_hh;
  const T *bias_ih, *bias_hh;  // both, or both null
  LstmVariant<T> variant;
  const int64_t* lengths;  // [B], each in [0, steps], or null
  const void* packed;      // what LstmPack has made of the weights, which take their place, or null
  bool quantised;  // `packed` has 8 bits a weight; where it is for another instruction set, the weights get them here
  T* output;
  Widened<T>* cells;  // these null where nobody needs them
  T* gates;
  T* normalized;       // with layer norm and gates: LN(W_ih x_t), LN(W_hh h_{t-1}), [2, steps, B, 4H]
  Widened<T>* scales;  // [steps, B, 4]: 1 / deviation of these two; mean and 1 / deviation of c_t
  T *h_n, *c_n;
  int64_t steps, B, I, H, P;  // P = H without projection
  bool reverse;
};

// A copy of the weights in the order in which the kernels of the instruction set in use read them, behind a header that
// says which order that is: others do not take it for their own. Nothing else makes one that outlives a call, because
// nobody could know whether the weights are still the same.
//
// Quantised (float alone), a row of a weight is scale * q with integers |q| <= 127 and scale = max |w| / 127. Where
// there is an instruction for it q is multiplied by 16-bit activations; elsewhere the rounded weights are kept in 32
// bits.
template <class T>
struct LstmPack {
  const T *weight_ih, *weight_hh;
  bool quantised;
  void* packed;  // as many bytes as LstmPackedLayout says, aligned to 64
  int64_t I, H, P;
};

struct LstmPackHeader {
  int64_t magic, vector_bytes, terms, sum_bytes, quantised, I, H, P;
};
constexpr int64_t kLstmPackMagic = 0x4b43415020534c;

// What packed weights begin with and take under the instruction set in use.
template <class T>
struct LstmPackedLayout {
  bool quantised;
  int64_t I, H, P;
  LstmPackHeader* header;
  int64_t* bytes;  // a multiple of 64
};

template <class T>
struct LstmBackward {
  const T *grad_output, *grad_h_n, *grad_c_n;  // each may be null: zero
  const Widened<T>* grad_cells;                // or null
  // Of a plain layer input, h_0 and output may be null where the gates are there and grad_weight_hh is null.
  const T *input, *h_0, *c_0;
  const T *weight_ih, *weight_hh;
  const T *bias_ih, *bias_hh;  // or null
  LstmVariant<T> variant;
  const int64_t* lengths;  // or null
  const T* output;
  const Widened<T>* cells;
  const T *gates, *normalized;  // null: computed again
  const Widened<T>* scales;
  T* grad_gates;  // [T, B, 4H]: da of every step, or null; of plain layers without lengths alone
  T* grad_input;  // or null
  T *grad_h_0, *grad_c_0;
  // grad_weight_hh null: the gradients of weights, biases and gains are not wanted. (That of W_ih is null with I = 0.)
  T *grad_weight_ih, *grad_weight_hh;
  T* grad_bias;  // [4H]: the gradient of both biases
  T *grad_weight_hr, *grad_norm_gates, *grad_norm_cell;
  int64_t steps, B, I, H, P;
  bool reverse;
};

// The gradients of the weights from da, x and h_{t-1} of steps that were made one by one.
template <class T>
struct LstmWeightGradients {
  const T* const* grad_gates;  // a matrix a step: [rows, 4H]
  const T* const* input;       // [rows, I]
  const T* const* previous;    // [rows, P]
  const int64_t* rows;         // [steps]
  T *grad_weight_ih, *grad_weight_hh;
  T* grad_bias;
  int64_t steps, I, H, P;
};

// CUDA: every step after its input's product. One launch a step, on one stream.
template <class T>
struct LstmRecurrence {
  const Widened<T>* input_gates;  // [T, B, 4H]: W_ih x_t, without bias
  const T *h_0, *c_0;             // [B, H]
  const T* weight_hh;
  const T *bias_ih, *bias_hh;  // both, or both null
  const int64_t* lengths;      // [B], each in [0, steps], or null
  T* output;                   // [T, B, H]
  Widened<T>* cells;           // [T, B, H]
  T* gates;                    // [T, B, 4H]; may be input_gates itself where the types agree
  T *h_n, *c_n;                // [B, H]
  int64_t steps, B, H;
  bool reverse;
};

// CUDA: grad_gates, and the gradients of the initial states.
template <class T>
struct LstmRecurrenceBackward {
  const T *grad_output, *grad_h_n, *grad_c_n;  // each may be null: zero
  const T *c_0, *weight_hh;
  const Widened<T>* cells;
  const T* gates;
  const int64_t* lengths;  // or null
  Widened<T>* grad_cell;   // workspace [B, H]: the running dc
  T* grad_gates;           // [T, B, 4H]: da, 0 beyond a row's length
  T *grad_h_0, *grad_c_0;
  int64_t steps, B, H;
  bool reverse;
};

// CUDA: h_{t-1} of every step, whose product with grad_gates is the gradient of W_hh.
template <class T>
struct LstmPrevious {
  const T *h_0, *output;
  const int64_t* lengths;  // or null
  T* previous;             // [T, B, H]; 0 beyond a row's length
  int64_t steps, B, H;
  bool reverse;
};

}  // namespace llmkern
