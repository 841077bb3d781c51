# SPDX-License-Identifier: Apache-2.0
"""convert() and revert(): the layers change, and nothing else that anybody could see."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import llmkern
from tests.conftest import assert_close

pytestmark = pytest.mark.usefixtures("one_thread")
PAIRS = [(getattr(nn, n), getattr(llmkern.nn, n)) for n in ("LSTM", "LSTMCell", "Embedding")]
V, D = 17, 6


class Model(nn.Module):
    """Containers, sharing, tied weights, packed sequences, a cell in a loop; float64."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.embedding = nn.Embedding(V, D, padding_idx=0)
        self.encoder = nn.LSTM(D, D // 2, 2, batch_first=True, bidirectional=True, dropout=dropout)
        self.cells = nn.ModuleList([nn.LSTMCell(D, D), nn.LSTMCell(D, D, bias=False)])
        self.heads = nn.ModuleDict({"middle": nn.Sequential(nn.Tanh(), nn.Linear(D, D))})
        self.shared = nn.LSTM(D, D)
        self.again = self.shared
        self.decoder = nn.Linear(D, V)
        self.decoder.weight = self.embedding.weight
        self.register_buffer("scale", torch.tensor(2.0))
        self.double()

    def forward(self, ids, lengths):
        packed = pack_padded_sequence(
            self.embedding(ids), lengths, batch_first=True, enforce_sorted=False
        )
        output, hx = self.encoder(packed)
        x, _ = pad_packed_sequence(output, batch_first=True)
        x = self.heads["middle"](x).transpose(0, 1)
        for module in (self.shared, self.again):
            x, _ = module(x)
        state = torch.cat(tuple(hx[0][-2:]), dim=1)
        for cell in self.cells:
            state, _ = cell(state)
        return self.decoder(x + self.scale * state)


CONVERTED = ["embedding", "encoder", "cells.0", "cells.1", "shared"]


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(V, (4, 5), generator=generator), torch.tensor([3, 5, 1, 4])


def loss_of(model, seed=0):
    ids, lengths = batch(seed)
    return F.cross_entropy(model(ids, lengths).flatten(0, 1), ids.T.flatten())


def train(model, optimizer, steps):
    losses = []
    for seed in steps:
        optimizer.zero_grad()
        loss = loss_of(model, seed)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def kinds(model):
    return {name: type(module) for name, module in model.named_modules(remove_duplicate=False)}


@pytest.fixture
def models():
    """The same model twice, as torch made it and converted."""
    model = Model()
    twin = copy.deepcopy(model)
    llmkern.convert(twin)
    return model, twin


def test_every_layer_changes_its_class_and_stays_the_object_it_is():
    model = Model()
    before = {name: module for name, module in model.named_modules(remove_duplicate=False)}
    types = kinds(model)
    report = llmkern.convert(model)
    for name, module in model.named_modules(remove_duplicate=False):
        assert module is before[name]
        assert type(module) is dict(PAIRS).get(types[name], types[name])
    assert [layer.name for layer in report.converted] == CONVERTED  # the shared one once
    assert [(x.type, x.to) for x in report.converted] == [(PAIRS[k]) for k in (2, 0, 1, 1, 0)]
    assert report.left == ()
    assert model.shared is model.again


def test_outputs_and_gradients_stay(models):
    expected, got = ([loss_of(m), *grads(m)] for m in models)
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b)


def grads(model):
    return torch.autograd.grad(loss_of(model), list(model.parameters()))


OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, 0.3, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, 0.01),
    "fused adamw": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_training_goes_on_with_the_same_optimizer(kind):
    model = Model()
    other = copy.deepcopy(model)
    optimizer = OPTIMIZERS[kind](other.parameters())
    expected = train(other, optimizer, range(12))
    assert expected[-1] < expected[0]
    optimizer = OPTIMIZERS[kind](model.parameters())
    got = [train(model, optimizer, range(4))]
    llmkern.convert(model)
    got.append(train(model, optimizer, range(4, 8)))
    llmkern.revert(model)
    got.append(train(model, optimizer, range(8, 12)))
    assert_close(torch.cat(got), expected, 1e-11)


