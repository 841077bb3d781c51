# SPDX-License-Identifier: Apache-2.0
"""Embedding: Penn Treebank, WikiText-2 and BPE vocabularies; ids of a few, and of many, windows of text."""

import pytest

from llmkern.benchmark.embedding import forward, training

CASES = [
    case(V, D, N)
    for V, D, N in [
        (10_000, 200, 400),
        (10_000, 650, 700),
        (33_000, 400, 5_600),
        (33_000, 1024, 8_192),
        (128_000, 1024, 8_192),
    ]
    for case in (forward, training)
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_embedding(case, run_case) -> None:
    run_case(case)
