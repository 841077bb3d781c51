# SPDX-License-Identifier: Apache-2.0
"""llmkern.nn.Sampler: the settings of llmkern.ops.sample, held and checked."""

import copy
import inspect
import math
import pickle

import pytest
import torch

import llmkern
from tests.ops import sampling_oracle as oracle

INF = math.inf
FLT_MAX = torch.finfo(torch.float32).max

SETTINGS = {
    "temperature": 0.7,
    "top_k": 40,
    "top_p": 0.9,
    "min_p": 0.01,
    "typical_p": 0.95,
    "repetition_penalty": 1.3,
    "presence_penalty": 0.2,
    "frequency_penalty": 0.1,
}


def arguments() -> dict:
    allowed = torch.ones(100, dtype=torch.bool)
    allowed[:5] = False
    return {
        "prompt_ids": torch.randint(100, (8, 4)),
        "output_ids": torch.randint(100, (8, 6)),
        "logit_bias": {7: 2.0},
        "allowed": allowed,
        "seed": torch.arange(8),
        "position": 6,
        "num_logprobs": 3,
        "return_entropy": True,
        "return_rank": True,
    }


@pytest.mark.parametrize("settings", [{}, SETTINGS, *({k: v} for k, v in SETTINGS.items())])
def test_is_the_function_with_its_settings(settings):
    logits, kwargs = torch.randn(8, 100) * 3, arguments()
    got = llmkern.nn.Sampler(**settings)(logits, **kwargs)
    for a, b in zip(got, llmkern.ops.sample(logits, **settings, **kwargs), strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_takes_a_generator():
    sampler = llmkern.nn.Sampler(top_p=0.9)
    logits = torch.randn(8, 100)
    first, second = (sampler(logits, generator=torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(first.token, second.token)


def test_settings_are_those_of_the_function():
    constructor = inspect.signature(llmkern.nn.Sampler.__init__).parameters
    function = inspect.signature(llmkern.ops.sample).parameters
    forward = inspect.signature(llmkern.nn.Sampler.forward).parameters
    assert set(constructor) | set(forward) == set(function) | {"self"}
    for name, parameter in constructor.items():
        if name != "self":
            assert parameter.default == function[name].default


# ---- the table of its docstring, a test a row ----


def kept(logits: list[float], forward: dict | None = None, **settings) -> list[int]:
    """The tokens that turn up in 4000 draws; as many as num_kept says."""
    rows = torch.tensor(logits).expand(4000, -1)
    out = llmkern.nn.Sampler(**settings)(rows, seed=0, **forward or {})
    found = out.token.unique().tolist()
    assert out.num_kept.unique().tolist() == [len(found)]
    return found


def processed(logits: list[float], **options) -> list[float]:
    return llmkern.ops.filter_logits(torch.tensor(logits), **options).tolist()


def test_table_logit_bias():
    assert processed([0.0, 1.0, 2.0], logit_bias={0: 5.0, 2: -INF}) == [5, 1, -INF]
    bias = torch.tensor([0.25, 0.0, INF])
    assert processed([0.0, 1.0, 2.0], logit_bias=bias) == [0.25, 1, FLT_MAX]


def test_table_allowed():
    allowed = torch.tensor([True, False, True, False])
    assert processed([0.0, INF, 2.0, math.nan], allowed=allowed) == [0, -INF, 2, -INF]
    # No bias and no penalty brings them back.
    options = {"allowed": allowed, "logit_bias": {1: 1e30}, "output_ids": torch.tensor([1])}
    assert processed([0.0, 0.0, 2.0, 0.0], presence_penalty=-1e30, **options)[1] == -INF
    assert kept([0.0, 9.0, 0.0, 9.0], {"allowed": allowed}) == [0, 2]


def test_table_repetition_penalty():
    options = {"prompt_ids": torch.tensor([0, 1, 0, 9]), "output_ids": torch.tensor([2, 0, -1])}
    got = processed([4.0, -4.0, 0.0, 4.0], repetition_penalty=2.0, **options)
    assert got == [2, -8, 0, 4]  # once, however often they occur
    assert processed([4.0, -4.0, 0.0, 4.0], repetition_penalty=1.0, **options) == [4, -4, 0, 4]


def test_table_frequency_penalty():
    options = {"prompt_ids": torch.tensor([3, 3]), "output_ids": torch.tensor([2, 0, 2, 7])}
    assert processed([1.0, 1.0, 1.0, 1.0], frequency_penalty=0.5, **options) == [0.5, 1, 0, 1]
    assert processed([1.0, 1.0, 1.0, 1.0], frequency_penalty=0.0, **options) == [1, 1, 1, 1]


def test_table_presence_penalty():
    options = {"prompt_ids": torch.tensor([3, 3]), "output_ids": torch.tensor([2, 0, 2, 7])}
    assert processed([1.0, 1.0, 1.0, 1.0], presence_penalty=0.5, **options) == [0.5, 1, 0.5, 1]
    assert processed([1.0, 1.0, 1.0, 1.0], presence_penalty=0.0, **options) == [1, 1, 1, 1]


def test_table_order_of_the_penalties():
    got = processed(
        [4.0, -4.0],
        output_ids=torch.tensor([0, 1, 1]),
        repetition_penalty=2.0,
        frequency_penalty=0.25,
        presence_penalty=0.5,
    )
    assert got == [4 / 2 - 0.25 - 0.5, -4 * 2 - 2 * 0.25 - 0.5]


def test_table_temperature():
    assert processed([1.0, 3.0], temperature=0.5) == [2, 6]
    for cold in (0, 1e-31):
        assert kept([1.0, 3.0, 3.0], temperature=cold) == [1]
    assert kept([1.0, 3.0, 3.0], temperature=1e-30, top_k=2) == [1, 2]
    assert kept([1.0, INF, INF, FLT_MAX], top_k=3) == [
        1,
        2,
        3,
    ]  # infinity counts as the largest number
    # The order is by logit, also where the temperature makes all probabilities equal.
    assert kept([1.0, 2.0, 3.0], temperature=1e30, top_k=2) == [1, 2]


def test_table_top_k():
    row = [0.0, 1.0, 1.0, 2.0]
    assert kept(row, top_k=2) == [1, 3]  # of the equals the lower id, and no more than two
    assert kept(row, top_k=0) == kept(row, top_k=4) == kept(row, top_k=10**9) == [0, 1, 2, 3]


def test_table_top_p():
    row = torch.tensor([1.0, 4.0, 2.0, 1.0]).log2().mul(math.log(2)).tolist()  # 1/8, 1/2, 1/4, 1/8
    assert kept(row, top_p=0.5) == [1]  # which reaches it, and is enough
    assert kept(row, top_p=0.5 + 1e-9) == [1, 2]
    assert kept(row, top_p=0.8) == [0, 1, 2]  # of the equals the lower id
    assert kept(row, top_p=1e-300) == [1]
    assert kept(row, top_p=1.0) == [0, 1, 2, 3]


def test_table_min_p():
    row = torch.tensor([1.0, 4.0, 2.0, 4.0]).log().tolist()
    assert kept(row, min_p=0.5 - 1e-6) == [1, 2, 3]
    assert kept(row, min_p=0.5 + 1e-6) == kept(row, min_p=1.0) == [1, 3]
    assert kept(row, min_p=0.0) == [0, 1, 2, 3]


def test_table_typical_p():
    row = torch.tensor([8.0, 1.0, 2.0, 1.0, 2.0, 2.0]).log().tolist()
    # Information 1, 3 and 4 bits, entropy 2.125: the tokens of 3 bits are closest.
    assert kept(row, typical_p=0.3) == [2, 4, 5]
    assert kept(row, typical_p=0.2) == [2, 4]
    assert kept(row, typical_p=1e-300) == [2]
    assert kept(row, typical_p=1.0) == [0, 1, 2, 3, 4, 5]


def test_table_draw():
    """The token in which the running probability passes u, along ascending ids."""
    row = torch.tensor([1.0, 2.0, 3.0, 2.0])
    seeds = torch.arange(500)
    tokens = llmkern.nn.Sampler()(row.log().expand(500, 4), seed=seeds, position=7).token
    reached = (row / row.sum()).double().cumsum(0)
    u = torch.tensor([oracle.random_u64(seed, 7) / 2**64 for seed in range(500)]).double()
    assert torch.equal(tokens, torch.searchsorted(reached, u, right=True))


def test_what_the_docstring_says_below_the_table():
    sampler = llmkern.nn.Sampler()
    far = torch.tensor([0.0, -29.0])
    assert sampler(far.expand(1000, 2), seed=0, num_logprobs=2).top_ids[0].tolist() == [0, 1]
    assert sampler(far.expand(1000, 2), seed=0).filtered_logprob.unique().tolist() == [0]
    rows = torch.tensor([[0.0, math.nan], [-INF, -INF], [0.0, 1.0]])
    out = sampler(rows, seed=0, num_logprobs=1, return_entropy=True, return_rank=True)
    assert out.valid.tolist() == [False, False, True]
    for bad in (0, 1):
        assert out.token[bad] == out.top_ids[bad] == -1
        assert out.num_kept[bad] == out.rank[bad] == 0
        for field in (out.logprob, out.filtered_logprob, out.entropy, out.top_logprobs):
            assert field[bad].isnan().all()
    lean = sampler(rows, seed=0, return_logprob=False)
    assert lean[4:] == (None,) * 5


# ---- the module ----


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"temperature": -0.5}, ValueError, r"expected temperature in \[0, inf\), got -0.5"),
        ({"top_p": 0}, ValueError, r"expected top_p in \(0, 1\], got 0"),
        ({"top_k": 1.5}, ValueError, "expected top_k to be a whole number >= 0, got 1.5"),
        ({"min_p": "0.1"}, TypeError, "expected min_p to be a number, got str"),
    ],
)
def test_settings_are_checked_at_once(settings, error, message):
    with pytest.raises(error, match=r"llmkern\.sample: " + message):
        llmkern.nn.Sampler(**settings)


def test_is_a_module_without_state():
    sampler = llmkern.nn.Sampler(**SETTINGS)
    assert list(sampler.state_dict()) == []
    assert "temperature=0.7, top_k=40, top_p=0.9" in repr(sampler)
    logits = torch.randn(8, 100)
    for again in (copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))):
        assert torch.equal(again(logits, seed=1).token, sampler(logits, seed=1).token)


def test_compiles():
    sampler = llmkern.nn.Sampler(temperature=0.8, top_k=10)
    logits, seeds = torch.randn(8, 100), torch.arange(8)
    compiled = torch.compile(sampler, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(logits, seed=seeds).token, sampler(logits, seed=seeds).token)
