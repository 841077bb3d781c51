# SPDX-License-Identifier: Apache-2.0
"""Sampling on a GPU: every output has the bits that the CPU gives, whatever the settings and the vocabulary."""

from typing import Any

import pytest
import torch
from torch import Tensor

import llmkern

from .promises import Op, assert_same_bits, every_op, every_promise, results

pytestmark = pytest.mark.cuda
small = pytest.mark.sanitize

SETTINGS: dict[str, list[float]] = {
    "temperature": [0.0, 0.3, 0.7, 1.0, 1.0, 1.5],
    "top_k": [0, 0, 1, 2, 40, 1000],
    "top_p": [1.0, 1.0, 0.1, 0.5, 0.9, 0.99],
    "min_p": [0.0, 0.0, 0.0, 0.05, 0.3],
    "typical_p": [1.0, 1.0, 1.0, 0.2, 0.95],
    "repetition_penalty": [1.0, 1.0, 1.2, 0.7],
    "presence_penalty": [0.0, 0.0, 0.5, -0.5],
    "frequency_penalty": [0.0, 0.0, 0.1],
}


def mixed(B: int) -> dict[str, Tensor]:
    """A value of every setting for every row, drawn."""
    chosen = {}
    for name, values in SETTINGS.items():
        dtype = torch.int64 if name == "top_k" else torch.float64
        chosen[name] = torch.tensor(values, dtype=dtype)[torch.randint(len(values), (B,))]
    return chosen


def request(B: int, V: int, **more: Any) -> dict[str, Any]:
    """Everything that can be asked for at once; logits on a grid, so that some of them tie."""
    return {
        "logits": (torch.randn(B, V) * 3 * 64).round() / 64,
        "seed": torch.arange(B),
        "position": torch.randint(1000, (B,)),
        "num_logprobs": min(5, V),
        "return_entropy": True,
        "return_rank": True,
        **mixed(B),
        **more,
    }


def on_device(device: torch.device | str, call: dict[str, Any]) -> dict[str, Any]:
    return {name: v.to(device) if isinstance(v, Tensor) else v for name, v in call.items()}


def draw(device: torch.device | str, call: dict[str, Any]) -> dict[str, Tensor]:
    """On the device, what was asked for on the CPU."""
    there = on_device(device, call)
    out = llmkern.ops.sample(there.pop("logits"), **there)
    return {name: t.cpu() for name, t in zip(out._fields, out, strict=True) if t is not None}


def filtered(device: torch.device | str, call: dict[str, Any]) -> Tensor:
    """The logits that the draw is from."""
    drawing = ("seed", "position", "num_logprobs")
    there = on_device(device, call)
    there = {n: v for n, v in there.items() if n not in drawing and not n.startswith("return_")}
    return llmkern.ops.filter_logits(there.pop("logits"), **there).cpu()


def assert_like_the_cpu(device: torch.device, call: dict[str, Any]) -> None:
    expected = draw("cpu", call) | {"filtered": filtered("cpu", call)}
    got = draw(device, call) | {"filtered": filtered(device, call)}
    assert got.keys() == expected.keys()
    for name in expected:
        try:
            assert_same_bits([got[name]], [expected[name]])
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@pytest.mark.parametrize(
    ("B", "V"),
    [
        pytest.param(3, 1, marks=small),
        pytest.param(9, 7, marks=small),
        pytest.param(5, 1031, marks=small),
        (1000, 173),
        (1000, 10_000),
        (200, 32_000),
        (64, 128_256),
        (1, 128_256),
        (3, 131_073),
    ],
)
def test_a_thousand_seeds_with_mixed_settings(device, B, V):
    assert_like_the_cpu(device, request(B, V))


@small
def test_penalties_bias_and_mask(device):
    B, V = 40, 500
    ids = torch.randint(-1, V, (B, 30))
    more = {"prompt_ids": ids, "output_ids": ids.flip(0)[:, :20], "allowed": torch.rand(B, V) < 0.8}
    assert_like_the_cpu(device, request(B, V, logit_bias=torch.randn(V), **more))
    assert_like_the_cpu(device, request(B, V, logit_bias={3: 5.0, 499: -2.0}, **more))
    each = [{b: -1.0, 2 * b: 4.0} for b in range(B)]
    more["allowed"] = torch.randint(-(2**31), 2**31, (B, 16)).to(torch.int32)  # packed
    assert_like_the_cpu(device, request(B, V, logit_bias=each, **more))
    more["allowed"] = more["allowed"][0]
    assert_like_the_cpu(device, request(B, V, **more))
    more["allowed"] = torch.zeros(B, V, dtype=torch.bool)
    more["allowed"][:, 17] = True
    assert_like_the_cpu(device, request(B, V, **more))


