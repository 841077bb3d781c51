# SPDX-License-Identifier: Apache-2.0
"""Embedding on a GPU: rows and gradients of every dtype, the operator's promises, ids out of range."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import llmkern
from tests.conftest import TOLERANCE, assert_close

from .promises import DTYPES, Op, every_op, every_promise, leaf, moved, results

pytestmark = pytest.mark.cuda
small = pytest.mark.sanitize

# V, D, ids: one of everything, primes, aligned to 16 bytes and not, one row taken by all, many chunks of the sort.
SHAPES = [
    pytest.param(1, 1, (1,), marks=small),
    pytest.param(7, 3, (5, 13), marks=small),
    pytest.param(9, 8, (64,), marks=small),
    (101, 650, (20, 35)),
    (10_000, 400, (70, 80)),
    (12_000, 515, (4, 1024)),
]


def zipf(shape: tuple[int, ...], V: int) -> Tensor:
    """Ids as words are in a text: the first row is taken very often."""
    weights = 1.0 / torch.arange(1, V + 1, dtype=torch.float64)
    count = int(torch.tensor(shape).prod())
    return torch.multinomial(weights, count, replacement=True).view(shape)


def gathered(table: Tensor, ids: Tensor) -> Tensor:
    return llmkern.ops.embedding(ids, table)


def ops() -> list[Op]:
    ids = zipf((6, 50), 200)
    return [
        Op(f"embedding-{dtype}", gathered, (leaf(200, 24, dtype=dtype), ids))
        for dtype in (torch.float32, torch.bfloat16)
    ]


@pytest.mark.parametrize(("V", "D", "shape"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_rows_and_gradient(device, V, D, shape, dtype, index):
    ids, table = zipf(shape, V).to(index), leaf(V, D, dtype=dtype)
    grad = torch.randn(*shape, D, dtype=torch.float64).to(dtype)
    for options in ({}, {"padding_idx": 0}, {"scale_grad_by_freq": True}):
        on_gpu = table.detach().to(device).requires_grad_()
        out = llmkern.ops.embedding(ids.to(device), on_gpu, **options)
        assert torch.equal(out.cpu(), table[ids])
        (got,) = torch.autograd.grad(out, on_gpu, grad.to(device))
        wide = table.detach().double().requires_grad_()
        (exact,) = torch.autograd.grad(F.embedding(ids, wide, **options), wide, grad.double())
        # 16-bit gradients are summed in float32 and rounded once.
        assert_close(got.cpu(), exact, TOLERANCE.get(dtype, torch.finfo(dtype).eps))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [False, True])
def test_the_cpu_agrees_to_the_rounding(device, dtype, scale):
    ids = zipf((64, 128), 500)
    op = Op(
        "",
        lambda table, ids: llmkern.ops.embedding(ids, table, scale_grad_by_freq=scale),
        (leaf(500, 37, dtype=dtype), ids),
    )
    on_cpu, on_gpu = (results(op.forward, moved(op.arguments, d)) for d in ("cpu", device))
    assert torch.equal(on_gpu[0].cpu(), on_cpu[0])
    assert_close(on_gpu[1].cpu(), on_cpu[1])


@small
def test_nothing_strides_and_misalignment(device):
    table = torch.randn(50, 8, device=device)
    nothing = torch.zeros(0, 3, dtype=torch.int64, device=device)
    assert llmkern.ops.embedding(nothing, table).shape == (0, 3, 8)
    ids = torch.arange(40, device=device).view(8, 5)
    odd = torch.randn(50 * 8 + 1, device=device)[1:].view(50, 8)  # four bytes off every alignment
    for weight in (table.t().contiguous().t(), table[:, :6], odd):
        for index in (ids, ids.t(), ids[:, ::2]):
            assert torch.equal(llmkern.ops.embedding(index, weight), weight[index])
    weight = torch.randn(50, 8, device=device, requires_grad=True)
    (grad,) = torch.autograd.grad(llmkern.ops.embedding(ids, weight).sum(), weight)  # stride 0
    assert torch.equal(grad[:40], torch.ones_like(grad[:40])) and not grad[40:].any()


@every_promise
@every_op(ops())
def test_promises(device, op, promise):
    promise(op)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(device, dtype):
    ids = torch.randint(20, (2, 3), device=device)
    table = torch.randn(20, 5, device=device).to(dtype).requires_grad_()
    op = torch.ops.llmkern.embedding.default
    torch.library.opcheck(op, (ids, table, -1, False))
    torch.library.opcheck(op, (ids, table.detach(), 2, True))


@small
@pytest.mark.parametrize("bad", [7, -1, 2**40])
def test_an_id_out_of_range_is_raised_later_and_the_context_lives(device, bad):
    table = torch.randn(5, 3, device=device)
    ids = torch.tensor([[0, 4], [bad, 1]], device=device)
    out = llmkern.ops.embedding(ids, table)
    message = rf"embedding: expected ids in \[0, 5\), got {bad} at position 2"
    with pytest.raises(IndexError, match=message):
        llmkern.ops.raise_deferred_errors()
    llmkern.ops.raise_deferred_errors()  # it is raised once
    assert torch.isnan(out[1, 0]).all() and torch.equal(out[0], table[[0, 4]])
    llmkern.ops.embedding(ids, table)
    torch.cuda.synchronize()
    with pytest.raises(IndexError, match=message):  # or by the next call of any operator
        llmkern.ops.embedding(ids[:1], table)
    assert torch.equal(llmkern.ops.embedding(ids[:1], table)[0], table[[0, 4]])


def test_a_layer_under_autocast_keeps_its_dtype(device):
    layer = llmkern.nn.Embedding(20, 6, device=device)
    ids = torch.randint(20, (4, 7), device=device)
    with torch.autocast("cuda", torch.bfloat16):
        out = layer(ids)
    assert out.dtype == torch.float32 and torch.equal(out, layer.weight[ids])
