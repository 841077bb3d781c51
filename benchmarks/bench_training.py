# SPDX-License-Identifier: Apache-2.0
"""A whole training step: the models of Zaremba et al. 2014, and a character model."""

import torch

from llmkern.benchmark.training import step

BF16 = torch.bfloat16
MEDIUM = {"name": "zaremba-medium", "V": 10_000, "H": 650, "B": 20, "T": 35}
CASES = {
    "cpu": [
        step("zaremba-small", V=10_000, H=200, B=20, T=20),
        step(**MEDIUM),
        step("characters", V=65, H=512, B=32, T=64),
    ],
    "cuda": [
        step(**MEDIUM, dtype=BF16),
        step(**MEDIUM),
        step("zaremba-large", V=10_000, H=1500, B=20, T=35, dtype=BF16),
        step("characters", V=65, H=512, B=32, T=64, dtype=BF16),
    ],
}


def test_training(case, run_case) -> None:
    run_case(case)
