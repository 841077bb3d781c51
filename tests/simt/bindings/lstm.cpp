// SPDX-License-Identifier: Apache-2.0
#include "kernels/lstm.h"

#include "bind.h"

#define BIND_FORWARD(T)                                                                                             \
  BIND((LstmRecurrence<T>), input_gates, h_0, c_0, weight_hh, bias_ih, bias_hh, lengths, output, cells, gates, h_n, \
       c_n, steps, B, H, reverse)
#define BIND_BACKWARD(T)                                                                                               \
  BIND((LstmRecurrenceBackward<T>), grad_output, grad_h_n, grad_c_n, c_0, weight_hh, cells, gates, lengths, grad_cell, \
       grad_gates, grad_h_0, grad_c_0, steps, B, H, reverse)

#define BIND_PREVIOUS(T) BIND((LstmPrevious<T>), h_0, output, lengths, previous, steps, B, H, reverse)

BIND_FORWARD(float)
BIND_FORWARD(double)
BIND_FORWARD(bfloat16)
BIND_FORWARD(float16)
BIND_BACKWARD(float)
BIND_BACKWARD(double)
BIND_BACKWARD(bfloat16)
BIND_BACKWARD(float16)
BIND_PREVIOUS(float)
BIND_PREVIOUS(double)
BIND_PREVIOUS(bfloat16)
BIND_PREVIOUS(float16)
BINDINGS
