# SPDX-License-Identifier: Apache-2.0
"""Embedding gather: parity, gradients, errors, determinism, the compiler."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import llmkern
from llmkern import _reference
from tests.conftest import TOLERANCE, assert_close

# N, V, D: one row, primes, the widths of classic language models, more columns than one block, nothing at all.
SHAPES = [(1, 1, 1), (7, 5, 3), (64, 17, 650), (33, 11, 1150), (400, 50, 7), (0, 4, 3), (5, 4, 0)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("N", "V", "D"), SHAPES)
def test_gather_is_exact(isa, N, V, D, dtype, index_dtype):
    table = torch.randn(V, D).to(dtype)
    ids = torch.randint(V, (N,), dtype=index_dtype)
    assert torch.equal(llmkern.ops.embedding(ids, table), table[ids.long()])


@pytest.mark.parametrize("scale_grad_by_freq", [False, True])
@pytest.mark.parametrize("padding_idx", [None, 0, -1])
@pytest.mark.parametrize(("N", "V", "D"), SHAPES)
def test_gradient_equals_reference_and_torch(isa, N, V, D, padding_idx, scale_grad_by_freq):
    table = torch.randn(V, D, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(V, (N,))
    upstream = torch.randn(N, D, dtype=torch.float64)
    options = {"padding_idx": padding_idx, "scale_grad_by_freq": scale_grad_by_freq}
    (got,) = torch.autograd.grad(llmkern.ops.embedding(ids, table, **options), table, upstream)
    row = -1 if padding_idx is None else padding_idx % V
    expected = _reference.embedding_backward(
        upstream.numpy(), ids.numpy(), V, row, scale_grad_by_freq
    )
    assert_close(got, torch.from_numpy(np.asarray(expected)))
    (torchs,) = torch.autograd.grad(F.embedding(ids, table, **options), table, upstream)
    assert_close(got, torchs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale_grad_by_freq", [False, True])
@pytest.mark.parametrize(("N", "V", "D"), SHAPES)
def test_gradients_of_narrower_types(isa, N, V, D, scale_grad_by_freq, dtype):
    """Summed in float32 and rounded once: within one rounding of the reference where a row gets many terms, and that
    of the whole where it gets one."""
    table = torch.zeros(V, D, dtype=dtype, requires_grad=True)
    ids = torch.randint(V, (N,))
    upstream = torch.randn(N, D).to(dtype)
    options = {"padding_idx": 1 % V, "scale_grad_by_freq": scale_grad_by_freq}
    (got,) = torch.autograd.grad(llmkern.ops.embedding(ids, table, **options), table, upstream)
    expected = torch.from_numpy(
        _reference.embedding_backward(
            upstream.double().numpy(), ids.numpy(), V, 1 % V, scale_grad_by_freq
        )
    )
    assert got.dtype == dtype
    assert_close(got, expected)
    if dtype != torch.float32:
        wide = upstream.float().requires_grad_()
        in_float32 = torch.ops.llmkern.embedding_backward.default(
            wide.detach(), ids, V, 1 % V, scale_grad_by_freq
        )
        assert torch.equal(got, in_float32.to(dtype))


def test_many_terms_of_16_bits_are_not_lost():
    """A sum taken in bfloat16 stands still at 256 ones."""
    table = torch.zeros(2, 3, dtype=torch.bfloat16, requires_grad=True)
    ids = torch.ones(5000, dtype=torch.int64)
    llmkern.ops.embedding(ids, table).sum().backward()
    assert table.grad.tolist() == [[0, 0, 0], [4992, 4992, 4992]]  # 5000, rounded


def test_reference_by_hand():
    table = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    assert _reference.embedding(np.array([2, 0, 2]), table).tolist() == [[5, 6], [1, 2], [5, 6]]
    grad = np.array([[1.0, 1.0], [10.0, 10.0], [100.0, 100.0]])
    got = _reference.embedding_backward(grad, np.array([2, 0, 2]), 3)
    assert got.tolist() == [[10, 10], [0, 0], [101, 101]]
    assert _reference.embedding_backward(grad, np.array([2, 0, 2]), 3, 0, True).tolist() == [
        [0, 0],
        [0, 0],
        [50.5, 50.5],
    ]


def test_any_shape_of_ids_and_strided_inputs():
    table = torch.randn(9, 14)[:, ::2]
    ids = torch.randint(9, (4, 6))[:, ::3]
    assert torch.equal(llmkern.ops.embedding(ids, table), table[ids])
    assert llmkern.ops.embedding(torch.tensor(3), table).shape == (7,)


def test_expanded_gradient():
    """The gradient of sum() has stride 0 everywhere: the classic silent bug."""
    table = torch.randn(6, 5, requires_grad=True)
    llmkern.ops.embedding(torch.tensor([1, 1, 4]), table).sum().backward()
    assert table.grad[:, 0].tolist() == [0, 2, 0, 0, 1, 0]


def test_gradcheck_and_gradgradcheck():
    table = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[0, 3], [3, 1]])
    assert torch.autograd.gradcheck(lambda t: llmkern.ops.embedding(ids, t).sin(), table)
    assert torch.autograd.gradgradcheck(lambda t: llmkern.ops.embedding(ids, t).sin(), table)


@pytest.mark.parametrize("options", [(-1, False), (1, False), (1, True)])
def test_gradcheck_of_the_backward(options):
    """With padding_idx or scale_grad_by_freq it is no true gradient of the gather, but it is linear all the same."""
    grad = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([0, 3, 3, 1])
    backward = torch.ops.llmkern.embedding_backward.default
    assert torch.autograd.gradcheck(lambda g: backward(g, ids, 5, *options), grad)


def test_opcheck():
    table = torch.randn(5, 3, requires_grad=True)
    ids = torch.tensor([[0, 3], [4, 1]])
    torch.library.opcheck(torch.ops.llmkern.embedding.default, (ids, table, -1, False))
    torch.library.opcheck(torch.ops.llmkern.embedding.default, (ids, table.detach(), 2, True))
    half = table.detach().to(torch.bfloat16).requires_grad_()
    torch.library.opcheck(torch.ops.llmkern.embedding.default, (ids, half, 2, True))
    grad = torch.randn(2, 2, 3, requires_grad=True)
    torch.library.opcheck(torch.ops.llmkern.embedding_backward.default, (grad, ids, 5, 2, True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_same_bits_on_any_number_of_threads(on_threads, dtype):
    table = torch.randn(1000, 400).to(dtype).requires_grad_()
    ids = torch.randint(1000, (5000,))
    upstream = torch.randn(5000, 400).to(dtype)

    def run():
        out = llmkern.ops.embedding(ids, table)
        return out, *torch.autograd.grad(out, table, upstream)

    for one, two in zip(on_threads(1, run), on_threads(2, run), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic):
    table = torch.randn(5, 3, requires_grad=True)
    ids = torch.tensor([0, 3, 4, 3])
    compiled = torch.compile(
        lambda t: llmkern.ops.embedding(ids, t).square().sum(),
        fullgraph=True,
        backend="aot_eager",
        dynamic=dynamic,
    )
    (got,) = torch.autograd.grad(compiled(table), table)
    (expected,) = torch.autograd.grad(table[ids].square().sum(), table)
    assert torch.equal(got, expected)


TABLE = torch.zeros(5, 3)
IDS = torch.tensor([0, 1])
BAD_CALLS = [
    ((IDS, [[0.0]]), {}, TypeError, "expected weight to be a Tensor, got list"),
    (([0], TABLE), {}, TypeError, "expected ids to be a Tensor, got list"),
    ((IDS.float(), TABLE), {}, TypeError, "expected ids of dtype int32 or int64, got float32"),
    (
        (IDS, TABLE.long()),
        {},
        TypeError,
        "expected weight of dtype float32 or float64 or bfloat16 or float16, got int64",
    ),
    ((IDS, TABLE[0]), {}, ValueError, r"expected weight of shape \[V, D\], got \[3\]"),
    ((IDS, TABLE.to("meta")), {}, ValueError, "ids on cpu and weight on meta"),
    ((IDS, TABLE), {"padding_idx": 5}, ValueError, r"expected padding_idx in \[-5, 5\), got 5"),
    (
        (torch.tensor([[0, 1], [2, 5]]), TABLE),
        {},
        IndexError,
        r"\[0, 5\), got 5 at position \[1, 1\]",
    ),
    ((torch.tensor([-1]), TABLE), {}, IndexError, r"\[0, 5\), got -1 at position \[0\]"),
    ((torch.tensor([0]), TABLE[:0]), {}, IndexError, r"\[0, 0\), got 0 at position \[0\]"),
]


@pytest.mark.parametrize(("args", "kwargs", "error", "message"), BAD_CALLS)
def test_bad_input(args, kwargs, error, message):
    with pytest.raises(error, match=r"llmkern\.embedding: .*" + message):
        llmkern.ops.embedding(*args, **kwargs)


def test_the_binding_checks_too():
    """A caller who goes round Python's checks gets an error, not a wild read."""
    op = torch.ops.llmkern.embedding_backward.default
    with pytest.raises(ValueError, match=r"gradient of 6 elements|shape ids.shape"):
        op(torch.zeros(4, 3), torch.tensor([0, 1]), 5, -1, False)
    with pytest.raises(IndexError, match=r"\[0, 1\), got 1"):
        op(torch.zeros(2, 3), torch.tensor([0, 1]), 1, -1, False)
