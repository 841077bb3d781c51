# SPDX-License-Identifier: Apache-2.0
"""Linear cross entropy: parity with the reference and with torch, accuracy, determinism, extremes, errors."""

import functools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import llmkern
from llmkern import _reference
from tests.conftest import assert_close, assert_no_less_accurate

pytestmark = pytest.mark.usefixtures("one_thread")

# N, D, V: one feature, primes, the widths of classic language models, more rows than a block of the matrix
# product has, a vocabulary that needs several chunks of rows with a ragged last one, a chunk of the least size.
SMALL_SHAPES = [(3, 1, 2), (7, 5, 3), (530, 3, 17)]
LARGE_SHAPES = [(13, 650, 37), (9, 1150, 101), (500, 2, 9000), (70, 2, 66000)]
OPTIONS = [
    {},
    {"linear_bias": True},
    {"weight": True},
    {"label_smoothing": 0.1, "ignored": True},
    {"linear_bias": True, "weight": True, "label_smoothing": 0.3, "ignored": True},
    {"weight": True, "label_smoothing": 1.0},
]
REDUCTIONS = ["none", "mean", "sum"]
CASES = [(s, o, r) for s in SMALL_SHAPES for o in range(len(OPTIONS)) for r in REDUCTIONS]
CASES += [(s, 0, "none") for s in LARGE_SHAPES] + [(s, 4, "mean") for s in LARGE_SHAPES]


def torch_loss(input, linear_weight, target, *, linear_bias=None, **options):
    logits = F.linear(input, linear_weight, linear_bias)
    return F.cross_entropy(logits, target, **options)


def arguments_of(shape, option, dtype=torch.float64):
    """Arguments and options of a call; every value is a float32, so that both dtypes compute the same function."""
    N, D, V = shape
    wanted = dict(OPTIONS[option])
    tensors = {"input": torch.randn(N, D), "linear_weight": torch.randn(V, D) / D**0.5}
    if wanted.pop("linear_bias", False):
        tensors["linear_bias"] = torch.randn(V)
    options = {"weight": torch.rand(V).to(dtype)} if wanted.pop("weight", False) else {}
    target = torch.randint(V, (N,))
    if wanted.pop("ignored", False):
        target[1::3] = options["ignore_index"] = 1 if V > 2 else -100
    return {k: t.to(dtype) for k, t in tensors.items()}, target, options | wanted


def run(f, tensors, target, options, upstream) -> list[Tensor]:
    """The loss, then the gradients of every tensor."""
    tensors = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    loss = f(target=target, **tensors, **options)
    return [loss.detach(), *torch.autograd.grad(loss, list(tensors.values()), upstream)]


@functools.cache
def reference_case(shape, option, reduction):
    tensors, target, options = arguments_of(shape, option)
    options["reduction"] = reduction
    upstream = torch.randn(shape[:1] if reduction == "none" else ()).double()
    names = {"weight": "class_weight", "linear_weight": "weight", "linear_bias": "bias"}
    arrays = {
        names.get(k, k): v.numpy() if isinstance(v, Tensor) else v
        for k, v in (options | {"target": target}).items()
    }
    arrays |= {names.get(k, k): t.numpy() for k, t in tensors.items()}
    loss = _reference.linear_cross_entropy(**arrays)
    *grads, grad_bias, _ = _reference.linear_cross_entropy_backward(upstream.numpy(), **arrays)
    expected = [loss, *grads] + ([grad_bias] if "linear_bias" in tensors else [])
    return tensors, target, options, upstream, [torch.from_numpy(np.asarray(e)) for e in expected]


def cast(values, dtype):
    return {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in values.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("shape", "option", "reduction"), CASES)
def test_loss_and_gradients_equal_reference_and_torch(isa, shape, option, reduction, dtype):
    tensors, target, options, upstream, expected = reference_case(shape, option, reduction)
    call = (cast(tensors, dtype), target, cast(options, dtype), upstream.to(dtype))
    got = run(llmkern.ops.linear_cross_entropy, *call)
    for ours, truth in zip(got, expected, strict=True):
        assert_close(ours, truth)
    if dtype == torch.float64:  # torch's float32 is the less accurate one
        for ours, torchs in zip(got, run(torch_loss, *call), strict=True):
            assert_close(ours, torchs)


