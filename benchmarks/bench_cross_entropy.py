# SPDX-License-Identifier: Apache-2.0
"""Linear cross entropy: heads of Penn Treebank (10k words) and WikiText-2 (33k words) models."""

import pytest

from llmkern.benchmark.cross_entropy import forward, training

CASES = [
    forward(700, 10_000, 400),
    training(400, 10_000, 200),
    training(700, 10_000, 400),
    training(700, 10_000, 650),
    training(400, 33_000, 200),
    training(700, 33_000, 400),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cross_entropy(case, run_case) -> None:
    run_case(case)
