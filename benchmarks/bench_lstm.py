# SPDX-License-Identifier: Apache-2.0
"""LSTM: decoding, sequences at B = 1, and the training shapes of Zaremba et al. 2014 and Merity et al. 2017."""

import pytest

from llmkern.benchmark.lstm import cell_training, decode, sequence, training

CASES = [
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
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_lstm(case, run_case) -> None:
    run_case(case)
