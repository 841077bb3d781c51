# SPDX-License-Identifier: Apache-2.0
"""top_p where a sample of the row misleads (cpu/sampling/nucleus.h), and extremes of temperature and of logits.

The kernel guesses from every stride-th vector of a row where its nucleus ends. So rows are made with all that matters
between those vectors, or in them alone, for every width of vector: the guess is then too high or too low, and the set
must be the right one all the same.
"""

import math

import numpy as np
import pytest
import torch

from llmkern.ops import sample
from tests.ops.sampling_cases import (
    assert_equal_to_oracle,
    assert_same_bits,
    by_kernel,
    by_reference,
    judge,
    make_batch,
    settings_of,
)

TOP_P = [1e-30, 1e-6, 0.01, 0.3, 0.5, 0.9, 0.99, 0.9999, 1 - 1e-9, 1 - 2**-53]
FLT_MAX = float(np.finfo(np.float32).max)


def sampled(V: int, lanes: int) -> np.ndarray:
    """Which tokens a kernel with vectors of so many lanes looks at: one vector in V / 2048, at most in 16."""
    stride = min(max(V // 2048, 1), 16)
    return np.arange(V) // lanes % stride == 0


def misleading_rows(V: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """float32 [V] by name."""
    noise = rng.normal(0, 1, V)
    rows: dict[str, np.ndarray] = {}
    for lanes in (4, 8, 16):
        seen = sampled(V, lanes)
        rows[f"mass between the vectors of {lanes}"] = np.where(seen, noise - 8, noise)
        rows[f"mass in the vectors of {lanes}"] = np.where(seen, noise, noise - 8)
        rows[f"flat in, steep between the vectors of {lanes}"] = np.where(seen, 0, noise * 5)
        rows[f"nothing in the vectors of {lanes}"] = np.where(seen, -np.inf, noise)
        rows[f"nothing but the vectors of {lanes}"] = np.where(seen, noise, -np.inf)
        rows[f"two values, by the vectors of {lanes}"] = np.where(seen, 0.0, -1.0)
        rows[f"two values, against the vectors of {lanes}"] = np.where(seen, -1.0, 0.0)
    for name, place in {"first": 0, "last": V - 1, "in the middle": V * 3 // 5}.items():
        rows[f"one giant, {name}"] = noise - 30
        rows[f"one giant, {name}"][place] = 5
        rows[f"one of half the mass, {name}"] = np.zeros(V)
        rows[f"one of half the mass, {name}"][place] = math.log(max(V - 1, 1))
    rows["all equal"] = np.full(V, 0.25)
    rows["all equal but the last"] = np.append(np.zeros(V - 1), -1e-3)
    rows["both zeros"] = np.where(rng.random(V) < 0.5, 0.0, -0.0)
    rows["ascending"] = np.sort(noise * 3)
    rows["descending"] = -np.sort(noise * 3)
    rows["ascending by one"] = np.arange(V) * 1e-3
    rows["a slope of a bin"] = np.arange(V) % 385 * -math.log(2) / 8
    rows["between two bins"] = (np.arange(V) % 385 + 0.5) * -math.log(2) / 8
    rows["half without mass"] = np.where(rng.random(V) < 0.5, noise, -1e30)
    rows["uniform"] = rng.random(V) * 40
    rows["heavy tail"] = rng.standard_cauchy(V)
    rows["huge"] = np.clip(noise * 1e38, -FLT_MAX, FLT_MAX)
    rows["denormal"] = noise * 1e-41
    return {name: row.astype(np.float32) for name, row in rows.items()}


def misleading_batch(V: int, temperature: float, more: dict | None = None):
    rng = np.random.default_rng(V)
    rows = list(misleading_rows(V, rng).values())
    settings = [{"top_p": p, "temperature": temperature} | (more or {}) for p in TOP_P]
    logits = np.repeat(np.stack(rows), len(TOP_P), axis=0)
    return make_batch(logits, rng, settings=settings_of(*settings * len(rows)))


@pytest.mark.parametrize("temperature", [1.0, 0.05, 30.0, 1e-29, 1e30])
@pytest.mark.parametrize("V", [1, 2, 17, 1024, 3000, 4096, 6000, 33_000])
def test_rows_whose_sample_misleads(V, temperature, on_isas):
    """All of them by the reference, on every instruction set."""
    if V > 10_000 and temperature != 1:
        pytest.skip("the largest vocabulary once")
    batch = misleading_batch(V, temperature)
    expected = by_reference(batch)
    for _ in on_isas():
        assert_same_bits(by_kernel(batch), expected)


@pytest.mark.parametrize(
    "more",
    [
        {"typical_p": 0.6},
        {"min_p": 1e-4},
        {"top_k": 40},
        {"top_k": 900},  # which a sample of the row finds too
        {"top_k": 4900},
        {"top_k": 300, "temperature": 1e-29},
    ],
    ids=str,
)
def test_misleading_rows_with_another_filter(more, on_isas):
    batch = misleading_batch(5000, 1.0, more)
    expected = by_reference(batch)
    for _ in on_isas():
        assert_same_bits(by_kernel(batch), expected)


def test_misleading_rows_by_the_oracle(isa):
    batch = misleading_batch(4096, 1.0)
    assert_equal_to_oracle(by_kernel(batch), batch, judge(batch))


# ---- extremes ----

EXTREME_ROWS = [
    [1.0, 2.0, 3.0, 2.0],
    [0.0, -0.0, 0.0, -0.0],
    [-0.0, -1e-45, 0.0, 1e-45],
    [1e-45, 3e-45, 1e-38, 1.2e-38],
    [FLT_MAX, -FLT_MAX, 0.0, 1.0],
    [-FLT_MAX, -FLT_MAX, -math.inf, -FLT_MAX],
    [FLT_MAX, math.inf, 3e38, -3e38],
    [math.inf, math.inf, -math.inf, 0.0],
    [1e30, 1e30, 1e30 + 1e23, 0.0],
    [-math.inf, -math.inf, -math.inf, -5.0],
]
TEMPERATURES = [0.0, 5e-324, 1e-300, 1e-31, 1e-30, 1e-20, 1e-3, 1.0, 1e10, 1e30, 1e36, 1e300]


@pytest.mark.parametrize(
    "filters",
    [
        {},
        {"top_k": 2},
        {"top_p": 0.5},
        {"top_p": 1e-30},
        {"min_p": 1e-30},
        {"min_p": 1.0},
        {"typical_p": 0.3},
        {"top_p": 0.9, "typical_p": 0.9, "min_p": 0.1},
    ],
    ids=str,
)
def test_extremes(isa, filters):
    """By the oracle; also at the end of longer rows, where the vectors are full."""
    small = np.array(EXTREME_ROWS, np.float32)
    for rest in (0, 61, 2100):
        tail = np.where(np.isinf(small[:, :1]), -np.inf, np.minimum(small[:, :1], 0))
        rows = np.concatenate([np.repeat(tail, rest, 1).astype(np.float32), small], axis=1)
        logits = np.repeat(rows, len(TEMPERATURES), axis=0)
        settings = [filters | {"temperature": t} for t in TEMPERATURES] * len(rows)
        rng = np.random.default_rng(rest)
        batch = make_batch(logits, rng, settings=settings_of(*settings), num_logprobs=4)
        assert_equal_to_oracle(by_kernel(batch), batch, judge(batch))


def test_temperature_extremes_by_hand():
    row = torch.tensor([1.0, 3.0, 2.9999998, 3.0])
    rows = row.expand(3000, 4)
    for cold in (0, 5e-324, 1e-300, 1e-31):  # greedy
        assert set(sample(rows, temperature=cold, seed=0).token.tolist()) == {1}
    assert set(sample(rows, temperature=1e-30, seed=0).token.tolist()) == {1, 3}
    hot = sample(rows, temperature=1e300, seed=0, return_entropy=True)
    counts = torch.bincount(hot.token, minlength=4)
    assert (counts - 750).abs().max() < 120  # 5 standard deviations
    torch.testing.assert_close(hot.entropy, torch.full((3000,), math.log(4)))


def test_equals_that_only_the_temperature_makes(isa):
    """The order is by logit: tokens whose masses are equal at this temperature keep the order of their logits."""
    logits = torch.arange(100.0).flip(0).repeat(50, 1)
    out = sample(logits, temperature=1e20, top_k=3, seed=0, num_logprobs=4)
    assert out.top_ids[0].tolist() == [0, 1, 2, 3]
    assert set(out.token.tolist()) == {0, 1, 2}
    out = sample(logits.flip(1), temperature=1e20, top_p=0.03, seed=0)
    assert set(out.token.tolist()) == {97, 98, 99}