@small
@pytest.mark.parametrize("V", [5, 2000])
def test_rows_of_extremes(device, V):
    inf = float("inf")
    rows = torch.randn(9, V)
    rows[0], rows[1], rows[2] = 0.0, -inf, 1e30
    rows[3, 1], rows[4, 2], rows[5, 3:] = float("nan"), inf, -inf
    rows[6], rows[7] = 3.4e38, -3.4e38
    rows[8, 0] = 200.0
    for settings in ({}, {"top_p": 0.5}, {"temperature": 0.0}, {"typical_p": 0.3}, {"top_k": 2}):
        plain = {"logits": rows, "seed": torch.arange(9), "position": 1, "num_logprobs": 5}
        assert_like_the_cpu(device, plain | settings)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_and_strides(device, dtype):
    case = request(20, 3000)
    case["logits"] = case["logits"].to(dtype)
    assert_like_the_cpu(device, case)
    case["logits"] = torch.randn(3000, 20).to(dtype).t()
    assert_like_the_cpu(device, case)
    apart = torch.randn(20, 3005).to(dtype)
    there = {n: v for n, v in case.items() if n != "logits"}
    got = draw(device, there | {"logits": apart.to(device)[:, :3000]})
    assert_same_bits(
        list(got.values()), list(draw("cpu", there | {"logits": apart[:, :3000]}).values())
    )


@small
@pytest.mark.parametrize("V", [900, 5000])
def test_what_nobody_asks_for_changes_nothing(device, V):
    case = request(12, V)
    whole = draw(device, case)
    case |= {"num_logprobs": 0, "return_entropy": False, "return_rank": False}
    for return_logprob in (True, False):
        got = draw(device, case | {"return_logprob": return_logprob})
        assert ("logprob" in got) == return_logprob
        assert_same_bits(list(got.values()), [whole[name] for name in got])


def test_one_seed_for_all_rows_and_none(device):
    logits = torch.randn(50, 400)
    assert_like_the_cpu(device, {"logits": logits, "seed": 12345})
    drawn = []
    for where in ("cpu", device):
        torch.manual_seed(3)
        drawn.append(llmkern.ops.sample(logits.to(where)).token.cpu())
    assert torch.equal(*drawn)


def test_a_row_does_not_depend_on_its_neighbours(device):
    case = request(64, 5000)
    whole = draw(device, case)
    some = torch.tensor([3, 60, 17])
    part = {n: v[some] if isinstance(v, Tensor) else v for n, v in case.items()}
    assert_same_bits(list(draw(device, part).values()), [t[some] for t in whole.values()])


def test_frequencies_are_the_probabilities(device):
    """A million draws of 50 tokens: chi-square with 49 degrees of freedom, which exceeds 100 once in 50 000 times."""
    row = torch.randn(50)
    N = 1_000_000
    seeds = torch.arange(N, device=device)
    token = llmkern.ops.sample(row.to(device).expand(N, 50), seed=seeds, position=0).token
    counts = torch.bincount(token, minlength=50).cpu().double()
    expected = row.double().softmax(0) * N
    assert ((counts - expected).square() / expected).sum() < 100


def drawn(logits: Tensor, **settings: Any) -> list[Tensor]:
    return [t for t in llmkern.ops.sample(logits, position=3, **settings) if t is not None]


def tokens(logits: Tensor, seeds: Tensor, ids: Tensor) -> list[Tensor]:
    settings = {"top_p": 0.9, "top_k": 50, "num_logprobs": 4}
    return drawn(logits, output_ids=ids, seed=seeds, return_entropy=True, **settings)


def plain_tokens(logits: Tensor, seeds: Tensor) -> list[Tensor]:
    return drawn(logits, temperature=0.8, seed=seeds)


def ops() -> list[Op]:
    seeds = torch.arange(12)
    return [
        Op("filters", tokens, (torch.randn(12, 3001), seeds, torch.randint(3001, (12, 9)))),
        Op("plain", plain_tokens, (torch.randn(12, 40_000), seeds)),
    ]


@every_promise
@every_op(ops())
def test_promises(device, op, promise):
    promise(op)


def test_opcheck(device):
    B, V = 4, 60
    settings = torch.tensor([[1.0, 5, 0.9, 0.01, 1.0, 1.1, 0.1, 0.1]], dtype=torch.float64)
    inputs = [torch.randn(B, V), torch.randn(V), torch.arange(5).repeat(B, 1), torch.randn(B, 5)]
    inputs += [torch.rand(V) < 0.9, torch.randint(V, (B, 3)), torch.randint(V, (B, 5)), settings]
    inputs += [torch.arange(B), torch.arange(B)]
    arguments = (*(t.to(device) for t in inputs), 3, True, True, True, True)
    torch.library.opcheck(torch.ops.llmkern.sample.default, arguments)


def test_autocast_changes_nothing(device):
    op = ops()[0]
    arguments = [t.to(device) for t in op.arguments]
    with torch.autocast("cuda", torch.bfloat16):
        got = results(op.forward, arguments)
    assert_same_bits(got, results(op.forward, arguments))


@small
def test_a_setting_out_of_range_is_raised_later_and_the_context_lives(device):
    logits = torch.randn(3, 7, device=device)
    top_p = torch.tensor([0.5, 1.5, 0.5], device=device)
    out = llmkern.ops.sample(logits, top_p=top_p, seed=1)
    message = r"sample: expected top_p in \(0, 1\], got 1.5 in row 1"
    with pytest.raises(ValueError, match=message):
        llmkern.ops.raise_deferred_errors()
    assert out.valid.tolist() == [True, False, True]
    assert llmkern.ops.sample(logits, seed=1).valid.all()
