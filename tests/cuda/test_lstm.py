# SPDX-License-Identifier: Apache-2.0
"""LSTM on a GPU: outputs and gradients over dtypes and awkward sizes, accuracy beside torch's, the cell, promises."""

import pytest
import torch
from torch import Tensor, nn

import llmkern
from tests.conftest import TOLERANCE, assert_close

from .promises import DTYPES, SIXTEEN_BIT, Op, every_op, every_promise, leaf, moved, results

pytestmark = pytest.mark.cuda
small = pytest.mark.sanitize

F32 = torch.float32
SOME_LENGTHS = torch.tensor([3, 6, 0, 1, 6])
# T, B, I, H
SHAPES = [
    pytest.param((1, 1, 1, 1), marks=small),
    pytest.param((3, 2, 5, 7), marks=small),
    pytest.param((2, 33, 17, 31), marks=small),
    (5, 1, 64, 128),
    (4, 300, 3, 40),
    (35, 20, 200, 200),
    (9, 65, 129, 130),
    (7, 20, 650, 650),
    (5, 17, 400, 1150),
    (3, 128, 1024, 1024),
    (101, 2, 16, 48),
]


def parameters(I: int, H: int, dtype: torch.dtype, bias: bool = True) -> list[Tensor]:  # noqa: E741
    shapes = [(4 * H, I), (4 * H, H), *([(4 * H,), (4 * H,)] if bias else [])]
    return [leaf(*shape, dtype=dtype, scale=0.6 / H**0.5) for shape in shapes]


def arguments(shape, dtype: torch.dtype, bias: bool = True) -> list[Tensor]:
    T, B, I, H = shape  # noqa: E741
    states = [leaf(*s, dtype=dtype) for s in ((T, B, I), (B, H), (B, H))]
    return [*states, *parameters(I, H, dtype, bias)]


