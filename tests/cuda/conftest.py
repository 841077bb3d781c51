# SPDX-License-Identifier: Apache-2.0
"""Tests that need an NVIDIA GPU: they are collected everywhere, and skipped where there is none.

``sanitize`` marks the cases that compute-sanitizer runs too (benchmarks/gpu.sh): small, eager, without graphs, which
capture no launches it could look into.
"""

from collections.abc import Iterator

import pytest
import torch

import llmkern

from . import promises


def _missing() -> str | None:
    """What a GPU test needs and does not find here."""
    if not torch.cuda.is_available():
        return "needs a GPU that torch can use"
    if not llmkern.info()["cuda_version"]:
        return "needs a build of llmkern with CUDA kernels"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = _missing()
    if missing is None:
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason=missing))


@pytest.fixture
def device() -> Iterator[torch.device]:
    """The GPU; a mistake that a kernel met and nobody asked for fails the test that made it, not the next one."""
    yield promises.DEVICE
    llmkern.ops.raise_deferred_errors()
