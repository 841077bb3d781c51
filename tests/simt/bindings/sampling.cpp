// SPDX-License-Identifier: Apache-2.0
#include "kernels/sampling.h"

#include "bind.h"

#define FIELDS                                                                                                       \
  logits, logits_stride, bias, bias_stride, bias_ids, bias_values, num_bias_ids, bias_ids_stride, allowed,           \
      allowed_stride, allowed_kind, prompt_ids, output_ids, prompt_length, output_length, settings, settings_stride, \
      seeds, seed_stride, positions, position_stride, B, V, num_logprobs, token, valid, num_kept, filtered_logprob,  \
      logprob, entropy, rank, top_ids, top_logprobs, processed, workspace, error

BIND((Sample<float>), FIELDS)
BIND((Sample<bfloat16>), FIELDS)
BIND((Sample<float16>), FIELDS)
BINDINGS
