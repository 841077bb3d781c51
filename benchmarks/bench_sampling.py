# SPDX-License-Identifier: Apache-2.0
"""Sampling: word and BPE vocabularies, one text and a batch of them."""

import pytest

from llmkern.benchmark.sampling import plain, top_k, top_p

CASES = [
    case(V, B) for V in (10_000, 32_000, 128_256) for B in (1, 64) for case in (plain, top_k, top_p)
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sampling(case, run_case) -> None:
    run_case(case)
