# SPDX-License-Identifier: Apache-2.0
"""llmkern.ops.beam_search_step: equal to the reference to the bit, to torch's log_softmax and topk in value, and to
exhaustive search when it is used as one."""

import itertools
import math

import numpy as np
import pytest
import torch

from llmkern import _reference
from llmkern.ops import BeamCandidates, beam_search_step

OP = torch.ops.llmkern.beam_search_step.default
INF = math.inf
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
KINDS = ["normal", "ties", "constant", "masked", "steep", "far apart"]


def make_step(kind: str, shape: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    logits, scores = torch.randn(shape) * 3, -torch.rand(shape[:2]) * 5
    if kind == "ties":
        logits, scores = logits.round(), scores.round()
    elif kind == "constant":
        logits, scores = torch.zeros(shape), torch.zeros(shape[:2])
    elif kind == "masked":
        logits[torch.rand(shape) < 0.8] = -INF
        scores[torch.rand(shape[:2]) < 0.4] = -INF
        logits[:, 0, shape[2] // 2] = INF
    elif kind == "steep":
        logits *= 1e37
    elif kind == "far apart":  # scores that swallow the logprobs
        scores *= 1e6
    return logits, scores


def assert_equals_reference(logits: torch.Tensor, scores: torch.Tensor, n: int) -> BeamCandidates:
    got = beam_search_step(logits, scores, num_candidates=n)
    expected = _reference.beam_search_step(logits.float().numpy(), scores.numpy(), n)
    for name, ours, theirs in zip(got._fields, got, expected, strict=True):
        assert ours.numpy().tobytes() == theirs.tobytes(), name
    return got


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 4, 7), (2, 3, 256), (2, 5, 1000), (1, 2, 5003)])
def test_equals_the_reference(isa, kind, shape):
    logits, scores = make_step(kind, shape)
    dtype = DTYPES[KINDS.index(kind) % 4]
    for n in (1, 2 * shape[1], 300):
        assert_equals_reference(logits.to(dtype), scores, n)


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_those_of_torch(isa, dtype):
    """In generic position: the same sets as from log_softmax and topk in float64."""
    logits, scores = (torch.randn(4, 6, 3000) * 4).to(dtype), torch.randn(4, 6)
    all_scores = logits.double().log_softmax(2) + scores.double()[:, :, None]
    got = beam_search_step(logits, scores)
    value, index = all_scores.flatten(1).topk(13)
    # A float32 difference of logits and a float32 result.
    assert (got.score - value[:, :12]).abs().max() < 4e-6
    for b in range(4):
        certain = int((value[b] > value[b, 12] + 1e-5).sum())  # not equal to what is left out
        ours = (got.beam[b] * 3000 + got.token[b]).tolist()
        assert set(index[b, :certain].tolist()) <= set(ours)
        assert len(set(ours)) == 12


def test_scores_are_ordered_and_equal_ones_by_beam_then_token(isa):
    logits = torch.zeros(1, 3, 600)
    logits[0, :, 500] = 1.0
    scores = torch.tensor([[-1.0, 0.0, 0.0]])
    got = beam_search_step(logits, scores, num_candidates=6)
    assert got.beam.tolist() == [[1, 2, 0, 1, 1, 1]]
    assert got.token.tolist() == [[500, 500, 500, 0, 1, 2]]
    assert got.score[0, 2] == got.score[0, 5] == got.score[0, 0] - 1


def test_finished_beams_and_masked_tokens_never_come_back(isa):
    logits = torch.full((1, 3, 400), -INF)
    logits[0, 0] = math.nan  # a finished beam's logits are not read
    logits[0, 1, 300] = -5.0
    scores = torch.tensor([[-INF, -2.0, -1.0]])  # the last beam has no token left
    got = beam_search_step(logits, scores, num_candidates=3)
    assert got.beam.tolist() == [[1, -1, -1]]
    assert got.token.tolist() == [[300, -1, -1]]
    assert got.score.tolist() == [[-2.0, -INF, -INF]]
    nothing = beam_search_step(logits, torch.full((1, 3), -INF))
    assert nothing.token.tolist() == [[-1] * 6]
    assert nothing.score.tolist() == [[-INF] * 6]


