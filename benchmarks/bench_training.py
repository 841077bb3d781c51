# SPDX-License-Identifier: Apache-2.0
"""A whole training step: the small and medium models of Zaremba et al. 2014, and a character model."""

import pytest

from llmkern.benchmark.training import step

CASES = [
    step("zaremba-small", V=10_000, H=200, B=20, T=20),
    step("zaremba-medium", V=10_000, H=650, B=20, T=35),
    step("characters", V=65, H=512, B=32, T=64),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_training(case, run_case) -> None:
    run_case(case)
