# SPDX-License-Identifier: Apache-2.0
"""LanguageModel: the same function as the torch.nn layers it stands for, state carried, arguments checked."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from llmkern.models import LanguageModel
from tests.conftest import assert_close
from tests.models import toys


class TorchTwin(nn.Module):
    """The same architecture of torch.nn's layers."""

    def __init__(self, V, D, H, L):
        super().__init__()
        self.embedding = nn.Embedding(V, D)
        self.lstm = nn.LSTM(D, H, L, batch_first=True)
        self.head = nn.Linear(H, V)

    def forward(self, ids, state=None):
        output, state = self.lstm(self.embedding(ids), state)
        return self.head(output), state


@pytest.fixture
def twins():
    ours = toys.model().double()
    theirs = TorchTwin(23, 12, 16, 2).double()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def test_is_the_same_function_as_torchs_layers(twins):
    ours, theirs = twins
    ids = torch.randint(23, (3, 8))
    (a, (h, c)), (b, (their_h, their_c)) = ours(ids[:, :-1]), theirs(ids[:, :-1])
    for mine, other in ((a, b), (h, their_h), (c, their_c)):
        assert_close(mine, other)
    loss, _ = ours.loss(ids[:, :-1], ids[:, 1:])
    expected = F.cross_entropy(b.reshape(-1, 23), ids[:, 1:].reshape(-1))
    assert_close(loss, expected)
    loss.backward()
    expected.backward()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close(mine.grad, other.grad, 1e-11)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_loss_reductions(reduction):
    model = toys.model()
    ids = torch.randint(23, (3, 8))
    each, _ = model.loss(ids[:, :-1], ids[:, 1:], reduction="none")
    logits, _ = model(ids[:, :-1])
    expected = F.cross_entropy(logits.reshape(-1, 23), ids[:, 1:].reshape(-1), reduction="none")
    assert_close(each.reshape(-1), expected, 1e-5)
    got, _ = model.loss(ids[:, :-1], ids[:, 1:], reduction=reduction)
    assert_close(got, each if reduction == "none" else each.sum(), 1e-5)


def test_the_carried_state_continues_the_text():
    model = toys.model().double()
    ids = torch.randint(23, (2, 9))
    whole, end = model(ids)
    first, state = model(ids[:, :4])
    rest, state = model(ids[:, 4:], state)
    assert_close(torch.cat([first, rest], 1), whole)
    assert_close(state[0], end[0])
    assert_close(state[1], end[1])
    zeros, _ = model(ids, model.initial_state(2))
    assert torch.equal(zeros, whole)


def test_per_sample_gradients():
    """Embedding, LSTM and head in one call of vmap(grad(...)), as differential privacy takes them, against a loop."""

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = toys.model().double()

        def forward(self, ids):
            return self.model.loss(ids[None, :-1], ids[None, 1:])[0]

    loss, ids = Loss(), torch.randint(23, (3, 6))
    parameters = {name: p.detach() for name, p in loss.named_parameters()}
    of_one = grad(lambda parameters, ids: functional_call(loss, parameters, ids))
    got = vmap(of_one, in_dims=(None, 0))(parameters, ids)
    for i in range(3):
        loss.zero_grad()
        loss(ids[i]).backward()
        for name, p in loss.named_parameters():
            assert_close(got[name][i], p.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_trains_in_sixteen_bits(dtype):
    """The loss and its gradients follow the model's dtype."""
    model = toys.model()
    ids = torch.randint(23, (2, 9))
    expected, _ = model.loss(ids[:, :-1], ids[:, 1:])
    loss, _ = model.to(dtype).loss(ids[:, :-1], ids[:, 1:])
    loss.backward()
    assert_close(loss, expected, 8 * torch.finfo(dtype).eps)
    assert all(p.grad.dtype == dtype and p.grad.any() for p in model.parameters())


def test_tied_weights_are_one_parameter_with_one_gradient():
    tied = toys.model(embedding_dim=16, tie_weights=True)
    assert tied.head.weight is tied.embedding.weight
    assert tied.num_parameters == toys.model(embedding_dim=16).num_parameters - 23 * 16
    ids = torch.randint(23, (2, 5))
    untied = toys.model(embedding_dim=16)
    untied.load_state_dict(tied.state_dict())
    for model in (tied, untied):
        model.loss(ids[:, :-1], ids[:, 1:])[0].backward()
    assert_close(
        tied.head.weight.grad, untied.head.weight.grad + untied.embedding.weight.grad, 1e-5
    )


def test_initial_values_are_uniform_in_the_range():
    model = LanguageModel(500, 32, 32, init_range=0.25)
    values = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    assert values.abs().max() <= 0.25
    for low in (-0.25, -0.125, 0.0, 0.125):  # a quarter each
        share = ((values >= low) & (values < low + 0.125)).float().mean().item()
        assert abs(share - 0.25) < 0.02
    # None leaves torch's own: N(0, 1) for the table.
    assert LanguageModel(500, 32, 32, init_range=None).embedding.weight.std() > 0.9


def test_zaremba_small_has_its_published_size():
    assert LanguageModel(10_000, 200, 200, 2).num_parameters == 4_653_200


def test_dropout_acts_in_training_alone_and_by_the_seed():
    model = toys.model(dropout=0.5)
    ids = torch.randint(23, (2, 6))
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(model(ids)[0])
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    model.eval()
    undropped = toys.model()
    undropped.load_state_dict(model.state_dict())
    assert torch.equal(model(ids)[0], undropped(ids)[0])


def test_dropout_is_on_the_embedding_and_on_the_output():
    model = toys.model(dropout=0.5, num_layers=1, hidden_size=200, embedding_dim=200)
    ids = torch.randint(23, (2, 6))
    output, _ = model.hidden_states(ids)
    assert 0.4 < (output == 0).float().mean() < 0.6
    read = []
    model.lstm.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
    model.hidden_states(ids)
    assert 0.4 < (read[0] == 0).float().mean() < 0.6


def test_dropout_between_layers_is_for_several_layers():
    # torch warns about dropout with one layer; here the embedding and the output still have it.
    model = toys.model(num_layers=1, dropout=0.5)
    ids = torch.randint(23, (1, 6))
    assert not torch.equal(model(ids)[0], model(ids)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 0}, "expected vocab_size to be an int >= 1, got 0"),
        ({"hidden_size": 2.5}, "expected hidden_size to be an int >= 1, got 2.5"),
        ({"num_layers": True}, "expected num_layers to be an int >= 1, got True"),
        ({"dropout": 1.0}, r"expected dropout in \[0, 1\), got 1.0"),
        ({"init_range": 0.0}, "expected a finite init_range > 0 or None, got 0.0"),
        ({"tie_weights": True, "embedding_dim": 8}, "for tie_weights=True, got 8 and 512"),
    ],
)
def test_constructor_names_the_wrong_argument(options, message):
    with pytest.raises(ValueError, match=message):
        LanguageModel(**({"vocab_size": 10} | options))


def test_calls_name_the_wrong_shape():
    model = toys.model()
    with pytest.raises(ValueError, match=r"expected ids of shape \[B, T\], got \[4\]"):
        model(torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"ids = \[2, 3\], got \[2, 2\]"):
        model.loss(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(IndexError, match="23"):
        model(torch.tensor([[1, 23]]))
