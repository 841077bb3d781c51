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
// Saved for the backward pass: output, cells and the activated gates.
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

template <class T>
struct LstmForward {
  const T *input, *h_0, *c_0;
  const T *weight_ih, *weight_hh;
  const T *bias_ih, *bias_hh;  // both, or both null
  const int64_t* lengths;      // [B], each in [0, steps], or null
  const void* packed;          // the weights as LstmPack has written them, or null
  bool quantised;              // they have 8 bits; without `packed` they are made so here
  T* output;
  Widened<T>* cells;  // this and gates null where there will be no backward pass
  T* gates;
  T *h_n, *c_n;
  int64_t steps, B, I, H;
  bool reverse;
};

// The weights in the order in which the kernels of the instruction set in use read them, behind a header that says
// which order that is: another instruction set does not take them for its own.
//
// Quantised (float alone), a row of a weight is scale * q with integers |q| <= 127 and scale = max |w| / 127: sums over
// 8-bit weights and 16-bit activations where there is an instruction for it, rounded weights of 32 bits elsewhere.
template <class T>
struct LstmPack {
  const T *weight_ih, *weight_hh;
  bool quantised;
  void* packed;  // aligned to 64 bytes, as many as LstmPackedBytes says
  int64_t I, H;
};

template <class T>
struct LstmPackedBytes {
  bool quantised;
  int64_t I, H;
  int64_t* bytes;  // a multiple of 64
};

template <class T>
struct LstmBackward {
  const T *grad_output, *grad_h_n, *grad_c_n;  // each may be null: zero
  const T *input, *h_0, *c_0;
  const T *weight_ih, *weight_hh;
  const int64_t* lengths;  // or null
  const T* output;
  const Widened<T>* cells;
  const T* gates;
  T* grad_gates;  // workspace [T, B, 4H]: da of every step
  T *grad_input, *grad_h_0, *grad_c_0;
  T *grad_weight_ih, *grad_weight_hh;
  T* grad_bias;  // [4H]: the gradient of both biases
  int64_t steps, B, I, H;
  bool reverse;
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