def test_dropout_between_layers_draws_what_torch_draws():
    model = Model(dropout=0.5)
    ids = batch()[0]
    twin = copy.deepcopy(model)
    llmkern.convert(twin)
    outputs = []
    for m in (model, twin):
        torch.manual_seed(5)
        outputs.append(m.encoder(m.embedding(ids))[0])
    assert_close(*outputs)
    assert not torch.equal(outputs[0], model.eval().encoder(model.embedding(ids))[0])


def test_parameters_names_buffers_mode_and_attributes_stay():
    model = Model()
    model.encoder.eval().requires_grad_(False)
    model.encoder.register_buffer("mine", torch.ones(3))
    model.encoder.comment = "kept"
    model.shared.weight_hh_l0.grad = grad = torch.ones_like(model.shared.weight_hh_l0)

    def facts():
        modules = [(name, module.training) for name, module in model.named_modules()]
        parameters = [
            (n, id(p), p.data_ptr(), p.requires_grad) for n, p in model.named_parameters()
        ]
        return modules, parameters, [(n, id(b)) for n, b in model.named_buffers()]

    before, state = facts(), {k: v.clone() for k, v in model.state_dict().items()}
    for change in (llmkern.convert, llmkern.revert):
        change(model)
        assert facts() == before
        assert model.decoder.weight is model.embedding.weight
        assert model.encoder.comment == "kept"
        assert model.shared.weight_hh_l0.grad is grad
        after = model.state_dict()
        assert list(after) == list(state) and after._metadata.keys() == state_metadata(model)
        assert all(torch.equal(after[name], state[name]) for name in state)


def state_metadata(model):
    return {name for name, _ in model.named_modules(remove_duplicate=False)}


def test_state_dicts_load_either_way(models):
    model, twin = models
    for m in (model, twin):
        with torch.no_grad():
            m.shared.weight_ih_l0.normal_()
    for source, target in ((model, twin), (twin, model)):
        with torch.no_grad():
            source.encoder.weight_hh_l1.normal_()
        target.load_state_dict(source.state_dict())
        assert_close(loss_of(target), loss_of(source))
    twin.load_state_dict({k: v * 0.5 for k, v in model.state_dict().items()}, assign=True)
    model.load_state_dict(twin.state_dict())
    assert_close(loss_of(twin), loss_of(model))


def install_hooks(layer, calls):
    def note(name, result=None):
        def hook(*_):
            calls.append(name)
            return result

        return hook

    layer.register_forward_pre_hook(note("forward pre"))
    layer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(f"kwargs {len(args)} {sorted(kwargs)}"),
        with_kwargs=True,
    )
    layer.register_forward_hook(lambda m, args, out: (out[0] * 3, out[1]))
    layer.register_forward_hook(note("forward always"), always_call=True)
    layer.register_full_backward_pre_hook(note("backward pre"))
    layer.register_full_backward_hook(note("backward"))
    layer.register_state_dict_pre_hook(note("state_dict pre"))
    layer.register_state_dict_post_hook(note("state_dict"))
    layer.register_load_state_dict_pre_hook(note("load pre"))
    layer.register_load_state_dict_post_hook(note("load"))
    layer.weight_ih_l0.register_hook(note("weight"))
    layer.weight_hh_l0.register_post_accumulate_grad_hook(note("accumulated"))


def test_hooks_fire_as_before():
    layer, calls = nn.LSTM(3, 4, dtype=torch.float64), []
    install_hooks(layer, calls)
    removable = layer.register_forward_hook(lambda *_: calls.append("removed"))
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)

    def use():
        calls.clear()
        output, _ = layer(x, hx=None)
        output.sum().backward()
        layer.load_state_dict(layer.state_dict())
        return output.detach(), list(calls)

    expected, expected_calls = use()
    assert len(set(expected_calls)) == len(expected_calls) == 12
    llmkern.convert(layer)
    output, seen = use()
    assert type(layer) is llmkern.nn.LSTM
    # Which parameter gets its gradient first is for autograd to choose.
    for_weights = {"weight", "accumulated"}
    assert for_weights < set(seen)
    assert [c for c in seen if c not in for_weights] == [
        c for c in expected_calls if c not in for_weights
    ]
    assert_close(output, expected)
    removable.remove()
    assert "removed" not in use()[1]


