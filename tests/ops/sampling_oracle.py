# SPDX-License-Identifier: Apache-2.0
"""The judge of sampling: its four steps (csrc/kernels/sampling.h) again, in numpy and Python's integers.

Written from the contract alone and without the project's native code, so that equality means something. numpy has no
fused multiply-add: fmaf is computed in float64, rounded to odd, and then rounded to float32, which is exact (Boldo &
Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd", 2008).
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

F32 = np.float32
FLOAT_MAX = F32(3.4028234663852886e38)
MASS_BITS = 40
FULL_MASS = 2**MASS_BITS
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


def falloff(temperature: float) -> tuple[F32, F32]:
    """What a distance is multiplied by, and the distance at which nothing is left of a mass."""
    scale = max(F32(np.log2(np.e) / temperature), F32(2.0**-120))
    return scale, F32(-48) / scale


EIGHTH_POWERS = np.array([2 ** (j / 8) for j in range(8)], F32)
CUBIC = [F32(float.fromhex(c)) for c in ("0x1.62e432p-1", "0x1.ec0c32p-3", "0x1.c6a004p-5")]


def exp_mass(d: Floats, temperature: float = 1.0) -> Floats:
    """2^(40 + d * scale) for d <= 0: 2^(j / 8) from a table, 2^r for |r| <= 1/16 by a cubic."""
    scale, lowest = falloff(temperature)
    d = np.maximum(d, lowest)
    eighths = F32(1.5 * 2**20 + MASS_BITS)  # whose last place is 1/8
    n = fmaf(d, scale, eighths) - eighths
    r = fmaf(d, scale, -n)
    whole = (8 * np.float64(n)).astype(np.int64) + 8 * MASS_BITS
    power = np.ldexp(EIGHTH_POWERS[whole % 8], whole // 8)
    q = fmaf(fmaf(r, CUBIC[2], CUBIC[1]), r, CUBIC[0])
    return fmaf(power * r, q, power)


def masses(d: Floats, temperature: float = 1.0) -> Integers:
    return np.rint(np.float64(exp_mass(d, temperature))).astype(np.uint64)


def weighted_masses(mass: Integers, d: Floats, temperature: float) -> Integers:
    """round(mass * information in bits), the products in float32."""
    scale, lowest = falloff(temperature)
    product = mass.astype(F32) * -(np.maximum(d, lowest) * scale)
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
    num_kept: int = 0
    filtered_logprob: float = float("nan")
    logprob: float = float("nan")
    entropy: float = float("nan")
    rank: int = 0
    kept: list[int] = field(default_factory=list)
    order: list[int] = field(default_factory=list)
    logprobs: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    processed: Floats = field(default_factory=lambda: np.empty(0, F32))


def adjusted_logits(
    logits: Floats,
    s: Settings,
    bias: Floats | None,
    sparse_bias: dict[int, float],
    allowed: NDArray[np.bool_] | None,
    prompt_ids: list[int],
    output_ids: list[int],
) -> Floats:
    y = logits.copy() if bias is None else logits + bias
    in_vocabulary = range(len(y))
    for v, value in sparse_bias.items():
        if v in in_vocabulary:
            y[v] += F32(value)
    if allowed is not None:
        y[~allowed] = -np.inf
    for v in {*prompt_ids, *output_ids}:
        if v not in in_vocabulary or y[v] == -np.inf:
            continue
        factor = F32(s.repetition_penalty)
        y[v] = y[v] / factor if y[v] > 0 else y[v] * factor
        count = output_ids.count(v)
        if count:
            y[v] = (y[v] - F32(s.frequency_penalty) * F32(count)) - F32(s.presence_penalty)
    return np.minimum(y, FLOAT_MAX)


def shortest_prefix(order: NDArray[np.int64], mass: Integers, needed: int) -> NDArray[np.int64]:
    running = np.cumsum(mass[order])
    return order[: int(np.searchsorted(running, np.uint64(needed), side="left")) + 1]


def by(values: NDArray, ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """The ids by value ascending, then id ascending."""
    return ids[np.lexsort((ids, values[ids]))]


def kept_tokens(
    d: Floats, mass: Integers, weighted: Integers, order: NDArray[np.int64], s: Settings
) -> NDArray[np.int64]:
    kept = order
    greedy = s.temperature < 2.0**-100
    k = 1 if greedy else s.top_k
    if k > 0:
        kept = kept[: int(min(k, len(kept)))]
    if s.top_p < 1:
        kept = shortest_prefix(kept, mass, fraction_of_mass(s.top_p, int(mass[kept].sum())))
    if s.min_p > 0:
        kept = kept[mass[kept] >= np.uint64(fraction_of_mass(s.min_p, FULL_MASS))]
    if s.typical_p < 1:
        total = int(mass[kept].sum())
        mean = float(int(weighted[kept].sum())) / float(total)
        information = -np.float64(d * falloff(1.0 if greedy else s.temperature)[0])
        deviation = np.abs(information - mean).astype(F32)
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
    sparse_bias: dict[int, float] = {},  # noqa: B006
) -> Result:
    """One row. Logprobs and entropy come from np.log and are good to 1e-12, the rest is exact."""
    y = adjusted_logits(logits, s, bias, sparse_bias, allowed, prompt_ids, output_ids)
    if np.isnan(y).any() or y.max() == -np.inf:
        return Result(processed=np.full(len(y), -np.inf, F32))
    temperature = 1.0 if s.temperature < 2.0**-100 else s.temperature
    d = (y - y.max()) + F32(0)  # never -0
    mass = masses(d, temperature)
    weighted = weighted_masses(mass, d, temperature)
    order = by(-y, np.flatnonzero(y > -np.inf))
    kept = kept_tokens(d, mass, weighted, order, s)

    kept_mass = int(mass[kept].sum())
    target = random_u64(seed, position) * kept_mass >> 64
    token = int(kept[np.searchsorted(np.cumsum(mass[kept]), np.uint64(target), side="right")])

    total = int(mass.sum())
    log_total = np.log(total / FULL_MASS)
    scaled = np.float64(d) / temperature
    processed = np.full(len(y), -np.inf, F32)
    processed[kept] = (np.float64(y[kept]) / temperature).astype(F32)
    return Result(
        token=token,
        num_kept=len(kept),
        filtered_logprob=scaled[token] - np.log(kept_mass / FULL_MASS),
        logprob=scaled[token] - log_total,
        entropy=log_total + np.log(2) * (int(weighted.sum()) / total),
        rank=int(np.flatnonzero(order == token)[0]),
        kept=kept.tolist(),
        order=order.tolist(),
        logprobs=scaled - log_total,
        processed=processed,
    )
