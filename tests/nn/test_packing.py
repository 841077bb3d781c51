# SPDX-License-Identifier: Apache-2.0
"""Packed weights are kept while the weights stay, made anew when they change, and never saved."""

import copy
import pickle

import pytest
import torch

import llmkern


@pytest.fixture(params=["LSTM", "LSTMCell"])
def module(request):
    return getattr(llmkern.nn, request.param)(5, 21).double()


@pytest.fixture(autouse=True, params=[True, False], ids=["grad", "no_grad"])
def _gradients(request):
    """Without gradients all layers of a module run in one call."""
    with torch.set_grad_enabled(request.param):
        yield


def run(module):
    x = torch.linspace(-1, 1, 5, dtype=torch.float64).reshape(1, 5)
    return torch.cat([t.reshape(-1) for t in module(x)[1]])


def fresh(module):
    """What a module that never ran gives."""
    twin = type(module)(5, 21).double()
    twin.load_state_dict(module.state_dict())
    return run(twin)


def step(module, **options):
    with torch.enable_grad():
        run(module).sum().backward()
    run(module)
    torch.optim.SGD(module.parameters(), 1.0, **options).step()


CHANGES = {
    "nothing": lambda m: None,
    "in place": lambda m: [p.detach().mul_(2) for p in m.parameters()],
    "an optimizer": step,
    "a fused optimizer": lambda m: step(m, fused=True),
    "load_state_dict": lambda m: m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()}),
    "another tensor": lambda m: [setattr(p, "data", p.data + 1) for p in m.parameters()],
    "dtype": lambda m: m.float().double(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_noticed(module, change):
    run(module)
    CHANGES[change](module)
    assert torch.equal(run(module), fresh(module))


def test_another_instruction_set_does_not_use_them(module):
    expected, isa = run(module), torch.ops.llmkern.cpu_isa()
    torch.ops.llmkern.select_cpu_isa("generic")
    generic, without = run(module), fresh(module)
    torch.ops.llmkern.select_cpu_isa(isa)
    assert torch.equal(generic, without)
    assert torch.allclose(generic, expected, rtol=1e-12)
    assert torch.equal(run(module), expected)


def test_packed_once(module, monkeypatch):
    calls = []
    pack = llmkern.ops.lstm_pack
    monkeypatch.setattr(llmkern.ops, "lstm_pack", lambda *a, **k: calls.append(1) or pack(*a, **k))
    for _ in range(3):
        run(module)
    assert len(calls) == 1


def test_copies_and_files_have_none(module):
    run(module)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert twin._packed is not module._packed
        assert torch.equal(run(twin), run(module))
    assert not [name for name in module.state_dict() if "packed" in name]


def test_functional_parameters(module):
    """torch.func hands in other weights at every call, some of them without memory of their own."""
    run(module)
    doubled = {name: 2 * p.detach() for name, p in module.named_parameters()}
    x = torch.ones(1, 5, dtype=torch.float64)
    got = torch.func.functional_call(module, doubled, (x,))
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(2)
    expected = module(x)
    assert torch.equal(
        got[1][0].squeeze() if isinstance(got[1], tuple) else got[1],
        expected[1][0].squeeze() if isinstance(expected[1], tuple) else expected[1],
    )
