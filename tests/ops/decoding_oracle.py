# SPDX-License-Identifier: Apache-2.0
"""The judge of decoding: csrc/kernels/decoding.h again in Python's integers and fractions, one row at a time.

Written from the contract alone and without the project's native code; the masses of distances and Philox are those of
sampling_oracle.
"""

import math
from fractions import Fraction
from itertools import accumulate

import numpy as np

from tests.ops import sampling_oracle

TEST, REPLACEMENT, MULTINOMIAL = 5, 6, 7
WORD, LONG = 2**32 - 1, 2**64 - 1


def random_u64(seed: int, purpose: int, index: int, last: int = 0) -> int:
    index &= LONG
    words = sampling_oracle.philox(seed & LONG, (index & WORD, index >> 32, purpose, last))
    return words[0] | words[1] << 32


@np.errstate(all="ignore")
def masses(logits: np.ndarray) -> list[int] | None:
    """None for a row that has a NaN or nothing above -inf."""
    z = np.minimum(logits.astype(np.float32), sampling_oracle.FLOAT_MAX)
    if np.isnan(z).any() or z.max() == -np.inf:
        return None
    return sampling_oracle.masses(z - z.max()).tolist()


def draw(u: int, weights: list[int]) -> int:
    target = u * sum(weights) // 2**64
    return next(v for v, running in enumerate(accumulate(weights)) if running > target)


def verify(
    draft_ids: list[int],
    draft: np.ndarray | None,
    target: np.ndarray,
    seed: int,
    position: int,
) -> tuple[list[int], int]:
    """The tokens that come out, and how many of them were accepted."""
    tokens: list[int] = []
    for i, row in enumerate(target):
        p = masses(row)
        if p is None:
            return tokens, i
        u = random_u64(seed, REPLACEMENT, position + i)
        if i == len(draft_ids) or draft_ids[i] == -1:
            return [*tokens, draw(u, p)], i
        x = draft_ids[i]
        q = [int(v == x) for v in range(len(p))] if draft is None else masses(draft[i])
        if q is None:
            return tokens, i
        # u / 2^64 < p(x) / q(x), but for the floor of the contract
        if random_u64(seed, TEST, position + i) * q[x] * sum(p) // 2**64 >= p[x] * sum(q):
            rest = [max(0, a * sum(q) - b * sum(p)) for a, b in zip(p, q, strict=True)]
            return [*tokens, draw(u, rest if any(rest) else p)], i
        tokens.append(x)
    raise AssertionError("the last row is always drawn from")


def weight_masses(weights: list[float], bits: int) -> list[int]:
    _, exponent = math.frexp(max(weights))
    return [round(Fraction(w) * Fraction(2) ** (bits - exponent)) for w in weights]


def multinomial(
    row: np.ndarray, n: int, replacement: bool, from_logits: bool, seed: int, position: int
) -> list[int]:
    values = row.astype(np.float64)
    bits = 40 if from_logits else min(51, 63 - len(row).bit_length())

    def anew() -> list[int]:
        return masses(values) if from_logits else weight_masses(values.tolist(), bits)

    mass, tokens = anew(), []
    for i in range(n):
        if sum(mass) < 2 ** (bits - 8):
            mass = anew()
        v = draw(random_u64(seed, MULTINOMIAL, position, i), mass)
        tokens.append(v)
        if not replacement:
            mass[v], values[v] = 0, -np.inf if from_logits else 0
    return tokens
