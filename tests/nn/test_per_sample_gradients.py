# SPDX-License-Identifier: Apache-2.0
"""A model that had per-sample gradients, jacobians and derivatives in forward mode has them after convert()."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn import functional as F

import llmkern
from llmkern.models import LanguageModel
from tests.conftest import TOLERANCE, assert_close

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # torch's own, the first time it is asked for derivatives in forward mode.
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
]

N, T, V, D, H = 4, 5, 11, 6, 7


class Tagger(nn.Module):
    """Embedding, LSTM and a plain linear head."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(V, D, padding_idx=0)
        self.lstm = nn.LSTM(D, H, num_layers=2, batch_first=True)
        self.head = nn.Linear(H, V)

    def forward(self, ids):
        return self.head(self.lstm(self.embedding(ids))[0])


def problem():
    theirs = Tagger().double()
    ours = copy.deepcopy(theirs)
    assert len(llmkern.convert(ours).converted) == 2
    ids = torch.randint(V, (N, T + 1))
    ids[0, :3] = 0  # padding
    return ours, theirs, ids


def loss_of(model, parameters, ids):
    """Of one text, [T + 1]."""
    logits = functional_call(model, parameters, (ids[None, :-1],))
    return F.cross_entropy(logits.flatten(0, 1), ids[1:])


def parameters_of(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def assert_all_close(got, expected):
    assert got.keys() == expected.keys()
    for name in expected:
        assert_close(got[name], expected[name])


def test_per_sample_gradients_equal_a_loop_and_torchs():
    ours, theirs, ids = problem()
    parameters = parameters_of(ours)
    one = grad(lambda p, row: loss_of(ours, p, row))
    got = vmap(one, in_dims=(None, 0))(parameters, ids)
    loop = []
    for row in ids:
        ours.zero_grad()
        loss_of(ours, dict(ours.named_parameters()), row).backward()
        loop.append({name: p.grad.clone() for name, p in ours.named_parameters()})
    assert_all_close(got, {name: torch.stack([g[name] for g in loop]) for name in parameters})
    # torch has no rule for its own LSTM under vmap: one at a time there.
    torchs = [grad(lambda p, row: loss_of(theirs, p, row))(parameters, row) for row in ids]
    assert_all_close(got, {name: torch.stack([g[name] for g in torchs]) for name in parameters})


def test_the_step_of_a_private_optimizer():
    """Per-sample gradients, clipped one by one, summed: what differential privacy does."""
    ours, _, ids = problem()
    parameters = parameters_of(ours)

    def clipped(row):
        grads = grad(lambda p: loss_of(ours, p, row))(parameters)
        norm = torch.stack([g.square().sum() for g in grads.values()]).sum().sqrt()
        return {name: g / norm.clamp(min=1) for name, g in grads.items()}

    got = {name: g.sum(0) for name, g in vmap(clipped)(ids).items()}
    each = [clipped(row) for row in ids]
    assert_all_close(got, {name: sum(g[name] for g in each) for name in parameters})


def test_a_hessian_vector_product_equals_torchs():
    ours, theirs, ids = problem()
    parameters = parameters_of(ours)
    tangents = {name: torch.randn_like(p) for name, p in parameters.items()}
    tangents["embedding.weight"][0] = (
        0  # forward mode, torch's too, sees the padding row; gradients do not
    )

    def loss(parameters):
        return vmap(lambda row: loss_of(ours, parameters, row))(ids).sum()

    got = jvp(grad(loss), (parameters,), (tangents,))
    for ours_, torchs in zip(got, product_by_autograd(theirs, ids, tangents), strict=True):
        assert_all_close(ours_, torchs)


def product_by_autograd(model, ids, tangents):
    parameters = dict(model.named_parameters())
    loss = sum(loss_of(model, parameters, row) for row in ids)
    grads = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
    dot = sum((g * tangents[name]).sum() for name, g in zip(parameters, grads, strict=True))
    second = torch.autograd.grad(dot, list(parameters.values()))
    return [dict(zip(parameters, g, strict=True)) for g in (grads, second)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("order", ["convert first", "dtype first"])
def test_a_converted_model_in_16_bits(order, dtype):
    """convert() and bfloat16() or half() in either order, forward and backward: near float64 as torch's is."""
    ours, theirs, ids = problem()
    if order == "dtype first":
        ours = copy.deepcopy(theirs).to(dtype)
        assert len(llmkern.convert(ours).converted) == 2
    ours.to(dtype)
    theirs.load_state_dict(ours.state_dict())
    grads = []
    for model in (ours, theirs):
        logits = model(ids[:, :-1])
        loss = F.cross_entropy(logits.double().flatten(0, 1), ids[:, 1:].flatten())
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
    for got, truth in zip(*grads, strict=True):
        assert got.dtype == dtype
        assert_close(got, truth)


class LossOf(nn.Module):
    """functional_call runs a module's forward."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, row):
        return self.model.loss(row[None, :-1], row[None, 1:])[0]


@pytest.mark.parametrize("tied", [False, True])
def test_a_whole_language_model(tied):
    """Embedding, LSTM and the fused loss, for every text: against a loop, and forward mode against both."""
    model = LanguageModel(V, embedding_dim=H, hidden_size=H, num_layers=2, tie_weights=tied)
    module = LossOf(model.double())
    parameters, ids = parameters_of(module), torch.randint(V, (N, T + 1))

    def loss(parameters, row):
        return functional_call(module, parameters, (row,))

    got = vmap(grad(loss), in_dims=(None, 0))(parameters, ids)
    each = []
    for row in ids:
        module.zero_grad()
        module(row).backward()
        each.append({name: p.grad.clone() for name, p in module.named_parameters()})
    assert_all_close(got, {name: torch.stack([g[name] for g in each]) for name in parameters})
    tangents = {name: torch.randn_like(p) for name, p in parameters.items()}
    _, slopes = jvp(lambda p: vmap(lambda row: loss(p, row))(ids), (parameters,), (tangents,))
    dots = [sum((g[name] * tangents[name]).sum() for name in parameters) for g in each]
    assert_close(slopes, torch.stack(dots))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_language_model_in_16_bits_trains_and_writes(dtype):
    model = LanguageModel(V, embedding_dim=D, hidden_size=H).to(dtype)
    ids = torch.randint(V, (N, T + 1))
    loss, _ = model.loss(ids[:, :-1], ids[:, 1:])
    wide = LanguageModel(V, embedding_dim=D, hidden_size=H).double()
    wide.load_state_dict(model.state_dict())
    truth, _ = wide.loss(ids[:, :-1], ids[:, 1:])
    loss.backward()
    truth.backward()
    assert_close(loss, truth, TOLERANCE[dtype])
    for got, expected in zip(model.parameters(), wide.parameters(), strict=True):
        assert got.grad.dtype == dtype
        assert_close(got.grad, expected.grad)
    written = model.eval().generate([[1, 2, 3]], max_new_tokens=8, seed=1)
    assert written.shape == (1, 11) and int(written.max()) < V
