# SPDX-License-Identifier: Apache-2.0
"""Sampling is exact: the kernel on every instruction set and the reference equal the oracle, row by row."""

import functools
import math

import numpy as np
import pytest
import torch

import llmkern
from llmkern import _reference
from tests.ops import sampling_oracle as oracle
from tests.ops.sampling_cases import (
    KINDS,
    OFF,
    Batch,
    assert_equal_to_oracle,
    assert_same_bits,
    by_kernel,
    by_reference,
    judge,
    make_batch,
    make_rows,
    settings_of,
)

NUM_LOGPROBS = {1: 1, 2: 1, 3: 3, 7: 7, 50: 5, 255: 0, 256: 255, 257: 20, 1000: 3}
VOCABULARIES = list(NUM_LOGPROBS)
ROWS_OF_A_KIND = 32


@functools.cache
def mixed_batch(V: int, extras: bool) -> Batch:
    rng = np.random.default_rng([V, extras])
    logits = np.concatenate([make_rows(kind, ROWS_OF_A_KIND, V, rng) for kind in KINDS])
    return make_batch(logits, rng, extras, NUM_LOGPROBS[V])


@functools.cache
def judged(V: int, extras: bool) -> list[oracle.Result]:
    return judge(mixed_batch(V, extras))


@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("V", VOCABULARIES)
def test_kernel_equals_oracle(isa, V, extras):
    batch = mixed_batch(V, extras)
    assert_equal_to_oracle(by_kernel(batch), batch, judged(V, extras))


@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("V", VOCABULARIES)
def test_reference_equals_oracle(V, extras):
    batch, expected = mixed_batch(V, extras), judged(V, extras)
    got = by_reference(batch)
    assert_equal_to_oracle(got, batch, expected)
    assert [np.flatnonzero(row).tolist() for row in got["kept"]] == [r.kept for r in expected]


@pytest.mark.parametrize("V", [50, 1000])
def test_kernel_equals_reference_bitwise(isa, V):
    batch = mixed_batch(V, True)
    assert_same_bits(by_kernel(batch), by_reference(batch))


def test_every_branch_of_the_cases_is_taken():
    """The cases mean something: valid rows of every size of kept set, and invalid ones."""
    results = [r for V in VOCABULARIES for extras in (False, True) for r in judged(V, extras)]
    assert len(results) == len(VOCABULARIES) * 2 * len(KINDS) * ROWS_OF_A_KIND
    assert sum(r.token < 0 for r in results) > 700
    assert sum(r.num_kept == 1 for r in results) > 1000
    assert sum(r.num_kept > 20 for r in results) > 1000
    assert sum(r.rank > 0 for r in results) > 1000


@functools.cache
def large_batch(name: str) -> tuple[Batch, list[oracle.Result]]:
    """Of a million tokens: one filter a row, all together, and nothing."""
    rng = np.random.default_rng(5)
    rows = [{"top_k": 70000, "top_p": 0.8, "min_p": 1e-4, "typical_p": 0.9}]
    if name == "normal":
        rows += [{"top_k": 40000}, {"top_p": 0.9}, {"top_p": 0.999, "temperature": 2}, {}]
    logits = np.repeat(make_rows(name, 1, 2**20, rng), len(rows), 0)
    batch = make_batch(logits, rng, num_logprobs=100, settings=settings_of(*rows))
    return batch, judge(batch)


@pytest.mark.parametrize("name", ["normal", "bfloat16", "constant"])
def test_a_million_tokens(isa, name):
    batch, expected = large_batch(name)
    assert_equal_to_oracle(by_kernel(batch), batch, expected)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0**-100, 1e-20, 1e20, 1e300])
def test_exp_mass_is_the_oracles_and_close_to_exp(temperature):
    """Bounds: csrc/kernels/arithmetic.h, exp_mass; half of 1 more for the rounding to an integer."""
    information = np.concatenate(
        [np.linspace(0, 45, 400_001), np.logspace(-45, 38, 100_000), [0.0, 48, 64]]
    )
    with np.errstate(over="ignore"):
        d = np.append(-information * math.log(2) * temperature, -np.inf).astype(np.float32)
    mass = _reference.exp_mass(d, temperature)
    np.testing.assert_array_equal(mass, oracle.masses(d, temperature))
    assert mass[d == 0].min() == mass.max() == 2**40
    scale = float(oracle.falloff(temperature)[0])
    bits = d.astype(np.float64) * scale
    if temperature != 1e300:  # whose scale is no longer log2(e) / temperature
        assert abs(scale * math.log(2) * temperature - 1) < 2**-24
    exact = np.exp2(40 + np.maximum(bits, -60))
    assert (np.abs(mass - exact) - 0.5 <= 1.5e-7 * exact).all()
    assert mass[bits < -41].max() == 0


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
    B = 300
    settings = np.tile(np.array(list(OFF.values()), dtype=np.float64), (B, 1))
    choices = {0: [0.5, 1, 2], 1: [0, 0, 2, 30], 2: [1, 1, 0.3, 0.95], 3: [0, 0, 0.01, 0.2]}
    for column, values in (choices | {4: [1, 1, 0.4, 0.9]}).items():
        settings[:, column] = rng.choice(values, B)
    batch = make_batch(make_rows("normal", B, 200, rng), rng, settings=settings)
    kept = np.isfinite(by_kernel(batch)["processed"])
    np.testing.assert_array_equal(kept, by_reference(batch)["kept"])
    for b in range(B):
        expected = hugging_face_kept(batch.logits[b], *settings[b, :5].tolist())
        assert np.flatnonzero(kept[b]).tolist() == expected


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
    batch = mixed_batch(50, True)
    batch = Batch(**vars(batch) | {"bias_ids": None, "bias_values": None})
    tensors = {n: torch.from_numpy(a) for n, a in vars(batch).items() if isinstance(a, np.ndarray)}
    out = llmkern.ops.sample(
        tensors["logits"],
        **dict(zip(OFF, tensors["settings"].unbind(1), strict=True)),
        prompt_ids=tensors["prompt_ids"],
        output_ids=tensors["output_ids"],
        logit_bias=tensors["bias"],
        allowed=tensors["allowed"],
        seed=tensors["seeds"],
        position=tensors["positions"],
        num_logprobs=batch.num_logprobs,
        return_entropy=True,
        return_rank=True,
    )
    got = {name: tensor.numpy() for name, tensor in out._asdict().items()}
    assert_equal_to_oracle(got, batch, judge(batch))
