# SPDX-License-Identifier: Apache-2.0
"""Sampling: word and BPE vocabularies, one text and batches of them."""

import torch

from llmkern.benchmark.sampling import plain, processors, top_k, top_p

KINDS = (top_p, plain, top_k)
VOCABULARIES = (10_000, 32_000, 128_256, 262_144)
CASES = {
    "cpu": [
        *(case(V, B) for V in VOCABULARIES for B in (1, 64, 512) for case in KINDS),
        *(top_k(V, B, return_logprob=False) for V in VOCABULARIES for B in (1, 64, 512)),
        *(processors(V, B) for V in VOCABULARIES for B in (1, 64)),
        *(case(128_256, B, dtype=torch.bfloat16) for B in (1, 64) for case in KINDS),
        processors(128_256, 64, dtype=torch.bfloat16),
    ],
    "cuda": [
        *(case(V, B) for V, B in [(128_256, 64), (32_000, 1), (10_000, 64)] for case in KINDS),
        top_p(128_256, 64, dtype=torch.bfloat16),
        top_p(128_256, 1),
        top_p(128_256, 512),
        processors(128_256, 64),
    ],
}


def test_sampling(case, run_case) -> None:
    run_case(case)
