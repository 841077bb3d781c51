# SPDX-License-Identifier: Apache-2.0
"""The draws have the distribution they should: G-tests on two million draws, and proof that a 1 % bias would show.

The power of the main test: N = 2^21 draws and a bias that makes one half of the mass 1 % more and the other 1 % less
likely give G a noncentrality of N * 1e-4 = 210 over 31 degrees of freedom, that is 241 +- 30. The limit (4.5 standard
deviations of a fair G) is 80: a fair sampler fails once in 1e5 tries, a biased one passes once in 1e7. Seeds are fixed,
so the tests always give the same answer.
"""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import llmkern

ROWS = 2**16
LIMIT = 4.5


def counts(logits: Tensor, draws: int, seed: int, **settings) -> Tensor:
    """How often each token is drawn at positions 0 .. draws - 1 of one seed."""
    rows = logits.repeat(ROWS, 1)
    total = torch.zeros(len(logits), dtype=torch.int64)
    for start in range(0, draws, ROWS):
        position = torch.arange(start, start + ROWS)
        token = llmkern.ops.sample(rows, seed=seed, position=position, **settings).token
        total += torch.bincount(token, minlength=len(logits))
    return total


def deviation(observed: Tensor, probabilities: Tensor) -> float:
    """The G statistic as a standard normal deviate (Wilson & Hilferty 1931)."""
    possible = probabilities > 0
    assert observed[~possible].sum() == 0, "a token without probability was drawn"
    observed, expected = observed[possible].double(), probabilities[possible] * observed.sum()
    assert expected.min() >= 10, "too few draws for the test"
    g = 2 * torch.special.xlogy(observed, observed / expected).sum().item()
    df = len(observed) - 1
    return ((g / df) ** (1 / 3) - (1 - 2 / (9 * df))) / math.sqrt(2 / (9 * df))


@pytest.fixture(scope="module")
def logits() -> Tensor:
    return torch.randn(32, generator=torch.Generator().manual_seed(1))


def test_softmax(logits):
    assert abs(deviation(counts(logits, 2**21, seed=1), logits.double().softmax(0))) < LIMIT


def test_a_bias_of_one_percent_fails(logits):
    """Half of the mass gets 1 % more: the test above would see it."""
    order = logits.argsort(descending=True)
    half = logits.softmax(0)[order].cumsum(0) < 0.5
    biased = logits.clone()
    biased[order[half]] += math.log(1.01 / 0.99)
    assert deviation(counts(biased, 2**21, seed=1), logits.double().softmax(0)) > LIMIT


def test_temperature_and_filters_renormalise(logits):
    settings = {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.02}
    scores = logits.double() / 1.5
    kept = scores >= scores.topk(20).values[-1]
    descending = scores[kept].sort(descending=True).values
    running = descending.softmax(0).cumsum(0)
    kept &= scores >= descending[int((running < 0.9).sum())]
    kept &= scores >= scores.max() + math.log(0.02)
    assert 5 < kept.sum() < 20
    probabilities = scores.masked_fill(~kept, -math.inf).softmax(0)
    assert abs(deviation(counts(logits, 2**19, seed=2, **settings), probabilities)) < LIMIT


def test_tail():
    """Sixteen nats below the top, where samplers with 24-bit noise fail: about 60 draws of a million."""
    tail = torch.full((513,), -16.0)
    tail[0] = 0.0
    probability = 512 * math.exp(-16) / (1 + 512 * math.exp(-16))
    rows = tail.repeat(2**13, 1)
    hits = 0
    for start in range(0, 2**20, len(rows)):
        position = torch.arange(start, start + len(rows))
        hits += int((llmkern.ops.sample(rows, seed=3, position=position).token > 0).sum())
    expected = 2**20 * probability
    assert abs(hits - expected) < LIMIT * math.sqrt(expected)


@pytest.mark.parametrize("vary", ["position", "seed"])
def test_neighbouring_draws_are_independent(vary):
    """Pairs of successive draws, over consecutive positions of one seed or consecutive seeds at one position."""
    draws = 2**19
    index = torch.arange(draws)
    fixed = torch.zeros(draws, dtype=torch.int64)
    where = {"seed": index, "position": fixed} if vary == "seed" else {"position": index, "seed": 0}
    probabilities = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    token = llmkern.ops.sample(probabilities.log().repeat(draws, 1), **where).token
    pairs = torch.bincount(token[:-1:2] * 4 + token[1::2], minlength=16)
    assert abs(deviation(pairs, torch.outer(probabilities, probabilities).reshape(-1))) < LIMIT


def test_the_deviate_of_the_statistic_is_standard_normal():
    """The judge is judged: fair multinomial samples by numpy give deviates of mean 0 and variance 1."""
    probabilities = torch.full((32,), 1 / 32, dtype=torch.float64)
    rng = np.random.default_rng(0)
    deviates = [
        deviation(torch.from_numpy(rng.multinomial(10**5, probabilities)), probabilities)
        for _ in range(400)
    ]
    assert abs(np.mean(deviates)) < 0.2
    assert abs(np.std(deviates) - 1) < 0.15
