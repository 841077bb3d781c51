# SPDX-License-Identifier: Apache-2.0
"""llmkern.ops.sample as a function: rules by hand, invariances, seeds, argument forms, errors, the compiler."""

import math

import pytest
import torch

import llmkern
from llmkern.ops import SampleOutput, sample

INF = math.inf


def assert_same(got: SampleOutput, expected: SampleOutput, rows=slice(None)) -> None:
    for name, a, b in zip(SampleOutput._fields, got, expected, strict=True):
        b = b[rows]
        assert a.dtype == b.dtype
        assert a.shape == b.shape, name
        assert torch.equal(a.nan_to_num(nan=-7.0), b.nan_to_num(nan=-7.0)), name


# ---- rules by hand ----


def test_greedy_takes_the_lowest_id_of_the_largest(isa):
    logits = torch.tensor([[1.0, 3.0, 3.0, -1.0], [-0.0, 0.0, -1.0, -2.0]])
    out = sample(logits, temperature=0, seed=1, num_logprobs=4)
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
    fine = sample(logits, seed=3, top_p=0.9, num_logprobs=2)
    logits[1, 7] = math.nan
    logits[3] = -INF
    out = sample(logits, seed=3, top_p=0.9, num_logprobs=2)
    assert out.valid.tolist() == [True, False, True, False]
    for bad in (1, 3):
        assert out.token[bad] == -1
        assert out.rank[bad] == out.num_kept[bad] == 0
        assert out.top_ids[bad].tolist() == [-1, -1]
        for field in (out.logprob, out.filtered_logprob, out.entropy, out.top_logprobs):
            assert field[bad].isnan().all()
    assert_same(SampleOutput(*[t[[0, 2]] for t in out]), fine, [0, 2])


def test_infinite_logits():
    out = sample(torch.tensor([[1.0, INF, 0.0, INF]]).repeat(200, 1), seed=0, num_logprobs=3)
    assert set(out.token.tolist()) == {1, 3}
    assert out.valid.all()
    assert out.top_ids[0].tolist() == [1, 3, 0]
    torch.testing.assert_close(out.entropy[0].item(), math.log(2))


def test_statistics_are_those_of_the_softmax(isa):
    logits = torch.randn(64, 5000) * 4
    out = sample(logits, seed=0, top_k=7, num_logprobs=3)
    logprobs = logits.double().log_softmax(1)
    picked = logprobs.gather(1, out.token[:, None])[:, 0]
    # A float32 difference of logits and a float32 result: 2^-23 of the largest distance, 30.
    assert (out.logprob - picked).abs().max() < 4e-6
    assert (out.entropy - -(logprobs.exp() * logprobs).sum(1)).abs().max() < 2e-6
    assert out.rank.tolist() == (logprobs > picked[:, None]).sum(1).tolist()
    assert torch.equal(out.top_ids, logits.topk(3).indices)
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
    whole = sample(logits, num_logprobs=4, **settings)
    for rows in (torch.randperm(B), torch.arange(13), torch.tensor([7]), torch.arange(60) % B):
        part = {name: value[rows] for name, value in settings.items()}
        assert_same(sample(logits[rows], num_logprobs=4, **part), whole, rows)


def test_numbers_are_tensors_of_equal_numbers():
    logits = torch.randn(9, 100)
    numbers = {"temperature": 0.8, "top_k": 30, "min_p": 0.01, "typical_p": 0.9}
    tensors = {name: torch.full((9,), float(value)).double() for name, value in numbers.items()}
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


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_are_taken_to_float32(dtype):
    logits = torch.randn(6, 50).to(dtype)
    out = sample(logits, seed=0, top_k=20, num_logprobs=2, logit_bias=logits[0])
    expected = logits[0].float()
    assert_same(out, sample(logits.float(), seed=0, top_k=20, num_logprobs=2, logit_bias=expected))
    assert out.logprob.dtype == torch.float32


def test_one_row_without_a_batch():
    logits = torch.randn(50)
    options = {"seed": 4, "top_p": 0.8, "num_logprobs": 3, "repetition_penalty": 1.5}
    out = sample(logits, output_ids=torch.tensor([1, 2]), **options)
    assert out.token.shape == out.valid.shape == ()
    assert out.top_ids.shape == (3,)
    batch = sample(logits[None], output_ids=torch.tensor([[1, 2]]), **options)
    assert_same(SampleOutput(*[t[None] for t in out]), batch)


def test_strided_and_expanded_inputs():
    logits = torch.randn(7, 200)[:, ::2]
    expected = sample(logits.contiguous(), seed=0)
    assert_same(sample(logits, seed=0), expected)
    assert_same(sample(logits.t().contiguous().t(), seed=0), expected)
    same = logits[:1].expand(7, -1)
    seeds = torch.tensor(3).expand(7)
    assert_same(sample(same, seed=seeds), sample(same.contiguous(), seed=seeds.contiguous()))


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


