# SPDX-License-Identifier: Apache-2.0
"""Embedding: Penn Treebank, WikiText-2 and BPE vocabularies; ids of a few, and of many, windows of text."""

import torch

from llmkern.benchmark.embedding import forward, training

BF16 = torch.bfloat16
CASES = {
    "cpu": [
        case(V, D, N)
        for V, D, N in [
            (10_000, 200, 400),
            (10_000, 650, 700),
            (33_000, 400, 5_600),
            (33_000, 1024, 8_192),
            (128_000, 1024, 8_192),
        ]
        for case in (forward, training)
    ],
    "cuda": [
        case(V, D, N, dtype=dtype)
        for V, D, N, dtype in [
            (128_000, 1024, 65_536, BF16),
            (33_000, 1024, 8_192, BF16),
            (10_000, 650, 700, torch.float32),
            (33_000, 400, 8_192, torch.float32),
            (10_000, 650, 700, BF16),
        ]
        for case in (training, forward)
    ],
}


def test_embedding(case, run_case) -> None:
    run_case(case)
