# SPDX-License-Identifier: Apache-2.0
"""llmkern.ops.sample as a function: rules by hand, invariances, seeds, the compiler."""

import math

import pytest
import torch

import llmkern
from llmkern.ops import SampleOutput, sample
from tests.ops.sampling_cases import WANTED, assert_same, operator_arguments

INF = math.inf
EVERYTHING = {"num_logprobs": 2, "return_entropy": True, "return_rank": True}


# ---- rules by hand ----


def test_greedy_takes_the_lowest_id_of_the_largest(isa):
    logits = torch.tensor([[1.0, 3.0, 3.0, -1.0], [-0.0, 0.0, -1.0, -2.0]])
    out = sample(logits, temperature=0, seed=1, num_logprobs=4, return_rank=True)
    assert out.token.tolist() == [1, 0]
    assert out.rank.tolist() == [0, 0]
    assert out.num_kept.tolist() == [1, 1]
    assert out.filtered_logprob.tolist() == [0, 0]
    assert out.top_ids.tolist() == [[1, 2, 0, 3], [0, 1, 2, 3]]
    torch.testing.assert_close(out.top_logprobs[0], logits[0].log_softmax(0)[[1, 2, 0, 3]])


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"top_k": 2}, {0, 2}),  # 2, 4 and 5 are equal: the lowest id is in
        ({"top_k": 3}, {0, 2, 4}),
        ({"top_p": 0.5}, {0}),  # exactly one half is enough
        ({"top_p": 0.5 + 1e-9}, {0, 2}),
        ({"min_p": 0.25}, {0, 2, 4, 5}),
        ({"min_p": 0.25 + 1e-9}, {0}),
        # Information 1, 3 and 4 bits, entropy 2.125: the three tokens of 3 bits are closest.
        ({"typical_p": 0.3}, {2, 4, 5}),
        ({"typical_p": 0.2}, {2, 4}),
        ({"top_k": 4, "top_p": 4 / 7}, {0}),  # of the mass that top_k left
        ({"top_k": 4, "top_p": 0.6}, {0, 2}),
    ],
)
def test_filters_by_hand(isa, settings, kept):
    """Probabilities 1/2, 1/8 three times, 1/16 twice; every kept token turns up, no other does."""
    logits = torch.tensor([8.0, 1.0, 2.0, 1.0, 2.0, 2.0]).log()
    out = sample(logits.repeat(500, 1), seed=0, **settings)
    assert set(out.token.tolist()) == kept
    assert set(out.num_kept.tolist()) == {len(kept)}
    mass = torch.logsumexp(logits[list(kept)], 0)
    torch.testing.assert_close(out.filtered_logprob, logits[out.token] - mass)
    torch.testing.assert_close(out.logprob, logits.log_softmax(0)[out.token])


def test_penalties_by_hand():
    logits = torch.tensor([[4.0, -4.0, 1.0, 2.0, 0.5]])
    out = sample(
        logits,
        repetition_penalty=2.0,
        frequency_penalty=0.25,
        presence_penalty=0.5,
        prompt_ids=torch.tensor([[0, 0, -1]]),
        output_ids=torch.tensor([[1, 3, 3, 99]]),
        seed=0,
        num_logprobs=5,
    )
    expected = torch.tensor([2.0, -8.75, 1.0, 0.0, 0.5])
    order = expected.argsort(descending=True)
    assert out.top_ids[0].tolist() == order.tolist()
    torch.testing.assert_close(out.top_logprobs[0], expected.log_softmax(0)[order])


def test_bias_and_mask():
    logits = torch.tensor([[0.0, 1.0, 2.0, math.nan]])
    allowed = torch.tensor([True, True, False, False])
    out = sample(logits, logit_bias={0: 5.0}, allowed=allowed, seed=0, num_logprobs=4)
    assert out.valid.all()  # the NaN is masked
    assert out.top_ids.tolist() == [[0, 1, -1, -1]]
    assert out.top_logprobs[0, 2:].tolist() == [-INF, -INF]
    masks = torch.eye(4, dtype=torch.bool)[:3]
    assert sample(logits.repeat(3, 1), allowed=masks, seed=0).token.tolist() == [0, 1, 2]
    bias = torch.eye(3, 4) * 100
    zeros = torch.zeros(3, 4)
    assert sample(zeros, logit_bias=bias, seed=0).token.tolist() == [0, 1, 2]
    assert sample(zeros, logit_bias={3: 100.0, 1: -INF}, seed=0).token.tolist() == [3, 3, 3]


