# SPDX-License-Identifier: Apache-2.0
"""Faults that end the process; test_sanitizers.py runs each in a process of its own."""

import numpy as np
import pytest

from .harness import Output, Scratch


@pytest.mark.parametrize(
    "kernel", ["own_array", "overflow", "beside_global", "beside_dynamic_shared"]
)
def test_planted(simt, kernel):
    simt("faults/sanitizers").run(
        kernel,
        **{"in": np.zeros(4, np.float32)},
        out=Output(64, np.float32),
        scratch=Scratch(1, np.float32),
        counters=np.array([4], np.int32),
        N=64,
    )
