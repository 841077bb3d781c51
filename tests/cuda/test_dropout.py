# SPDX-License-Identifier: Apache-2.0
"""Dropout on a GPU: the bits of the CPU for every dtype, and the operator's promises."""

import pytest
import torch
from torch import Tensor

import llmkern

from .promises import DTYPES, Op, every_op, every_promise, leaf

pytestmark = pytest.mark.cuda
small = pytest.mark.sanitize

# One element, less than a thread's quarter, groups with a rest, masks over many steps, a weight.
SHAPES = [
    pytest.param((1, 1, 1), marks=small),
    pytest.param((3, 2, 7), marks=small),
    pytest.param((5, 4, 16), marks=small),
    (35, 20, 650),
    (70, 1, 1150),
    (1, 4600, 1150),
]


def dropped(x: Tensor, seed: Tensor) -> Tensor:
    return llmkern.ops.dropout(x, 0.3, locked=True, seed=seed)


def ops() -> list[Op]:
    return [
        Op(f"dropout-{dtype}", dropped, (leaf(6, 5, 24, dtype=dtype), torch.tensor(4)))
        for dtype in (torch.float32, torch.bfloat16)
    ]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("locked", [False, True])
def test_the_bits_of_the_cpu(device, shape, dtype, locked):
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    for p, seed in ((0.5, 3), (0.1, -7), (1.0, 1)):
        on_cpu = llmkern.ops.dropout(x, p, locked=locked, seed=seed)
        assert torch.equal(
            llmkern.ops.dropout(x.to(device), p, locked=locked, seed=seed).cpu(), on_cpu
        )


@pytest.mark.sanitize
def test_masks_of_the_cpu(device):
    mask, seed = torch.ops.llmkern.mask.default, torch.tensor(5)
    for rows, columns in ((1, 1), (9, 650), (300, 3)):
        got = mask(seed.to(device), 3, rows, columns, 0.3)
        assert torch.equal(got.cpu(), mask(seed, 3, rows, columns, 0.3))


def test_torch_manual_seed_decides(device):
    x = torch.ones(40, 50)
    torch.manual_seed(3)
    on_cpu = llmkern.ops.dropout(x, 0.5)
    torch.manual_seed(3)
    assert torch.equal(llmkern.ops.dropout(x.to(device), 0.5).cpu(), on_cpu)


@every_promise
@every_op(ops())
def test_promises(device, op, promise):
    promise(op)
