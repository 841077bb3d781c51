# SPDX-License-Identifier: Apache-2.0
"""A user's own module in the trainer: what it carries, what it leaves, and what is refused before it trains."""

import dataclasses
import types
from collections import OrderedDict
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from llmkern.models import LanguageModel
from llmkern.training import Trainer, TrainingArguments, load_checkpoint
from tests.models import toys

TOKENIZER = toys.tokenizer()
IDS = toys.token_ids(TOKENIZER)


class Pair(NamedTuple):
    count: torch.Tensor
    steps: int


class Counting(nn.Module):
    """Its loss depends on how often it has been called with its own state; ``wrap`` gives the state its form."""

    def __init__(self, wrap=None, unwrap=None):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(TOKENIZER.vocab_size))
        self.wrap = wrap or (lambda count: (count,))
        self.unwrap = unwrap or (lambda state: state[0])
        self.kinds = set()

    def loss(self, ids, targets, state):
        self.kinds.add(type(state))
        count = torch.zeros(()) if state is None else self.unwrap(state)
        logits = self.bias.expand(*ids.shape, -1).reshape(-1, TOKENIZER.vocab_size)
        loss = F.cross_entropy(logits * (1 + 0.1 * count), targets.reshape(-1))
        return loss, self.wrap(count + 1 + 0 * self.bias.sum())


FORMS = {
    "tensor": (lambda c: c, lambda s: s),
    "list": (lambda c: [c, None], lambda s: s[0]),
    "dict": (lambda c: {"count": c, 3: "x"}, lambda s: s["count"]),
    "ordered dict": (lambda c: OrderedDict(count=c), lambda s: s["count"]),
    "named tuple": (lambda c: Pair(c, 1), lambda s: s.count),
    "nested": (lambda c: ({"a": [Pair(c, 2)]}, 1.5), lambda s: s[0]["a"][0].count),
}


def own_trainer(model, folder=None, **settings):
    defaults = {"batch_size": 8, "bptt": 12, "epochs": 2, "tensorboard": False}
    return Trainer(
        model,
        TrainingArguments(**(defaults | settings)),
        IDS[:800],
        IDS[800:],
        output_dir=folder,
        show_progress=False,
    )


@pytest.mark.parametrize("form", FORMS)
def test_states_of_every_form_are_carried_and_saved(tmp_path, form):
    """A stop in mid-epoch, after which the state comes from the checkpoint, changes no bit."""
    whole, parts = Counting(*FORMS[form]), Counting(*FORMS[form])
    own_trainer(whole, tmp_path / "whole").train()
    assert whole.kinds == {type(None), type(FORMS[form][0](torch.zeros(())))}
    own_trainer(parts, tmp_path / "parts", max_steps=4).train()
    resumed = Counting(*FORMS[form])
    own_trainer(resumed, tmp_path / "parts", max_steps=None).train(resume=True)
    assert torch.equal(resumed.bias, whole.bias)
    reference = Counting()
    own_trainer(reference).train()
    assert torch.equal(reference.bias, whole.bias)


def test_a_named_tuple_that_this_program_does_not_have(tmp_path, monkeypatch):
    own_trainer(Counting(*FORMS["named tuple"]), tmp_path, max_steps=4).train()
    monkeypatch.delattr(f"{__name__}.Pair")
    with pytest.raises(ValueError, match=r"-0000000004\.pt cannot be used.*named tuple .*:Pair"):
        own_trainer(Counting(*FORMS["named tuple"]), tmp_path).train(resume=True)


def local_pair():
    class Local(NamedTuple):
        count: torch.Tensor

    return Local


@pytest.mark.parametrize(
    ("wrap", "name"),
    [
        (lambda c: types.SimpleNamespace(count=c), r"types\.SimpleNamespace"),
        (lambda c: (local_pair()(c),), r"Local"),
        (lambda c: {(1, 2): c}, r"builtins\.dict"),
        (lambda c: {c}, r"builtins\.set"),
    ],
)
def test_a_state_that_cannot_be_saved_is_refused_in_the_first_step(tmp_path, wrap, name):
    with pytest.raises(TypeError, match=f"expected the state that loss returns .* got a .*{name}"):
        own_trainer(Counting(wrap), tmp_path).train()


@dataclasses.dataclass
class Config:
    width: int = 3


