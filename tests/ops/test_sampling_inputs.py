# SPDX-License-Identifier: Apache-2.0
"""What sampling reads and gives back: dtypes, strides, biases, masks, outputs on request, filter_logits, threads."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch

from llmkern.ops import SampleOutput, filter_logits, sample
from tests.ops.sampling_cases import (
    KINDS,
    OFF,
    Batch,
    assert_equal_to_oracle,
    assert_same,
    assert_same_bits,
    by_kernel,
    by_reference,
    judge,
    make_batch,
    make_rows,
    packed,
    settings_of,
)

INF = math.inf
EVERYTHING = {"num_logprobs": 3, "return_entropy": True, "return_rank": True}
HALVES = [torch.bfloat16, torch.float16]


def mixed(V: int, extras: bool = False, rows: int = 8):
    """A batch with all kinds of rows."""
    rng = np.random.default_rng([V, extras])
    logits = np.concatenate([make_rows(kind, rows, V, rng) for kind in KINDS])
    return make_batch(logits, rng, extras, num_logprobs=min(V, 3))


# ---- dtypes and strides ----


@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("V", [1, 31, 1000, 2085])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_16_bit_logits_are_the_same_values_in_float32(isa, dtype, V, extras):
    batch = mixed(V, extras)
    half = torch.from_numpy(batch.logits).to(dtype)
    expected = by_kernel(batch, half.float())
    assert_same_bits(by_kernel(batch, half), expected)
    wider = torch.full((len(batch), V + 9), math.nan, dtype=dtype)
    wider[:, 3:-6] = half
    assert_same_bits(by_kernel(batch, wider[:, 3:-6]), expected)


def test_every_number_of_16_bits_is_read_as_it_is(isa):
    """All 65536 of both formats, NaN excepted, as the only token that is not -inf."""
    for dtype in HALVES:
        numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
        numbers = numbers[~numbers.isnan()]
        expected = numbers.float().clamp(max=torch.finfo(torch.float32).max)
        assert torch.equal(filter_logits(numbers), expected)


@pytest.mark.parametrize("dtype", [torch.float64, *HALVES], ids=str)
def test_the_public_function_takes_other_dtypes(dtype):
    logits = torch.randn(6, 50).to(dtype)
    out = sample(logits, seed=0, top_k=20, logit_bias=logits[0], **EVERYTHING)
    bias = logits[0].float()
    assert_same(out, sample(logits.float(), seed=0, top_k=20, logit_bias=bias, **EVERYTHING))
    assert out.logprob.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_any_strides(isa, dtype):
    """Rows any distance apart are read where they lie; tokens apart are copied first. What is between is not read."""
    B, V = 7, 1301
    wide = torch.full((B, 2, 2 * V), math.nan, dtype=dtype)
    logits = torch.randn(B, V).to(dtype)
    wide[:, 1, 5 : V + 5] = logits
    wide[:, 0, ::2] = logits
    options = {"seed": 0, "top_p": 0.9} | EVERYTHING
    expected = sample(logits, **options)
    assert_same(sample(wide[:, 1, 5 : V + 5], **options), expected)
    assert_same(sample(wide[:, 0, ::2], **options), expected)
    assert_same(sample(logits.t().contiguous().t(), **options), expected)
    assert_same(sample(logits.flip(0)[torch.arange(B - 1, -1, -1)], **options), expected)
    same = logits[:1].expand(B, -1)
    assert same.stride(0) == 0
    seeds = torch.tensor(3).expand(B)
    assert_same(
        sample(same, **options | {"seed": seeds}),
        sample(same.contiguous(), **options | {"seed": seeds.contiguous()}),
    )
    one = torch.randn(B, 3).to(dtype)[:, 1:2]  # a vocabulary of one: its stride means nothing
    assert sample(one, seed=0).token.tolist() == [0] * B


def test_strided_settings_masks_and_ids():
    batch = mixed(70, True, rows=1)
    twice = {n: np.repeat(a, 2, -1) for n, a in vars(batch).items() if isinstance(a, np.ndarray)}
    logits = torch.from_numpy(twice.pop("logits"))[:, ::2]
    expected = by_kernel(batch)
    out = torch.ops.llmkern.sample.default(
        logits,
        *(
            torch.from_numpy(twice[name])[..., ::2]
            for name in ("bias", "bias_ids", "bias_values", "allowed", "prompt_ids", "output_ids")
        ),
        *(torch.from_numpy(twice[name])[..., ::2] for name in ("settings", "seeds", "positions")),
        *(batch.num_logprobs, True, True, True, True),
    )
    for got, other in zip(out, expected.values(), strict=True):
        assert got.numpy().tobytes() == other.tobytes()


# ---- biases and masks ----


def test_a_mapping_a_list_of_mappings_and_a_tensor_are_one_bias(isa):
    B, V = 4, 50
    logits = torch.randn(B, V)
    options = {"seed": 0, "top_p": 0.95} | EVERYTHING
    mapping = {3: 2.0, 49: -1.5, 0: -INF, 7: 1e30}
    dense = torch.zeros(V)
    dense[list(mapping)] = torch.tensor(list(mapping.values()))
    expected = sample(logits, logit_bias=dense, **options)
    assert_same(sample(logits, logit_bias=mapping, **options), expected)
    assert_same(sample(logits, logit_bias=[mapping] * B, **options), expected)
    assert_same(sample(logits, logit_bias=dense.expand(B, V), **options), expected)
    rows = [{3: 2.0}, {}, {49: -1.5, 1: 0.25}, {0: -INF}]
    dense = torch.zeros(B, V)
    for b, row in enumerate(rows):
        for token, value in row.items():
            dense[b, token] = value
    expected = sample(logits, logit_bias=dense, **options)
    assert_same(sample(logits, logit_bias=rows, **options), expected)
    for b, row in enumerate(rows):
        one = sample(logits[b], logit_bias=row, **options | {"seed": torch.tensor([0])[0]})
        alone = sample(logits[b : b + 1], logit_bias=[row], **options)
        assert_same(SampleOutput(*(t[None] for t in one)), alone)
    nothing = sample(logits, **options)
    assert_same(sample(logits, logit_bias={}, **options), nothing)
    assert_same(sample(logits, logit_bias=[{}] * B, **options), nothing)


def test_biases_and_masks_in_their_order(isa):
    """Dense before sparse (the sum rounds twice), the mask after both, penalties on what they leave."""
    V = 3
    logits = np.array([[1e8, -1.0, 0.5]], np.float32)
    batch = make_batch(logits, np.random.default_rng(0), settings=settings_of({}), num_logprobs=V)
    batch.bias = np.array([[3.0, math.nan, 1.0]], np.float32)
    batch.bias_ids = np.array([[0, -7, 1, V, 2]])
    batch.bias_values = np.array([[-1e8, INF, 5.0, math.nan, 1.0]], np.float32)
    batch.allowed = np.array([[True, False, True]])
    batch.output_ids = np.array([[2, 1, 2]])
    batch.settings = settings_of({"repetition_penalty": 2.0, "frequency_penalty": 0.125})
    got = by_kernel(batch)
    assert got["processed"].tolist() == [[0.0, -INF, 1.0]]  # fl(1e8 + 3) - 1e8 = 0; 2.5 / 2 - 2 / 8
    assert_same_bits(got, by_reference(batch))
    batch.allowed = None
    assert by_kernel(batch)["valid"].tolist() == [False]  # NaN, whose bias nobody removes


@pytest.mark.parametrize("V", [1, 5, 31, 32, 33, 64, 1023, 1024, 1025, 4000])
def test_packed_masks_are_the_masks(isa, V):
    batch = mixed(V, True, rows=3)
    expected = by_kernel(batch)
    assert_same_bits(by_kernel(batch, allowed=packed(batch.allowed)), expected)
    shared = by_kernel(batch, allowed=batch.allowed[0])
    assert_same_bits(by_kernel(batch, allowed=packed(batch.allowed[0])), shared)
    logits = torch.zeros(V)
    bits = torch.from_numpy(packed(np.arange(V) == V - 1))
    assert sample(logits, allowed=bits, seed=0).token == V - 1
    assert sample(logits[None], allowed=bits[None], seed=0).token == V - 1


# ---- outputs ----


@pytest.mark.parametrize("settings", [{}, {"top_k": 5}, {"min_p": 0.1}, {"top_p": 0.9}, None])
def test_what_is_asked_for_comes_and_changes_nothing(isa, settings):
    B, V = 64, 1500
    rng = np.random.default_rng(3)
    logits = np.concatenate([make_rows(kind, B, V, rng) for kind in ("normal", "infinities")])
    given = None if settings is None else settings_of(*[settings] * 2 * B)
    batch = make_batch(logits, rng, settings=given, num_logprobs=3)
    everything, columns = by_kernel(batch), dict(zip(OFF, batch.settings.T, strict=True))
    names = ("return_logprob", "return_entropy", "return_rank", "num_logprobs")
    fields = {
        "return_logprob": ("logprob",),
        "return_entropy": ("entropy",),
        "return_rank": ("rank",),
        "num_logprobs": ("top_ids", "top_logprobs"),
    }
    where = {"seed": torch.from_numpy(batch.seeds), "position": torch.from_numpy(batch.positions)}
    for asked in itertools.product([False, True], repeat=4):
        options = dict(zip(names, asked, strict=True))
        options["num_logprobs"] *= 3
        tensors = {name: torch.from_numpy(column.copy()) for name, column in columns.items()}
        out = sample(torch.from_numpy(logits), **tensors, **where, **options)._asdict()
        missing = {field for name in names if not options[name] for field in fields[name]}
        assert {name for name, value in out.items() if value is None} == missing
        got = {name: value.numpy() for name, value in out.items() if value is not None}
        assert_same_bits(got, everything)


@pytest.mark.parametrize("V", [1, 3, 100, 1500])
def test_filter_logits_is_the_oracles(isa, V):
    batch = mixed(V, True, rows=6)
    batch.bias_ids = batch.bias_values = None
    expected = judge(batch)
    t = {n: torch.from_numpy(a) for n, a in vars(batch).items() if isinstance(a, np.ndarray)}
    got = filter_logits(
        t["logits"],
        **dict(zip(OFF, t["settings"].unbind(1), strict=True)),
        logit_bias=t["bias"],
        allowed=t["allowed"],
        prompt_ids=t["prompt_ids"],
        output_ids=t["output_ids"],
    )
    assert got.dtype == torch.float32
    assert got.numpy().tobytes() == np.stack([r.processed for r in expected]).tobytes()


def test_filter_logits_by_hand():
    row = torch.tensor([1.0, 3.0, 2.0, -INF, 2.0])
    assert filter_logits(row).tolist() == row.tolist()
    assert filter_logits(row, top_k=2, temperature=0.5).tolist() == [-INF, 6, 4, -INF, -INF]
    assert filter_logits(row.half()[None], temperature=0).tolist() == [[-INF, 3, -INF, -INF, -INF]]
    assert filter_logits(row, logit_bias={0: 9.0}, min_p=0.5)[0] == 10
    assert filter_logits(torch.tensor([1.0, math.nan])).tolist() == [-INF, -INF]
    assert filter_logits(torch.empty(0, 4)).shape == (0, 4)
    assert filter_logits(torch.empty(3, 4, device="meta")).shape == (3, 4)
    assert not filter_logits(row.requires_grad_()).requires_grad


def test_the_draw_is_from_what_filter_logits_keeps(isa):
    logits = torch.randn(1, 300).expand(20_000, 300)
    settings = {"top_k": 40, "top_p": 0.9, "min_p": 0.05, "temperature": 1.5}
    tokens = sample(logits, seed=5, **settings).token
    kept = filter_logits(logits[0], **settings)
    assert set(tokens.tolist()) == set(kept.isfinite().nonzero()[:, 0].tolist())


# ---- one long row on several threads ----

LONG = [2**15, 2**15 + 1, 50_257, 131_072 + 333]
ROW_SETTINGS = [
    {},
    {"temperature": 0},
    {"top_k": 50},
    {"top_k": 5000, "top_p": 0.9},
    {"top_p": 0.95},
    {"top_p": 0.999, "typical_p": 0.9},
    {"min_p": 0.01},
    {"typical_p": 0.5},
    {"repetition_penalty": 1.3, "frequency_penalty": 0.2, "presence_penalty": 0.1, "top_p": 0.8},
]


def first_row(batch: Batch) -> Batch:
    arrays = {n: a[:1] for n, a in vars(batch).items() if isinstance(a, np.ndarray)}
    return Batch(**vars(batch) | arrays)


@pytest.mark.parametrize("V", LONG)
def test_a_row_shared_by_threads(isa, on_threads, V):
    """Two rows on three threads are shared as one is; the bits are those of one thread, and of the oracle."""
    rng = np.random.default_rng(V)
    for number, kind in enumerate(("normal", "quantised", "infinities", "nan")):
        for settings in ROW_SETTINGS:
            logits = make_rows(kind, 2, V, rng)
            batch = make_batch(
                logits, rng, True, settings=settings_of(settings, settings), num_logprobs=5
            )
            if number % 2 == 0:
                batch.bias = batch.bias_ids = batch.bias_values = batch.allowed = None
            run = functools.partial(by_kernel, batch)
            run_first = functools.partial(by_kernel, first_row(batch))
            one = on_threads(1, run)
            first = {name: array[:1] for name, array in one.items()}
            for threads in (2, 3):
                assert_same_bits(on_threads(threads, run), one)
                assert_same_bits(on_threads(threads, run_first), first)
        assert_equal_to_oracle(one, batch, judge(batch))