@pytest.mark.parametrize("option", range(len(OPTIONS)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_class_is_certain(isa, option, dtype):
    """No loss and no gradient, up to a rounding error of terms of size 1."""
    tensors, target, options = arguments_of((5, 3, 1), option, dtype)
    upstream = torch.randn((), dtype=dtype)
    for t in run(llmkern.ops.linear_cross_entropy, tensors, target, options, upstream):
        assert t.abs().max() <= 4 * torch.finfo(dtype).eps


@functools.cache
def float32_case(N, D, V, scale, label_smoothing):
    """A call, what torch makes of it, and the truth."""
    tensors = {"input": torch.randn(N, D), "linear_weight": torch.randn(V, D) * scale}
    options = {"reduction": "none", "label_smoothing": label_smoothing}
    target, upstream = torch.randint(V, (N,)), torch.randn(N)
    truth = run(torch_loss, cast(tensors, torch.float64), target, options, upstream.double())
    call = (tensors, target, options, upstream)
    return call, run(torch_loss, *call), truth


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    ("N", "D", "V", "scale"),
    [(50, 30, 1003, 1.0), (70, 200, 10000, 0.07), (64, 1150, 1000, 0.03), (20, 8, 50, 100.0)],
)
def test_float32_is_as_accurate_as_torch(isa, N, D, V, scale, label_smoothing):
    call, torchs, truth = float32_case(N, D, V, scale, label_smoothing)
    got = run(llmkern.ops.linear_cross_entropy, *call)
    for name, a, b, c in zip(("loss", *call[0]), got, torchs, truth, strict=True):
        assert_no_less_accurate(name, a, b, c)


def test_reference_by_hand():
    """Logits log 1, log 2, log 5: probabilities 1/8, 1/4, 5/8."""
    logits = np.log([[1.0, 2.0, 5.0]])
    call = {"input": logits, "weight": np.eye(3), "target": np.array([1])}
    assert _reference.linear_cross_entropy(**call) == pytest.approx(math.log(4), rel=1e-15)
    smooth = 0.7 * math.log(4) + 0.1 * (math.log(8) + math.log(4) + math.log(8 / 5))
    got = _reference.linear_cross_entropy(**call, label_smoothing=0.3)
    assert got == pytest.approx(smooth, rel=1e-15)
    grads = _reference.linear_cross_entropy_backward(np.array(2.0), **call)
    np.testing.assert_allclose(grads[2], [0.25, -1.5, 1.25], rtol=1e-14)
    np.testing.assert_allclose(grads[0], [[0.25, -1.5, 1.25]], rtol=1e-14)
    np.testing.assert_allclose(grads[1], np.outer(grads[2], logits), rtol=1e-14)
    with pytest.raises(IndexError, match=r"target outside \[0, V\)"):
        _reference.linear_cross_entropy(logits, np.eye(3), np.array([3]))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (2, 0)], ids=str)
def test_any_leading_shape(shape, reduction):
    tensors = {
        "input": torch.randn(*shape, 5).double(),
        "linear_weight": torch.randn(7, 5).double(),
    }
    target, options = torch.randint(7, shape), {"reduction": reduction}
    upstream = torch.randn(shape if reduction == "none" else ()).double()
    got = run(llmkern.ops.linear_cross_entropy, tensors, target, options, upstream)
    assert got[0].shape == upstream.shape and got[1].shape == tensors["input"].shape
    flat = {**tensors, "input": tensors["input"].reshape(-1, 5)}
    flat_upstream = upstream.reshape(-1) if reduction == "none" else upstream
    torchs = run(torch_loss, flat, target.reshape(-1), options, flat_upstream)
    for a, b in zip(got, torchs, strict=True):
        assert_close(a.reshape(b.shape).nan_to_num(7), b.nan_to_num(7))


def test_no_features():
    """Without features the logits are the bias alone."""
    bias = torch.randn(6).double().requires_grad_()
    target = torch.tensor([1, 5, 5])
    loss = llmkern.ops.linear_cross_entropy(
        torch.zeros(3, 0).double(), torch.zeros(6, 0).double(), target, linear_bias=bias
    )
    expected = F.cross_entropy(bias.expand(3, 6), target)
    assert_close(loss, expected)
    assert_close(torch.autograd.grad(loss, bias)[0], torch.autograd.grad(expected, bias)[0])


@pytest.mark.parametrize("ignore_index", [-100, 2])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_every_row_ignored(reduction, ignore_index):
    input = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    weight, target = torch.randn(5, 4).double(), torch.full((3,), ignore_index)
    options = {"reduction": reduction, "ignore_index": ignore_index}
    loss = llmkern.ops.linear_cross_entropy(input, weight, target, **options)
    assert loss.isnan().item() if reduction == "mean" else loss.eq(0).all()
    torch.testing.assert_close(
        loss, torch_loss(input, weight, target, **options), equal_nan=True, rtol=0, atol=0
    )
    (grad,) = torch.autograd.grad(loss.sum(), input)
    assert grad.count_nonzero() == 0


def test_ignored_row_gets_exactly_nothing():
    input = torch.randn(3, 4, requires_grad=True)
    with torch.no_grad():
        input[1] = float("inf")
    target = torch.tensor([1, -100, 0])
    loss = llmkern.ops.linear_cross_entropy(input, torch.randn(5, 4), target, reduction="none")
    assert loss[1] == 0 and loss.isfinite().all()
    assert torch.autograd.grad(loss.sum(), input)[0][1].tolist() == [0, 0, 0, 0]