@pytest.mark.parametrize("where", ["nan logit", "nan score", "infinite score"])
def test_an_invalid_entry_says_so_and_harms_no_other(isa, where):
    logits, scores = torch.randn(3, 2, 700), torch.randn(3, 2)
    fine = beam_search_step(logits, scores)
    if where == "nan logit":
        logits[1, 1, 600] = math.copysign(math.nan, -1)
    else:
        scores[1, 0] = math.nan if where == "nan score" else INF
    got = assert_equals_reference(logits, scores, 4)
    assert got.beam[1].tolist() == got.token[1].tolist() == [-1] * 4
    assert got.score[1].isnan().all()
    for ours, before in zip(got, fine, strict=True):
        assert torch.equal(ours[[0, 2]], before[[0, 2]])


def test_more_continuations_than_float32_can_count(isa):
    """K * V > 2^24: torch.topk over flattened float indices fails there, and bfloat16 ties are the rule."""
    V = 2**23 - 1
    logits = torch.zeros(1, 3, V, dtype=torch.bfloat16)
    logits[0, 2, V - 1] = logits[0, 2, V - 3] = 2.0
    logits[0, 1, 5] = 1.0
    got = beam_search_step(logits, torch.zeros(1, 3), num_candidates=5)
    assert got.beam.tolist() == [[2, 2, 1, 0, 0]]
    assert got.token.tolist() == [[V - 3, V - 1, 5, 0, 1]]
    one = torch.zeros(1, 1, V).log_softmax(2)[0, 0, 0].item()
    assert got.score[0].tolist() == pytest.approx([one + 2, one + 2, one + 1, one, one], abs=2e-6)


def test_strides(isa):
    logits, scores = torch.randn(4, 5, 300), torch.randn(4, 5)
    expected = beam_search_step(logits, scores)
    wide = torch.full((5, 4, 400), math.nan)
    wide[:, :, 50:350] = logits.transpose(0, 1)
    steps = [
        beam_search_step(wide[:, :, 50:350].transpose(0, 1), scores.t().contiguous().t()),
        beam_search_step(logits.transpose(1, 2).contiguous().transpose(1, 2), scores),
    ]
    for got in steps:
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    same = beam_search_step(logits[:1, :1].expand(4, 5, -1), scores)
    copied = beam_search_step(logits[:1, :1].expand(4, 5, -1).clone(), scores)
    assert all(torch.equal(a, b) for a, b in zip(same, copied, strict=True))


