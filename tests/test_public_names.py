# SPDX-License-Identifier: Apache-2.0
"""What `import llmkern` gives and does not load; numbers of numpy where Python's are taken."""

import subprocess
import sys

import numpy as np
import pytest
import torch

import llmkern
from llmkern.generation import GenerationConfig

LAZY = ["benchmark", "generation", "models", "onnx", "text", "training", "transformers"]


@pytest.mark.parametrize("name", LAZY)
def test_subpackages_come_when_they_are_asked_for(name):
    """In a process of its own: one import alone, and nothing of it loaded before."""
    program = f"""
import sys, llmkern
assert {name!r} in dir(llmkern)
assert "llmkern.{name}" not in sys.modules
assert llmkern.{name} is sys.modules["llmkern.{name}"]
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=600)


def test_there_is_nothing_else():
    with pytest.raises(AttributeError, match="module 'llmkern' has no attribute 'trainig'"):
        llmkern.trainig  # noqa: B018
    assert {*llmkern.__all__, *LAZY} == {*dir(llmkern)}


NUMBERS = [np.int64(3), np.int32(3), np.uint8(3), np.array(3), torch.tensor(3)]
ids = [f"{type(n).__name__}-{n.dtype}" for n in NUMBERS]


@pytest.mark.parametrize("three", [*NUMBERS, torch.tensor(3, dtype=torch.int32)], ids=str)
def test_seeds_and_positions(three):
    logits, x = torch.randn(4, 50), torch.ones(5, 6)
    seeds, targets = torch.arange(4), torch.randn(4, 3, 50)
    drafts = torch.zeros(4, 2, dtype=torch.int64)
    calls = [
        lambda n: llmkern.ops.dropout(x, 0.5, seed=n),
        lambda n: llmkern.ops.sample(logits, seed=n).token,
        lambda n: llmkern.ops.sample(logits, seed=seeds, position=n).token,
        lambda n: llmkern.ops.multinomial(logits.exp(), 2, seed=n),
        lambda n: llmkern.ops.speculative_verify(drafts, None, targets, seed=seeds, position=n)[0],
        lambda n: llmkern.nn.Sampler()(logits, seed=n).token,
    ]
    for call in calls:
        assert torch.equal(call(three), call(3))


@pytest.mark.parametrize("three", NUMBERS, ids=ids)
def test_counts_and_settings(three):
    logits = torch.randn(4, 50)
    for number in (three, np.float32(0.5), np.array(0.5)):
        name = "top_k" if number is three else "temperature"
        plain = {name: number.item()}
        sampler = llmkern.nn.Sampler(**{name: number})
        assert type(getattr(sampler, name)) is type(number.item())
        expected = llmkern.ops.sample(logits, seed=1, **plain)
        assert torch.equal(sampler(logits, seed=1).token, expected.token)
        assert torch.equal(
            llmkern.ops.sample(logits, seed=1, **{name: number}).token, expected.token
        )
    assert llmkern.ops.sample(logits, seed=1, num_logprobs=three).top_ids.shape == (4, 3)
    assert llmkern.ops.multinomial(logits.exp(), three, seed=1).shape == (4, 3)


@pytest.mark.parametrize("three", NUMBERS, ids=ids)
def test_settings_of_generation(three):
    config = GenerationConfig(
        max_new_tokens=three,
        top_k=three,
        num_return_sequences=three,
        seed=three,
        eos_token_id=three,
    )
    assert config == GenerationConfig(
        max_new_tokens=3, top_k=3, num_return_sequences=3, seed=3, eos_token_id=3
    )
    assert type(config.max_new_tokens) is int and config.end_tokens == (3,)
    model = llmkern.models.LanguageModel(vocab_size=20, embedding_dim=4, hidden_size=4)
    prompt = torch.tensor([1, 2])
    got = model.generate(prompt, max_new_tokens=three, seed=three)
    assert torch.equal(got, model.generate(prompt, max_new_tokens=3, seed=3))
    many = model.generate(prompt[None].expand(2, 2), max_new_tokens=3, seed=np.array([3, 4]))
    assert torch.equal(many[:1, :2], got.reshape(1, -1)[:, :2])


@pytest.mark.parametrize(
    "wrong", [True, np.True_, 1.0, np.float64(1), "1", np.array([1, 2])], ids=repr
)
def test_what_is_no_integer_is_no_seed(wrong):
    with pytest.raises(TypeError, match=r"llmkern\.dropout: expected seed to be an int or"):
        llmkern.ops.dropout(torch.ones(3), 0.5, seed=wrong)
    with pytest.raises(
        ValueError, match=r"llmkern\.generate: expected max_new_tokens to be an int"
    ):
        GenerationConfig(max_new_tokens=wrong)
