# SPDX-License-Identifier: Apache-2.0
"""The matrix product of the CPU kernels, through an operator that is a chain of them.

Linear cross entropy is x W^T forward, dl W and dl^T x backward, of any shape that is wanted: every width of the last
panel of columns, every height of the last tile of rows, depths around a block of terms, either way to split the work.
"""

import pytest
import torch
import torch.nn.functional as F

import llmkern
from tests.conftest import assert_close

pytestmark = pytest.mark.usefixtures("one_thread")


def gradients(loss, input, weight, target, upstream):
    input, weight = input.clone().requires_grad_(), weight.clone().requires_grad_()
    losses = loss(input, weight, target)
    return torch.autograd.grad(losses, (input, weight), upstream)


def ours(input, weight, target):
    return llmkern.ops.linear_cross_entropy(input, weight, target, reduction="none")


def theirs(input, weight, target):
    return F.cross_entropy(input @ weight.T, target, reduction="none")


def check(N, D, V, dtype):
    input, weight = torch.randn(N, D, dtype=dtype), torch.randn(V, D, dtype=dtype) / D**0.5
    target, upstream = torch.randint(V, (N,)), torch.randn(N, dtype=dtype)
    got = gradients(ours, input, weight, target, upstream)
    truth = gradients(theirs, input.double(), weight.double(), target, upstream.double())
    for a, b in zip(got, truth, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_last_tile_and_panel(isa, dtype):
    for size in range(2, 36):  # two panels of 16 float32 lanes, and a bit
        check(size % 9 + 1, 3, size, dtype)
        check(3, size, size % 7 + 2, dtype)
        check(size, 2, 5, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("depth", [255, 256, 257, 513])
def test_depths_around_a_block(isa, dtype, depth):
    check(5, depth, 7, dtype)  # terms of the logits
    check(5, 7, depth, dtype)  # terms of the gradient of the input
    check(depth, 5, 7, dtype)  # terms of the gradient of the weights
    check(2 * depth, 3, 2, dtype)  # rows around a block of them


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_split_over_rows_or_columns(isa, on_threads, threads):
    for N, D, V in ((700, 130, 5), (5, 130, 700), (130, 700, 37)):
        on_threads(threads, lambda: check(N, D, V, torch.float32))  # noqa: B023  (called at once)