def test_no_gradient_and_no_change_to_the_inputs():
    logits = torch.randn(3, 20, requires_grad=True)
    before = logits.detach().clone()
    out = sample(logits, seed=0, logit_bias={3: 2.0}, allowed=torch.ones(20, dtype=torch.bool))
    assert not any(t.requires_grad for t in out)
    assert torch.equal(logits.detach(), before)


# ---- errors ----

L = torch.zeros(2, 5)
IDS = torch.zeros(2, 3, dtype=torch.int64)
BAD_CALLS = [
    ({"logits": [0.0]}, TypeError, "expected logits to be a Tensor, got list"),
    (
        {"logits": L.long()},
        TypeError,
        "expected logits of dtype float32 or float64 or .* got int64",
    ),
    (
        {"logits": L[None]},
        ValueError,
        r"expected logits of shape \[B, V\] or \[V\], got \[1, 2, 5\]",
    ),
    (
        {"logits": L[:, :0]},
        ValueError,
        r"expected logits of 1 to 8388607 tokens, got shape \[2, 0\]",
    ),
    ({"temperature": -1}, ValueError, r"expected temperature in \[0, inf\), got -1"),
    ({"temperature": INF}, ValueError, r"expected temperature in \[0, inf\), got inf"),
    ({"temperature": "1"}, TypeError, "expected temperature to be a number or a Tensor .* got str"),
    (
        {"temperature": [1]},
        TypeError,
        "expected temperature to be a number or a Tensor .* got list",
    ),
    ({"temperature": True}, TypeError, "expected temperature to be a number .* got bool"),
    ({"top_k": -1}, ValueError, "expected top_k to be a whole number >= 0, got -1"),
    ({"top_k": 2.5}, ValueError, "expected top_k to be a whole number >= 0, got 2.5"),
    ({"top_p": 0.0}, ValueError, r"expected top_p in \(0, 1\], got 0.0"),
    ({"top_p": math.nan}, ValueError, r"expected top_p in \(0, 1\], got nan"),
    ({"min_p": 1.5}, ValueError, r"expected min_p in \[0, 1\], got 1.5"),
    ({"typical_p": 2}, ValueError, r"expected typical_p in \(0, 1\], got 2"),
    ({"repetition_penalty": 0}, ValueError, r"expected repetition_penalty in \(0, 3.4e38\], got 0"),
    ({"presence_penalty": INF}, ValueError, r"expected presence_penalty in .*, got inf"),
    ({"frequency_penalty": -1e39}, ValueError, r"expected frequency_penalty in .*, got -1e\+39"),
    (
        {"top_p": torch.tensor([0.5, 1.5])},
        ValueError,
        r"expected top_p in \(0, 1\], got 1.5 in row 1",
    ),
    (
        {"temperature": torch.tensor([1.0, math.nan])},
        ValueError,
        r"expected temperature in \[0, inf\), got nan in row 1",
    ),
    (
        {"top_k": torch.tensor([-3, 0])},
        ValueError,
        "expected top_k to be a whole number >= 0, got -3 in row 0",
    ),
    (
        {"min_p": torch.zeros(3)},
        ValueError,
        r"expected min_p of shape \[B\] = \[2\], got \[3\]",
    ),
    ({"min_p": torch.zeros(2, device="meta")}, ValueError, "logits on cpu and min_p on meta"),
    ({"num_logprobs": 6}, ValueError, r"expected num_logprobs in \[0, V = 5\], got 6"),
    ({"num_logprobs": -1}, ValueError, r"expected num_logprobs in \[0, V = 5\], got -1"),
    ({"seed": 1.0}, TypeError, "expected seed to be an int or an int64 Tensor .* got float"),
    ({"seed": 2**63}, ValueError, r"expected seed in \[-2\^63, 2\^63\), got 9223372036854775808"),
    ({"seed": torch.zeros(2)}, TypeError, "expected seed of dtype int32 or int64, got float32"),
    (
        {"seed": IDS[:, :1]},
        ValueError,
        r"expected seed of shape \[B\] = \[2\], got \[2, 1\]",
    ),
    ({"seed": 1, "generator": torch.Generator()}, ValueError, "a seed or a generator, got both"),
    ({"position": "1"}, TypeError, "expected position to be an int or an int64 Tensor"),
    ({"position": 3}, ValueError, r"expected seed to be a Tensor \[B\] .* got one seed for B = 2"),
    (
        {"position": torch.zeros(1, dtype=torch.int64)},
        ValueError,
        r"expected position of shape \[B\] = \[2\], got \[1\]",
    ),
    ({"logit_bias": [1.0]}, TypeError, "expected logit_bias to be a Tensor, got list"),
    ({"logit_bias": L.long()}, TypeError, "expected logit_bias of dtype float32 .* got int64"),
    (
        {"logit_bias": L[:, :4]},
        ValueError,
        r"expected logit_bias of shape \[V\] = \[5\] or \[B, V\] = \[2, 5\], got \[2, 4\]",
    ),
    ({"logit_bias": {5: 1.0}}, IndexError, r"ids in logit_bias in \[0, V\) = \[0, 5\), got 5"),
    ({"allowed": L}, TypeError, "expected allowed of dtype bool, got float32"),
    ({"allowed": L[0, :2] > 0}, ValueError, r"expected allowed of shape .* got \[2\]"),
    ({"prompt_ids": L}, TypeError, "expected prompt_ids of dtype int32 or int64, got float32"),
    (
        {"output_ids": IDS[:1]},
        ValueError,
        r"expected output_ids of shape \[B, L\] = \[2, L\], got \[1, 3\]",
    ),
    ({"output_ids": IDS[0]}, ValueError, r"expected output_ids of shape .* got \[3\]"),
]


