# SPDX-License-Identifier: Apache-2.0
"""The head's logits: a row has the same bits alone, in any batch and on any number of threads."""

import pytest
import torch

import llmkern
from tests.conftest import assert_close

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SIZES = [(1, 1, 1), (1, 650, 131), (5, 33, 700), (64, 70, 257), (0, 4, 5), (3, 0, 4)]


def arguments(N, D, V, dtype):
    return [torch.randn(*shape).to(dtype) for shape in ((N, D), (V, D), (V,))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_parity(isa, sizes, dtype):
    input, weight, bias = arguments(*sizes, dtype)
    expected = torch.nn.functional.linear(*(t.double() for t in (input, weight, bias)))
    got = llmkern.ops.linear_logits(input, weight, bias)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(got, expected)
    assert_close(llmkern.ops.linear_logits(input, weight), expected - bias.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_the_batch(isa, on_threads, dtype):
    input, weight, bias = arguments(33, 300, 1000, dtype)
    whole = on_threads(3, lambda: llmkern.ops.linear_logits(input, weight, bias))
    for rows in (slice(0, 1), slice(7, 8), slice(3, 20), slice(32, 33)):
        part = on_threads(1, lambda: llmkern.ops.linear_logits(input[rows], weight, bias))  # noqa: B023
        assert torch.equal(part, whole[rows])


def test_strided_arguments():
    input, weight, bias = arguments(4, 6, 9, torch.float32)
    expected = llmkern.ops.linear_logits(input, weight, bias)
    strided = [torch.stack([t, t], -1)[..., 0] for t in (input, weight, bias)]
    assert torch.equal(llmkern.ops.linear_logits(*strided), expected)
    assert torch.equal(llmkern.ops.linear_logits(input, weight.mT.contiguous().mT, bias), expected)


def test_opcheck():
    torch.library.opcheck(
        torch.ops.llmkern.linear_logits.default, tuple(arguments(3, 5, 7, torch.bfloat16))
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x, w, b: (x[0], w, b), ValueError, r"input of shape \[N, D\]"),
        (lambda x, w, b: (x[:, 1:], w, b), ValueError, r"weight of shape \[V, D\] = \[7, 4\]"),
        (lambda x, w, b: (x, w, b[1:]), ValueError, r"bias of shape \[V\] = \[7\], got \[6\]"),
        (lambda x, w, b: (x, w.double(), b), TypeError, "dtype"),
        (lambda x, w, b: (x.int(), w.int(), b.int()), TypeError, "dtype"),
        (lambda x, w, b: (x, [1], b), TypeError, "weight to be a Tensor"),
        (lambda x, w, b: (x, w.requires_grad_(), b), RuntimeError, "no gradients"),
    ],
)
def test_errors(change, error, message):
    with pytest.raises(error, match=r"llmkern\.linear_logits: expected .*" + message):
        llmkern.ops.linear_logits(*change(*arguments(3, 5, 7, torch.float32)))
