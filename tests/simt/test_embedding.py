# SPDX-License-Identifier: Apache-2.0
"""The embedding's CUDA kernels, executed on the host."""

import numpy as np
import pytest

from .harness import KernelError, Output, Scratch, checkers_only, from_bfloat16, to_bfloat16

# N, V, D: one row, primes, the widths of classic language models, more columns than threads.
SHAPES = [(1, 1, 1), (7, 5, 3), (64, 17, 650), (33, 11, 1150), (400, 50, 7), (3, 4, 257)]
C_TYPES = {
    "float32": "float",
    "float64": "double",
    "bfloat16": "bfloat16",
    "float16": "float16",
    "uint16": "bfloat16",
    "int32": "int32_t",
    "int64": "int64_t",
}
DTYPES = ["float32", "float64", "bfloat16", "float16"]
K_EMBEDDING_ID = 1
BACKWARD_TOLERANCE = {"float32": 1e-6, "float64": 1e-14, "bfloat16": 4e-3, "float16": 5e-4}


def narrow(values, dtype):
    return to_bfloat16(values) if dtype == "bfloat16" else np.asarray(values, dtype)


def widen(stored, dtype):
    return (from_bfloat16(stored) if dtype == "bfloat16" else stored).astype(np.float64)


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
        "error": np.zeros(4, np.int64),
    }
    return simt("embedding").run(struct, **{**fields, **changed})


