# SPDX-License-Identifier: Apache-2.0
"""The dropout's CUDA kernels, executed on the host: equality with masks drawn by numpy."""

import numpy as np
import pytest

from tests.ops import philox_oracle as oracle

from .harness import KernelError, Output, checkers_only, from_bfloat16, to_bfloat16

C_TYPES = {"float32": "float", "float64": "double", "bfloat16": "bfloat16", "float16": "float16"}
# N, D, R: one element, less than a thread's quarter, groups with a rest, more than a block, masks that repeat.
SHAPES = [(1, 1, 1), (3, 2, 3), (5, 17, 5), (2, 650, 1), (60, 24, 20), (7, 1150, 7), (300, 3, 100)]


def draw(simt, seed, purpose, rows, columns, p):
    fields = {"seed": np.array([seed]), "mask": Output((rows, columns), np.bool_)}
    fields |= {"rows": rows, "columns": columns, "purpose": purpose, "p": p}
    return simt("dropout").run("DrawMask", **fields)["mask"]


@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 1), (3, 7), (5, 16), (2, 17), (4, 650), (0, 5), (5, 0)]
)
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0, 2.0**-33])
def test_masks_equal_the_oracle(simt, rows, columns, p):
    for seed, purpose in ((-1, oracle.DROPOUT), (2**62, oracle.ZONEOUT_HIDDEN)):
        got = draw(simt, seed, purpose, rows, columns, p)
        np.testing.assert_array_equal(got, oracle.mask(seed, purpose, rows, columns, p))


@checkers_only
def test_more_groups_than_blocks(simt):
    """2048 blocks of 64 groups."""
    rows = 2**17 + 5
    np.testing.assert_array_equal(draw(simt, 3, 2, rows, 1, 0.5), oracle.mask(3, 2, rows, 1, 0.5))


def narrow(values, dtype):
    return to_bfloat16(values) if dtype == "bfloat16" else np.asarray(values, dtype)


def drop(simt, x, dtype, R, p=0.3, seed=9, **changed):
    N, D = x.shape
    fields = {"x": x, "seed": np.array([seed]), "out": Output((N, D), x.dtype)}
    fields |= {"N": N, "D": D, "R": R, "p": p}
    return simt("dropout").run(f"Dropout<{C_TYPES[dtype]}>", **{**fields, **changed})["out"]


def expected(x, dtype, R, p=0.3, seed=9):
    computed = np.float64 if dtype == "float64" else np.float32
    wide = (from_bfloat16(x) if dtype == "bfloat16" else x).astype(computed) * computed(1 / (1 - p))
    mask = np.tile(oracle.mask(seed, oracle.DROPOUT, R, x.shape[1], p), (len(x) // R, 1))
    return narrow(np.where(mask, 0, wide), dtype)


@pytest.mark.parametrize("dtype", C_TYPES)
@pytest.mark.parametrize(("N", "D", "R"), SHAPES)
def test_every_element_is_right(simt, N, D, R, dtype):
    x = narrow(np.random.default_rng(D).standard_normal((N, D)), dtype)
    np.testing.assert_array_equal(drop(simt, x, dtype, R), expected(x, dtype, R))


def test_probabilities_at_the_ends(simt):
    x = np.random.default_rng(0).standard_normal((4, 40)).astype(np.float32)
    np.testing.assert_array_equal(drop(simt, x, "float32", 4, p=0.0), x)
    np.testing.assert_array_equal(drop(simt, x, "float32", 4, p=1.0), np.zeros_like(x))


def test_nothing_to_do(simt):
    for shape in ((0, 3), (3, 0)):
        assert drop(simt, np.zeros(shape, np.float32), "float32", 3).shape == shape


@checkers_only
def test_more_repeats_than_blocks(simt):
    """2048 rows of blocks, each for one repeat of a single mask row."""
    x = np.ones((2051, 5), np.float32)
    np.testing.assert_array_equal(drop(simt, x, "float32", 1), expected(x, "float32", 1))


@checkers_only
def test_a_tensor_smaller_than_promised_is_noticed(simt):
    x = np.zeros((2, 8), np.float32)
    with pytest.raises(KernelError, match=r"global memory out of bounds: drop.*`x`"):
        drop(simt, x, "float32", 3, N=3, out=Output((3, 8), np.float32))
