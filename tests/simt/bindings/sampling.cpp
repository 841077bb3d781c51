// SPDX-License-Identifier: Apache-2.0
#include "kernels/sampling.h"

#include "bind.h"

BIND((Sample), logits, bias, bias_stride, allowed, allowed_stride, prompt_ids, output_ids, prompt_length, output_length,
     settings, settings_stride, seeds, seed_stride, positions, B, V, num_logprobs, token, logprob, filtered_logprob,
     rank, num_kept, entropy, top_ids, top_logprobs, workspace, error)
BINDINGS
