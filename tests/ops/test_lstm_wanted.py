# SPDX-License-Identifier: Apache-2.0
"""A backward pass over an LSTM layer computes the gradients that somebody wants, and no others."""

import pytest
import torch
from torch import nn

import llmkern
from llmkern.ops.lstm.arguments import PARAMETERS, Backward
from tests.conftest import assert_close
from tests.ops.test_lstm_variants import NAMES, problem

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE = 4, 3, 2, 5, 3
VARIANTS = [frozenset(), *[frozenset({name}) for name in NAMES if name != "seed"], frozenset(NAMES)]


@pytest.fixture
def calls(monkeypatch):
    """What llmkern::lstm_backward is called with."""
    seen = []
    operator = torch.ops.llmkern.lstm_backward

    class Spy:
        @staticmethod
        def default(*args):
            seen.append(Backward(*args))
            return operator.default(*args)

    monkeypatch.setattr(torch.ops.llmkern, "lstm_backward", Spy)
    return seen


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("wanted", [("input",), ("h_0", "c_0"), ("weight_hh",), ("bias_hh",)])
@pytest.mark.parametrize("chosen", VARIANTS, ids=lambda v: "+".join(sorted(v)) or "plain")
def test_some_gradients_are_those_of_all(isa, calls, chosen, wanted, recompute):
    leaves, options = problem(SHAPE, chosen)
    options |= {"recompute": recompute}

    def gradients(names):
        given = {n: t.detach().requires_grad_(n in names) for n, t in leaves.items()}
        loss = sum(o.sin().sum() for o in llmkern.ops.lstm(**given, **options))
        return dict(zip(names, torch.autograd.grad(loss, [given[n] for n in names]), strict=True))

    everything, some = gradients(list(leaves)), gradients(wanted)
    assert all(torch.equal(some[name], everything[name]) for name in wanted)
    assert [call.weights for call in calls] == [True, bool({*wanted} & {*PARAMETERS})]
    assert [call.need_input for call in calls] == [True, "input" in wanted]


@pytest.mark.parametrize("chosen", VARIANTS, ids=lambda v: "+".join(sorted(v)) or "plain")
@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("need_input", [False, True])
def test_what_is_not_wanted_is_empty(chosen, weights, need_input):
    """The operator itself, and what it tells the compiler about its results."""
    leaves, options = problem(SHAPE, chosen)
    given = {n: t.detach() for n, t in leaves.items()} | options
    output, _, _, *saved = torch.ops.llmkern.lstm.default(**given, save_cells=True, save_gates=True)
    names = ("cells", "gates", "normalized", "scales")
    call = dict.fromkeys(Backward._fields[:22]) | given | dict(zip(names, saved, strict=True))
    call |= {"output": output, "grad_output": output, "weights": weights, "need_input": need_input}
    torch.library.opcheck(torch.ops.llmkern.lstm_backward.default, tuple(Backward(**call)))
    results = torch.ops.llmkern.lstm_backward.default(*Backward(**call))
    assert (results[0].numel() > 0) == need_input
    assert (results[3].numel() > 0) == (not weights and not chosen)
    assert all((t.numel() > 0) == weights for t in results[4:7])


def test_a_frozen_layer_below_a_trained_one(calls):
    """Fine-tuning: no gradient of a frozen layer's weights, none at all below the first trained parameter."""
    frozen, trained = llmkern.nn.LSTM(5, 6), llmkern.nn.LSTM(6, 7)
    frozen.requires_grad_(False)
    x = torch.randn(70, 2, 5)
    trained(frozen(x)[0])[0].sum().backward()
    assert [(c.weights, c.need_input) for c in calls] == [(True, False)]
    del calls[:]
    x.requires_grad_()
    trained(frozen(x)[0])[0].sum().backward()
    assert [(c.weights, c.need_input) for c in calls] == [(True, True), (False, True)]
    assert all(p.grad is None for p in frozen.parameters()) and x.grad.count_nonzero() > 0


def test_second_derivatives_where_few_first_ones_are_wanted():
    modules = [m.LSTM(3, 4, dtype=torch.float64) for m in (llmkern.nn, nn)]
    modules[1].load_state_dict(modules[0].state_dict())
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    seconds = []
    for module in modules:
        module.requires_grad_(False)
        (first,) = torch.autograd.grad(module(x)[0].square().sum(), x, create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), x)[0])
    assert_close(*seconds)
