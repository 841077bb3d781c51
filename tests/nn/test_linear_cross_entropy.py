# SPDX-License-Identifier: Apache-2.0
"""llmkern.nn.LinearCrossEntropyLoss against torch's, and where torch has none."""

import copy
import importlib
import inspect
import pickle
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import llmkern
from tests.conftest import assert_close

D, V = 6, 11
IN_TORCH = hasattr(nn, "LinearCrossEntropyLoss")
OPTIONS = [
    {},
    {"bias": True},
    {"reduction": "sum", "ignore_index": 3},
    {"reduction": "none", "label_smoothing": 0.2, "bias": True},
    {"weight": torch.linspace(0.1, 2, V).double(), "label_smoothing": 0.1, "ignore_index": 0},
]


def check_against_linear_and_cross_entropy(layer, options, shape):
    x = torch.randn(*shape, D, dtype=torch.float64, requires_grad=True)
    target = torch.randint(V, shape)
    options = {k: v for k, v in options.items() if k != "bias"}
    loss = layer(x, target)
    flat = F.cross_entropy(layer.linear(x).reshape(-1, V), target.reshape(-1), **options)
    expected = flat.reshape(loss.shape)
    assert_close(loss, expected)
    leaves, upstream = [x, *layer.parameters()], torch.randn_like(loss)
    ours = torch.autograd.grad(loss, leaves, upstream)
    for a, b in zip(ours, torch.autograd.grad(expected, leaves, upstream), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("shape", [(), (7,), (3, 4)], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o))
def test_outputs_and_gradients(options, shape):
    layer = llmkern.nn.LinearCrossEntropyLoss(D, V, dtype=torch.float64, **options)
    check_against_linear_and_cross_entropy(layer, options, shape)


@pytest.mark.skipif(not IN_TORCH, reason="torch has the class from 2.13 on")
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o))
def test_is_a_drop_in(options):
    torch.manual_seed(1)
    theirs = nn.LinearCrossEntropyLoss(D, V, dtype=torch.float64, **options)
    torch.manual_seed(1)
    ours = llmkern.nn.LinearCrossEntropyLoss(D, V, dtype=torch.float64, **options)
    assert isinstance(ours, nn.LinearCrossEntropyLoss) and repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor)
    theirs.load_state_dict(ours.state_dict())
    x, target = torch.randn(7, D, dtype=torch.float64), torch.randint(V, (7,))
    assert_close(ours(x, target), theirs(x, target))
    with torch.no_grad():
        assert_close(ours(x[0], target[0]), theirs(x[0], target[0]))
    parameters = [inspect.signature(c).parameters for c in (type(ours), type(theirs))]
    assert [(p.name, p.kind, p.default) for p in parameters[0].values()] == [
        (p.name, p.kind, p.default) for p in parameters[1].values()
    ]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o))
def test_without_torchs_class(monkeypatch, options):
    """On torch 2.10 to 2.12 the class stands on nn.Module alone."""
    monkeypatch.delattr(nn, "LinearCrossEntropyLoss", raising=False)
    monkeypatch.delitem(sys.modules, "llmkern.nn.linear_cross_entropy")
    alone = importlib.import_module("llmkern.nn.linear_cross_entropy").LinearCrossEntropyLoss
    assert alone.__bases__ == (nn.Module,)
    layer = alone(D, V, dtype=torch.float64, **options)
    check_against_linear_and_cross_entropy(layer, options, (7,))
    assert "Linear(in_features=6, out_features=11" in repr(layer)
    same = llmkern.nn.LinearCrossEntropyLoss(D, V, dtype=torch.float64, **options)
    assert list(layer.state_dict()) == list(same.state_dict())


def test_copies():
    layer = llmkern.nn.LinearCrossEntropyLoss(D, V, weight=torch.rand(V), bias=True)
    x, target = torch.randn(5, D), torch.randint(V, (5,))
    expected = layer(x, target)
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(again(x, target), expected)
    double = copy.deepcopy(layer).double()
    assert double.weight.dtype == torch.float64
    assert_close(double(x.double(), target), expected.double(), 2e-6)


def test_bad_options_and_input():
    cls, name = llmkern.nn.LinearCrossEntropyLoss, r"llmkern\.LinearCrossEntropyLoss: expected "
    with pytest.raises(ValueError, match=name + r"weight of shape \[11\], got \[3\]"):
        cls(D, V, weight=torch.ones(3))
    with pytest.raises(ValueError, match=name + r"label_smoothing in \[0, 1\], got -0.1"):
        cls(D, V, label_smoothing=-0.1)
    with pytest.raises(ValueError, match=name + r"out_features \(\), got \(4,\)"):
        cls(D, V, out_features=(4,))
    with pytest.raises(ValueError, match=r"reduction to be none, mean or sum, got 'avg'"):
        cls(D, V, reduction="avg")(torch.zeros(2, D), torch.zeros(2).long())
    with pytest.raises(TypeError, match="target of dtype int64, got int32"):
        cls(D, V)(torch.zeros(2, D), torch.zeros(2).int())
