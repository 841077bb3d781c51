# SPDX-License-Identifier: Apache-2.0
"""Linear cross entropy in bfloat16 and float16 on the CPU: parity, accuracy beside torch's, bits, whole models."""

import pytest
import torch

import llmkern
from tests.conftest import assert_close, assert_no_less_accurate
from tests.ops.test_cross_entropy import (
    LARGE_SHAPES,
    OPTIONS,
    SMALL_SHAPES,
    arguments_of,
    cast,
    run,
    torch_loss,
)

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
CASES = [(s, o, r) for s in SMALL_SHAPES for o in range(len(OPTIONS)) for r in ("none", "mean")]
CASES += [(s, 4, "mean") for s in LARGE_SHAPES]


def sixteen_bit_call(shape, option, reduction, dtype):
    """Arguments of 16 bits, and what torch makes of the same values in float64."""
    tensors, target, options = arguments_of(shape, option)
    tensors, options = cast(tensors, dtype), cast(options, dtype) | {"reduction": reduction}
    upstream = torch.rand(shape[:1] if reduction == "none" else ()) + 0.5
    exact = cast(tensors, torch.float64), target, cast(options, torch.float64), upstream.double()
    return (tensors, target, options, upstream), run(torch_loss, *exact)


@DTYPES
@pytest.mark.parametrize(("shape", "option", "reduction"), CASES)
def test_loss_and_gradients(on_isas, shape, option, reduction, dtype):
    call, (true_loss, *truth) = sixteen_bit_call(shape, option, reduction, dtype)
    for _ in on_isas():
        loss, *grads = run(llmkern.ops.linear_cross_entropy, *call)
        assert loss.dtype == torch.float32
        assert_close(loss, true_loss, 1e-5)
        for ours, expected in zip(grads, truth, strict=True):
            assert ours.dtype == dtype
            assert_close(ours, expected)


@DTYPES
@pytest.mark.parametrize("shape", [(50, 30, 1003), (70, 200, 10000), (64, 650, 300)], ids=str)
def test_no_less_accurate_than_torch(on_isas, shape, dtype):
    call, truth = sixteen_bit_call(shape, 1, "sum", dtype)
    tensors, target, options, upstream = call
    torchs = run(torch_loss, tensors, target, options, upstream.to(dtype))
    for _ in on_isas():
        got = run(llmkern.ops.linear_cross_entropy, *call)
        for name, a, b, c in zip(("loss", *tensors), got, torchs, truth, strict=True):
            assert_no_less_accurate(name, a.to(dtype), b, c)


@DTYPES
def test_bits_on_threads_and_rows_alone(isa, on_threads, dtype):
    """Rows and their gradients over more than one chunk."""
    (tensors, target, options, upstream), _ = sixteen_bit_call((70, 33, 66000), 4, "none", dtype)

    def once():
        return run(llmkern.ops.linear_cross_entropy, tensors, target, options, upstream)

    whole = on_threads(1, once)
    for other in (2, 3):
        assert all(torch.equal(a, b) for a, b in zip(whole, on_threads(other, once), strict=True))
    for rows in (slice(0, 1), slice(4, 20), slice(69, 70)):
        part = tensors | {"input": tensors["input"][rows]}
        alone = run(llmkern.ops.linear_cross_entropy, part, target[rows], options, upstream[rows])
        assert torch.equal(alone[0], whole[0][rows]) and torch.equal(alone[1], whole[1][rows])


@DTYPES
def test_nothing_and_ignored_rows(dtype):
    weight, none = torch.randn(5, 3).to(dtype).requires_grad_(), torch.zeros(0, dtype=torch.int64)
    loss = llmkern.ops.linear_cross_entropy(
        torch.zeros(0, 3, dtype=dtype), weight, none, reduction="sum"
    )
    assert loss.item() == 0 and not torch.autograd.grad(loss, weight)[0].any()
    x = torch.full((2, 3), float("inf"), dtype=dtype, requires_grad=True)
    loss = llmkern.ops.linear_cross_entropy(x, weight, none.new_full((2,), -100), reduction="sum")
    assert loss.item() == 0 and not torch.autograd.grad(loss, x)[0].any()


@DTYPES
def test_autocast_is_as_by_hand(dtype):
    """Of the region's dtype, as torch's own linear layers; gradients arrive in float32."""
    tensors, target, options = arguments_of((6, 5, 9), 4, torch.float32)
    results = []
    for under_autocast in (True, False):
        leaves = {k: t.clone().requires_grad_() for k, t in tensors.items()}
        if under_autocast:
            with torch.autocast("cpu", dtype):
                loss = llmkern.ops.linear_cross_entropy(**leaves, target=target, **options)
        else:
            loss = llmkern.ops.linear_cross_entropy(
                **cast(leaves, dtype), target=target, **cast(options, dtype)
            )
        results.append([loss, *torch.autograd.grad(loss, list(leaves.values()))])
    for a, b in zip(*results, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)


@DTYPES
def test_a_layer_narrowed_after_it_was_made(dtype):
    """As torch's own layers: every layer follows its dtype."""
    layer = llmkern.nn.LinearCrossEntropyLoss(6, 11, bias=True, weight=torch.rand(11))
    x, target = torch.randn(5, 6), torch.randint(11, (5,))
    expected = layer(x, target)
    loss = layer.to(dtype)(x.to(dtype), target)
    loss.backward()
    assert_close(loss, expected, 8 * torch.finfo(dtype).eps)
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in layer.parameters())


@DTYPES
def test_both_losses_of_a_training_step_in_parts(dtype):
    """A head on one chunk of rows and on several, whose gradients are summed in float32."""
    torch.manual_seed(1)
    x, weight = torch.randn(128, 16).to(dtype), torch.randn(66000, 16).to(dtype).requires_grad_()
    target = torch.randint(66000, (128,))
    whole = llmkern.ops.linear_cross_entropy(x, weight, target, reduction="sum")
    exact = weight.detach().double().requires_grad_()
    truth = torch_loss(x.double(), exact, target, reduction="sum")
    (got,), (expected,) = torch.autograd.grad(whole, weight), torch.autograd.grad(truth, exact)
    assert_close(whole, truth, 1e-5)
    assert_close(got, expected, 2 * torch.finfo(dtype).eps)
