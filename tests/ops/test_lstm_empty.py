# SPDX-License-Identifier: Apache-2.0
"""Layers of which a size is 0: I (a layer that has its state alone) and B. Every gradient, against torch's formulas."""

import pytest
import torch

import llmkern
from llmkern.ops.lstm import composite
from tests.conftest import assert_close
from tests.ops.test_lstm import layer, run, upstream_of
from tests.ops.test_lstm_variants import problem

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = [(4, 3, 0, 5), (1, 3, 0, 17), (4, 0, 3, 5), (3, 0, 0, 5)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def poisoned():
    """Memory that is used next is not zero by chance."""
    for size in (20, 100, 400, 1156, 4624):
        torch.full((size,), 7.25, dtype=torch.float64)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_plain_layer(isa, shape, dtype, reverse):
    arguments, upstream = layer(shape, dtype=dtype), upstream_of(shape)
    upstream = [u.to(dtype) for u in upstream]
    poisoned()
    got = run(llmkern.ops.lstm, arguments, upstream, reverse=reverse)
    wide = [t.double() for t in arguments]
    expected = run(
        lambda *a: composite.lstm(*a, reverse=reverse)[:3], wide, [u.double() for u in upstream]
    )
    for ours, truth in zip(got, expected, strict=True):
        assert_close(ours, truth)


@pytest.mark.parametrize("saved", ["all", "cells", "nothing"])
@pytest.mark.parametrize("variant", ["projection", "layer_norm", "zoneout", "reset", "lengths"])
@pytest.mark.parametrize("shape", [(4, 3, 0, 5, 2), (4, 0, 3, 5, 2)], ids=str)
def test_variants(isa, shape, variant, saved):
    leaves, options = problem(shape, {variant})
    if saved == "cells":
        options |= {"recompute": True}

    def ours(**given):
        if saved != "nothing":
            return llmkern.ops.lstm(**given, **options)
        return torch.ops.llmkern.lstm.default(**given, **options)[:3]

    poisoned()
    grads = []
    for f in (ours, lambda **given: composite.lstm(**given, **_known(options))[:3]):
        loss = sum((o * (1 + i)).sin().sum() for i, o in enumerate(f(**leaves)))
        grads.append(torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True))
    for got, expected in zip(*grads, strict=True):
        assert_close(got, expected)


def _known(options):
    return {name: value for name, value in options.items() if name != "recompute"}


@pytest.mark.parametrize("shape", [(3, 0, 5), (0, 3, 5), (0, 0, 5)], ids=str)
def test_a_loop_over_a_cell(isa, shape):
    B, I, H = shape  # noqa: E741
    cells = [m.LSTMCell(I, H, dtype=torch.float64) for m in (llmkern.nn, torch.nn)]
    cells[1].load_state_dict(cells[0].state_dict())
    x = torch.randn(B, I, dtype=torch.float64, requires_grad=True)
    poisoned()
    grads = []
    for cell in cells:
        state = cell(x, cell(x))
        loss = state[0].sin().sum() + state[1].square().sum()
        grads.append(torch.autograd.grad(loss, [x, *cell.parameters()]))
    for got, expected in zip(*grads, strict=True):
        assert_close(got, expected)
