# SPDX-License-Identifier: Apache-2.0
"""LSTM: decoding, sequences at B = 1, and the training shapes of Zaremba et al. 2014 and Merity et al. 2017."""

import torch

from llmkern.benchmark.lstm import cell_training, decode, sequence, training

BF16, FP16 = torch.bfloat16, torch.float16
CASES = {
    "cpu": [
        *(decode(H) for H in (200, 512, 650, 1024)),
        decode(650, B=20),
        *(sequence(H, B=1, T=256) for H in (512, 1024)),
        training(200, B=20, T=20),
        training(650, B=20, T=35),
        training(650, B=64, T=35),
        training(1024, B=20, T=35),
        training(1024, B=64, T=35),
        training(1150, B=20, T=35),
        cell_training(512, B=20, T=70),
    ],
    "cuda": [
        training(650, B=20, T=35, dtype=BF16),
        training(650, B=20, T=35),
        # One of the few shapes that torch gives to cuDNN's persistent kernels: float16, H % 128 == 0, B % 8 == 0.
        training(768, B=16, T=256, dtype=FP16),
        training(1024, B=64, T=70, dtype=BF16),
        training(1150, B=80, T=70, dtype=BF16),
        training(1150, B=20, T=70),
        training(200, B=20, T=20),
        decode(1024),
        decode(1024, dtype=BF16),
        decode(512),
        decode(650, B=20),
        decode(1024, B=64, dtype=BF16),
        sequence(512, B=1, T=256),
        sequence(1024, B=1, T=256, dtype=BF16),
        cell_training(512, B=20, T=35),
    ],
}


def test_lstm(case, run_case) -> None:
    run_case(case)