@pytest.mark.parametrize("shape", [(7, 3, 2000), (1, 6, 30_000)])
def test_same_bits_on_any_number_of_threads(on_threads, shape):
    logits, scores = torch.randn(shape), torch.randn(shape[:2])
    one, two = (on_threads(n, lambda: beam_search_step(logits, scores)) for n in (1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_a_batch_entry_knows_nothing_of_the_others(isa):
    logits, scores = make_step("masked", (6, 4, 500))
    whole = beam_search_step(logits, scores, num_candidates=9)
    some = torch.tensor([4, 1])
    part = beam_search_step(logits[some], scores[some], num_candidates=9)
    assert all(torch.equal(a, b[some]) for a, b in zip(part, whole, strict=True))


# ---- a whole search ----

TOKENS, END, STEPS = 5, 4, 4


def toy_logits(prefix: tuple[int, ...]) -> torch.Tensor:
    """A model that looks at all it has written."""
    generator = torch.Generator().manual_seed(hash(prefix) % 2**31)
    return torch.randn(TOKENS, generator=generator) * 2


def best_texts(count: int) -> list[tuple[float, tuple[int, ...]]]:
    """Every text that ends, or is STEPS long, by its log-probability in float64."""
    texts = []
    for text in itertools.product(range(TOKENS), repeat=STEPS):
        if END in text:
            text = text[: text.index(END) + 1]
        logprobs = [toy_logits(text[:i]).double().log_softmax(0)[t] for i, t in enumerate(text)]
        texts.append((sum(logprobs).item(), text))
    return sorted(set(texts), reverse=True)[:count]


def beam_search(K: int) -> list[tuple[float, tuple[int, ...]]]:
    beams, scores = [()] * K, torch.tensor([[0.0] + [-INF] * (K - 1)])
    finished: list[tuple[float, tuple[int, ...]]] = []
    for _ in range(STEPS):
        logits = torch.stack([toy_logits(prefix) for prefix in beams])[None]
        best = beam_search_step(logits, scores)
        found = [x[0].tolist() for x in best if x is not None]
        kept = []
        for score, beam, token in zip(*found, strict=True):
            if token == END:
                finished.append((score, (*beams[beam], token)))
            elif token >= 0:
                kept.append((score, (*beams[beam], token)))
        kept = (kept + [(-INF, ())] * K)[:K]
        scores, beams = torch.tensor([[s for s, _ in kept]]), [text for _, text in kept]
    finished += [x for x in kept if x[0] > -INF]
    return sorted(finished, reverse=True)


def test_a_wide_enough_search_is_exhaustive():
    """With as many beams as there are open texts, beam search finds the best of all, in order."""
    expected = best_texts(20)
    got = beam_search(K=4**STEPS)[:20]
    assert [text for _, text in got] == [text for _, text in expected]
    assert [s for s, _ in got] == pytest.approx([s for s, _ in expected], abs=1e-5)
    assert beam_search(K=2)[0][0] <= got[0][0]


# ---- arguments ----


def test_defaults_and_no_gradient():
    logits, scores = torch.randn(2, 3, 50, requires_grad=True), torch.randn(2, 3).double()
    got = beam_search_step(logits, scores)
    assert got.score.shape == got.beam.shape == got.token.shape == (2, 6)
    assert got.score.dtype == torch.float32
    assert not got.score.requires_grad
    empty = beam_search_step(torch.empty(0, 3, 5), torch.empty(0, 3))
    assert empty.token.shape == (0, 6)


L, S = torch.zeros(2, 3, 5), torch.zeros(2, 3)
BAD_CALLS = [
    ({"logits": [0.0]}, TypeError, "logits to be a Tensor, got list"),
    ({"logits": L.long()}, TypeError, "logits of dtype float32 or float64 or .* got int64"),
    ({"logits": L[0]}, ValueError, r"logits of shape \[B, K, V\], got \[3, 5\]"),
    ({"logits": L[..., :0]}, ValueError, "logits of 1 to 8388607 tokens, got shape"),
    ({"logits": L.to("meta")}, ValueError, "logits on the CPU, where this operator runs, got meta"),
    ({"scores": 1.0}, TypeError, "scores to be a Tensor, got float"),
    ({"scores": S.long()}, TypeError, "scores of dtype float32 or .* got int64"),
    ({"scores": S[:1]}, ValueError, r"scores of shape \[B, K\] = \[2, 3\], got \[1, 3\]"),
    ({"scores": S.to("meta")}, ValueError, "one device, got logits on cpu and scores on meta"),
    ({"num_candidates": 0}, ValueError, "num_candidates of at least 1, got 0"),
]


@pytest.mark.parametrize(("kwargs", "error", "message"), BAD_CALLS)
def test_bad_input(kwargs, error, message):
    with pytest.raises(error, match=r"llmkern\.beam_search_step: expected .*" + message):
        beam_search_step(**{"logits": L, "scores": S} | kwargs)


BAD_OPERANDS = [
    ((L[0], S, 2), "logits of 3 dimensions"),
    ((L[..., :0], S, 2), "logits of 1 to 8388607 tokens"),
    ((L.long(), S, 2), "logits of dtype float32"),
    ((L, S.double(), 2), "scores of dtype Float"),
    ((L, S[:, :2], 2), r"scores of shape \[2, 3\], got \[2, 2\]"),
    ((L, S, 0), "num_candidates of at least 1, got 0"),
]


@pytest.mark.parametrize(("args", "message"), BAD_OPERANDS)
def test_the_binding_checks_too(args, message):
    with pytest.raises(ValueError, match=r"llmkern\.beam_search_step: expected .*" + message):
        OP(*args)


def test_opcheck():
    torch.library.opcheck(OP, (torch.randn(2, 3, 5), S, 4))
    torch.library.opcheck(OP, (torch.randn(2, 3, 5, dtype=torch.bfloat16), S, 40))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic):
    def f(logits, scores):
        return beam_search_step(logits * 2, scores)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for B in (4, 6):
        args = torch.randn(B, 3, 30), torch.randn(B, 3)
        for got, expected in zip(compiled(*args), f(*args), strict=True):
            assert np.array_equal(got.numpy(), expected.numpy())
