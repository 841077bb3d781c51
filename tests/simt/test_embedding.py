# SPDX-License-Identifier: Apache-2.0
"""The embedding's CUDA kernels, executed on the host."""

import numpy as np
import pytest

from .harness import KernelError, Output, checkers_only

# N, V, D: one row, primes, the widths of classic language models, more columns than threads.
SHAPES = [(1, 1, 1), (7, 5, 3), (64, 17, 650), (33, 11, 1150), (400, 50, 7), (3, 4, 257)]
C_TYPES = {"float32": "float", "float64": "double", "int32": "int32_t", "int64": "int64_t"}


def gather(simt, table, ids, **changed):
    struct = f"EmbeddingForward<{C_TYPES[table.dtype.name]}, {C_TYPES[ids.dtype.name]}>"
    N, (V, D) = len(ids), table.shape
    fields = {
        "table": table,
        "ids": ids,
        "out": Output((N, D), table.dtype),
        "N": N,
        "V": V,
        "D": D,
    }
    return simt("embedding").run(struct, **{**fields, **changed})["out"]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("index_dtype", ["int32", "int64"])
@pytest.mark.parametrize(("N", "V", "D"), SHAPES)
def test_gather_is_exact(simt, N, V, D, dtype, index_dtype):
    rng = np.random.default_rng(0)
    table = rng.standard_normal((V, D)).astype(dtype)
    ids = rng.integers(V, size=N).astype(index_dtype)
    np.testing.assert_array_equal(gather(simt, table, ids), table[ids])


def test_nothing_to_do(simt):
    assert gather(simt, np.zeros((4, 3)), np.zeros(0, np.int64)).shape == (0, 3)
    assert gather(simt, np.zeros((4, 0)), np.zeros(2, np.int64)).shape == (2, 0)


def test_ids_out_of_range_give_rows_of_nan(simt):
    table = np.arange(12, dtype=np.float32).reshape(4, 3)
    out = gather(simt, table, np.array([3, 4, -1, 0, 2**40]))
    assert np.isnan(out[[1, 2, 4]]).all()
    np.testing.assert_array_equal(out[[0, 3]], table[[3, 0]])


@checkers_only
def test_more_rows_than_blocks(simt):
    table = np.array([[1.0], [2.0]], np.float32)
    ids = (np.arange(65536 + 3) % 2).astype(np.int32)
    np.testing.assert_array_equal(gather(simt, table, ids), table[ids])


@checkers_only
def test_a_table_smaller_than_promised_is_noticed(simt):
    with pytest.raises(
        KernelError, match=r"global memory out of bounds: embedding_forward.*`table`\+12"
    ):
        gather(simt, np.zeros((1, 3), np.float32), np.array([1]), V=2)
