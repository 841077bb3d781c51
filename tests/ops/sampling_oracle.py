# SPDX-License-Identifier: Apache-2.0
"""The judge of sampling: its five steps (csrc/kernels/sampling.h) again, in numpy and Python's integers.

Written from the contract alone and without the project's native code, so that equality means something. numpy has no
fused multiply-add: fmaf is computed in float64, rounded to odd, and then rounded to float32, which is exact (Boldo &
Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd", 2008).
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

F32 = np.float32
FLOAT_MAX = F32(3.4028234663852886e38)
FLOAT_MIN = F32(2.0**-126)
FULL_MASS = 2**40
PURPOSE_SAMPLE = 1

Floats = NDArray[np.float32]
Integers = NDArray[np.uint64]


def fmaf(a: Floats | F32, b: Floats | F32, c: Floats | F32) -> Floats:
    """a * b + c in float32 with one rounding."""
    product = np.float64(a) * np.float64(b)  # exact: 48 bits
    addend = np.broadcast_to(np.float64(c), product.shape)
    total = product + addend
    virtual = total - product  # two-sum (Knuth): the exact error of the addition
    error = (product - (total - virtual)) + (addend - virtual)
    is_even = (total.view(np.int64) & 1) == 0
    toward = np.where(error > 0, np.inf, -np.inf)
    odd = np.where((error != 0) & is_even, np.nextafter(total, toward), total)
    return odd.astype(F32)


def exp_mass(d: Floats) -> Integers:
    """round(2^40 * exp(d)), halves to even, for d <= 0."""
    d = -np.minimum(-d, F32(64))
    round_ = F32(12582912)
    shifted = fmaf(d, F32(1.44269504), round_)
    n = shifted - round_
    r = fmaf(n, F32(-0.693359375), d)
    r = fmaf(n, F32(2.12194440e-4), r)
    p = np.full(d.shape, F32(1) / F32(5040), F32)
    for divisor in (720, 120, 24, 6, 2, 1, 1):
        p = fmaf(p, r, F32(1) / F32(divisor))
    scaled = np.ldexp(np.float64(p), n.astype(np.int32) + 40)
    return np.rint(scaled).astype(np.uint64)


def weighted_mass(mass: Integers, d: Floats) -> Integers:
    """round(mass * -d), the product in float32."""
    product = mass.astype(F32) * np.minimum(-d, F32(64))
    return np.rint(np.float64(product)).astype(np.uint64)


def philox(key: int, counter: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Philox 4x32-10 of Random123 (Salmon et al. 2011)."""
    word = 0xFFFFFFFF
    k0, k1 = key & word, key >> 32 & word
    c0, c1, c2, c3 = counter
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = b >> 32 ^ c1 ^ k0, b & word, a >> 32 ^ c3 ^ k1, a & word
        k0, k1 = k0 + 0x9E3779B9 & word, k1 + 0xBB67AE85 & word
    return c0, c1, c2, c3


def random_u64(seed: int, position: int) -> int:
    position &= 2**64 - 1
    words = philox(seed & 2**64 - 1, (position & 0xFFFFFFFF, position >> 32, PURPOSE_SAMPLE, 0))
    return words[0] | words[1] << 32


def fraction_of_mass(p: float, mass: int) -> int:
    numerator = int(p * 2.0**62)
    return max(1, -(-numerator * mass // 2**62))


@dataclass
class Settings:
    temperature: float = 1.0
    top_k: float = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0


@dataclass
class Result:
    """Of one row; the fields of an invalid one keep these values."""

    token: int = -1
    logprob: float = float("nan")
    filtered_logprob: float = float("nan")
    rank: int = 0
    num_kept: int = 0
    entropy: float = float("nan")
    kept: set[int] = field(default_factory=set)
    order: list[int] = field(default_factory=list)
    logprobs: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))


