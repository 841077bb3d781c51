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
#pragma once

#include <cstdint>

namespace llmkern {

template <class T>
struct LstmForward {
  const T *input, *h_0, *c_0;
  const T *weight_ih, *weight_hh;
  const T *bias_ih, *bias_hh;  // both, or both null
  T *output, *cells, *gates;
  int64_t steps, B, I, H;
  bool reverse;
};

template <class T>
struct LstmBackward {
  const T *grad_output, *grad_h_n, *grad_c_n;  // each may be null: zero
  const T *input, *h_0, *c_0;
  const T *weight_ih, *weight_hh;
  const T *output, *cells, *gates;
  T* grad_gates;  // workspace [T, B, 4H]: da of every step
  T *grad_input, *grad_h_0, *grad_c_0;
  T *grad_weight_ih, *grad_weight_hh;
  T* grad_bias;  // [4H]: the gradient of both biases
  int64_t steps, B, I, H;
  bool reverse;
};

}  // namespace llmkern
