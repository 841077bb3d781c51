# SPDX-License-Identifier: Apache-2.0
"""Sampling: word and BPE vocabularies, one text and a batch of them."""

import torch

from llmkern.benchmark.sampling import plain, top_k, top_p

KINDS = (top_p, plain, top_k)
CASES = {
    "cpu": [case(V, B) for V in (10_000, 32_000, 128_256) for B in (1, 64) for case in KINDS],
    "cuda": [
        *(case(V, B) for V, B in [(128_256, 64), (32_000, 1), (10_000, 64)] for case in KINDS),
        top_p(128_256, 64, dtype=torch.bfloat16),
        top_p(128_256, 1),
        top_p(128_256, 512),
    ],
}


def test_sampling(case, run_case) -> None:
    run_case(case)