def torch_lstm(input: Tensor, h_0: Tensor, c_0: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    output, h_n, c_n = torch.lstm(
        input, (h_0[None], c_0[None]), weights, len(weights) == 4, 1, 0.0, False, False, False
    )
    return output, h_n[0], c_n[0]


def exact(arguments: list[Tensor]) -> list[Tensor]:
    """Outputs and gradients in float64 on the CPU, by torch."""
    wide = [t.detach().double().requires_grad_() for t in arguments]
    return results(torch_lstm, wide)


def assert_not_worse(name: str, got: Tensor, torchs: Tensor, truth: Tensor) -> None:
    """The root mean square error of ours is at most torch's, and the luck of so many values."""
    ours, theirs = ((t.double() - truth).square().mean().sqrt().item() for t in (got, torchs))
    luck = 1 + 3 / truth.numel() ** 0.5
    rounding = truth.square().mean().sqrt().item() * torch.finfo(got.dtype).eps / 4
    few = rounding if truth.numel() < 1000 else 0.0
    assert ours <= luck * theirs + few, f"{name}: error {ours:.3e}, torch's {theirs:.3e}"


def on(device: torch.device, forward, arguments: list[Tensor]) -> list[Tensor]:
    return [t.cpu() for t in results(forward, moved(arguments, device))]


def with_lengths(*arguments: Tensor) -> tuple[Tensor, ...]:
    *tensors, lengths = arguments
    return llmkern.ops.lstm(*tensors, lengths=lengths)


def ops() -> list[Op]:
    def op(name: str, shape, dtype: torch.dtype) -> Op:
        return Op(f"{name}-{dtype}", llmkern.ops.lstm, tuple(arguments(shape, dtype)))

    return [
        op("lstm", (6, 5, 24, 40), torch.float32),
        op("lstm", (6, 20, 64, 128), torch.bfloat16),
        op("wide", (4, 20, 650, 650), torch.float16),
        op("step", (1, 1, 64, 512), torch.float32),
        Op("lengths", with_lengths, (*arguments((6, 5, 24, 40), torch.float32), SOME_LENGTHS)),
        Op(
            "inference", llmkern.ops.lstm, tuple(t.detach() for t in arguments((6, 5, 24, 40), F32))
        ),
    ]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_outputs_and_gradients(device, shape, bias, dtype):
    a = arguments(shape, dtype, bias)
    for got, truth in zip(on(device, llmkern.ops.lstm, a), exact(a), strict=True):
        # Long sums: the framework's products on a GPU split them in an order of their own.
        assert_close(got, truth, 10 * TOLERANCE[dtype])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
def test_sixteen_bits_are_no_less_accurate_than_torch(device, shape, dtype):
    a = arguments(shape, dtype)
    ours, torchs = on(device, llmkern.ops.lstm, a), on(device, torch_lstm, a)
    for i, (got, other, truth) in enumerate(zip(ours, torchs, exact(a), strict=True)):
        assert got.dtype == dtype and torch.isfinite(got).all()
        assert_not_worse(f"result {i}", got, other, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("options", [{"bidirectional": True}, {"batch_first": True}], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_layers_are_those_of_torch_and_of_the_cpu(device, dtype, options, bias):
    layer = llmkern.nn.LSTM(19, 37, num_layers=2, bias=bias, dtype=dtype, **options)
    twin = nn.LSTM(19, 37, num_layers=2, bias=bias, dtype=torch.float64, **options)
    twin.load_state_dict({name: value.double() for name, value in layer.state_dict().items()})
    x = torch.randn(11, 6, 19, dtype=dtype)
    expected, (h_n, c_n) = twin(x.double())
    (expected.square().sum() + c_n.sum()).backward()
    on_cpu = layer(x)[0].detach()
    layer.to(device)
    output, state = layer(x.to(device))
    (output.square().sum() + state[1].sum()).backward()
    for got, truth in zip((output, *state), (expected, h_n, c_n), strict=True):
        assert_close(got.cpu(), truth, 10 * TOLERANCE[dtype])
    assert_close(output.cpu(), on_cpu.double(), 10 * TOLERANCE[dtype])
    for (name, mine), other in zip(layer.named_parameters(), twin.parameters(), strict=True):
        assert mine.grad is not None, name
        assert_close(mine.grad.cpu(), other.grad, 20 * TOLERANCE[dtype])


@small
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reverse", [False, True])
def test_directions_of_every_dtype(device, dtype, reverse):
    a = arguments((6, 3, 5, 9), dtype)
    got = on(device, lambda *t: llmkern.ops.lstm(*t, reverse=reverse), a)
    turned = [a[0].detach().flip(0).requires_grad_(), *a[1:]] if reverse else a
    truth = exact(turned)
    if reverse:
        truth[0], truth[3] = truth[0].flip(0), truth[3].flip(0)
    for mine, expected in zip(got, truth, strict=True):
        assert_close(mine, expected, 10 * TOLERANCE.get(dtype, torch.finfo(dtype).eps))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("B", [1, 2, 3, 7, 8, 9, 16, 31, 64, 65, 127, 200, 300])
def test_every_batch_size(device, dtype, B):
    a = arguments((3, B, 20, 72), dtype)
    for got, truth in zip(on(device, llmkern.ops.lstm, a), exact(a), strict=True):
        assert_close(got, truth, 10 * TOLERANCE[dtype])


@small
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("B", "I", "H"), [(1, 3, 5), (20, 33, 64)])
def test_cell(device, dtype, B, I, H):  # noqa: E741
    cell = llmkern.nn.LSTMCell(I, H, dtype=dtype)
    twin = nn.LSTMCell(I, H, dtype=torch.float64)
    twin.load_state_dict({name: value.double() for name, value in cell.state_dict().items()})
    x, h, c = (torch.randn(B, n, dtype=dtype) for n in (I, H, H))
    expected = twin(x.double(), (h.double(), c.double()))
    sum(t.square().sum() for t in expected).backward()
    cell.to(device)
    got = cell(x.to(device), (h.to(device), c.to(device)))
    sum(t.square().sum() for t in got).backward()
    for mine, truth in zip(got, expected, strict=True):
        assert_close(mine.cpu(), truth, 10 * TOLERANCE[dtype])
    for mine, truth in zip(cell.parameters(), twin.parameters(), strict=True):
        assert_close(mine.grad.cpu(), truth.grad, 10 * TOLERANCE[dtype])


@small
def test_empty_batch_and_strided_arguments(device):
    layer = llmkern.nn.LSTM(5, 7, device=device)
    assert layer(torch.zeros(3, 0, 5, device=device))[0].shape == (3, 0, 7)
    a = arguments((4, 3, 5, 6), torch.float32)
    strided = [torch.stack([t, t * 0 + 7], dim=-1)[..., 0].detach().requires_grad_() for t in a]
    with_gaps = [torch.stack([t, t], dim=-1).to(device)[..., 0].detach() for t in strided]
    assert not any(t.is_contiguous() for t in with_gaps)
    with_gaps = [t.requires_grad_() for t in with_gaps]
    for got, expected in zip(
        results(llmkern.ops.lstm, with_gaps), on(device, llmkern.ops.lstm, a), strict=True
    ):
        assert torch.equal(got.cpu(), expected)


@small
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("reverse", [False, True])
def test_lengths(device, dtype, reverse):
    """A row of length n is what the row's first n steps give on their own; beyond them is nothing."""
    a, lengths = arguments((6, 5, 24, 40), dtype), SOME_LENGTHS
    output, h_n, c_n, *grads = on(
        device, lambda *t: llmkern.ops.lstm(*t, lengths=lengths.to(device), reverse=reverse), a
    )
    for b, n in enumerate(lengths.tolist()):
        assert not output[n:, b].any() and not grads[0][n:, b].any()
        x, h, c = a[0][:n, b : b + 1], a[1][b : b + 1], a[2][b : b + 1]
        if n == 0:
            assert torch.equal(h_n[b], a[1][b]) and torch.equal(c_n[b], a[2][b])
            continue
        with torch.no_grad():
            wide = [t.double() for t in (x.flip(0) if reverse else x, h, c, *a[3:])]
            expected, h_1, c_1 = torch_lstm(*wide)
        expected = expected.flip(0) if reverse else expected
        assert_close(output[:n, b], expected[:, 0], 10 * TOLERANCE[dtype])
        assert_close(h_n[b], h_1[0], 10 * TOLERANCE[dtype])
        assert_close(c_n[b], c_1[0], 10 * TOLERANCE[dtype])
    on_cpu = on(
        torch.device("cpu"), lambda *t: llmkern.ops.lstm(*t, lengths=lengths, reverse=reverse), a
    )
    for got, truth in zip(grads, on_cpu[3:], strict=True):
        assert_close(got, truth.double(), 20 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_gradients_the_outputs_are_the_same(device, dtype):
    a = moved(arguments((7, 20, 65, 200), dtype), device)
    expected = llmkern.ops.lstm(*a)
    with torch.inference_mode():
        for got, other in zip(llmkern.ops.lstm(*a), expected, strict=True):
            assert torch.equal(got, other)


def test_saturated_gates_and_large_values_stay_finite(device):
    for dtype in DTYPES:
        a = [t.detach() * 50 for t in arguments((6, 4, 8, 16), dtype)]
        for got in on(device, llmkern.ops.lstm, a):
            assert torch.isfinite(got).all(), dtype


@every_promise
@every_op(ops())
def test_promises(device, op, promise):
    promise(op)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(device, dtype):
    a = moved(arguments((3, 2, 4, 5), dtype), device)
    op, lengths = torch.ops.llmkern.lstm.default, torch.tensor([3, 1], device=device)
    saves = {"save_cells": True, "save_gates": True}
    torch.library.opcheck(op, tuple(a), saves)
    torch.library.opcheck(op, tuple(a), {"lengths": lengths, "reverse": True, **saves})
    torch.library.opcheck(op, tuple(t.detach() for t in a[:5]), {"reverse": True})


def test_gradcheck(device):
    a = moved(arguments((3, 2, 4, 5), torch.float64), device)
    assert torch.autograd.gradcheck(llmkern.ops.lstm, a, fast_mode=True)


def test_autocast_casts_as_by_hand(device):
    a = moved(arguments((5, 4, 16, 24), torch.float32), device)

    def under_autocast(*t: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast("cuda", torch.bfloat16):
            return llmkern.ops.lstm(*t)

    def by_hand(*t: Tensor) -> tuple[Tensor, ...]:
        return llmkern.ops.lstm(*(x.bfloat16() for x in t))

    got, expected = results(under_autocast, a), results(by_hand, a)
    assert got[0].dtype == torch.bfloat16 and got[-1].dtype == torch.float32
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