def adjusted_logits(
    logits: Floats,
    s: Settings,
    bias: Floats | None,
    allowed: NDArray[np.bool_] | None,
    prompt_ids: list[int],
    output_ids: list[int],
) -> Floats:
    y = logits.copy() if bias is None else logits + bias
    if allowed is not None:
        y[~allowed] = -np.inf
    in_vocabulary = range(len(y))
    for v in {*prompt_ids, *output_ids}:
        if v not in in_vocabulary or y[v] == -np.inf:
            continue
        factor = F32(s.repetition_penalty)
        y[v] = y[v] / factor if y[v] > 0 else y[v] * factor
        count = output_ids.count(v)
        if count:
            y[v] = (y[v] - F32(s.frequency_penalty) * F32(count)) - F32(s.presence_penalty)
    return y


def shortest_prefix(order: NDArray[np.int64], mass: Integers, needed: int) -> NDArray[np.int64]:
    running = np.cumsum(mass[order])
    return order[: int(np.searchsorted(running, np.uint64(needed), side="left")) + 1]


def by(values: NDArray, ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """The ids by value ascending, then id ascending."""
    return ids[np.lexsort((ids, values[ids]))]


def kept_tokens(
    z: Floats, d: Floats, mass: Integers, order: NDArray[np.int64], s: Settings
) -> NDArray[np.int64]:
    kept = order
    k = 1 if s.temperature < 2.0**-100 else s.top_k
    if k > 0:
        kept = kept[: int(min(k, len(kept)))]
    if s.top_p < 1:
        kept = shortest_prefix(kept, mass, fraction_of_mass(s.top_p, int(mass[kept].sum())))
    if s.min_p > 0:
        kept = kept[mass[kept] >= np.uint64(fraction_of_mass(s.min_p, FULL_MASS))]
    if s.typical_p < 1:
        total, weighted = int(mass[kept].sum()), int(weighted_mass(mass, d)[kept].sum())
        deviation = np.abs(-d.astype(np.float64) - float(weighted) / float(total)).astype(F32)
        kept = shortest_prefix(by(deviation, kept), mass, fraction_of_mass(s.typical_p, total))
    return np.sort(kept)


@np.errstate(all="ignore")
def sample(
    logits: Floats,
    s: Settings,
    seed: int,
    position: int,
    bias: Floats | None = None,
    allowed: NDArray[np.bool_] | None = None,
    prompt_ids: list[int] = [],  # noqa: B006  (never written)
    output_ids: list[int] = [],  # noqa: B006
) -> Result:
    """One row. Logprobs and entropy come from math.log and are good to 1e-12, the rest is exact."""
    y = adjusted_logits(logits, s, bias, allowed, prompt_ids, output_ids)
    greedy = s.temperature < 2.0**-100
    inverse = F32(1) if greedy else max(F32(1 / s.temperature), FLOAT_MIN)
    z = np.minimum(y * inverse, FLOAT_MAX)
    if np.isnan(z).any() or z.max() == -np.inf:
        return Result()
    d = z - z.max()
    mass = exp_mass(d)
    order = by(-z, np.flatnonzero(z > -np.inf))
    kept = kept_tokens(z, d, mass, order, s)

    kept_mass = int(mass[kept].sum())
    target = random_u64(seed, position) * kept_mass >> 64
    token = int(kept[np.searchsorted(np.cumsum(mass[kept]), np.uint64(target), side="right")])

    total = int(mass.sum())
    log_total = np.log(total / FULL_MASS)
    return Result(
        token=token,
        logprob=float(d[token]) - log_total,
        filtered_logprob=float(d[token]) - np.log(kept_mass / FULL_MASS),
        rank=int(np.flatnonzero(order == token)[0]),
        num_kept=len(kept),
        entropy=log_total + int(weighted_mass(mass, d).sum()) / total,
        kept=set(kept.tolist()),
        order=order.tolist(),
        logprobs=d.astype(np.float64) - log_total,
    )
