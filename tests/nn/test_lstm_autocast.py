# SPDX-License-Identifier: Apache-2.0
"""LSTM and LSTMCell under autocast on the CPU: dtypes are torch's, and values as close to float64 as torch's."""

import itertools

import pytest
import torch
from torch import nn

import llmkern

pytestmark = pytest.mark.usefixtures("one_thread")
T, B, I, H = 4, 3, 5, 6  # noqa: E741
WIDE, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
HALVES = [BF16, F16]


def twins(name, dtype=WIDE, **options):
    ours, theirs = (getattr(m, name)(I, H, **options).to(dtype) for m in (llmkern.nn, nn))
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def results(module, x, hx, region):
    # The layer of torch by its formulas: that of oneDNN, which not every machine has, casts its states too.
    with torch.autocast("cpu", region), torch.backends.mkldnn.flags(enabled=False):
        first, second = module(x, hx)
    return [first, *second] if isinstance(second, tuple) else [first, second]


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # of torch, about switching oneDNN off
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("region", HALVES, ids=str)
@pytest.mark.parametrize("name", ["LSTM", "LSTMCell"])
def test_dtypes_are_torchs(name, region, gradients):
    """Of every combination that torch takes: of the states, the input where there are none, and the parameters."""
    taken = 0
    for of_weights, of_x, of_h, of_c in itertools.product(
        [WIDE, *HALVES, torch.float64],
        [WIDE, *HALVES, torch.float64],
        [None, WIDE, BF16],
        [WIDE, BF16],
    ):
        x = torch.randn(*([T] if name == "LSTM" else []), B, I).to(of_x)
        hx = None
        if of_h is not None:
            h, c = torch.randn(2, *([1] if name == "LSTM" else []), B, H)
            hx = h.to(of_h), c.to(of_c)
        ours, theirs = twins(name, of_weights)
        with torch.set_grad_enabled(gradients):
            try:
                expected = results(theirs, x, hx, region)
            except (RuntimeError, ValueError):
                continue
            got = results(ours, x, hx, region)
        taken += 1
        assert [t.dtype for t in got] == [t.dtype for t in expected], (of_weights, of_x, of_h, of_c)
        for a, b in zip(got, expected, strict=True):
            assert (a.double() - b.double()).abs().max() < 4 * torch.finfo(region).eps
    assert taken > 50


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_a_projection_returns_what_a_product_returns():
    """h comes out of a product, in the region's dtype; c does not."""
    ours, theirs = twins("LSTM", proj_size=2)
    x = torch.randn(T, B, I)
    got, expected = (results(m, x, None, BF16) for m in (ours, theirs))
    assert [t.dtype for t in got] == [t.dtype for t in expected] == [BF16, BF16, WIDE]


@pytest.mark.parametrize("name", ["LSTM", "LSTMCell"])
def test_a_slow_counter(name):
    """A state that grows by less than the spacing of bfloat16 at a step goes on growing: 5.03 after 1000, not 4.0."""
    ours, theirs = twins(name)
    with torch.no_grad():
        for p in ours.parameters():
            p.zero_()
        bias = next(p for n, p in ours.named_parameters() if n.startswith("bias_ih"))
        i, f, g, _ = bias.chunk(4)
        i.fill_(-5.3), f.fill_(30.0), g.fill_(3.0)
    theirs.load_state_dict(ours.state_dict())
    x = torch.zeros(*([1] if name == "LSTM" else []), 1, I)

    def count(module, region=None):
        state = None
        with torch.no_grad(), torch.autocast("cpu", region or BF16, enabled=region is not None):
            for _ in range(1000):
                results = module(x, state)
                state = results[1] if name == "LSTM" else results
        return state[1].max().item()

    exact = count(theirs)
    assert abs(count(ours, BF16) - exact) < 0.01 * exact
    assert abs(exact - 4.93) < 0.1


@pytest.mark.parametrize("name", ["LSTM", "LSTMCell"])
def test_gradients_have_the_dtypes_of_their_tensors(name):
    ours, theirs = twins(name)
    x = torch.randn(*([T] if name == "LSTM" else []), B, I)
    expected = torch.autograd.grad(theirs(x)[0].sum(), list(theirs.parameters()))
    with torch.autocast("cpu", BF16):
        loss = ours(x)[0].sum()
    got = torch.autograd.grad(loss, list(ours.parameters()))
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == WIDE and (a - b).abs().max() <= 0.02 * b.abs().max()