def test_the_model_itself_may_be_a_layer():
    layer = nn.LSTM(3, 4)
    report = llmkern.convert(layer)
    assert type(layer) is llmkern.nn.LSTM
    assert report.converted == (("", nn.LSTM, llmkern.nn.LSTM),)
    assert "the model itself: torch.nn.LSTM -> llmkern.nn.LSTM" in str(report)


def test_one_part_of_a_model_can_be_converted():
    model = Model()
    llmkern.convert(model.cells)
    changed = {n for n, kind in kinds(model).items() if kind in dict(PAIRS).values()}
    assert changed == {"cells.0", "cells.1"}


def test_copies_and_pickles(models):
    model, twin = models
    expected = loss_of(model)
    loss_of(twin)  # packs its weights
    for copied in (copy.deepcopy(twin), pickle.loads(pickle.dumps(twin))):
        assert kinds(copied) == kinds(twin)
        assert copied.shared is copied.again and copied.decoder.weight is copied.embedding.weight
        assert_close(loss_of(copied), expected)
        optimizer = torch.optim.SGD(copied.parameters(), 0.1)
        reference = copy.deepcopy(model)
        assert_close(
            train(copied, optimizer, range(2)),
            train(reference, torch.optim.SGD(reference.parameters(), 0.1), range(2)),
        )


def test_a_reverted_model_is_one_that_never_was_converted():
    model = Model()
    before = {name: list(vars(module)) for name, module in model.named_modules()}
    types = kinds(model)
    assert len(llmkern.convert(model).converted) == len(CONVERTED)
    loss_of(model)
    report = llmkern.revert(model)
    assert [(x.name, x.type, x.to) for x in report.converted] == [
        (name, ours, theirs)
        for name, (theirs, ours) in zip(CONVERTED, (PAIRS[k] for k in (2, 0, 1, 1, 0)), strict=True)
    ]
    assert report.left == () and kinds(model) == types
    assert {name: list(vars(module)) for name, module in model.named_modules()} == before
    assert b"llmkern" not in pickle.dumps(nn.ModuleList([model.encoder, *model.cells]))


def test_twice_is_once():
    model = Model()
    llmkern.convert(model)
    again = llmkern.convert(model)
    assert again.converted == () and again.left == ()
    assert str(again) == "0 converted, 0 left"
    assert llmkern.revert(nn.Linear(2, 2)).converted == ()


def test_layers_made_by_llmkern_can_be_reverted():
    layer = llmkern.nn.LSTM(3, 4, 2, bias=False, batch_first=True, bidirectional=True)
    x = torch.randn(2, 5, 3)
    expected = layer(x)[0]
    llmkern.revert(layer)
    assert type(layer) is nn.LSTM
    assert repr(layer) == repr(nn.LSTM(3, 4, 2, bias=False, batch_first=True, bidirectional=True))
    assert_close(layer(x)[0], expected)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of Dynamo, where it breaks a graph
@pytest.mark.parametrize("first", ["compiled", "converted"])
def test_compiles_in_one_graph(first):
    torch.compiler.reset()
    model = nn.Sequential(nn.Embedding(V, D), nn.LSTM(D, 8, 2)).double()
    ids, _ = batch()

    def run(f):
        output, (h, _) = f(ids)
        return output, *torch.autograd.grad(output.square().sum() + h.sum(), model.parameters())

    expected = run(model)
    if first == "compiled":
        compiled = torch.compile(model, backend="aot_eager")
        run(compiled)
        assert len(llmkern.convert(compiled).converted) == 2
    else:
        llmkern.convert(model)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for got, wanted in zip(run(compiled), expected, strict=True):
        assert_close(got, wanted)


