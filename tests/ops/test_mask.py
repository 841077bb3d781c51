# SPDX-License-Identifier: Apache-2.0
"""Masks: equality with Philox in numpy, element by element, on every instruction set."""

import numpy as np
import pytest
import torch

from . import philox_oracle as oracle

MASK = torch.ops.llmkern.mask.default
# Fewer columns than a group, whole groups, a few more; more groups than are drawn at once; nothing.
SHAPES = [
    (1, 1),
    (3, 7),
    (5, 16),
    (2, 17),
    (4, 650),
    (3, 1150),
    (2, 2049),
    (700, 3),
    (0, 5),
    (5, 0),
]


def draw(seed: int, purpose: int, rows: int, columns: int, p: float) -> np.ndarray:
    return MASK(torch.tensor(seed), purpose, rows, columns, p).numpy()


def test_the_oracle_is_philox():
    """Known answers of Salmon et al.'s own implementation (Random123, kat_vectors)."""
    zeros = oracle.philox(0, np.zeros((1, 4), np.uint64))[0]
    assert zeros.tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = oracle.philox(2**64 - 1, np.full((1, 4), 2**32 - 1, np.uint64))[0]
    assert ones.tolist() == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.875])
def test_equals_the_oracle(isa, rows, columns, p):
    for seed in (0, -1, 2**63 - 1, 123456789012345):
        for purpose in (oracle.DROPOUT, oracle.ZONEOUT_CELL, oracle.ZONEOUT_HIDDEN):
            got = draw(seed, purpose, rows, columns, p)
            np.testing.assert_array_equal(got, oracle.mask(seed, purpose, rows, columns, p))


@pytest.mark.parametrize("p", [2.0**-32, 2.0**-33, 1 - 2.0**-32, 0.5 + 2.0**-34, 1e-300])
def test_probabilities_between_two_words(isa, p):
    """A word is below p * 2^32 as real numbers, so every p > 0 sets words of 0."""
    np.testing.assert_array_equal(draw(5, 2, 40, 650, p), oracle.mask(5, 2, 40, 650, p))


def test_zero_sets_none_and_one_all(isa):
    assert not draw(1, 2, 300, 650, 0.0).any()
    assert draw(1, 2, 300, 650, 1.0).all()


def test_as_many_as_p_says():
    drawn = draw(7, 2, 1000, 1000, 0.3)
    assert abs(drawn.mean() - 0.3) < 5 * np.sqrt(0.21e-6)
    assert (np.abs(drawn.mean(axis=0) - 0.3) < 5 * np.sqrt(0.21e-3)).all()


def test_seeds_and_purposes_are_independent():
    masks = [draw(seed, purpose, 100, 100, 0.5) for seed in (1, 2) for purpose in (2, 3, 4)]
    for i, one in enumerate(masks):
        for other in masks[:i]:
            assert abs((one == other).mean() - 0.5) < 0.025


def test_same_bits_on_any_number_of_threads(on_threads):
    one, two = (on_threads(n, lambda: draw(3, 2, 999, 650, 0.5)) for n in (1, 2))
    np.testing.assert_array_equal(one, two)


def test_opcheck():
    torch.library.opcheck(MASK, (torch.tensor(1), 2, 3, 17, 0.5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.tensor([1]), 2, 3, 4, 0.5), r"expected seed of shape \[\], got \[1\]"),
        ((torch.tensor(1.0), 2, 3, 4, 0.5), "expected seed of dtype Long, got Float"),
        ((torch.tensor(1), 0, 3, 4, 0.5), r"expected purpose in \[1, 4\], got 0"),
        ((torch.tensor(1), 2, -3, 4, 0.5), r"expected sizes of at least 0, got \[-3, 4\]"),
        ((torch.tensor(1), 2, 3, 4, 1.5), r"expected p in \[0, 1\], got 1.5"),
        ((torch.tensor(1), 2, 3, 4, float("nan")), r"expected p in \[0, 1\], got nan"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=r"llmkern\.mask: " + message):
        MASK(*arguments)
