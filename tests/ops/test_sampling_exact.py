# SPDX-License-Identifier: Apache-2.0
"""Sampling is exact: the kernel on every instruction set and the reference equal the oracle, row by row."""

import functools
import math
from dataclasses import astuple, dataclass

import numpy as np
import pytest
import torch

import llmkern
from llmkern import _reference
from tests.ops import sampling_oracle as oracle

OFF = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
CHOICES = {
    "temperature": [0.0, 0.7, 1.0, 1.3, 5.0, 1e-3, 1e-29, 1e-31, 1e-300, 1e30, 1e300],
    "top_k": [1, 2, 3, 5, 50, 257, 10**6],
    "top_p": [1e-30, 0.01, 0.5, 0.9, 0.95, 0.999, 1 - 2**-53, 1.0],
    "min_p": [1e-30, 1e-9, 0.01, 0.1, 0.5, 1.0],
    "typical_p": [1e-30, 0.05, 0.5, 0.9, 0.99],
    "repetition_penalty": [0.5, 1.2, 2.0, 1e-40, 3e38],
    "presence_penalty": [0.7, -0.7, 1e30],
    "frequency_penalty": [0.3, -0.3, 3e38, -3e38],
}
VOCABULARIES = [1, 2, 3, 7, 50, 255, 256, 257, 1000]
NUM_LOGPROBS = {1: 1, 2: 1, 3: 3, 7: 7, 50: 5, 255: 0, 256: 255, 257: 20, 1000: 3}
ROWS = 420


def make_row(kind: str, V: int, rng: np.random.Generator) -> np.ndarray:
    x = rng.normal(0, 3, V)
    if kind == "quantised":  # hundreds of ties
        x = np.round(x)
    elif kind == "bfloat16":
        return torch.from_numpy(x).bfloat16().float().numpy()
    elif kind == "constant":
        x[:] = -0.0
        x[rng.random(V) < 0.5] = 0.0  # the same number
    elif kind == "peaked":
        x = x * 5 - 30
        x[rng.integers(V)] = 10
    elif kind == "denormal":
        x = x * 1e-41
    elif kind == "huge":
        x = x * 1e38
    elif kind == "merged":  # many z that differ, with one z - m
        x = rng.integers(0, 20, V) * 1e-9
        x[rng.integers(V)] = 3
    elif kind == "infinities":
        x[rng.random(V) < 0.3] = -np.inf
        x[rng.random(V) < 0.05] = np.inf
    elif kind == "nan":
        x[rng.integers(V)] = math.copysign(np.nan, rng.normal())
    elif kind == "nothing":
        x[:] = -np.inf
    with np.errstate(over="ignore"):
        return x.astype(np.float32)


KINDS = ["normal", "normal", "quantised", "bfloat16", "constant", "peaked", "denormal", "huge"]
KINDS += ["merged", "infinities", "nan", "nothing"]


@dataclass
class Batch:
    logits: np.ndarray
    settings: np.ndarray  # [B, 8]
    seeds: np.ndarray
    positions: np.ndarray
    bias: np.ndarray | None
    allowed: np.ndarray | None
    prompt_ids: np.ndarray | None
    output_ids: np.ndarray | None
    num_logprobs: int

    def tensors(self) -> list:
        arrays = (self.logits, self.bias, self.allowed, self.prompt_ids, self.output_ids)
        inputs = (*arrays, self.settings, self.seeds, self.positions)
        return [None if a is None else torch.from_numpy(a) for a in inputs]


def make_settings(B: int, rng: np.random.Generator) -> np.ndarray:
    columns = []
    for name, off in OFF.items():
        column = np.full(B, float(off))
        on = rng.random(B) < 0.35
        column[on] = rng.choice(CHOICES[name], int(on.sum()))
        columns.append(column)
    return np.stack(columns, axis=1)


@functools.cache
def make_batch(V: int, extras: bool, B: int = ROWS) -> Batch:
    rng = np.random.default_rng([V, extras])
    bias = allowed = prompt_ids = output_ids = None
    if extras:
        bias = rng.normal(0, 2, (B, V)).astype(np.float32)
        bias[rng.random((B, V)) < 0.01] = -np.inf
        allowed = rng.random((B, V)) < rng.choice([0.1, 0.5, 0.95, 1.0], (B, 1))
        prompt_ids = rng.integers(-2, V + 2, (B, 6))
        output_ids = rng.integers(-2, min(V, 5) + 1, (B, 9))
    return Batch(
        np.stack([make_row(KINDS[b % len(KINDS)], V, rng) for b in range(B)]),
        make_settings(B, rng),
        rng.integers(-(2**63), 2**63, B),
        rng.integers(-(2**63), 2**63, B),
        bias,
        allowed,
        prompt_ids,
        output_ids,
        NUM_LOGPROBS.get(V, 0),
    )


