# SPDX-License-Identifier: Apache-2.0
"""Dropout: equality with masks drawn by numpy, gradients, errors, determinism, the compiler."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from llmkern import _reference
from llmkern.ops import dropout

from . import philox_oracle as oracle

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
OP = torch.ops.llmkern.dropout.default
SHAPES = [
    (1, 1),
    (3, 7),
    (5, 16),
    (2, 17),
    (4, 650),
    (3, 1150),
    (2, 2049),
    (700, 3),
    (0, 5),
    (5, 0),
]


def expected(x: Tensor, seed: int, p: float, mask_rows: int) -> Tensor:
    """By the formula: the scale rounded to what x is computed in, the product to x's dtype."""
    D = x.shape[-1]
    rows = x.flatten(0, -2)
    mask = torch.from_numpy(oracle.mask(seed, oracle.DROPOUT, mask_rows, D, p))
    mask = mask.repeat(len(rows) // max(mask_rows, 1), 1)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    scale = torch.tensor(1 / (1 - p), dtype=wide)
    return (rows.to(wide) * scale).to(x.dtype).masked_fill(mask, 0).reshape(x.shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_every_element_is_right(isa, rows, columns, dtype):
    x = torch.randn(rows, columns, dtype=torch.float64).to(dtype)
    for p, seed in ((0.1, 5), (0.5, -3), (0.75, 2**62)):
        assert torch.equal(dropout(x, p, seed=seed), expected(x, seed, p, rows))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("T", "B", "D"), [(5, 3, 7), (35, 20, 65), (3, 1, 2049), (1, 4, 16), (9, 70, 1)]
)
def test_a_locked_mask_stays_over_the_steps(isa, T, B, D, dtype):
    x = torch.randn(T, B, D, dtype=torch.float64).to(dtype)
    got = dropout(x, 0.4, locked=True, seed=9)
    assert torch.equal(got, expected(x, 9, 0.4, B))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropped_is_zero_whatever_it_was(isa, dtype):
    x = torch.full((4, 40), float("nan"), dtype=dtype)
    got = dropout(x, 0.5, seed=1)
    mask = torch.from_numpy(oracle.mask(1, oracle.DROPOUT, 4, 40, 0.5))
    assert torch.equal(got.isnan(), ~mask)
    assert (got[mask] == 0).all()


def test_equals_the_reference():
    x = torch.randn(12, 33, dtype=torch.float64)
    for mask_rows, locked in ((12, False), (3, True)):
        got = dropout(x.reshape(-1, mask_rows, 33), 0.3, locked=locked, seed=4).reshape(12, 33)
        np.testing.assert_allclose(
            got, _reference.dropout(x.numpy(), 4, 0.3, mask_rows), rtol=1e-15
        )
    mask = _reference.mask(4, oracle.ZONEOUT_CELL, 9, 37, 0.3)
    np.testing.assert_array_equal(mask, oracle.mask(4, oracle.ZONEOUT_CELL, 9, 37, 0.3))


def test_probabilities_at_the_ends():
    x = torch.randn(3, 50)
    assert dropout(x, 0.0) is x
    assert torch.equal(dropout(x, 1.0), torch.zeros(3, 50))
    assert torch.equal(OP(x, torch.tensor(1), 0.0, 150), x)


def test_shapes_of_any_dimension():
    assert dropout(torch.tensor(3.0), 0.5, seed=2).item() in (0.0, 6.0)
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(dropout(x, 0.5, seed=1), expected(x, 1, 0.5, 24))
    assert torch.equal(dropout(x[0, 0, 0], 0.5, seed=1), expected(x[0, 0, :1], 1, 0.5, 1)[0])
    assert dropout(torch.zeros(0, 3, 4), 0.5, locked=True).shape == (0, 3, 4)


def test_strided_inputs_and_expanded_gradients():
    x = torch.randn(6, 10)[:, ::2].requires_grad_()
    y = dropout(x, 0.5, seed=3)
    assert torch.equal(y, expected(x.detach(), 3, 0.5, 6))
    y.sum().backward()
    assert torch.equal(x.grad, expected(torch.ones(6, 5), 3, 0.5, 6))


@pytest.mark.parametrize("locked", [False, True])
def test_gradcheck_and_gradgradcheck(locked):
    x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    f = lambda x: dropout(x.sin(), 0.4, locked=locked, seed=1).sin()  # noqa: E731
    assert torch.autograd.gradcheck(f, x)
    assert torch.autograd.gradgradcheck(f, x)


def test_opcheck():
    seed = torch.tensor(1)
    torch.library.opcheck(OP, (torch.randn(3, 5, requires_grad=True), seed, 0.5, 15))
    torch.library.opcheck(OP, (torch.randn(4, 3, 5, dtype=torch.bfloat16), seed, 0.5, 15))


def test_manual_seed_and_generators():
    x = torch.ones(20, 30)
    torch.manual_seed(5)
    first, second = dropout(x), dropout(x)
    torch.manual_seed(5)
    assert torch.equal(dropout(x), first)
    assert not torch.equal(first, second)
    one, two = (dropout(x, generator=torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(one, two)
    assert torch.equal(dropout(x, seed=torch.tensor(11)), dropout(x, seed=11))


@pytest.mark.parametrize(
    ("shape", "locked"), [((300, 650), False), ((70, 20, 650), True), ((9, 1, 5000), True)]
)
def test_same_bits_on_any_number_of_threads(on_threads, shape, locked):
    x = torch.randn(shape)
    one, two = (on_threads(n, lambda: dropout(x, seed=3, locked=locked)) for n in (1, 2))
    assert torch.equal(one, two)


def test_vmap():
    x = torch.randn(5, 3, 4)
    seed = torch.tensor(6)
    same = torch.vmap(lambda x: OP(x, seed, 0.5, 12))(x)
    assert torch.equal(same, torch.stack([OP(x[i], seed, 0.5, 12) for i in range(5)]))
    across = torch.vmap(lambda x: OP(x, seed, 0.5, 4), in_dims=1, out_dims=1)(x)
    assert torch.equal(across, torch.stack([OP(x[:, i], seed, 0.5, 4) for i in range(3)], 1))
    seeds = torch.arange(5)
    own = torch.vmap(lambda x, s: OP(x, s, 0.5, 12))(x, seeds)
    assert torch.equal(own, torch.stack([OP(x[i], seeds[i], 0.5, 12) for i in range(5)]))
    spread = torch.vmap(lambda s: OP(x[0], s, 0.5, 12))(seeds)
    assert torch.equal(spread, torch.stack([OP(x[0], seeds[i], 0.5, 12) for i in range(5)]))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_transforms_of_torch_func():
    x, v = torch.randn(5, 3, 4), torch.randn(3, 4)
    loss = lambda x: dropout(x, 0.5, seed=6).square().sum()  # noqa: E731
    twice = lambda x: dropout(dropout(x, 0.5, seed=6), 0.5, seed=6)  # noqa: E731
    got = torch.vmap(torch.func.grad(loss))(x)
    assert torch.equal(got, torch.stack([2 * twice(x[i]) for i in range(5)]))
    _, tangent = torch.func.jvp(loss, (x[0],), (v,))
    assert torch.allclose(tangent, (2 * twice(x[0]) * v).sum())
    hessian = torch.func.hessian(loss)(x[0]).reshape(12, 12)
    assert torch.equal(hessian, torch.diag(2 * twice(torch.ones(3, 4)).flatten()))


@pytest.mark.parametrize("locked", [False, True])
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_forward_mode(locked):
    """Dual numbers have the tangent, and both ways to second derivatives the same value."""
    x, v = torch.randn(2, 3, 2, 4, dtype=torch.float64)
    f = lambda x: dropout(x, 0.5, locked=locked, seed=6)  # noqa: E731
    with forward_ad.dual_level():
        primal, tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(x, v)))
    assert torch.equal(primal, f(x))
    assert torch.equal(tangent, f(v))
    assert tangent.abs().max() > 0
    smooth = lambda x: f(x.sin()).sin()  # noqa: E731
    variable = x.clone().requires_grad_()
    assert torch.autograd.gradcheck(smooth, variable, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(smooth, variable, check_fwd_over_rev=True)
    loss = lambda x: smooth(x).sum()  # noqa: E731
    _, one = torch.func.jvp(torch.func.grad(loss), (x,), (v,))
    other = torch.func.grad(lambda x: torch.func.jvp(loss, (x,), (v,))[1])(x)
    assert torch.allclose(one, other)
    keep = f(torch.ones_like(x))
    slope = f(x.sin()).cos() * keep * x.cos()
    assert torch.allclose(torch.func.grad(loss)(x), slope)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_compiled_transforms():
    x, seed = torch.randn(3, 4), torch.tensor(6)
    loss = lambda x: dropout(x, 0.5, seed=seed).square().sum()  # noqa: E731
    transforms = (
        torch.func.grad(loss),
        lambda x: torch.func.jvp(loss, (x,), (x.cos(),))[1],
        lambda x: torch.vmap(torch.func.grad(loss))(torch.stack([x, x.sin()])),
    )
    for f in transforms:
        expected = f(x)
        assert expected.abs().max() > 0
        assert torch.equal(torch.compile(f, fullgraph=True, backend="aot_eager")(x), expected)


def test_compile_draws_anew_without_recompiling():
    calls = []

    def backend(graph, inputs):
        calls.append(graph)
        return graph.forward

    x = torch.ones(8, 40, requires_grad=True)
    compiled = torch.compile(lambda x: dropout(x, 0.5).square(), fullgraph=True, backend=backend)
    outputs = [compiled(x) for _ in range(4)]
    assert len(calls) == 1
    assert not torch.equal(outputs[1], outputs[2])
    (grad,) = torch.autograd.grad(outputs[0].sum(), x)
    assert torch.equal(grad, 2 * outputs[0])


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic):
    x = torch.randn(6, 5, 4, requires_grad=True)
    seed = torch.tensor(3)
    compiled = torch.compile(
        lambda x, seed: dropout(x, 0.5, locked=True, seed=seed).sin().sum(),
        fullgraph=True,
        backend="aot_eager",
        dynamic=dynamic,
    )
    (got,) = torch.autograd.grad(compiled(x, seed), x)
    (want,) = torch.autograd.grad(dropout(x, 0.5, locked=True, seed=seed).sin().sum(), x)
    assert torch.equal(got, want)


X = torch.zeros(2, 3)
BAD_CALLS = [
    (([1.0],), {}, TypeError, "expected x to be a Tensor, got list"),
    (
        (X.long(),),
        {},
        TypeError,
        "expected x of dtype float32 or float64 or bfloat16 or float16, got int64",
    ),
    ((X, 1.5), {}, ValueError, r"expected p in \[0, 1\], got 1.5"),
    ((X, float("nan")), {}, ValueError, r"expected p in \[0, 1\], got nan"),
    ((X[0],), {"locked": True}, ValueError, r"two dimensions at least beside locked, got \[3\]"),
    (
        (X,),
        {"seed": 1.0},
        TypeError,
        r"expected seed to be an int or an int64 Tensor \[\], got float",
    ),
    (
        (X,),
        {"seed": 2**63},
        ValueError,
        r"expected seed in \[-2\^63, 2\^63\), got 9223372036854775808",
    ),
    (
        (X,),
        {"seed": torch.tensor([1])},
        ValueError,
        r"expected seed of shape \[\] = \[\], got \[1\]",
    ),
    (
        (X,),
        {"seed": torch.tensor(1.0)},
        TypeError,
        "expected seed of dtype int32 or int64, got float32",
    ),
    (
        (X,),
        {"seed": 1, "generator": torch.Generator()},
        ValueError,
        "expected a seed or a generator, got both",
    ),
]


@pytest.mark.parametrize(("args", "kwargs", "error", "message"), BAD_CALLS)
def test_bad_input(args, kwargs, error, message):
    with pytest.raises(error, match=r"llmkern\.dropout: .*" + message):
        dropout(*args, **kwargs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (X, torch.tensor(1), 0.5, 4),
            "that is a multiple of the last dimension and divides x, got 4",
        ),
        ((X, torch.tensor(1), 0.5, 0), r"got 0 for shape \[2, 3\]"),
        ((torch.zeros(5, 3), torch.tensor(1), 0.5, 6), r"got 6 for shape \[5, 3\]"),
        ((X, torch.tensor([1]), 0.5, 6), r"expected seed of shape \[\], got \[1\]"),
        ((X, torch.tensor(1), -0.5, 6), r"expected p in \[0, 1\], got -0.5"),
        ((X.long(), torch.tensor(1), 0.5, 6), "expected x of dtype float32, float64, bfloat16"),
    ],
)
def test_the_binding_checks_too(arguments, message):
    with pytest.raises(ValueError, match=r"llmkern\.dropout: .*" + message):
        OP(*arguments)
