# SPDX-License-Identifier: Apache-2.0
"""LSTM: decoding, sequences at B = 1, and the training shapes of Zaremba et al. 2014 and Merity et al. 2017."""

import torch

from llmkern.benchmark import lstm_options
from llmkern.benchmark.lstm import (
    cell_training,
    decode,
    quantized,
    ragged_training,
    sequence,
    training,
)

F32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
OPTIONS = ("layer-norm", "zoneout", "weight-dropout", "locked-dropout")
CASES = {
    "cpu": [
        *(decode(H, dtype=dtype) for dtype in (F32, BF16) for H in (512, 650, 1024)),
        decode(200),
        decode(650, B=20),
        *(quantized(H, B=1, T=1) for H in (512, 650, 1024)),
        *(sequence(H, B=1, T=256, dtype=dtype) for dtype in (F32, BF16) for H in (512, 1024)),
        *(quantized(H, B=1, T=256) for H in (512, 1024)),
        training(200, B=20, T=20),
        *(
            training(H, B, T=35, dtype=dtype)
            for dtype in (F32, BF16)
            for B in (20, 64)
            for H in (200, 650, 1024, 1150)
        ),
        *(ragged_training(H, B=32, T=500) for H in (64, 256)),
        cell_training(512, B=20, T=70),
        *(lstm_options.training(option, 650, B=20, T=35) for option in OPTIONS),
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
