# SPDX-License-Identifier: Apache-2.0
"""llmkern.nn.Embedding against torch.nn.Embedding."""

import copy
import pickle

import pytest
import torch
from torch import nn

import llmkern
from tests.conftest import assert_close

OPTIONS = [
    {},
    {"padding_idx": 2},
    {"padding_idx": -1, "scale_grad_by_freq": True},
    {"max_norm": 0.5},
    {"max_norm": 0.7, "norm_type": 1.0},
    {"sparse": True},
]


def twins(**options):
    theirs = nn.Embedding(11, 6, dtype=torch.float64, **options)
    ours = llmkern.nn.Embedding(11, 6, dtype=torch.float64, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_outputs_and_gradients_are_torchs(options):
    ours, theirs = twins(**options)
    ids = torch.tensor([[1, 2, 2], [10, 0, 2]])
    a, b = ours(ids), theirs(ids)
    assert_close(a, b)
    upstream = torch.randn_like(a)
    a.backward(upstream)
    b.backward(upstream)
    assert_close(ours.weight, theirs.weight)  # max_norm changes it
    assert ours.weight.grad.is_sparse == theirs.weight.grad.is_sparse
    assert_close(ours.weight.grad.to_dense(), theirs.weight.grad.to_dense())


def test_is_a_drop_in():
    ours, theirs = twins(padding_idx=3)
    assert isinstance(ours, nn.Embedding)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert repr(ours) == repr(theirs)
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(again(torch.tensor([3, 4])), ours(torch.tensor([3, 4])))
    frozen = llmkern.nn.Embedding.from_pretrained(torch.eye(3))
    assert type(frozen) is llmkern.nn.Embedding
    assert frozen(torch.tensor([2])).tolist() == [[0, 0, 1]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS[:4], ids=str)
def test_follows_its_dtype(options, dtype):
    """A layer that becomes narrower goes on, as torch's does."""
    ours, theirs = (layer.to(dtype) for layer in twins(**options))
    ids = torch.tensor([[1, 2, 2], [10, 0, 2]])
    a, b = ours(ids), theirs(ids)
    assert a.dtype == dtype
    assert torch.equal(a, b)
    upstream = torch.randn_like(a)
    a.backward(upstream)
    b.backward(upstream)
    assert ours.weight.grad.dtype == dtype
    assert_close(ours.weight.grad, theirs.weight.grad)
