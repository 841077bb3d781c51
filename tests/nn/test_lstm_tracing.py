# SPDX-License-Identifier: Apache-2.0
"""LSTM and LSTMCell recorded by torch.jit.trace, torch.export and make_fx: checked, run and trained as nn.LSTM."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import llmkern
from tests.conftest import assert_close

pytestmark = pytest.mark.usefixtures("one_thread")
T, B, I, H = 5, 2, 3, 4  # noqa: E741

OPTIONS = [
    ("LSTMCell", {}),
    ("LSTM", {}),
    ("LSTM", {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    ("LSTM", {"proj_size": 2}),
]
OURS = [("LSTM", {"layer_norm": True}), ("LSTM", {"recompute": True}), ("LSTM", {"zoneout_h": 0.3})]
named = pytest.mark.parametrize(
    ("name", "options"), [*OPTIONS, *OURS], ids=lambda v: v if isinstance(v, str) else "+".join(v)
)


def problem(name, options):
    module = getattr(llmkern.nn, name)(I, H, dtype=torch.float64, **options).eval()
    x = torch.randn(*([T] if name == "LSTM" else []), B, I, dtype=torch.float64)
    return module, x


def first(module, x):
    return module(x)[0]


def gradients(call, module, x):
    x = x.clone().requires_grad_()
    loss = sum(t.sin().sum() for t in torch.utils._pytree.tree_leaves(call(x)))
    return [loss, *torch.autograd.grad(loss, [x, *module.parameters()])]


def check_trained(recorded, module, x):
    """What was recorded has the module's values and gradients, before and after a step of training, in any mode."""
    for _ in range(2):
        for got, expected in zip(
            gradients(recorded, module, x), gradients(module, module, x), strict=True
        ):
            assert_close(got, expected)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.data.mul_(0.9)
            assert_close(first(recorded, x), first(module, x))


@pytest.mark.filterwarnings("ignore")  # tracing is deprecated, and says so in many ways
@pytest.mark.parametrize("recording", [True, False])
@named
def test_jit_trace(name, options, recording):
    """With torch's own check, which traces again under no_grad and compares the graphs."""
    module, x = problem(name, options)
    with torch.set_grad_enabled(recording):
        module(x)  # what a module may keep from an earlier call is no part of a trace
        traced = torch.jit.trace(module, x)
    check_trained(traced, module, x)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("recording", [True, False])
@named
def test_export(name, options, recording, strict):
    module, x = problem(name, options)
    with torch.set_grad_enabled(recording):
        program = torch.export.export(module, (x,), strict=strict)
    check_trained(program.module(), *trained_copy(program.module(), module, x))


def trained_copy(exported, module, x):
    """An exported module has the parameters of the module it was made of."""
    assert {p.data_ptr() for p in exported.parameters()} == {
        p.data_ptr() for p in module.parameters()
    }
    return module, x


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("recording", [True, False])
def test_make_fx_of_the_operator(recording, mode):
    """Graphs made without gradients in mind give the same ones as those that were."""
    module, x = problem("LSTM", {})
    leaves = [x, *torch.zeros(2, B, H, dtype=torch.float64), *module.parameters()]
    leaves = [t.detach().requires_grad_() for t in leaves]
    with torch.set_grad_enabled(recording):
        graph = make_fx(lambda *a: llmkern.ops.lstm(*a), tracing_mode=mode)(*leaves)
    grads = []
    for call in (graph, llmkern.ops.lstm):
        loss = sum(t.sin().sum() for t in call(*leaves))
        grads.append([loss, *torch.autograd.grad(loss, leaves)])
    for got, expected in zip(*grads, strict=True):
        assert_close(got, expected)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("recording", [True, False])
@named
def test_make_fx(name, options, recording, mode):
    """The parameters are inputs of the graph, or its attributes: never a copy of them made at that time."""
    module, x = problem(name, options)
    with torch.set_grad_enabled(recording):
        module(x)
        graph = make_fx(module, tracing_mode=mode, _allow_non_fake_inputs=True)(x)
    constants = {n.target for n in graph.graph.nodes if n.op == "get_attr"}
    pointers = {p.data_ptr() for p in module.parameters()}
    assert {getattr(graph, c).data_ptr() for c in constants if "param" in c} <= pointers
    check_trained(graph, module, x)


@pytest.mark.parametrize("mode", ["fake", "symbolic"])
def test_make_fx_of_a_module_that_has_never_run(mode):
    module, x = problem("LSTM", {})
    with torch.no_grad():
        graph = make_fx(module, tracing_mode=mode, _allow_non_fake_inputs=True)(x)
    check_trained(graph, module, x)


def test_a_backward_pass_computes_what_was_not_saved():
    """The operator called without a thought of gradients: they are the same."""
    module, x = problem("LSTM", {})
    leaves = [x, *torch.zeros(2, B, H, dtype=torch.float64), *module.parameters()]
    leaves = [t.detach().requires_grad_() for t in leaves]
    grads = []
    for options in ({}, {"save_cells": True}, {"save_cells": True, "save_gates": True}):
        outputs = torch.ops.llmkern.lstm.default(*leaves, **options)[:3]
        loss = sum(t.sin().sum() for t in outputs)
        once = torch.autograd.grad(loss, leaves, create_graph=True)
        twice = torch.autograd.grad(sum(g.square().sum() for g in once), leaves)
        grads.append([*once, *twice])
    for some in grads[:2]:
        for got, expected in zip(some, grads[2], strict=True):
            assert_close(got, expected)