@pytest.mark.parametrize(("kwargs", "error", "message"), BAD_CALLS)
def test_bad_input(kwargs, error, message):
    with pytest.raises(error, match=r"llmkern\.sample: .*" + message):
        sample(**{"logits": L} | kwargs)


def operator_arguments() -> dict:
    settings = torch.tensor([[1.0, 0, 1, 0, 1, 1, 0, 0]], dtype=torch.float64)
    optional = dict.fromkeys(("bias", "allowed", "prompt_ids", "output_ids"))
    seeds, positions = torch.tensor([1]), torch.tensor([0, 1])
    rest = {"settings": settings, "seeds": seeds, "positions": positions, "num_logprobs": 2}
    return {"logits": torch.randn(2, 5)} | optional | rest


BAD_OPERANDS = [
    ({"logits": L.double()}, "logits of dtype Float"),
    ({"logits": L[0]}, "logits of 2 dimensions"),
    ({"logits": L[:, :0]}, "logits of 1 to 8388607 tokens"),
    ({"bias": torch.zeros(4)}, r"logit_bias of shape \[5\], got \[4\]"),
    ({"bias": torch.zeros(1, 5)}, r"logit_bias of shape \[2, 5\], got \[1, 5\]"),
    ({"bias": torch.zeros(5).double()}, "logit_bias of dtype Float"),
    ({"allowed": torch.zeros(5)}, "allowed of dtype Bool"),
    ({"prompt_ids": torch.zeros(3, 1, dtype=torch.int64)}, r"prompt_ids of shape \[2, 1\]"),
    ({"output_ids": torch.zeros(2, dtype=torch.int64)}, "output_ids of 2 dimensions"),
    ({"output_ids": torch.zeros(2, 1)}, "output_ids of dtype Long"),
    ({"settings": torch.ones(1, 8)}, "settings of dtype Double"),
    ({"settings": torch.ones(1, 7).double()}, r"settings of shape \[1, 8\], got \[1, 7\]"),
    ({"settings": torch.ones(3, 8).double()}, "settings with 1 or B = 2 rows"),
    ({"settings": torch.zeros(1, 8).double()}, r"top_p in \(0, 1\], got 0 in row 0"),
    ({"seeds": torch.tensor([1, 2, 3])}, "seeds with 1 or B = 2 rows"),
    ({"seeds": torch.tensor(1)}, "seeds of 1 dimensions"),
    ({"seeds": torch.tensor([1.0])}, "seeds of dtype Long"),
    ({"positions": torch.tensor([1])}, r"positions of shape \[2\], got \[1\]"),
    ({"num_logprobs": 6}, r"num_logprobs in \[0, V = 5\], got 6"),
    ({"num_logprobs": -1}, r"num_logprobs in \[0, V = 5\], got -1"),
]


@pytest.mark.parametrize(("operands", "message"), BAD_OPERANDS)
def test_the_binding_checks_too(operands, message):
    """A caller who goes round Python's checks gets an error, not a wild read."""
    with pytest.raises(ValueError, match=r"llmkern\.sample: expected .*" + message):
        torch.ops.llmkern.sample.default(*(operator_arguments() | operands).values())


# ---- the compiler ----


def test_opcheck():
    full = operator_arguments()
    extras = {
        "bias": torch.zeros(5),
        "allowed": torch.ones(2, 5, dtype=torch.bool),
        "prompt_ids": torch.tensor([[1], [2]]),
        "output_ids": torch.tensor([[1, 2], [-1, 0]]),
    }
    for arguments in (full, full | extras, full | {"num_logprobs": 0}):
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
        )
        return out.token, out.logprob, out.valid, out.top_ids

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