def test_invalid_rows_say_so_and_harm_no_other(isa):
    logits = torch.randn(4, 300)
    fine = sample(logits, seed=3, top_p=0.9, **EVERYTHING)
    logits[1, 7] = math.nan
    logits[3] = -INF
    out = sample(logits, seed=3, top_p=0.9, **EVERYTHING)
    assert out.valid.tolist() == [True, False, True, False]
    for bad in (1, 3):
        assert out.token[bad] == -1
        assert out.rank[bad] == out.num_kept[bad] == 0
        assert out.top_ids[bad].tolist() == [-1, -1]
        for field in (out.logprob, out.filtered_logprob, out.entropy, out.top_logprobs):
            assert field[bad].isnan().all()
    assert_same(SampleOutput(*[t[[0, 2]] for t in out]), fine, [0, 2])


def test_infinite_logits():
    out = sample(torch.tensor([[1.0, INF, 0.0, INF]]).repeat(200, 1), seed=0, **EVERYTHING)
    assert set(out.token.tolist()) == {1, 3}
    assert out.valid.all()
    assert out.top_ids[0].tolist() == [1, 3]
    torch.testing.assert_close(out.entropy[0].item(), math.log(2))


def test_statistics_are_those_of_the_softmax(isa):
    logits = torch.randn(64, 5000) * 4
    out = sample(logits, seed=0, top_k=7, **EVERYTHING)
    logprobs = logits.double().log_softmax(1)
    picked = logprobs.gather(1, out.token[:, None])[:, 0]
    # A float32 difference of logits and a float32 result: 2^-23 of the largest distance, 30.
    assert (out.logprob - picked).abs().max() < 4e-6
    assert (out.entropy - -(logprobs.exp() * logprobs).sum(1)).abs().max() < 2e-6
    assert out.rank.tolist() == (logprobs > picked[:, None]).sum(1).tolist()
    assert torch.equal(out.top_ids, logits.topk(2).indices)
    kept = logprobs.topk(7).values.logsumexp(1)
    assert (out.filtered_logprob - (picked - kept)).abs().max() < 4e-6


# ---- invariances ----


def row_settings(B: int) -> dict:
    return {
        "temperature": torch.rand(B) + 0.5,
        "top_k": torch.randint(0, 200, (B,)),
        "top_p": torch.rand(B) * 0.9 + 0.1,
        "seed": torch.randint(2**40, (B,)),
        "position": torch.randint(100, (B,)),
    }


def test_a_row_knows_nothing_of_its_batch(isa):
    B, V = 40, 700
    logits, settings = torch.randn(B, V) * 3, row_settings(B)
    logits[5, 3] = math.nan
    whole = sample(logits, **EVERYTHING, **settings)
    for rows in (torch.randperm(B), torch.arange(13), torch.tensor([7]), torch.arange(60) % B):
        part = {name: value[rows] for name, value in settings.items()}
        assert_same(sample(logits[rows], **EVERYTHING, **part), whole, rows)


def test_numbers_are_tensors_of_equal_numbers():
    logits = torch.randn(9, 100)
    numbers = {"temperature": 0.8, "top_k": 30, "min_p": 0.01, "typical_p": 0.9}
    tensors = {
        name: torch.full((9,), value, dtype=torch.float64) for name, value in numbers.items()
    }
    expected = sample(logits, seed=5, **numbers)
    assert_same(sample(logits, seed=5, **tensors), expected)
    assert_same(sample(logits, seed=5, **numbers | {"top_k": torch.tensor(30)}), expected)
    assert_same(sample(logits, seed=torch.tensor(5), **numbers), expected)


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.9, "num_logprobs": 3}])
def test_same_bits_on_any_number_of_threads(on_threads, settings):
    logits = torch.randn(64, 3000) * 2

    def run():
        return sample(logits, seed=1, **settings)

    assert_same(on_threads(1, run), on_threads(2, run))


def test_same_bits_on_every_instruction_set(isa):
    logits = torch.randn(50, 3000, generator=torch.Generator().manual_seed(3)) * 3
    before = torch.ops.llmkern.cpu_isa()
    out = sample(logits, seed=1, top_p=0.95, num_logprobs=3)
    torch.ops.llmkern.select_cpu_isa("generic")
    assert_same(sample(logits, seed=1, top_p=0.95, num_logprobs=3), out)
    torch.ops.llmkern.select_cpu_isa(before)


# ---- seeds and positions ----


def test_manual_seed_and_generator():
    logits = torch.zeros(20, 1000)
    torch.manual_seed(3)
    first, second = sample(logits), sample(logits)
    assert not torch.equal(first.token, second.token)
    torch.manual_seed(3)
    assert_same(sample(logits), first)
    generator = torch.Generator().manual_seed(3)
    assert_same(sample(logits, generator=generator), first)
    assert_same(sample(logits, generator=generator), second)