def judge(batch: Batch) -> list[oracle.Result]:
    def row(array: np.ndarray | None, b: int):
        return None if array is None else array[b]

    def ids(array: np.ndarray | None, b: int) -> list[int]:
        return [] if array is None else array[b].tolist()

    return [
        oracle.sample(
            batch.logits[b],
            oracle.Settings(*batch.settings[b].tolist()),
            int(batch.seeds[b]),
            int(batch.positions[b]),
            row(batch.bias, b),
            row(batch.allowed, b),
            ids(batch.prompt_ids, b),
            ids(batch.output_ids, b),
        )
        for b in range(len(batch.logits))
    ]


@functools.cache
def judged(V: int, extras: bool) -> list[oracle.Result]:
    return judge(make_batch(V, extras))


def assert_equal_to_oracle(got: list[np.ndarray], batch: Batch, expected: list[oracle.Result]):
    token, logprob, filtered_logprob, rank, num_kept, entropy, top_ids, top_logprobs = got
    assert token.tolist() == [r.token for r in expected]
    assert rank.tolist() == [r.rank for r in expected]
    assert num_kept.tolist() == [r.num_kept for r in expected]
    # Within one rounding to float32, and some 1e-12 where both terms cancel.
    close = functools.partial(np.testing.assert_allclose, rtol=2**-23, atol=1e-12)
    close(logprob, [r.logprob for r in expected])
    close(filtered_logprob, [r.filtered_logprob for r in expected])
    close(entropy, [r.entropy for r in expected])
    n = batch.num_logprobs
    for b, r in enumerate(expected):
        top = r.order[:n]
        assert top_ids[b].tolist() == top + [-1] * (n - len(top))
        beyond = np.nan if r.token < 0 else -np.inf
        close(top_logprobs[b], [*r.logprobs[top], *[beyond] * (n - len(top))])


def by_kernel(batch: Batch) -> list[np.ndarray]:
    out = torch.ops.llmkern.sample.default(*batch.tensors(), batch.num_logprobs)
    return [tensor.numpy() for tensor in out]


def by_reference(batch: Batch) -> tuple[list[np.ndarray], np.ndarray]:
    *out, kept = _reference.sample(
        batch.logits,
        batch.settings,
        batch.seeds,
        batch.positions,
        batch.bias,
        batch.allowed,
        batch.prompt_ids,
        batch.output_ids,
        batch.num_logprobs,
    )
    return out, kept


@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("V", VOCABULARIES)
def test_kernel_equals_oracle(isa, V, extras):
    batch = make_batch(V, extras)
    assert_equal_to_oracle(by_kernel(batch), batch, judged(V, extras))


@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("V", VOCABULARIES)
def test_reference_equals_oracle(V, extras):
    batch, expected = make_batch(V, extras), judged(V, extras)
    got, kept = by_reference(batch)
    assert_equal_to_oracle(got, batch, expected)
    assert [set(np.flatnonzero(row).tolist()) for row in kept] == [r.kept for r in expected]


@pytest.mark.parametrize("V", [50, 1000])
def test_kernel_equals_reference_bitwise(isa, V):
    batch = make_batch(V, True)
    for got, expected in zip(by_kernel(batch), by_reference(batch)[0], strict=True):
        assert got.tobytes() == expected.tobytes()


def test_every_branch_of_the_cases_is_taken():
    """The cases mean something: valid rows of every size of kept set, and invalid ones."""
    results = [r for V in VOCABULARIES for extras in (False, True) for r in judged(V, extras)]
    assert len(results) == 7560
    assert sum(r.token < 0 for r in results) > 700
    assert sum(r.num_kept == 1 for r in results) > 1000
    assert sum(r.num_kept > 20 for r in results) > 1000
    assert sum(r.rank > 0 for r in results) > 1000


@pytest.mark.parametrize("name", ["normal", "bfloat16", "constant"])
def test_a_million_tokens(isa, name):
    V = 2**20
    rng = np.random.default_rng(5)
    # One filter a row, and all together; then nothing.
    rows = [
        {"top_k": 40000},
        {"top_p": 0.9},
        {"top_k": 70000, "top_p": 0.8, "min_p": 1e-4, "typical_p": 0.9},
        {},
    ]
    if isa == "generic" or name != "normal":
        rows = rows[2:3]
    logits = make_row(name, V, rng)
    settings = np.array([list((OFF | row).values()) for row in rows], dtype=np.float64)
    B = len(rows)
    batch = Batch(
        np.stack([logits] * B),
        settings,
        np.arange(B),
        np.arange(B),
        *[None] * 4,
        num_logprobs=100,
    )
    assert_equal_to_oracle(by_kernel(batch), batch, million(name, settings.tobytes()))


