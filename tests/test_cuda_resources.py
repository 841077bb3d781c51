# SPDX-License-Identifier: Apache-2.0
"""The committed table of what CUDA kernels take says what the built library takes, and no kernel spills."""

import pytest

import llmkern
from tests.native import cuda_resources

pytestmark = [
    pytest.mark.skipif(not llmkern.info()["cuda_version"], reason="a build without CUDA kernels"),
    pytest.mark.skipif(
        cuda_resources.cuobjdump() is None, reason="no cuobjdump (package nvidia-cuda-cuobjdump)"
    ),
]


@pytest.fixture(scope="module")
def built() -> list[cuda_resources.Resources]:
    return cuda_resources.built()


def test_no_kernel_spills(built):
    assert built
    assert [row for row in built if row.stack or row.local] == []


def test_table_is_up_to_date(built):
    """Another nvcc allocates otherwise; then only the list of kernels is compared."""
    committed = cuda_resources.table()
    assert {row.kernel for row in built} == {row.kernel for row in committed}
    known = {(row.kernel, row.architecture, row.nvcc): row for row in committed}
    for row in built:
        assert known.get(row[:3], row) == row, (
            "run tests/native/cuda_resources.py after a full build"
        )


def test_every_architecture_of_a_wheel_is_in_the_table():
    committed = cuda_resources.table()
    kernels = {row.kernel for row in committed}
    for architecture in {row.architecture for row in committed}:
        assert {row.kernel for row in committed if row.architecture == architecture} == kernels
    assert len({row.architecture for row in committed}) >= 6