def test_a_compiled_model_uses_the_converted_layers():
    torch.compiler.reset()
    model = nn.Sequential(nn.LSTM(3, 4))
    x = torch.randn(5, 2, 3)
    graphs = []

    def backend(graph, _):
        graphs.append(str(graph.graph))
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    compiled(x)
    llmkern.convert(model)
    compiled(x)
    assert any("llmkern.lstm" in graph for graph in graphs)


def test_packed_sequences_go_in_and_out(models):
    model, twin = models
    x = torch.randn(4, 5, D, dtype=torch.float64)
    lengths = batch()[1]
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    (theirs, (h, c)), (ours, (h_n, c_n)) = model.encoder(packed), twin.encoder(packed)
    assert type(ours) is type(theirs)
    for got, expected in ((ours.data, theirs.data), (h_n, h), (c_n, c)):
        assert_close(got, expected)
    assert all(torch.equal(a, b) for a, b in zip(ours[1:], theirs[1:], strict=True))


def test_only_torchs_layers_have_their_weights_flattened(monkeypatch):
    """As cuDNN wants them; llmkern's kernels read them where they are."""
    layer, flattened = nn.LSTM(3, 4, 2), []
    monkeypatch.setattr(nn.RNNBase, "flatten_parameters", lambda self: flattened.append(self))
    llmkern.convert(layer)
    layer.flatten_parameters()
    assert layer not in flattened
    llmkern.revert(layer)
    assert layer in flattened


def test_moving_to_another_dtype_after_the_conversion(models):
    for model in models:
        model.float()
    assert_close(loss_of(models[1]), loss_of(models[0]))


def test_nothing_is_drawn_warned_of_or_printed(capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(nn.LSTM(3, 4, dropout=0.5), nn.LSTMCell(3, 4), nn.Embedding(5, 2))
    state = torch.get_rng_state()
    llmkern.convert(model)
    llmkern.revert(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert capfd.readouterr() == ("", "")


def test_a_model_on_the_meta_device():
    model = Model()
    with torch.device("meta"):
        empty = Model()
    assert len(llmkern.convert(empty).converted) == len(CONVERTED)
    empty.load_state_dict(model.state_dict(), assign=True)
    empty.decoder.weight = empty.embedding.weight
    assert_close(loss_of(empty), loss_of(model))


def test_options_of_an_embedding_stay():
    options = {"padding_idx": -2, "max_norm": 0.7, "norm_type": 1.0, "scale_grad_by_freq": True}
    layer = nn.Embedding(5, 3, dtype=torch.float64, **options)
    twin = copy.deepcopy(layer)
    llmkern.convert(twin)
    ids = torch.tensor([[3, 1, 1], [0, 3, 1]])
    outputs = [m(ids) for m in (layer, twin)]
    assert_close(outputs[1], outputs[0])
    assert_close(twin.weight, layer.weight)
    got, expected = (
        torch.autograd.grad(o.square().sum(), m.weight)[0]
        for o, m in zip(reversed(outputs), (twin, layer), strict=True)
    )
    assert_close(got, expected)


def test_weights_may_be_computed_after_the_conversion():
    """What the reason for leaving a parametrized layer advises."""
    layer = nn.LSTM(3, 4, dtype=torch.float64)
    twin = copy.deepcopy(layer)
    llmkern.convert(twin)
    parametrizations.weight_norm(twin, "weight_hh_l0")
    x = torch.randn(1, 2, 3, dtype=torch.float64)
    assert_close(twin(x)[0], layer(x)[0])
    with torch.no_grad():
        twin.parametrizations.weight_hh_l0.original0.mul_(2)
        layer.weight_hh_l0.mul_(2)
    assert_close(twin(x, states(1))[0], layer(x, states(1))[0])
    (reason,) = llmkern.revert(twin).left
    assert "weight_hh_l0 is computed by torch.nn.utils.parametrize" in reason.reason


def states(layers):
    state = torch.ones(layers, 2, 4, dtype=torch.float64)
    return state, state


def test_only_modules_are_taken():
    for change in (llmkern.convert, llmkern.revert):
        text = f"llmkern.{change.__name__}: expected model to be a torch.nn.Module, got dict"
        with pytest.raises(TypeError, match=text):
            change({})