def test_defaults_of_position():
    logits = torch.zeros(5, 1000)
    assert_same(sample(logits, seed=9), sample(logits, seed=9, position=torch.arange(5)))
    seeds = torch.arange(5)
    own = sample(logits, seed=seeds)
    assert_same(own, sample(logits, seed=seeds, position=0))
    assert_same(own, sample(logits, seed=seeds, position=torch.zeros(5, dtype=torch.int32)))
    for b in range(5):
        assert sample(logits[b], seed=b, position=0).token == own.token[b]
    assert not torch.equal(own.token, sample(logits, seed=seeds, position=1).token)


# ---- forms of arguments ----


def test_one_row_without_a_batch():
    logits = torch.randn(50)
    options = {"seed": 4, "top_p": 0.8, "num_logprobs": 3, "repetition_penalty": 1.5}
    out = sample(logits, output_ids=torch.tensor([1, 2]), **options)
    assert out.token.shape == out.valid.shape == ()
    assert out.top_ids.shape == (3,)
    batch = sample(logits[None], output_ids=torch.tensor([[1, 2]]), **options)
    assert_same(SampleOutput(*[None if t is None else t[None] for t in out]), batch)


def test_lists_of_ids_are_padded():
    logits = torch.randn(2, 10)
    lists = sample(logits, presence_penalty=3.0, output_ids=[[1], [2, 3, 3]], seed=0)
    padded = torch.tensor([[1, -1, -1], [2, 3, 3]], dtype=torch.int32)
    assert_same(lists, sample(logits, presence_penalty=3.0, output_ids=padded, seed=0))
    empty = sample(logits, presence_penalty=3.0, output_ids=[[], []], seed=0)
    assert_same(empty, sample(logits, seed=0))


def test_no_rows():
    out = sample(torch.empty(0, 7), seed=0, num_logprobs=2)
    assert out.token.shape == (0,)
    assert out.top_ids.shape == (0, 2)
    none = torch.empty(0, dtype=torch.int64)
    assert sample(torch.empty(0, 7), seed=none, position=none, top_p=none.double()).token.shape == (
        0,
    )


def test_no_gradient_and_no_change_to_the_inputs():
    logits = torch.randn(3, 20, requires_grad=True)
    before = logits.detach().clone()
    out = sample(logits, seed=0, logit_bias={3: 2.0}, allowed=torch.ones(20, dtype=torch.bool))
    assert not any(t.requires_grad for t in out if t is not None)
    assert torch.equal(logits.detach(), before)


# ---- the compiler ----


def test_opcheck():
    full = operator_arguments()
    extras = {
        "bias": torch.zeros(5),
        "bias_ids": torch.tensor([[1, -1]]),
        "bias_values": torch.ones(1, 2),
        "allowed": torch.ones(2, 5, dtype=torch.bool),
        "prompt_ids": torch.tensor([[1], [2]]),
        "output_ids": torch.tensor([[1, 2], [-1, 0]]),
    }
    least = dict.fromkeys(WANTED, False) | {"num_logprobs": 0, "positions": None}
    packed = {"logits": torch.randn(2, 5).half(), "allowed": torch.tensor([[3], [31]]).int()}
    for arguments in (full, full | extras, full | least, full | packed):
        torch.library.opcheck(torch.ops.llmkern.sample.default, tuple(arguments.values()))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic):
    def f(logits, temperature, seeds, ids):
        out = sample(
            logits * 2,
            temperature=temperature,
            top_p=0.9,
            repetition_penalty=1.2,
            output_ids=ids,
            logit_bias={1: 0.5},
            seed=seeds,
            position=3,
            num_logprobs=2,
            return_entropy=True,
        )
        return out.token, out.logprob, out.valid, out.top_ids, out.entropy

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for B in (4, 6):
        args = (torch.randn(B, 30), torch.rand(B) + 0.5, torch.arange(B), torch.randint(30, (B, 3)))
        for got, expected in zip(compiled(*args), f(*args), strict=True):
            assert torch.equal(got, expected)


def test_compile_with_one_seed():
    compiled = torch.compile(
        lambda x: sample(x, seed=7, top_k=5).token, fullgraph=True, backend="aot_eager"
    )
    logits = torch.randn(4, 30)
    assert torch.equal(compiled(logits), sample(logits, seed=7, top_k=5).token)


def test_fake_tensors_leave_no_trace():
    """The settings are cached between calls: never those of a fake call."""
    with torch._subclasses.FakeTensorMode():
        assert sample(torch.empty(3, 10), top_p=0.123, seed=1).token.shape == (3,)
    assert llmkern.ops.sample(torch.zeros(3, 10), top_p=0.123, seed=1).valid.all()
