# SPDX-License-Identifier: Apache-2.0
"""More than a million rows, every one with its own settings: the kernel and the reference agree to the last bit.

A case is one call. The rows are of all kinds (tests/ops/sampling_cases.py), most of them short and full of ties, some
of them long; a third of the calls has biases, masks and ids to penalise. Every row goes through the reference once and
through the kernel four times: on each instruction set on one thread, and on the best one on two threads.
"""

import numpy as np
import pytest

from tests.ops.sampling_cases import (
    KINDS,
    assert_same_bits,
    by_kernel,
    by_reference,
    make_batch,
    make_rows,
    make_settings,
)

# V: rows
ROWS = {V: 90_000 for V in (1, 2, 3, 4, 6, 9, 13, 16, 21, 32)}
ROWS |= {V: 30_000 for V in (41, 64, 77, 96)} | {257: 4000, 1025: 1200, 4200: 250}
ROWS |= {17_000: 52, 33_000: 26, 70_000: 26}
PART = 15_000  # rows a call


def test_they_are_a_million():
    assert sum(ROWS.values()) > 1_000_000


def batches(V: int):
    for number, start in enumerate(range(0, ROWS[V], PART)):
        rng = np.random.default_rng([V, number])
        B = min(PART, ROWS[V] - start)
        of_a_kind = -(-B // len(KINDS))
        logits = np.concatenate([make_rows(kind, of_a_kind, V, rng) for kind in KINDS])[:B]
        share = (0.35, 0.6, 0.15)[number % 3]
        settings = make_settings(B, rng, share)
        yield make_batch(logits, rng, number % 3 == 1, min(V, 3), settings)


@pytest.mark.parametrize("V", ROWS)
def test_kernel_equals_reference_bit_for_bit(V, on_isas, on_threads):
    for batch in batches(V):
        expected = by_reference(batch)
        for _ in on_isas():
            assert_same_bits(on_threads(1, lambda batch=batch: by_kernel(batch)), expected)
        assert_same_bits(on_threads(2, lambda batch=batch: by_kernel(batch)), expected)
