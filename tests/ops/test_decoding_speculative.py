# SPDX-License-Identifier: Apache-2.0
"""llmkern.ops.speculative_verify: equal to the integer oracle, and what comes out has the target's distribution.

The power of the G-tests: the two planted mistakes below shift some percent of the mass, and their deviates are beyond
the limit of 4.5 by far; a fair verifier fails once in 1e5 tries. Seeds are fixed.
"""

import math

import numpy as np
import pytest
import torch

from llmkern import _reference
from llmkern.ops import sample, speculative_verify
from tests.ops import decoding_oracle as oracle
from tests.ops.test_sampling_distribution import LIMIT, deviation

OP = torch.ops.llmkern.speculative_verify.default
INF = math.inf
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def make_case(B: int, n: int, V: int, dtype: torch.dtype = torch.float32):
    """Drafts that are accepted now and then; some rows with masks, ties, NaN and nothing, some drafts shorter."""
    draft = torch.randn(B, n, V) * 3
    target = torch.cat([draft + 0.5 * torch.randn(B, n, V), torch.randn(B, 1, V)], 1)
    draft[B // 2 :] = draft[B // 2 :].round()
    target[B // 2 :] = target[B // 2 :].round()
    target[torch.rand(B, n + 1, V) < 0.05] = -INF
    target[::3, :n] = draft[::3]
    ids = sample(draft.flatten(0, 1), seed=3).token.view(B, n)
    if B > 5 and n > 1:
        target[1, 1], target[2, n] = math.nan, -INF
        draft[4, 1, (ids[4, 1] + 1) % V] = math.nan
        target[5, :n] = draft[5]
        ids[5, n - 1] = -1
    return ids, draft.to(dtype), target.to(dtype)


SHAPES = [(8, 3, 1), (20, 1, 2), (40, 4, 9), (30, 3, 256), (12, 5, 700), (3, 0, 50)]


@pytest.mark.parametrize("is_certain", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_oracle(isa, shape, is_certain):
    ids, draft, target = make_case(*shape, dtype=DTYPES[sum(shape) % 4])
    B, n, _ = shape
    seeds, positions = torch.arange(B) - 2, torch.arange(B) * 1000 - 5
    given = None if is_certain else draft
    got = speculative_verify(ids, given, target, seed=seeds, position=positions)
    for b in range(B):
        tokens, num_accepted = oracle.verify(
            ids[b].tolist(),
            None if is_certain else draft[b].float().numpy(),
            target[b].float().numpy(),
            seeds[b].item(),
            positions[b].item(),
        )
        assert got.tokens[b].tolist() == tokens + [-1] * (n + 1 - len(tokens))
        assert got.num_accepted[b] == num_accepted
        assert got.valid[b] == (len(tokens) > num_accepted)


def verify_by_reference(ids, draft, target, seeds, positions):
    arrays = (None if x is None else x.float().numpy() for x in (draft, target))
    return _reference.speculative_verify(ids.numpy(), *arrays, seeds.numpy(), positions.numpy())


@pytest.mark.parametrize("is_certain", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_reference_bitwise(isa, dtype, is_certain):
    ids, draft, target = make_case(50, 4, 3001, dtype)
    if is_certain:
        draft = None
    where = torch.full((50,), 7), torch.arange(50) * 5
    got = speculative_verify(ids, draft, target, seed=7)
    for ours, theirs in zip(got, verify_by_reference(ids, draft, target, *where), strict=False):
        assert ours.numpy().tobytes() == theirs.tobytes()
    assert got.num_accepted.unique().numel() > (1 if is_certain else 2)


def test_nearly_equal_distributions_are_told_apart_exactly(isa):
    """All but two tokens have p / q = 1 + 2^-56, which float64 cannot tell from 1, and together 2 / 7 of the rest."""
    B, V = 40, 2**17
    p, q = torch.zeros(V), torch.zeros(V)
    p[7], q[7] = -26.0, -27.4  # masses 6 and 1
    p[9], q[9] = -INF, -25.8  # 0 and 7
    ids, draft, target = torch.full((B, 1), 9), q.expand(B, 1, V), p.expand(B, 2, V)
    where = torch.full((B,), 1), torch.arange(B) * 2
    got = speculative_verify(ids, draft, target, seed=1)
    for ours, theirs in zip(got, verify_by_reference(ids, draft, target, *where), strict=False):
        assert ours.numpy().tobytes() == theirs.tobytes()
    assert (got.num_accepted == 0).all()
    assert 5 < (got.tokens[:, 0] != 7).sum() < 20


def test_logprobs_are_the_targets(isa):
    ids, draft, target = make_case(40, 4, 500)
    got = speculative_verify(ids, draft, target, seed=0)
    is_token = got.tokens >= 0
    picked = target.double().log_softmax(2).gather(2, got.tokens.clamp(min=0)[:, :, None])[:, :, 0]
    assert (got.logprobs - picked)[is_token].abs().max() < 4e-6
    assert (got.logprobs[~is_token] == 0).all()


# ---- distribution ----

P = torch.tensor([0.02, 0.3, 0.05, 0.13, 0.2, 0.0, 0.3], dtype=torch.float64)
Q = torch.tensor([0.25, 0.1, 0.05, 0.2, 0.15, 0.15, 0.1], dtype=torch.float64)
ROWS = 2**18


def drafted(q: torch.Tensor, p: torch.Tensor, n: int, seed: int):
    """The tokens of ROWS drafts from q, and what the verifier makes of them."""
    draft, target = q.log().expand(ROWS, n, -1), p.log().expand(ROWS, n + 1, -1)
    positions = torch.arange(ROWS) * (n + 1)
    places = positions[:, None] + torch.arange(n)
    rows = q.log().expand(ROWS * n, -1)
    ids = sample(rows, seed=seed, position=places.flatten()).token.view(ROWS, n)
    return ids, speculative_verify(ids, draft, target, seed=seed, position=positions)


def test_the_first_token_has_the_targets_distribution():
    _, out = drafted(Q, P, 1, seed=1)
    assert abs(deviation(torch.bincount(out.tokens[:, 0], minlength=7), P)) < LIMIT
    accepted = torch.minimum(P, Q).sum().item()
    standard = math.sqrt(ROWS * accepted * (1 - accepted))
    assert abs(out.num_accepted.sum().item() - ROWS * accepted) < LIMIT * standard


def test_pairs_of_tokens_have_the_targets_distribution():
    """Two tokens come out only after an acceptance: the first is then min(p, q), the second p, independently."""
    _, out = drafted(Q, P, 1, seed=2)
    both = out.tokens[out.num_accepted == 1]
    kept = torch.minimum(P, Q) / torch.minimum(P, Q).sum()
    pairs = torch.bincount(both[:, 0] * 7 + both[:, 1], minlength=49)
    assert abs(deviation(pairs, torch.outer(kept, P).reshape(-1))) < LIMIT


def test_a_certain_draft_keeps_the_targets_distribution():
    ids = torch.full((ROWS, 1), 4)
    out = speculative_verify(ids, None, P.log().expand(ROWS, 2, -1), seed=3)
    assert abs(deviation(torch.bincount(out.tokens[:, 0], minlength=7), P)) < LIMIT
    assert abs(out.num_accepted.double().mean().item() - 0.2) < 0.005


@pytest.mark.parametrize("mistake", ["replacement from p", "all accepted"])
def test_a_mistake_would_show(mistake):
    """The test above on verifiers that are wrong."""
    ids, out = drafted(Q, P, 1, seed=1)
    first = out.tokens[:, 0]
    if mistake == "replacement from p":
        instead = sample(P.log().expand(ROWS, -1), seed=9).token
        first = torch.where(out.num_accepted == 1, first, instead)
    else:
        first = torch.where(P[ids[:, 0]] > 0, ids[:, 0], first)
    assert deviation(torch.bincount(first, minlength=7), P) > LIMIT


def test_a_draft_that_is_the_target_is_accepted(isa):
    target = torch.randn(200, 6, 400) * 4
    ids = sample(target[:, :5].flatten(0, 1), seed=1).token.view(200, 5)
    out = speculative_verify(ids, target[:, :5], target, seed=2)
    assert (out.num_accepted == 5).all()
    assert torch.equal(out.tokens[:, :5], ids)
    assert out.valid.all()


def test_a_draft_of_other_tokens_is_not(isa):
    draft, target = torch.randn(100, 3, 400), torch.randn(100, 4, 400)
    draft[:, :, 200:], target[:, :, :200] = -INF, -INF
    ids = sample(draft.flatten(0, 1), seed=1).token.view(100, 3)
    for given in (draft, None):
        out = speculative_verify(ids, given, target, seed=2)
        assert (out.num_accepted == 0).all()
        assert (out.tokens[:, 0] >= 200).all()
        assert (out.tokens[:, 1:] == -1).all()


def test_greedy_target(isa):
    """Logits that leave one token: its draft is accepted, any other replaced by it."""
    choice = torch.randint(300, (50, 4))
    target = torch.full((50, 4, 300), -INF).scatter(2, choice[:, :, None], 0.0)
    ids = choice[:, :3].clone()
    ids[10:20, 1] += 1
    ids %= 300
    out = speculative_verify(ids, torch.randn(50, 3, 300), target, seed=0)
    assert out.num_accepted.tolist() == [3] * 10 + [1] * 10 + [3] * 30
    assert torch.equal(out.tokens[:10], choice[:10])
    assert torch.equal(out.tokens[10:20, :2], choice[10:20, :2])


# ---- edges ----


def test_edges_of_a_chain(isa):
    """A draft may end early; a row without a distribution ends the chain without a draw, and what came before stays."""
    target = torch.zeros(5, 3, 4)
    target[:, 0, 1] = target[:, 1, 2] = 100.0
    target[1, 1, 3] = math.nan
    target[2, 2] = -INF
    ids = torch.tensor([[1, -1], [1, 2], [1, 2], [-1, 99], [0, 2]])
    draft = torch.zeros(5, 2, 4)
    draft[0, 1] = math.nan  # not read: the draft has ended
    draft[4, 0, 1] = math.nan
    out = speculative_verify(ids, draft, target, seed=0)
    assert out.tokens[:, :2].tolist() == [[1, 2], [1, -1], [1, 2], [1, -1], [-1, -1]]
    assert out.tokens[:, 2].tolist() == [-1] * 5
    assert out.num_accepted.tolist() == [1, 1, 2, 0, 0]
    assert out.valid.tolist() == [True, False, False, True, False]


def test_a_draft_less_likely_than_any_mass(isa):
    """q(x) of no mass, but above -inf: accepted where p has mass. Where p has none either, and is q, nothing of p is
    left, and the draw is from p."""
    draft = torch.tensor([[[0.0, -90.0]], [[0.0, -90.0]]])
    target = torch.tensor([[[0.0, -1.0], [0.0, 0.0]], [[0.0, -90.0], [0.0, 0.0]]])
    out = speculative_verify(torch.tensor([[1], [1]]), draft, target, seed=0)
    assert out.num_accepted.tolist() == [1, 0]
    assert out.tokens[0, 0] == 1
    assert out.tokens[1].tolist() == [0, -1]


# ---- a function of (seed, position) and the row ----


def test_a_row_knows_nothing_of_its_batch(isa, on_threads):
    ids, draft, target = make_case(40, 3, 400)
    where = {"seed": torch.randint(2**40, (40,)), "position": torch.randint(99, (40,))}
    whole = speculative_verify(ids, draft, target, **where)
    some = torch.randperm(40)[:9]
    part = {name: x[some] for name, x in where.items()}
    got = on_threads(1, lambda: speculative_verify(ids[some], draft[some], target[some], **part))
    for ours, expected in zip(got, whole, strict=True):
        assert torch.equal(ours, expected[some])


def test_positions_continue_from_call_to_call():
    """What a chain draws at a place depends on that place alone, not on where the call began."""
    ids, draft, target = make_case(30, 4, 60)
    whole = speculative_verify(ids, draft, target, seed=torch.arange(30), position=10)
    rest = speculative_verify(
        ids[:, 1:], draft[:, 1:], target[:, 1:], seed=torch.arange(30), position=11
    )
    went_on = whole.num_accepted > 0
    assert went_on.sum() > 5
    assert torch.equal(rest.tokens[went_on], whole.tokens[went_on, 1:])


def test_seeds_and_generators():
    ids, draft, target = make_case(60, 2, 90)
    torch.manual_seed(5)
    first, second = (speculative_verify(ids, draft, target).tokens for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(speculative_verify(ids, draft, target).tokens, first)
    assert not torch.equal(first, second)
    by_row = speculative_verify(ids, draft, target, seed=1, position=3 * torch.arange(60))
    assert torch.equal(speculative_verify(ids, draft, target, seed=1).tokens, by_row.tokens)
    a, b = (
        speculative_verify(ids, draft, target, generator=torch.Generator().manual_seed(7)).tokens
        for _ in range(2)
    )
    assert torch.equal(a, b)


def test_strides_and_dtypes(isa):
    ids, draft, target = make_case(20, 3, 200)
    expected = speculative_verify(ids, draft, target, seed=1).tokens
    apart = torch.full((3, 20, 300), math.nan)
    apart[:, :, :200] = draft.transpose(0, 1)
    across = target.transpose(1, 2).contiguous().transpose(1, 2)
    got = speculative_verify(ids.int(), apart[:, :, :200].transpose(0, 1), across, seed=1)
    assert torch.equal(got.tokens, expected)
    mixed = speculative_verify(ids, draft.double(), target, seed=1)
    assert torch.equal(mixed.tokens, expected)


def test_no_gradient_and_no_rows():
    ids, draft, target = make_case(4, 2, 30)
    out = speculative_verify(ids, draft.requires_grad_(), target.requires_grad_(), seed=0)
    assert not any(x.requires_grad for x in out)
    none = speculative_verify(ids[:0], draft[:0], target[:0], seed=0)
    assert none.tokens.shape == (0, 3)


# ---- errors ----

IDS = torch.zeros(2, 3, dtype=torch.int64)
D, T = torch.zeros(2, 3, 5), torch.zeros(2, 4, 5)
GOOD = {"draft_ids": IDS, "draft_logits": D, "target_logits": T}


def with_id(x: int) -> torch.Tensor:
    ids = IDS.clone()
    ids[1, 2] = x
    return ids


def with_logit(x: float) -> torch.Tensor:
    logits = D.clone()
    logits[1, 2, 0] = x
    return logits


BAD_CALLS = [
    (
        {"draft_ids": with_id(5)},
        IndexError,
        r"in \[0, V\) = \[0, 5\) or -1, got 5 at position \[1, 2\]",
    ),
    ({"draft_ids": with_id(-2)}, IndexError, r"or -1, got -2 at position \[1, 2\]"),
    (
        {"draft_logits": with_logit(-INF)},
        ValueError,
        r"that draft_logits can draw, got 0 with logit -inf at position \[1, 2\]",
    ),
    ({"draft_ids": [[0]]}, TypeError, "draft_ids to be a Tensor, got list"),
    ({"draft_ids": D[..., 0]}, TypeError, "draft_ids of dtype int32 or int64, got float32"),
    ({"draft_ids": IDS[0]}, ValueError, r"draft_ids of shape \[B, n\], got \[3\]"),
    ({"target_logits": T.long()}, TypeError, "target_logits of dtype float32 or .* got int64"),
    ({"target_logits": T[0]}, ValueError, r"target_logits of shape \[B, n \+ 1, V\], got \[4, 5\]"),
    ({"target_logits": D}, ValueError, r"= \[2, 4, 5\], got \[2, 3, 5\]"),
    ({"target_logits": T[..., :0]}, ValueError, "target_logits of 1 to 8388607 tokens"),
    ({"target_logits": T.to("meta")}, ValueError, "target_logits on the CPU, .* got meta"),
    ({"draft_logits": D.to("meta")}, ValueError, "draft_logits on the CPU, .* got meta"),
    ({"draft_ids": IDS.to("meta")}, ValueError, "on cpu and draft_ids on meta"),
    ({"draft_logits": T}, ValueError, r"draft_logits of shape .* = \[2, 3, 5\], got \[2, 4, 5\]"),
    ({"draft_logits": D[..., :4]}, ValueError, r"= \[2, 3, 5\], got \[2, 3, 4\]"),
    ({"seed": 1, "position": 3}, ValueError, r"seed to be a Tensor \[B\] beside an int position"),
    ({"seed": torch.zeros(3).long()}, ValueError, r"seed of shape \[B\] = \[2\], got \[3\]"),
]


@pytest.mark.parametrize(("kwargs", "error", "message"), BAD_CALLS)
def test_bad_input(kwargs, error, message):
    with pytest.raises(error, match=r"llmkern\.speculative_verify: expected .*" + message):
        speculative_verify(**GOOD | kwargs)


SEED, POSITIONS = torch.tensor([1]), torch.tensor([0, 4])
BAD_OPERANDS = [
    ((IDS.int(), D, T, SEED, POSITIONS), "draft_ids of dtype Long"),
    ((IDS[0], D, T, SEED, POSITIONS), "draft_ids of 2 dimensions"),
    ((IDS, D, T[0], SEED, POSITIONS), "target_logits of 3 dimensions"),
    ((IDS, D, D, SEED, POSITIONS), r"target_logits of shape \[2, 4, 5\]"),
    ((IDS, D.double(), T, SEED, POSITIONS), "draft_logits of dtype Float"),
    ((IDS, T, T, SEED, POSITIONS), r"draft_logits of shape \[2, 3, 5\]"),
    ((IDS, D, T[..., :0], SEED, POSITIONS), "target_logits of 1 to 8388607 tokens"),
    ((IDS, None, T.long(), SEED, POSITIONS), "target_logits of dtype float32"),
    ((IDS, D, T, SEED, SEED), r"positions of shape \[2\]"),
    ((IDS, D, T, IDS[0], POSITIONS), "seeds with 1 or B = 2 rows"),
]


@pytest.mark.parametrize(("args", "message"), BAD_OPERANDS)
def test_the_binding_checks_too(args, message):
    with pytest.raises(ValueError, match=r"llmkern\.speculative_verify: expected .*" + message):
        OP(*args)


# ---- the compiler ----


def test_opcheck():
    for draft, target in ((D, T), (None, T), (D.bfloat16(), T.bfloat16())):
        torch.library.opcheck(OP, (IDS, draft, target, SEED, POSITIONS))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic):
    def f(ids, draft, target, seeds):
        out = speculative_verify(ids, draft * 2, target, seed=seeds, position=3)
        return out.tokens, out.num_accepted, out.valid

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for B in (4, 6):
        ids, draft, target = make_case(B, 2, 30)
        args = ids, draft, target, torch.arange(B)
        for got, expected in zip(compiled(*args), f(*args), strict=True):
            assert np.array_equal(got.numpy(), expected.numpy())
