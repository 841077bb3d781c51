# SPDX-License-Identifier: Apache-2.0
"""Linear cross entropy: heads of Penn Treebank (10k words), WikiText-2 (33k words) and BPE (128k) models."""

import torch

from llmkern.benchmark.cross_entropy import forward, training

BF16, FP16 = torch.bfloat16, torch.float16
CASES = {
    "cpu": [
        forward(700, 10_000, 400),
        training(400, 10_000, 200),
        training(700, 10_000, 400),
        training(700, 10_000, 650),
        training(400, 33_000, 200),
        training(700, 33_000, 400),
    ],
    "cuda": [
        training(700, 10_000, 650, dtype=BF16),
        training(700, 10_000, 650),
        training(5_600, 33_000, 400, dtype=BF16),
        training(5_600, 33_000, 400),
        training(8_192, 128_256, 1024, dtype=BF16),
        training(8_192, 32_000, 1024, dtype=FP16),
        forward(8_192, 32_000, 1024, dtype=BF16),
    ],
}


def test_cross_entropy(case, run_case) -> None:
    run_case(case)