def gather_rows(simt, table, ids, **changed):
    result = gather(simt, table, ids, **changed)
    assert not result["error"].any()
    return result["out"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index_dtype", ["int32", "int64"])
@pytest.mark.parametrize(("N", "V", "D"), SHAPES)
def test_gather_is_exact(simt, N, V, D, dtype, index_dtype):
    rng = np.random.default_rng(0)
    table = narrow(rng.standard_normal((V, D)), dtype)
    ids = rng.integers(V, size=N).astype(index_dtype)
    np.testing.assert_array_equal(gather_rows(simt, table, ids), table[ids])


def test_nothing_to_do(simt):
    assert gather_rows(simt, np.zeros((4, 3)), np.zeros(0, np.int64)).shape == (0, 3)
    assert gather_rows(simt, np.zeros((4, 0)), np.zeros(2, np.int64)).shape == (2, 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [3, 8])
def test_ids_out_of_range_give_rows_of_nan_and_are_reported(simt, D, dtype):
    table = narrow(np.arange(4 * D).reshape(4, D), dtype)
    for bad in (4, -1, 2**40):
        ids = np.array([3, bad, 0])
        result = gather(simt, table, ids)
        assert np.isnan(widen(result["out"][1], dtype)).all()
        np.testing.assert_array_equal(result["out"][[0, 2]], table[[3, 0]])
        assert result["error"].tolist() == [K_EMBEDDING_ID | 1 << 32, 1, bad, 4]


def test_one_of_many_mistakes_is_reported(simt):
    ids = np.array([0, 9, 8, 7])
    error = gather(simt, np.zeros((1, 3), np.float32), ids)["error"]
    assert error[1] in (1, 2, 3)
    assert error.tolist() == [K_EMBEDDING_ID | 1 << 32, error[1], ids[error[1]], 1]


@checkers_only
def test_more_rows_than_blocks(simt):
    """2048 blocks of 256 rows of one element."""
    table = np.array([[1.0], [2.0]], np.float32)
    ids = (np.arange(2**19 + 3) % 2).astype(np.int32)
    np.testing.assert_array_equal(gather_rows(simt, table, ids), table[ids])


@checkers_only
def test_more_columns_than_blocks_in_the_gradient(simt):
    """2048 blocks of 128 columns, a run that crosses a boundary, and one that does not."""
    check_backward(simt, np.repeat([1, 0], [2, 31]), 2, 128 * 2049 + 1)


@checkers_only
def test_a_table_smaller_than_promised_is_noticed(simt):
    with pytest.raises(
        KernelError, match=r"global memory out of bounds: embedding_forward.*`table`\+12"
    ):
        gather(simt, np.zeros((1, 3), np.float32), np.array([1]), V=2)


def workspace_bytes(N, D):
    return -(-N // 32) * 2 * D * 8


def backward(simt, grad, ids, V, dtype, *, padding=-1, by_frequency=False, **changed):
    """The table's gradient in float64, and the record of mistakes."""
    order = np.argsort(ids, kind="stable").astype(np.int64)
    N, D = grad.shape
    fields = {
        "grad_out": grad,
        "sorted_ids": ids[order],
        "order": order,
        "grad_table": np.zeros((V, D), grad.dtype),
        "workspace": Scratch(workspace_bytes(N, D), np.uint8),
        "N": N,
        "V": V,
        "D": D,
        "padding_idx": padding,
        "scale_by_frequency": by_frequency,
        "error": np.zeros(4, np.int64),
    }
    struct = f"EmbeddingBackwardSorted<{C_TYPES[dtype]}, {C_TYPES[ids.dtype.name]}>"
    out = simt("embedding").run(struct, **{**fields, **changed})
    return widen(out["grad_table"], dtype), out["error"]


def check_backward(simt, ids, V, D, dtype="float32", *, padding=-1, by_frequency=False):
    rng = np.random.default_rng(len(ids) + D)
    grad = narrow(rng.standard_normal((len(ids), D)), dtype)
    exact = widen(grad, dtype)
    expected, size = np.zeros((V, D)), np.zeros((V, D))
    np.add.at(expected, ids, exact)
    np.add.at(size, ids, np.abs(exact))
    count = np.bincount(ids, minlength=V).clip(1)[:, None] if by_frequency else 1
    expected, size = expected / count, size / count
    if padding >= 0:
        expected[padding] = 0
    got, error = backward(simt, grad, ids, V, dtype, padding=padding, by_frequency=by_frequency)
    assert not error.any()
    # The sum's rounding, relative to the sum of magnitudes, and that of the store.
    excess = np.abs(got - expected) - BACKWARD_TOLERANCE[dtype] * np.abs(expected)
    assert (excess <= min(BACKWARD_TOLERANCE[dtype], 1e-6) * size).all()


def zipf(N, V, dtype=np.int64):
    """One id in 20 % of the positions, the others as 1/rank."""
    rng = np.random.default_rng(N)
    weight = 1 / np.arange(1.0, V + 1)
    weight[0] = 0.25 * weight[1:].sum()
    return rng.permutation(V)[rng.choice(V, N, p=weight / weight.sum())].astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [1, 3, 64, 257])
def test_gradient_of_zipf_ids(simt, D, dtype):
    check_backward(simt, zipf(300, 40), 40, D, dtype)


@pytest.mark.parametrize("index_dtype", ["int32", "int64"])
@pytest.mark.parametrize("N", [1, 31, 32, 33, 64, 65, 1000])
@pytest.mark.parametrize("kind", ["equal", "distinct", "zipf"])
def test_gradient_over_group_boundaries(simt, kind, N, index_dtype):
    V = N + 2
    ids = {"equal": np.full(N, 1), "distinct": np.arange(N)[::-1] + 1, "zipf": zipf(N, V)}[kind]
    check_backward(simt, ids.astype(index_dtype), V, 6, by_frequency=N % 2 == 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_run_of_many_groups_uses_every_warp(simt, dtype):
    """Two runs longer than one warp adds alone, with short ones before and between."""
    ids = np.repeat([0, 2, 3, 5], [40, 1100, 70, 1300])
    check_backward(simt, ids, 7, 5, dtype, by_frequency=True)


@pytest.mark.parametrize("D", [2, 4, 6, 8, 33, 260, 1026])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gradient_for_every_width_of_pack(simt, D, dtype):
    check_backward(simt, np.repeat([3, 0, 1], [3, 40, 2]), 4, D, dtype)


@pytest.mark.parametrize("by_frequency", [False, True])
@pytest.mark.parametrize("padding", [0, 3])
def test_padding_gets_no_gradient(simt, padding, by_frequency):
    ids = np.repeat([0, 1, 3, 4], [50, 3, 90, 1])
    check_backward(simt, ids, 5, 4, padding=padding, by_frequency=by_frequency)


def test_thousand_ones_in_bfloat16_are_a_thousand(simt):
    grad = to_bfloat16(np.ones((1000, 3)))
    got, _ = backward(simt, grad, np.zeros(1000, np.int32), 1, "bfloat16")
    assert (got == 1000).all()


def test_the_gradient_repeats(simt):
    grad = np.random.default_rng(0).standard_normal((1000, 3)).astype(np.float32)
    first, again = (backward(simt, grad, zipf(1000, 30), 30, "float32")[0] for _ in range(2))
    np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize("index_dtype", ["int32", "int64"])
@pytest.mark.parametrize(("bad", "V"), [(-3, 6), (6, 6), (2**31 - 1, 6)])
@pytest.mark.parametrize("count", [1, 80])
def test_gradient_leaves_ids_out_of_range_out_and_reports_one(simt, count, bad, V, index_dtype):
    rng = np.random.default_rng(count)
    ids = rng.permutation(np.concatenate([np.full(count, bad), np.arange(V), np.full(40, 2)]))
    ids = ids.astype(index_dtype)
    grad = rng.standard_normal((len(ids), 5)).astype(np.float32)
    known = (ids >= 0) & (ids < V)
    expected = np.zeros((V, 5))
    np.add.at(expected, ids[known], grad[known])
    got, error = backward(simt, grad, ids, V, "float32")
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert error.tolist() == [K_EMBEDDING_ID | 1 << 32, np.flatnonzero(~known)[0], bad, V]


def test_gradient_of_nothing(simt):
    got, _ = backward(simt, np.zeros((0, 3), np.float32), np.zeros(0, np.int64), 2, "float32")
    assert not got.any()
    got, _ = backward(simt, np.zeros((2, 0), np.float32), np.zeros(2, np.int64), 2, "float32")
    assert got.shape == (2, 0)