@functools.cache
def million(name: str, settings: bytes) -> list[oracle.Result]:
    rows = np.frombuffer(settings).reshape(-1, len(OFF))
    logits = make_row(name, 2**20, np.random.default_rng(5))
    return [
        oracle.sample(logits, oracle.Settings(*row.tolist()), b, b) for b, row in enumerate(rows)
    ]


def test_exp_mass_is_the_oracles_and_close_to_exp():
    d = np.concatenate(
        [-np.linspace(0, 30, 400_001), -np.logspace(-45, 38, 100_000), [0.0, -64.0, -np.inf]]
    ).astype(np.float32)
    mass = _reference.exp_mass(d)
    np.testing.assert_array_equal(mass, oracle.exp_mass(d))
    exact = np.exp(d.astype(np.float64)) * 2**40
    error = np.abs(mass - exact) - 0.5  # beyond the rounding to an integer
    assert (error <= 8e-8 * exact).all()
    assert mass[d < -28.42].max() == 0
    assert mass[d == 0].min() == mass.max() == 2**40


def test_log_mass_is_the_logarithm():
    mass = np.unique(np.concatenate([np.logspace(0, 18.9, 20_000).astype(np.uint64), [1, 2**40]]))
    error = _reference.log_mass(mass) - np.log(mass / 2.0**40)
    assert np.abs(error).max() < 1e-14
    assert _reference.log_mass(np.array([2**40], dtype=np.uint64))[0] == 0.0


ONES = 0xFFFFFFFF
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
KNOWN_ANSWERS = [  # kat_vectors of Random123, philox4x32 with 10 rounds
    (0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (2**64 - 1, (ONES,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (0x299F31D0A4093822, PI, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


@pytest.mark.parametrize(("key", "counter", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(key, counter, expected):
    assert _reference.philox(key, counter) == expected
    assert oracle.philox(key, counter) == expected


def test_kept_sets_are_those_of_hugging_face():
    """In generic position (no ties), against its warpers, written with sort and cumsum in float64."""
    rng = np.random.default_rng(0)
    B, V = 300, 200
    batch = make_batch(V, False, B)
    logits = rng.normal(0, 3, (B, V)).astype(np.float32)
    settings = np.tile(np.array(list(OFF.values()), dtype=np.float64), (B, 1))
    choices = {0: [0.5, 1, 2], 1: [0, 0, 2, 30], 2: [1, 1, 0.3, 0.95], 3: [0, 0, 0.01, 0.2]}
    for column, values in (choices | {4: [1, 1, 0.4, 0.9]}).items():
        settings[:, column] = rng.choice(values, B)
    batch = Batch(logits, settings, batch.seeds, batch.positions, *[None] * 4, num_logprobs=0)
    _, kept = by_reference(batch)
    num_kept = by_kernel(batch)[4]
    for b in range(B):
        expected = hugging_face_kept(logits[b], *settings[b, :5].tolist())
        assert np.flatnonzero(kept[b]).tolist() == expected
        assert num_kept[b] == len(expected)


def hugging_face_kept(logits, temperature, top_k, top_p, min_p, typical_p) -> list[int]:
    scores = torch.from_numpy(logits).double() / temperature
    if top_k:
        scores[scores < scores.topk(min(int(top_k), len(scores))).values[-1]] = -math.inf
    if top_p < 1:
        ascending, ids = scores.sort()
        remove = ascending.softmax(0).cumsum(0) <= 1 - top_p
        remove[-1:] = False
        scores[ids[remove]] = -math.inf
    if min_p > 0:
        probabilities = scores.softmax(0)
        scores[probabilities < min_p * probabilities.max()] = -math.inf
    if typical_p < 1:
        logprobs = scores.log_softmax(0)
        entropy = -(logprobs * logprobs.exp()).nansum()
        shifted, ids = (-logprobs - entropy).abs().sort()
        cumulative = scores[ids].softmax(0).cumsum(0)
        last = min(int((cumulative < typical_p).sum()), len(ids) - 1)
        scores[ids[shifted > shifted[last]]] = -math.inf
    return torch.isfinite(scores).nonzero()[:, 0].tolist()


def test_public_function_passes_everything_on():
    """The keyword arguments reach the fields they name: the public function equals the oracle too."""
    batch = make_batch(50, True)
    expected = judged(50, True)
    logits, bias, allowed, prompt_ids, output_ids, settings, seeds, positions = batch.tensors()
    out = llmkern.ops.sample(
        logits,
        **dict(zip(OFF, settings.unbind(1), strict=True)),
        prompt_ids=prompt_ids,
        output_ids=output_ids,
        logit_bias=bias,
        allowed=allowed,
        seed=seeds,
        position=positions,
        num_logprobs=batch.num_logprobs,
    )
    assert_equal_to_oracle([t.numpy() for t in out[:6] + out[7:]], batch, expected)
    assert out.valid.tolist() == [r.token >= 0 for r in expected]
    assert list(OFF.values()) == list(astuple(oracle.Settings()))
