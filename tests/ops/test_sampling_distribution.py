# SPDX-License-Identifier: Apache-2.0
"""The draws have the distribution they should: tests on millions of draws, and proof that they would show if not.

Their power:

- G at V = 32, N = 2^21 draws: a bias that makes one half of the mass 1 % more and the other 1 % less likely gives G a
  noncentrality of N * 1e-4 = 210 over 31 degrees of freedom, that is 241 +- 30. The limit (4.5 standard deviations of a
  fair G) is 80: a fair sampler fails once in 1e5 tries, a biased one passes once in 1e7.
- G at V = 32 000, N = 2^19, tokens pooled to an expectation of 10: 16 500 degrees of freedom, standard deviation 180. A
  bias of 6 % as above gives 1890, ten of them; random numbers of 16 bits give a hundred. 1 %, or 24 bits, would not
  show.
- The tail, N = 2^22: how often tokens 16, 18, 20 and 22 nats down are drawn (121, 196, 20 and 4 times; errors of 41 %
  and 32 % in the first two show), and which of them. Random numbers of 24 bits draw these depths as often as they
  should, but always the same few tokens: so pairs of draws that hit one token are counted, 6.3 for a fair sampler and
  26 for that one, six standard deviations.

Planted samplers with each of these faults fail. Seeds are fixed, so the tests always give the same answer.
"""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import llmkern
from tests.ops import sampling_oracle as oracle

ROWS = 2**16
LIMIT = 4.5  # of a standard normal; both sides are 7e-6


def counts(logits: Tensor, draws: int, seed: int, **settings) -> Tensor:
    """How often each token is drawn at positions 0 .. draws - 1 of one seed."""
    total = torch.zeros(len(logits), dtype=torch.int64)
    for start in range(0, draws, ROWS):
        position = torch.arange(start, min(start + ROWS, draws))
        rows = logits.expand(len(position), -1)
        out = llmkern.ops.sample(
            rows, seed=seed, position=position, return_logprob=False, **settings
        )
        total += torch.bincount(out.token, minlength=len(logits))
    return total


def planted_counts(logits: Tensor, draws: int, bits: int) -> Tensor:
    """The same inversion of the same masses, with random numbers of a few bits."""
    mass = oracle.masses((logits - logits.max()).numpy())
    running = np.cumsum(mass)
    u = np.random.default_rng(0).integers(0, 2**bits, draws) / 2**bits
    target = (u * float(running[-1])).astype(np.uint64)
    token = np.searchsorted(running, target, side="right")
    return torch.from_numpy(np.bincount(token, minlength=len(logits)))


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


# ---- a large vocabulary ----

LARGE_DRAWS = 2**19


def pooled(observed: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens by falling probability, neighbours together until 10 draws of them are expected."""
    order = probabilities.argsort(descending=True)
    running = (probabilities[order] * observed.sum()).cumsum(0)
    bins, start = torch.empty(len(order), dtype=torch.int64), 0.0
    index = 0
    for i, reached in enumerate(running.tolist()):
        bins[i] = index
        if reached - start >= 10:
            index, start = index + 1, reached
    bins.clamp_(max=index - 1)  # what is left over joins the last
    zeros = torch.zeros(index, dtype=torch.float64)
    return (
        zeros.index_add(0, bins, observed[order].double()),
        zeros.index_add(0, bins, probabilities[order]),
    )


@pytest.fixture(scope="module")
def large_logits() -> Tensor:
    return torch.randn(32_000, generator=torch.Generator().manual_seed(2)) * 1.5


def large_deviation(observed: Tensor, logits: Tensor) -> float:
    return deviation(*pooled(observed, logits.double().softmax(0)))


@pytest.mark.slow
def test_softmax_of_a_large_vocabulary(large_logits):
    observed = counts(large_logits, LARGE_DRAWS, seed=4)
    bins, _ = pooled(observed, large_logits.double().softmax(0))
    assert len(bins) > 10_000
    assert abs(large_deviation(observed, large_logits)) < LIMIT


def test_faults_in_a_large_vocabulary_fail(large_logits):
    assert large_deviation(planted_counts(large_logits, LARGE_DRAWS, 16), large_logits) > LIMIT
    biased = large_logits + torch.where(torch.arange(32_000) % 2 == 0, 0.06, -0.06)
    assert large_deviation(planted_counts(biased, LARGE_DRAWS, 53), large_logits) > LIMIT


# ---- the tail ----

DEPTHS = {16: 256, 18: 3072, 20: 2304, 22: 3072}  # nats below the top: how many tokens
TAIL_DRAWS = 2**22


def tail_logits() -> Tensor:
    """All depths in one row, shuffled, and one token that has nearly all the mass."""
    rows = [torch.zeros(1)] + [torch.full((n,), -float(depth)) for depth, n in DEPTHS.items()]
    row = torch.cat(rows)
    return row[torch.randperm(len(row), generator=torch.Generator().manual_seed(5))]


def tail_deviates(observed: Tensor, logits: Tensor) -> dict[str, float]:
    """How often each depth is drawn, and how many pairs of draws from 18 nats down hit one token: Poisson numbers, as
    normal deviates of the same probability."""
    probabilities = logits.double().softmax(0)
    deviates, pairs, expected_pairs = {}, 0.0, 0.0
    for depth in DEPTHS:
        hits, p = observed[logits == -depth].double(), probabilities[logits == -depth]
        deviates[f"{depth} nats"] = poisson_deviate(hits.sum(), p.sum() * TAIL_DRAWS)
        if depth >= 18:
            pairs += float((hits * (hits - 1) / 2).sum())
            expected_pairs += float((p * TAIL_DRAWS).square().sum() / 2)
    return deviates | {"pairs": poisson_deviate(pairs, expected_pairs)}


def poisson_deviate(count: Tensor | float, mean: Tensor | float) -> float:
    """The larger of both tails' deviates, signed: more than expected is positive."""
    count, mean = (torch.as_tensor(x, dtype=torch.float64) for x in (count, mean))
    at_least = torch.special.gammainc(count.clamp(min=1e-300), mean)  # P(X >= count)
    at_most = torch.special.gammaincc(count + 1, mean)
    high, low = (-torch.special.ndtri(p.clamp(1e-300, 1 - 1e-16)) for p in (at_least, at_most))
    return float(high if high > low else -low)


@pytest.mark.slow
def test_tail():
    logits = tail_logits()
    deviates = tail_deviates(counts(logits, TAIL_DRAWS, seed=3), logits)
    assert {name: d for name, d in deviates.items() if abs(d) >= LIMIT} == {}


def test_random_numbers_of_24_bits_fail_in_the_tail():
    logits = tail_logits()
    deviates = tail_deviates(planted_counts(logits, TAIL_DRAWS, 24), logits)
    assert deviates["pairs"] >= LIMIT
    fair = tail_deviates(planted_counts(logits, TAIL_DRAWS, 53), logits)
    assert {name: d for name, d in fair.items() if abs(d) >= LIMIT} == {}


# ---- independence ----


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