def test_strided_arguments_and_expanded_gradients():
    N, D, V = 6, 5, 9
    tensors, target, options = arguments_of((N, D, V), 4)
    spread = {k: torch.stack([t, t * 0 + 7], dim=-1)[..., 0] for k, t in tensors.items()}
    options["weight"] = torch.stack([options["weight"]] * 2, dim=-1)[..., 0]
    targets = torch.stack([target, target], dim=-1)[..., 0]
    assert not any(t.is_contiguous() for t in (*spread.values(), targets, options["weight"]))
    options["reduction"] = "none"
    one = torch.ones((), dtype=torch.float64)
    got = run(llmkern.ops.linear_cross_entropy, spread, targets, options, one.expand(N))
    expected = run(torch_loss, tensors, target, options, torch.ones(N).double())
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b)
    row = torch.randn(D).double()
    loss = llmkern.ops.linear_cross_entropy(row.expand(N, D), tensors["linear_weight"], target)
    assert_close(loss, torch_loss(row.expand(N, D), tensors["linear_weight"], target))


@pytest.mark.parametrize("shape", [(70, 3, 66000), (130, 65, 301)], ids=str)
def test_same_bits_on_any_number_of_threads(isa, on_threads, shape):
    tensors, target, options = arguments_of(shape, 4, torch.float32)
    upstream = torch.randn(())

    def once():
        return run(llmkern.ops.linear_cross_entropy, tensors, target, options, upstream)

    for other in (2, 3):
        for a, b in zip(on_threads(1, once), on_threads(other, once), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_does_not_depend_on_the_batch(isa, dtype):
    tensors, target, options = arguments_of((29, 300, 65), 4, dtype)
    options["reduction"], upstream = "none", torch.randn(29).to(dtype)
    loss, grad, *_ = run(llmkern.ops.linear_cross_entropy, tensors, target, options, upstream)
    for rows in (slice(0, 1), slice(4, 5), slice(3, 20), slice(28, 29)):
        part = {**tensors, "input": tensors["input"][rows]}
        alone = run(llmkern.ops.linear_cross_entropy, part, target[rows], options, upstream[rows])
        assert torch.equal(alone[0], loss[rows]) and torch.equal(alone[1], grad[rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_extreme_logits(isa, dtype, label_smoothing):
    """Logits of 1e4 either way, exact in float32: losses and gradients are right, not just finite."""
    input = torch.tensor([[1e4], [-1e4], [9999.5], [1e4 / 3]]).to(dtype)
    weight = torch.tensor([[1.0], [-1.0], [1.0], [0.0], [0.9999]]).to(dtype)
    tensors, target = {"input": input, "linear_weight": weight}, torch.tensor([0, 0, 3, 4])
    options, upstream = {"reduction": "none", "label_smoothing": label_smoothing}, torch.ones(4)
    truth = run(torch_loss, cast(tensors, torch.float64), target, options, upstream.double())
    got = run(llmkern.ops.linear_cross_entropy, tensors, target, options, upstream.to(dtype))
    for a, b in zip(got, truth, strict=True):
        assert_close(a, b, 1e-12 if dtype == torch.float64 else 1e-4)


def test_probabilities_sum_to_one_at_a_high_level(isa):
    """A log-sum-exp of 1e4 rounded to float32 would scale every probability of the row by up to 5e-4."""
    level = torch.full((1, 1), 1e4)
    bias = torch.zeros(64, requires_grad=True)
    loss = llmkern.ops.linear_cross_entropy(
        level, torch.ones(64, 1), torch.tensor([3]), linear_bias=bias, reduction="sum"
    )
    (grad,) = torch.autograd.grad(loss, bias)
    assert_close(grad, torch.full((64,), 1 / 64) - F.one_hot(torch.tensor(3), 64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_excluded_classes_have_no_probability(isa, dtype):
    """A bias of -inf takes a class out: no loss, no gradient, exactly."""
    input = torch.randn(3, 4, dtype=dtype, requires_grad=True)
    weight, bias = torch.randn(40, 4, dtype=dtype), torch.zeros(40, dtype=dtype)
    bias[5:] = -float("inf")
    bias.requires_grad_()
    target = torch.tensor([0, 4, 2])
    loss = llmkern.ops.linear_cross_entropy(input, weight, target, linear_bias=bias)
    assert_close(loss, F.cross_entropy(input @ weight[:5].T, target))
    grad_input, grad_bias = torch.autograd.grad(loss, (input, bias))
    assert grad_bias[5:].count_nonzero() == 0
    assert grad_input.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("place", [0, 3, 18, 36])
def test_nan_is_seen_and_stays_in_its_row(isa, dtype, place):
    input, weight = torch.eye(37, dtype=dtype)[:3].clone(), torch.zeros(37, 37, dtype=dtype)
    bias = torch.zeros(37, dtype=dtype)
    weight[place, 1] = float("nan")
    input[0, 1] = input[2, 1] = 0
    rows = [
        llmkern.ops.linear_cross_entropy(
            row, w, torch.tensor(8), linear_bias=bias, reduction="sum"
        ).item()
        for row, w in ((input[0], weight.nan_to_num()), (input[1], weight), (input[2], weight))
    ]
    assert rows[0] == pytest.approx(math.log(37), rel=1e-6)
    assert math.isnan(rows[1])
    bias[place] = float("nan")
    loss = llmkern.ops.linear_cross_entropy(
        input, weight.nan_to_num(), torch.tensor([8, 8, 8]), linear_bias=bias
    )
    assert math.isnan(loss.item())
