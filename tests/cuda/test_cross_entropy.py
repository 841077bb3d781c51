# SPDX-License-Identifier: Apache-2.0
"""Linear cross entropy on a GPU: every option against float64, chunks, 16 bits, promises, targets out of range."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import llmkern
from llmkern.ops import _checks
from tests.conftest import TOLERANCE, assert_close

from .promises import DTYPES, SIXTEEN_BIT, Op, every_op, every_promise, leaf, moved, results

pytestmark = pytest.mark.cuda
small = pytest.mark.sanitize

# N, V, D
SHAPES = [
    pytest.param((1, 1, 1), marks=small),
    pytest.param((6, 9, 4), marks=small),
    pytest.param((33, 257, 17), marks=small),
    (700, 10_000, 200),
    (257, 33_001, 65),
]


def head(shape, dtype: torch.dtype, bias: bool = True) -> tuple[Tensor, ...]:
    """input, weight, bias, target: every ninth target is ignored."""
    N, V, D = shape
    target = torch.randint(V, (N,))
    target[::9] = -100 if N > 1 else target[0]
    weight = leaf(V, D, dtype=dtype, scale=1 / D**0.5)
    return leaf(N, D, dtype=dtype), weight, leaf(V, dtype=dtype) if bias else None, target


def loss_of(x: Tensor, head: Tensor, bias: Tensor | None, target: Tensor, **options) -> Tensor:
    return llmkern.ops.linear_cross_entropy(x, head, target, linear_bias=bias, **options)


def exact(arguments, **options) -> list[Tensor]:
    """The loss and its gradients in float64 on the CPU, by torch."""

    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight, bias), target, **options)

    wide = [None if t is None else t.detach() for t in arguments]
    wide[:3] = [None if t is None else t.double().requires_grad_() for t in wide[:3]]
    return results(forward, wide)


def on(device: torch.device, arguments, **options) -> list[Tensor]:
    return [t.cpu() for t in results(lambda *a: loss_of(*a, **options), moved(arguments, device))]


def ops() -> list[Op]:
    return [
        Op(f"loss-{dtype}", loss_of, head((60, 500, 32), dtype))
        for dtype in (torch.float32, torch.bfloat16)
    ] + [Op("rows", rows_of, head((60, 500, 32), torch.float32, bias=False))]


def rows_of(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
    return loss_of(x, weight, bias, target, reduction="none", label_smoothing=0.1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_loss_and_gradients(device, shape, dtype, bias):
    arguments = head(shape, dtype, bias)
    for got, truth in zip(on(device, arguments), exact(arguments), strict=True):
        assert_close(got, truth, 10 * TOLERANCE[dtype])


@small
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_option(device, reduction, smoothing, weighted, dtype):
    arguments = head((50, 91, 13), dtype)
    classes = torch.rand(91, dtype=dtype) if weighted else None
    options = {"reduction": reduction, "label_smoothing": smoothing}
    got = on(device, arguments, weight=None if classes is None else classes.to(device), **options)
    truth = exact(arguments, weight=None if classes is None else classes.double(), **options)
    for mine, expected in zip(got, truth, strict=True):
        assert_close(mine, expected, 10 * TOLERANCE[dtype])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
def test_sixteen_bits(device, shape, dtype):
    arguments = head(shape, dtype)
    (loss, *grads), (true_loss, *true_grads) = on(device, arguments), exact(arguments)
    assert loss.dtype == torch.float32
    assert_close(loss, true_loss, 1e-5)
    for got, truth in zip(grads, true_grads, strict=True):
        assert got.dtype == dtype
        assert_close(got, truth, 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_chunks_of_rows(device, dtype):
    """More logits than the 256 MiB that a chunk may have: gradients are summed over chunks."""
    arguments = head((1300, 140_000, 8), dtype)
    (loss, *grads), (true_loss, *true_grads) = on(device, arguments), exact(arguments)
    assert_close(loss, true_loss, 1e-5)
    tolerance = 2e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    for got, truth in zip(grads, true_grads, strict=True):
        assert_close(got, truth, tolerance)


@small
@pytest.mark.parametrize("wanted", [{0}, {1}, {2}], ids=["input", "weight", "bias"])
def test_only_wanted_gradients(device, wanted):
    x, weight, bias, target = moved(head((50, 91, 13), torch.float64), device)
    for i, tensor in enumerate((x, weight, bias)):
        tensor.requires_grad_(i in wanted)
    leaves = [t for t in (x, weight, bias) if t.requires_grad]
    for got, expected in zip(
        torch.autograd.grad(loss_of(x, weight, bias, target), leaves),
        torch.autograd.grad(F.cross_entropy(F.linear(x, weight, bias), target), leaves),
        strict=True,
    ):
        assert_close(got, expected, 10 * TOLERANCE[torch.float64])


@small
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_probabilities(device, dtype):
    """Plain operations of torch."""
    x, weight, bias, _ = head((50, 91, 13), dtype)
    probabilities = torch.randn(50, 91).softmax(-1).double().to(_checks.widened(dtype))
    arguments = (x, weight, bias, probabilities)
    tolerance = 10 * TOLERANCE[dtype]
    for got, truth in zip(on(device, arguments), exact(arguments), strict=True):
        assert_close(got, truth, tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_cpu_agrees_to_the_rounding(device, dtype):
    arguments = head((300, 2000, 50), dtype)
    for got, expected in zip(
        on(device, arguments), on(torch.device("cpu"), arguments), strict=True
    ):
        assert_close(got, expected.double(), 10 * TOLERANCE[dtype])


@small
def test_no_rows_ignored_rows_and_strides(device):
    x, weight = leaf(0, 4), leaf(9, 4)
    nothing = torch.zeros(0, dtype=torch.int64)
    loss, _, grad = on(device, (x, weight, None, nothing), reduction="sum")
    assert loss.item() == 0 and not grad.any()
    x, weight, bias, target = head((6, 9, 4), torch.float32)
    all_ignored = torch.full_like(target, 5)
    loss, *_ = on(device, (x, weight, bias, all_ignored), ignore_index=5)
    assert loss.isnan()
    wide = torch.randn(6, 2, 4, device=device)
    strided, column = wide[:, 0], torch.randn(4, 9, device=device).t()
    target = target.clamp(min=0).to(device)
    got = llmkern.ops.linear_cross_entropy(strided, column, target)
    expected = llmkern.ops.linear_cross_entropy(strided.contiguous(), column.contiguous(), target)
    assert torch.equal(got, expected)


def test_extreme_logits_stay_finite(device):
    for dtype in DTYPES:
        x = torch.full((4, 2), 200.0, dtype=dtype, device=device)
        weight = torch.tensor([[40.0, 40], [-40, -40], [0, 0]], dtype=dtype, device=device)
        target = torch.tensor([0, 0, 0, 0], device=device)
        assert llmkern.ops.linear_cross_entropy(x, weight, target).item() == 0.0, dtype
        assert llmkern.ops.linear_cross_entropy(x, weight, target + 1).item() == 32000.0, dtype


@every_promise
@every_op(ops())
def test_promises(device, op, promise):
    promise(op)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(device, dtype):
    x, weight, bias, target = moved(head((6, 9, 4), dtype), device)
    for reduction in range(3):
        arguments = (x, weight, bias, target, None, reduction, -100, 0.1)
        torch.library.opcheck(torch.ops.llmkern.linear_cross_entropy.default, arguments)


def test_autocast_casts_as_by_hand(device):
    arguments = moved(head((60, 500, 32), torch.float32), device)

    def under_autocast(*a: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return loss_of(*a)

    def by_hand(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
        return loss_of(x.bfloat16(), weight.bfloat16(), bias.bfloat16(), target)

    got, expected = results(under_autocast, arguments), results(by_hand, arguments)
    assert got[0].dtype == torch.float32 and got[1].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@small
@pytest.mark.parametrize("bad", [5, -3])
def test_a_target_out_of_range_is_raised_later_and_the_context_lives(device, bad):
    x, weight = torch.randn(3, 4, device=device), torch.randn(5, 4, device=device)
    target = torch.tensor([0, bad, 1], device=device)
    loss = llmkern.ops.linear_cross_entropy(x, weight, target, reduction="none")
    message = rf"linear_cross_entropy: expected targets in \[0, 5\).*got {bad} at position 1"
    with pytest.raises(IndexError, match=message):
        llmkern.ops.raise_deferred_errors()
    assert torch.isnan(loss).tolist() == [False, True, False]
    target[1] = 4
    fine = llmkern.ops.linear_cross_entropy(x, weight, target, reduction="none")
    llmkern.ops.raise_deferred_errors()
    assert torch.isfinite(fine).all() and torch.equal(fine[0], loss[0])
