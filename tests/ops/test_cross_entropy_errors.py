# SPDX-License-Identifier: Apache-2.0
"""Linear cross entropy: every wrong argument has its error, in Python and at the binding."""

import math

import pytest
import torch

import llmkern

GOOD = {"input": torch.zeros(2, 3, 4), "linear_weight": torch.zeros(5, 4)}
GOOD |= {"target": torch.zeros(2, 3, dtype=torch.int64)}
BAD_TARGET = torch.tensor([[0, 4, -100], [1, 5, 0]])
BAD_CALLS = [
    ({"input": [1.0]}, TypeError, "expected input to be a Tensor, got list"),
    ({"target": 3}, TypeError, "expected target to be a Tensor, got int"),
    ({"weight": [1.0]}, TypeError, "expected weight to be a Tensor, got list"),
    ({"input": GOOD["input"].int()}, TypeError, "dtype float32 or .* or float16, got int32"),
    (
        {"linear_weight": torch.zeros(5, 4).double()},
        TypeError,
        "input's dtype float32, got float64",
    ),
    ({"target": GOOD["target"].float()}, ValueError, r"\[..., V\] = \[2, 3, 5\], got \[2, 3\]"),
    (
        {"target": torch.zeros(2, 3, 5), "ignore_index": -100},
        ValueError,
        "no ignore_index for probabilities, got -100",
    ),
    ({"target": GOOD["target"].int()}, TypeError, "target of dtype int64, got int32"),
    ({"linear_weight": torch.zeros(5, 4).to("meta")}, ValueError, "linear_weight on meta"),
    ({"target": GOOD["target"].to("meta")}, ValueError, "input on cpu and target on meta"),
    ({"linear_weight": torch.zeros(5)}, ValueError, r"of shape \[V, D\], got \[5\]"),
    ({"linear_weight": torch.zeros(5, 3)}, ValueError, r"= \[..., 3\], got \[2, 3, 4\]"),
    ({"linear_weight": torch.zeros(0, 4)}, ValueError, r"at least one class, got .*\[0, 4\]"),
    ({"input": torch.tensor(1.0)}, ValueError, r"\[..., D\] = \[..., 4\], got \[\]"),
    ({"target": torch.zeros(6).long()}, ValueError, r"target of shape .*\[2, 3\], got \[6\]"),
    ({"linear_bias": torch.zeros(4)}, ValueError, r"linear_bias of shape \[V\] = \[5\], got \[4\]"),
    ({"weight": torch.zeros(5, 1)}, ValueError, r"weight of shape \[V\] = \[5\], got \[5, 1\]"),
    ({"reduction": "avg"}, ValueError, "reduction to be none, mean or sum, got 'avg'"),
    ({"label_smoothing": -0.1}, ValueError, r"label_smoothing in \[0, 1\], got -0.1"),
    ({"label_smoothing": 1.5}, ValueError, r"label_smoothing in \[0, 1\], got 1.5"),
    ({"label_smoothing": math.nan}, ValueError, r"label_smoothing in \[0, 1\], got nan"),
    (
        {"target": BAD_TARGET},
        IndexError,
        r"in \[0, 5\) or -100, got 5 at position 4 of the flattened targets",
    ),
    ({"target": BAD_TARGET, "ignore_index": 5}, IndexError, r"got -100 at position 2"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_CALLS)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=r"llmkern\.linear_cross_entropy: .*" + message):
        llmkern.ops.linear_cross_entropy(**(GOOD | change))


BINDING = {"input": torch.zeros(6, 4), "weight": torch.zeros(5, 4), "bias": torch.zeros(5)}
BINDING |= {"target": torch.zeros(6, dtype=torch.int64), "class_weight": torch.zeros(5)}
BINDING |= {"reduction": 1, "ignore_index": -100, "label_smoothing": 0.0}
BAD_BINDING_CALLS = [
    ({"input": torch.zeros(6)}, ValueError, r"input of 2 dimensions, got shape \[6\]"),
    ({"weight": torch.zeros(5)}, ValueError, r"weight of 2 dimensions, got shape \[5\]"),
    ({"weight": torch.zeros(0, 4)}, ValueError, r"at least one class, .* shape \[0, 4\]"),
    ({"weight": torch.zeros(5, 3)}, ValueError, r"weight of shape \[5, 4\], got \[5, 3\]"),
    ({"weight": torch.zeros(5, 4).double()}, ValueError, "weight of dtype Float, got Double"),
    ({"bias": torch.zeros(4)}, ValueError, r"bias .* of shape \[5\], got \[4\]"),
    ({"class_weight": torch.zeros(5).double()}, ValueError, "class weights of dtype Float"),
    ({"target": torch.zeros(5).long()}, ValueError, r"target of shape \[6\], got \[5\]"),
    ({"target": torch.zeros(6).int()}, ValueError, "target of dtype Long or Float, got Int"),
    ({"target": torch.zeros(6, 5).half()}, ValueError, "dtype Long or Float, got Half"),
    ({"target": torch.zeros(6)}, ValueError, r"target of shape \[6, 5\], got \[6\]"),
    ({"input": torch.zeros(6, 4).int()}, ValueError, "weight of dtype Int, got Float"),
    ({"target": torch.full((6,), 5)}, IndexError, r"\[0, 5\) or -100, got 5 at position 0"),
    ({"target": torch.tensor([0, 0, -1, 0, 0, 0])}, IndexError, "got -1 at position 2"),
    ({"reduction": 3}, ValueError, "reduction 0, 1 or 2, got 3"),
    ({"label_smoothing": -0.5}, ValueError, r"label_smoothing in \[0, 1\], got -0.5"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_BINDING_CALLS)
def test_the_binding_checks_too(change, error, message):
    """A caller who goes round Python's checks gets an error, not a wild read."""
    with pytest.raises(error, match=r"llmkern\.linear_cross_entropy: expected .*" + message):
        torch.ops.llmkern.linear_cross_entropy.default(*(BINDING | change).values())


SAVED = {"grad_loss": torch.zeros(())} | dict(list(BINDING.items())[:5])
SAVED |= {"lse": torch.zeros(6).double(), "total_weight": torch.zeros(())}
SAVED |= dict(list(BINDING.items())[5:])
SAVED |= {f"needs_{name}": False for name in ("input", "weight", "bias", "target")}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"grad_loss": torch.zeros(6)}, ValueError, r"gradient of 1 elements, got shape \[6\]"),
        ({"reduction": 0}, ValueError, r"gradient of 6 elements, got shape \[\]"),
        ({"grad_loss": torch.zeros(()).double()}, ValueError, "every tensor of dtype Float"),
        ({"lse": torch.zeros(5).double()}, ValueError, r"lse of shape \[6\], got \[5\]"),
        ({"lse": torch.zeros(6)}, ValueError, "lse of dtype Double, got Float"),
        ({"total_weight": torch.zeros(1)}, ValueError, r"total_weight of shape \[\], got \[1\]"),
        ({"target": torch.full((6,), 9)}, IndexError, "got 9 at position 0"),
        ({"needs_target": True}, ValueError, "gradient of probabilities alone, got classes"),
    ],
)
def test_the_backward_binding_checks_too(change, error, message):
    with pytest.raises(error, match=r"llmkern\.linear_cross_entropy: expected .*" + message):
        torch.ops.llmkern.linear_cross_entropy_backward.default(*(SAVED | change).values())