@pytest.mark.parametrize("config", [Config(), types.SimpleNamespace(width=3), {"width": Config()}])
def test_a_config_of_any_kind_does_no_harm(tmp_path, config):
    model = Counting()
    model.config = config
    own_trainer(model, tmp_path, max_steps=4).train()
    assert load_checkpoint(tmp_path)["model_config"] is None
    resumed, whole = Counting(), Counting()
    own_trainer(resumed, tmp_path).train(resume=True)
    own_trainer(whole).train()
    assert torch.equal(resumed.bias, whole.bias)


class WithExtraState(Counting):
    def __init__(self, extra):
        super().__init__()
        self.extra = extra

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


def test_extra_state_that_can_be_read_again_is_kept(tmp_path):
    own_trainer(WithExtraState({"seen": [1, 2.5, "x"]}), tmp_path, max_steps=4).train()
    model = WithExtraState({"seen": [0, 0.0, ""]})
    own_trainer(model, tmp_path, max_steps=4).train(resume=True)
    assert model.extra == {"seen": [1, 2.5, "x"]}


def test_extra_state_may_have_grown_since_the_model_was_made(tmp_path):
    own_trainer(WithExtraState([1, {"a": torch.ones(2)}]), tmp_path, max_steps=4).train()
    for fresh in ([], None, {"x": 1}):
        model = WithExtraState(fresh)
        own_trainer(model, tmp_path, max_steps=4).train(resume=True)
        assert model.extra[0] == 1


@pytest.mark.parametrize(
    "extra",
    [Config(), types.SimpleNamespace(), {"a": [lambda: 1]}],
    ids=["dataclass", "namespace", "function"],
)
def test_extra_state_that_cannot_be_read_again_is_refused_before_the_first_step(tmp_path, extra):
    model = WithExtraState(extra)
    with pytest.raises(TypeError, match=r"which can be read again, got model\._extra_state.*, a "):
        own_trainer(model, tmp_path).train()
    assert not model.kinds  # not one step
    assert not list(tmp_path.iterdir())
    own_trainer(model).train()  # nothing is saved: nothing to refuse


def test_the_best_state_of_an_own_module_is_kept(tmp_path):
    """A learning rate that ruins it after the first epoch."""
    own_trainer(Counting(), tmp_path / "one", epochs=1, learning_rate=0.1).train()
    ruined = own_trainer(Counting(), tmp_path / "two", epochs=2, learning_rate=0.1)
    step = ruined.stepper.step

    def ruining(inputs, targets, number):
        if number > ruined.steps_per_epoch:
            ruined.stepper.optimizer.param_groups[0]["lr"] = 50.0
        return step(inputs, targets, number)

    ruined.stepper.step = ruining
    result = ruined.train()
    assert result.history[1]["valid_loss"] > result.history[0]["valid_loss"]
    best = torch.load(tmp_path / "two" / "best.pt", weights_only=True)
    first = torch.load(tmp_path / "one" / "best.pt", weights_only=True)
    assert torch.equal(best["bias"], first["bias"])
    assert not torch.equal(best["bias"], ruined.model.bias)
    Counting().load_state_dict(best)


def test_a_compiled_model_leaves_its_model(tmp_path):
    plain = toys.model(TOKENIZER.vocab_size)
    compiled = torch.compile(toys.model(TOKENIZER.vocab_size), backend="eager")
    own_trainer(plain, tmp_path / "plain").train()
    own_trainer(compiled, tmp_path / "compiled", max_steps=12).train()
    names = [sorted(p.name for p in (tmp_path / run).iterdir()) for run in ("plain", "compiled")]
    assert "model.safetensors" in names[1]
    # Not compiled any more, it goes on with the same run.
    own_trainer(toys.model(TOKENIZER.vocab_size), tmp_path / "compiled").train(resume=True)
    toys.assert_same_parameters(
        *(LanguageModel.from_pretrained(tmp_path / run) for run in ("plain", "compiled"))
    )
    assert load_checkpoint(tmp_path / "compiled")["model_class"] == "LanguageModel"


def test_a_module_without_a_loss_is_refused_by_name(tmp_path):
    with pytest.raises(
        TypeError, match=r"a method loss\(ids, targets, state\).*got a Linear without"
    ):
        own_trainer(nn.Linear(3, 3), tmp_path / "run")
    assert not (tmp_path / "run").exists()

    class Bare(nn.Module):
        def loss(self, ids, targets, state):
            return 0, None

    with pytest.raises(ValueError, match="a model with parameters, got a Bare without any"):
        own_trainer(Bare())
