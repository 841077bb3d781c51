# SPDX-License-Identifier: Apache-2.0
"""llmkern.nn.Sampler: the settings of llmkern.ops.sample, held and checked."""

import copy
import inspect
import pickle

import pytest
import torch

import llmkern

SETTINGS = {
    "temperature": 0.7,
    "top_k": 40,
    "top_p": 0.9,
    "min_p": 0.01,
    "typical_p": 0.95,
    "repetition_penalty": 1.3,
    "presence_penalty": 0.2,
    "frequency_penalty": 0.1,
}


def arguments() -> dict:
    allowed = torch.ones(100, dtype=torch.bool)
    allowed[:5] = False
    return {
        "prompt_ids": torch.randint(100, (8, 4)),
        "output_ids": torch.randint(100, (8, 6)),
        "logit_bias": {7: 2.0},
        "allowed": allowed,
        "seed": torch.arange(8),
        "position": 6,
        "num_logprobs": 3,
    }


@pytest.mark.parametrize("settings", [{}, SETTINGS, *({k: v} for k, v in SETTINGS.items())])
def test_is_the_function_with_its_settings(settings):
    logits, kwargs = torch.randn(8, 100) * 3, arguments()
    got = llmkern.nn.Sampler(**settings)(logits, **kwargs)
    for a, b in zip(got, llmkern.ops.sample(logits, **settings, **kwargs), strict=True):
        assert torch.equal(a, b)


def test_takes_a_generator():
    sampler = llmkern.nn.Sampler(top_p=0.9)
    logits = torch.randn(8, 100)
    first, second = (sampler(logits, generator=torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(first.token, second.token)


def test_settings_are_those_of_the_function():
    constructor = inspect.signature(llmkern.nn.Sampler.__init__).parameters
    function = inspect.signature(llmkern.ops.sample).parameters
    forward = inspect.signature(llmkern.nn.Sampler.forward).parameters
    assert set(constructor) | set(forward) == set(function) | {"self"}
    for name, parameter in constructor.items():
        if name != "self":
            assert parameter.default == function[name].default


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"temperature": -0.5}, ValueError, r"expected temperature in \[0, inf\), got -0.5"),
        ({"top_p": 0}, ValueError, r"expected top_p in \(0, 1\], got 0"),
        ({"top_k": 1.5}, ValueError, "expected top_k to be a whole number >= 0, got 1.5"),
        ({"min_p": "0.1"}, TypeError, "expected min_p to be a number or a Tensor .* got str"),
    ],
)
def test_settings_are_checked_at_once(settings, error, message):
    with pytest.raises(error, match=r"llmkern\.sample: " + message):
        llmkern.nn.Sampler(**settings)


def test_is_a_module_without_state():
    sampler = llmkern.nn.Sampler(**SETTINGS)
    assert list(sampler.state_dict()) == []
    assert "temperature=0.7, top_k=40, top_p=0.9" in repr(sampler)
    logits = torch.randn(8, 100)
    for again in (copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))):
        assert torch.equal(again(logits, seed=1).token, sampler(logits, seed=1).token)


def test_compiles():
    sampler = llmkern.nn.Sampler(temperature=0.8, top_k=10)
    logits, seeds = torch.randn(8, 100), torch.arange(8)
    compiled = torch.compile(sampler, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(logits, seed=seeds).token, sampler(logits, seed=seeds).token)
