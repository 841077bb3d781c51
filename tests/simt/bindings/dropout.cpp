// SPDX-License-Identifier: Apache-2.0
#include "kernels/dropout.h"

#include "bind.h"

BIND((DrawMask), seed, mask, rows, columns, purpose, p)
BIND((Dropout<float>), x, seed, out, N, D, R, p)
BIND((Dropout<double>), x, seed, out, N, D, R, p)
BIND((Dropout<bfloat16>), x, seed, out, N, D, R, p)
BIND((Dropout<float16>), x, seed, out, N, D, R, p)
BINDINGS
