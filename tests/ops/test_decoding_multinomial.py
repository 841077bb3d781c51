# SPDX-License-Identifier: Apache-2.0
"""llmkern.ops.multinomial: equal to the integer oracle, distributed as it should be, torch.multinomial's drop-in."""

import functools
import math

import numpy as np
import pytest
import torch

from llmkern import _reference
from llmkern.ops import multinomial
from tests.ops import decoding_oracle as oracle
from tests.ops.test_sampling_distribution import LIMIT, deviation

OP = torch.ops.llmkern.multinomial.default
INF = math.inf
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SIZES = [1, 2, 3, 63, 64, 65, 300, 4097]
KINDS = ["uniform", "skewed", "sparse", "falling"]


def make_weights(kind: str, V: int, generator: torch.Generator) -> torch.Tensor:
    x = torch.rand(V, generator=generator, dtype=torch.float64)
    if kind == "skewed":  # from 1 to some 1e-7
        x = (16 * (x - 1)).exp()
    elif kind == "sparse":
        x[torch.rand(V, generator=generator) < 0.7] = -0.0
        x[V // 2] = 0.5
    elif kind == "falling":  # far below what is left of the largest's bits
        x = 0.5 ** torch.arange(V, dtype=torch.float64).remainder(100)
    return x


def make_rows(V: int, from_logits: bool, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(V)
    rows = torch.stack([make_weights(kind, V, generator) for kind in KINDS])
    return (rows.log() if from_logits else rows).to(dtype)


@pytest.mark.parametrize("from_logits", [False, True])
@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize("V", SIZES)
def test_equals_the_oracle(isa, V, replacement, from_logits):
    dtype = DTYPES[V % 4] if V > 3 else torch.float64
    rows = make_rows(V, from_logits, dtype)
    positive = rows > (-INF if from_logits else 0)
    n = min(V, 40, int(positive.sum(1).min()))
    seeds, positions = torch.tensor([-1, 0, 2**63 - 1, 7]), torch.tensor([0, -5, 2**40, 3])
    got = multinomial(rows, n, replacement, from_logits=from_logits, seed=seeds, position=positions)
    expected = [
        oracle.multinomial(row.double().numpy(), n, replacement, from_logits, seed, position)
        for row, seed, position in zip(rows, seeds.tolist(), positions.tolist(), strict=True)
    ]
    assert got.tolist() == expected


@pytest.mark.parametrize("from_logits", [False, True])
@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_reference(isa, dtype, replacement, from_logits):
    rows = make_rows(2000, from_logits, dtype)
    got = multinomial(rows, 50, replacement, from_logits=from_logits, seed=3)
    where = np.full(4, 3), np.arange(4)
    expected = _reference.multinomial(rows.double().numpy(), 50, replacement, from_logits, *where)
    assert np.array_equal(got.numpy(), expected)


@pytest.mark.parametrize("scale", [2.0**-1074, 1e-310, 1e-200, 1e300, 2.0**1020])
def test_any_scale_of_float64(isa, scale):
    weights = torch.tensor([3.0, 0.0, 1.0, 2.0, 8.0], dtype=torch.float64)
    expected = multinomial(weights, 200, True, seed=1)
    assert torch.equal(multinomial(weights * scale, 200, True, seed=1), expected)
    order = multinomial(weights * scale, 4, seed=1)
    assert torch.equal(order, multinomial(weights, 4, seed=1))


def test_every_category_without_replacement(isa):
    """A permutation of those above 0, however small they are beside the largest."""
    weights = torch.tensor([0.0, 1e-38, 1.0, 1e-30, 1e-45, 1e30, 0.0, 1e-20])
    assert multinomial(weights, 6, seed=0).tolist() == [5, 2, 7, 3, 1, 4]
    logits = torch.tensor([-INF, -300.0, 0.0, -1e30, 3e38, -3e38])
    assert multinomial(logits, 5, from_logits=True, seed=0).tolist() == [4, 2, 1, 3, 5]


@pytest.mark.parametrize("from_logits", [False, True])
def test_a_whole_permutation(isa, from_logits):
    """5000 draws from two levels of sums, each of which changes them."""
    rows = make_rows(5000, from_logits, torch.float32)[:2]
    got = multinomial(rows, 5000, from_logits=from_logits, seed=2)
    assert torch.equal(got.sort().values, torch.arange(5000).expand(2, -1))
    assert np.array_equal(got.numpy(), permutations(from_logits))


@functools.cache
def permutations(from_logits: bool) -> np.ndarray:
    rows = make_rows(5000, from_logits, torch.float32)[:2].double().numpy()
    return _reference.multinomial(rows, 5000, False, from_logits, np.full(2, 2), np.arange(2))


def test_more_categories_than_torch_has(isa):
    """Past 2^24, where torch.multinomial refuses, and float32 counting ends."""
    V = 2**24 + 300
    weights = torch.zeros(V)
    live = torch.tensor([0, 2**24 - 1, 2**24 + 1, V - 1])
    weights[live] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    drawn = multinomial(weights, 2**14, True, seed=0)
    counts = torch.bincount(torch.searchsorted(live, drawn), minlength=4)
    assert torch.isin(drawn, live).all()
    assert abs(deviation(counts, torch.tensor([0.1, 0.2, 0.3, 0.4]).double())) < LIMIT
    assert sorted(multinomial(weights, 4, seed=0).tolist()) == live.tolist()


# ---- distribution ----


def probabilities() -> torch.Tensor:
    return torch.tensor([0.0, 0.3, 0.25, 0.2, 0.15, 0.1], dtype=torch.float64)


@pytest.mark.parametrize("from_logits", [False, True])
def test_distribution_with_replacement(from_logits):
    """One half of the mass 1 % more likely would give G a noncentrality of 2^20 * 1e-4 = 105: a deviate of 8.7."""
    p = probabilities()
    rows = 7 * p if not from_logits else p.log() - 3
    drawn = multinomial(rows, 2**20, True, from_logits=from_logits, seed=1)
    assert abs(deviation(torch.bincount(drawn, minlength=6), p)) < LIMIT


def ordered_pairs(p: torch.Tensor) -> torch.Tensor:
    """P(first, then second) without replacement, flattened."""
    joint = p[:, None] * p[None, :] / (1 - p[:, None])
    return joint.fill_diagonal_(0).reshape(-1)


@pytest.mark.parametrize("from_logits", [False, True])
def test_distribution_of_ordered_pairs_without_replacement(from_logits):
    p = probabilities()
    rows = (p.log() if from_logits else p).repeat(2**18, 1)
    first, second = multinomial(rows, 2, from_logits=from_logits, seed=4).unbind(1)
    pairs = torch.bincount(first * 6 + second, minlength=36)
    assert abs(deviation(pairs, ordered_pairs(p))) < LIMIT


def test_pairs_of_another_distribution_fail():
    """Two draws with replacement, kept where they differ: the same support, and P(first) is another."""
    p = probabilities()
    first, second = multinomial(p.repeat(2**18, 1), 2, True, seed=4).unbind(1)
    pairs = torch.bincount((first * 6 + second)[first != second], minlength=36)
    assert deviation(pairs, ordered_pairs(p)) > LIMIT


def test_small_weights_keep_their_ratio_when_the_large_one_is_gone():
    """1 : 3 at 2^-60 of the largest, where 51 bits would see neither."""
    weights = torch.tensor([1.0, 2.0**-60, 3 * 2.0**-60], dtype=torch.float64).repeat(2**16, 1)
    first, second = multinomial(weights, 2, seed=5).unbind(1)
    assert (first == 0).all()
    counts = torch.bincount(second, minlength=3)
    assert abs(deviation(counts, torch.tensor([0, 0.25, 0.75]).double())) < LIMIT


# ---- a function of (seed, position, draw) and the row ----


@pytest.mark.parametrize("replacement", [False, True])
def test_a_row_knows_nothing_of_its_batch(isa, replacement, on_threads):
    rows = torch.rand(40, 700)
    where = {"seed": torch.randint(2**40, (40,)), "position": torch.randint(99, (40,))}
    whole = multinomial(rows, 30, replacement, **where)
    assert torch.equal(on_threads(1, lambda: multinomial(rows, 30, replacement, **where)), whole)
    some = torch.randperm(40)[:7]
    part = {name: x[some] for name, x in where.items()}
    assert torch.equal(multinomial(rows[some], 30, replacement, **part), whole[some])
    assert torch.equal(multinomial(rows, 11, replacement, **where), whole[:, :11])
    one = multinomial(
        rows[3], 30, replacement, seed=where["seed"][3], position=where["position"][3]
    )
    assert torch.equal(one, whole[3])


@pytest.mark.parametrize("V", [300, 70_000])
def test_same_bits_on_any_number_of_threads(on_threads, V):
    row = torch.rand(V)
    one, two = (on_threads(n, lambda: multinomial(row, 5000, True, seed=3)) for n in (1, 2))
    assert torch.equal(one, two)


def test_seeds_and_generators():
    rows = torch.rand(50, 100)
    torch.manual_seed(5)
    first, second = multinomial(rows, 4), multinomial(rows, 4)
    torch.manual_seed(5)
    assert torch.equal(multinomial(rows, 4), first)
    assert not torch.equal(first, second)
    a, b = (multinomial(rows, 4, generator=torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(a, b)
    same = multinomial(rows[:1].expand(50, -1), 4, True, seed=1)
    assert len({tuple(row) for row in same.tolist()}) > 45  # each row has its own numbers
    by_row = multinomial(rows, 4, seed=1, position=torch.arange(50))
    assert torch.equal(multinomial(rows, 4, seed=1), by_row)


def test_strides():
    rows = torch.rand(6, 40)
    expected = multinomial(rows, 9, seed=1)
    assert torch.equal(multinomial(rows.t().contiguous().t(), 9, seed=1), expected)
    wide = torch.full((6, 100), -1.0)
    wide[:, 10:50] = rows
    assert torch.equal(multinomial(wide[:, 10:50], 9, seed=1), expected)
    expanded = rows[:1].expand(6, -1)
    assert torch.equal(multinomial(expanded, 9, seed=1), multinomial(expanded.clone(), 9, seed=1))


# ---- torch.multinomial's drop-in ----


@pytest.mark.parametrize("shape", [(7,), (1,), (3, 7), (0, 7), (1, 1)])
@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes_and_dtypes_are_torchs(shape, replacement, dtype):
    weights = torch.rand(shape).add(0.5).to(dtype).requires_grad_()
    for n in (1, shape[-1]):
        ours, theirs = (f(weights, n, replacement) for f in (multinomial, torch.multinomial))
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype == torch.int64
        assert not ours.requires_grad


W = torch.tensor([[1.0, 0.0, 2.0], [3.0, 1.0, 1.0]])


def with_value(x: float) -> torch.Tensor:
    weights = W.clone()
    weights[1, 2] = x
    return weights


# What torch.multinomial refuses too.
TORCH_REFUSES = [
    ((with_value(-1.0), 1), r"finite weights of at least 0, got -1 at position \[1, 2\]"),
    ((with_value(-1.0), 2, True), r"finite weights of at least 0, got -1 at position \[1, 2\]"),
    ((with_value(math.nan), 1), r"finite weights of at least 0, got nan at position \[1, 2\]"),
    ((with_value(INF), 2), r"finite weights of at least 0, got inf at position \[1, 2\]"),
    ((W * torch.tensor([[1.0], [0.0]]), 1), "a weight above 0 in every row, got none in row 1"),
    ((W, 4), "num_samples of at most V = 3 without replacement, got 4"),
    ((W, 0), r"num_samples in \[1, 2\^32\), got 0"),
    ((W, -1, True), r"num_samples in \[1, 2\^32\), got -1"),
    ((W[None], 1), r"input of shape \[B, V\] or \[V\], got \[1, 2, 3\]"),
    ((W[0, 0], 1), r"input of shape \[B, V\] or \[V\], got \[\]"),
    ((W[:, :0], 1), "input of 1 to 2147483647 categories, got 0"),
    ((W.long(), 1), "input of dtype float32 or float64 or bfloat16 or float16, got int64"),
]


@pytest.mark.parametrize(("args", "message"), TORCH_REFUSES)
def test_errors_are_torchs(args, message):
    with pytest.raises(RuntimeError):
        torch.multinomial(*args)
    with pytest.raises(RuntimeError, match=r"llmkern\.multinomial: expected " + message) as raised:
        multinomial(*args)
    assert isinstance(raised.value, TypeError if args[0].dtype == torch.int64 else ValueError)


REFUSED = [
    (
        (W, 3),
        {},
        ValueError,
        "num_samples = 3 categories with a weight above 0 .* got fewer in row 0",
    ),
    ((W, 1.0), {}, TypeError, "num_samples to be an int, got float"),
    (([1.0], 1), {}, TypeError, "input to be a Tensor, got list"),
    ((W.to("meta"), 1), {}, ValueError, "input on the CPU, where this operator runs, got meta"),
    ((W, 1), {"seed": 1, "position": 2}, ValueError, r"seed to be a Tensor \[B\]"),
    ((W, 1), {"seed": 1.5}, TypeError, "seed to be an int or an int64 Tensor"),
    ((W, 1), {"seed": 1, "generator": torch.Generator()}, ValueError, "a seed or a generator"),
    (
        (with_value(math.nan), 1),
        {"from_logits": True},
        ValueError,
        r"logits that are not NaN, got nan at position \[1, 2\]",
    ),
    (
        (torch.full((2, 3), -INF), 1),
        {"from_logits": True},
        ValueError,
        "a logit above -inf in every row, got none in row 0",
    ),
    (
        (W.log(), 3),
        {"from_logits": True},
        ValueError,
        "num_samples = 3 categories with a logit above -inf .* got fewer in row 0",
    ),
    (
        (torch.empty(1).expand(2**23), 1),
        {"from_logits": True},
        ValueError,
        "input of 1 to 8388607 categories, got 8388608",
    ),
]


@pytest.mark.parametrize(("args", "options", "error", "message"), REFUSED)
def test_errors(args, options, error, message):
    with pytest.raises(error, match=r"llmkern\.multinomial: expected " + message):
        multinomial(*args, **options)


SEED, ROWS = torch.tensor([1]), torch.tensor([0, 1])
BAD_OPERANDS = [
    ((W[0], 1, True, False, SEED, ROWS), "input of 2 dimensions"),
    ((W[:, :0], 1, True, False, SEED, ROWS), "input of 1 to 2147483647 categories"),
    ((W.long(), 1, True, False, SEED, ROWS), "input of dtype float32, float64"),
    ((W, 0, True, False, SEED, ROWS), r"num_samples in \[1, 2\^32\), got 0"),
    ((W, 4, False, False, SEED, ROWS), "num_samples of at most V = 3"),
    ((W, 1, True, False, torch.zeros(3, dtype=torch.int64), ROWS), "seeds with 1 or B = 2 rows"),
    ((W, 1, True, False, SEED.double(), ROWS), "seeds of dtype Long"),
    ((W, 1, True, False, SEED, SEED), r"positions of shape \[2\], got \[1\]"),
]


@pytest.mark.parametrize(("args", "message"), BAD_OPERANDS)
def test_the_binding_checks_too(args, message):
    with pytest.raises(ValueError, match=r"llmkern\.multinomial: expected " + message):
        OP(*args)


# ---- the compiler ----


def test_opcheck():
    for rows in (torch.rand(2, 5), torch.rand(2, 5, dtype=torch.bfloat16, requires_grad=True)):
        torch.library.opcheck(OP, (rows, 3, True, False, SEED, ROWS))
        torch.library.opcheck(OP, (rows, 3, False, True, SEED, ROWS))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic):
    def f(rows, seeds):
        return multinomial(rows * 2, 3, seed=seeds, position=4)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for B in (4, 6):
        args = torch.rand(B, 30), torch.arange(B)
        assert torch.equal(compiled(*args), f(*args))
