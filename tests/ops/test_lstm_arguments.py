# SPDX-License-Identifier: Apache-2.0
"""Arguments that Python addresses by name are those of the schemas in csrc/ops, in their order, with their defaults."""

import inspect

import pytest
import torch

import llmkern.onnx
from llmkern.ops.lstm import arguments
from llmkern.ops.lstm.arguments import (
    LAYER,
    MASKS,
    OPTIONS,
    SAVED,
    UPSTREAM,
    Backward,
    BackwardResults,
    Forward,
    ForwardResults,
)

SCHEMAS = {
    "lstm": (Forward, ForwardResults),
    "lstm_backward": (Backward, BackwardResults),
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_names_follow_the_schema(name):
    schema = getattr(torch.ops.llmkern, name).default._schema
    call, results = SCHEMAS[name]
    assert call._fields == tuple(a.name for a in schema.arguments)
    assert results._fields == tuple(r.name for r in schema.returns)
    defaults = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    assert call._field_defaults == defaults


def test_groups_of_names():
    """Tensors in front, in the order of both schemas; what a backward pass is given has the results' names."""
    tensors = (*LAYER, *MASKS)
    assert Forward._fields[: len(tensors)] == tensors
    assert Backward._fields[: len(tensors) + 9] == (*UPSTREAM, *tensors, *SAVED)
    assert set(OPTIONS) < set(Forward._fields) & set(Backward._fields)
    assert set(arguments.PARAMETERS) < set(LAYER)
    assert tuple(n.removeprefix("grad_") for n in UPSTREAM) == ForwardResults._fields[:4]


def test_the_translation_to_onnx_takes_the_same_arguments():
    parameters = inspect.signature(llmkern.onnx._lstm).parameters
    assert tuple(parameters) == Forward._fields
    defaults = {n: p.default for n, p in parameters.items() if p.default is not p.empty}
    assert defaults == Forward._field_defaults
