# SPDX-License-Identifier: Apache-2.0
"""Every error of llmkern.ops.sample and of its operator, by its text."""

import math

import pytest
import torch

from llmkern.ops import filter_logits, sample
from tests.ops.sampling_cases import operator_arguments

INF = math.inf
L = torch.zeros(2, 5)
IDS = torch.zeros(2, 3, dtype=torch.int64)
BAD_CALLS = [
    ({"logits": [0.0]}, TypeError, "expected logits to be a Tensor, got list"),
    (
        {"logits": L.long()},
        TypeError,
        "expected logits of dtype float32 or float64 or .* got int64",
    ),
    (
        {"logits": L[None]},
        ValueError,
        r"expected logits of shape \[B, V\] or \[V\], got \[1, 2, 5\]",
    ),
    (
        {"logits": L[:, :0]},
        ValueError,
        r"expected logits of 1 to 8388607 tokens, got shape \[2, 0\]",
    ),
    ({"temperature": -1}, ValueError, r"expected temperature in \[0, inf\), got -1"),
    ({"temperature": INF}, ValueError, r"expected temperature in \[0, inf\), got inf"),
    ({"temperature": "1"}, TypeError, "expected temperature to be a number or a Tensor .* got str"),
    (
        {"temperature": [1]},
        TypeError,
        "expected temperature to be a number or a Tensor .* got list",
    ),
    ({"temperature": True}, TypeError, "expected temperature to be a number .* got bool"),
    ({"top_k": -1}, ValueError, "expected top_k to be a whole number >= 0, got -1"),
    ({"top_k": 2.5}, ValueError, "expected top_k to be a whole number >= 0, got 2.5"),
    ({"top_p": 0.0}, ValueError, r"expected top_p in \(0, 1\], got 0.0"),
    ({"top_p": math.nan}, ValueError, r"expected top_p in \(0, 1\], got nan"),
    ({"min_p": 1.5}, ValueError, r"expected min_p in \[0, 1\], got 1.5"),
    ({"typical_p": 2}, ValueError, r"expected typical_p in \(0, 1\], got 2"),
    ({"repetition_penalty": 0}, ValueError, r"expected repetition_penalty in \(0, 3.4e38\], got 0"),
    ({"presence_penalty": INF}, ValueError, r"expected presence_penalty in .*, got inf"),
    ({"frequency_penalty": -1e39}, ValueError, r"expected frequency_penalty in .*, got -1e\+39"),
    (
        {"top_p": torch.tensor([0.5, 1.5])},
        ValueError,
        r"expected top_p in \(0, 1\], got 1.5 in row 1",
    ),
    (
        {"temperature": torch.tensor([1.0, math.nan])},
        ValueError,
        r"expected temperature in \[0, inf\), got nan in row 1",
    ),
    (
        {"top_k": torch.tensor([-3, 0])},
        ValueError,
        "expected top_k to be a whole number >= 0, got -3 in row 0",
    ),
    (
        {"min_p": torch.zeros(3)},
        ValueError,
        r"expected min_p of shape \[B\] = \[2\], got \[3\]",
    ),
    ({"min_p": torch.zeros(2, device="meta")}, ValueError, "logits on cpu and min_p on meta"),
    ({"num_logprobs": 6}, ValueError, r"expected num_logprobs in \[0, V = 5\], got 6"),
    ({"num_logprobs": -1}, ValueError, r"expected num_logprobs in \[0, V = 5\], got -1"),
    ({"seed": 1.0}, TypeError, "expected seed to be an int or an int64 Tensor .* got float"),
    ({"seed": 2**63}, ValueError, r"expected seed in \[-2\^63, 2\^63\), got 9223372036854775808"),
    ({"seed": torch.zeros(2)}, TypeError, "expected seed of dtype int32 or int64, got float32"),
    (
        {"seed": IDS[:, :1]},
        ValueError,
        r"expected seed of shape \[B\] = \[2\], got \[2, 1\]",
    ),
    ({"seed": 1, "generator": torch.Generator()}, ValueError, "a seed or a generator, got both"),
    ({"position": "1"}, TypeError, "expected position to be an int or an int64 Tensor"),
    ({"position": 3}, ValueError, r"expected seed to be a Tensor \[B\] .* got one seed for B = 2"),
    (
        {"position": torch.zeros(1, dtype=torch.int64)},
        ValueError,
        r"expected position of shape \[B\] = \[2\], got \[1\]",
    ),
    ({"logit_bias": 1.0}, TypeError, "expected logit_bias to be a Tensor, got float"),
    ({"logit_bias": [{}]}, ValueError, "logit_bias with a mapping for each of B = 2 rows, got 1"),
    ({"logit_bias": [{}, {-1: 2.0}]}, IndexError, r"ids in logit_bias in \[0, V\) = .* got -1"),
    ({"logit_bias": L.long()}, TypeError, "expected logit_bias of dtype float32 .* got int64"),
    (
        {"logit_bias": L[:, :4]},
        ValueError,
        r"expected logit_bias of shape \[V\] = \[5\] or \[B, V\] = \[2, 5\], got \[2, 4\]",
    ),
    ({"logit_bias": {5: 1.0}}, IndexError, r"ids in logit_bias in \[0, V\) = \[0, 5\), got 5"),
    ({"allowed": L}, TypeError, "expected allowed of dtype bool or int32, got float32"),
    ({"allowed": L[0, :2] > 0}, ValueError, r"expected allowed of shape .* got \[2\]"),
    (
        {"allowed": torch.zeros(2, 2, dtype=torch.int32)},
        ValueError,
        r"expected allowed of shape \[ceil\(V / 32\)\] = \[1\] or .* = \[2, 1\], got \[2, 2\]",
    ),
    ({"prompt_ids": L}, TypeError, "expected prompt_ids of dtype int32 or int64, got float32"),
    (
        {"output_ids": IDS[:1]},
        ValueError,
        r"expected output_ids of shape \[B, L\] = \[2, L\], got \[1, 3\]",
    ),
    ({"output_ids": IDS[0]}, ValueError, r"expected output_ids of shape .* got \[3\]"),
]


@pytest.mark.parametrize(("kwargs", "error", "message"), BAD_CALLS)
def test_bad_input(kwargs, error, message):
    with pytest.raises(error, match=r"llmkern\.sample: .*" + message):
        sample(**{"logits": L} | kwargs)
    if not {"seed", "position", "generator", "num_logprobs"} & set(kwargs):
        with pytest.raises(error, match=r"llmkern\.sample: .*" + message):
            filter_logits(**{"logits": L} | kwargs)


BAD_OPERANDS = [
    ({"logits": L.double()}, "logits of dtype float32, bfloat16 or float16, got Double"),
    ({"logits": L[0]}, "logits of 2 dimensions"),
    ({"logits": L[:, :0]}, "logits of 1 to 8388607 tokens"),
    ({"bias": torch.zeros(4)}, r"logit_bias of shape \[5\], got \[4\]"),
    ({"bias": torch.zeros(1, 5)}, r"logit_bias of shape \[2, 5\], got \[1, 5\]"),
    ({"bias": torch.zeros(5).double()}, "logit_bias of dtype Float"),
    ({"allowed": torch.zeros(5)}, "allowed of dtype Bool"),
    ({"allowed": torch.zeros(5).int()}, r"allowed of shape \[1\], got \[5\]"),
    ({"bias_ids": IDS}, "ids and the values of a sparse bias, got one of them"),
    ({"bias_values": L}, "ids and the values of a sparse bias, got one of them"),
    ({"bias_ids": IDS, "bias_values": L}, r"bias_values of shape \[2, 3\], got \[2, 5\]"),
    ({"bias_ids": IDS.int(), "bias_values": L[:, :3]}, "bias_ids of dtype Long"),
    ({"bias_ids": IDS, "bias_values": L[:, :3].double()}, "bias_values of dtype Float"),
    (
        {"bias_ids": torch.zeros(3, 1, dtype=torch.int64), "bias_values": torch.zeros(3, 1)},
        "bias_ids with 1 or B = 2 rows",
    ),
    ({"prompt_ids": torch.zeros(3, 1, dtype=torch.int64)}, r"prompt_ids of shape \[2, 1\]"),
    ({"output_ids": torch.zeros(2, dtype=torch.int64)}, "output_ids of 2 dimensions"),
    ({"output_ids": torch.zeros(2, 1)}, "output_ids of dtype Long"),
    ({"settings": torch.ones(1, 8)}, "settings of dtype Double"),
    ({"settings": torch.ones(1, 7).double()}, r"settings of shape \[1, 8\], got \[1, 7\]"),
    ({"settings": torch.ones(3, 8).double()}, "settings with 1 or B = 2 rows"),
    ({"settings": torch.zeros(1, 8).double()}, r"top_p in \(0, 1\], got 0 in row 0"),
    ({"seeds": torch.tensor([1, 2, 3])}, "seeds with 1 or B = 2 rows"),
    ({"seeds": torch.tensor(1)}, "seeds of 1 dimensions"),
    ({"seeds": torch.tensor([1.0])}, "seeds of dtype Long"),
    ({"positions": torch.tensor([1, 2, 3])}, "positions with 1 or B = 2 rows"),
    ({"positions": torch.tensor([1.0, 2.0])}, "positions of dtype Long"),
    ({"num_logprobs": 6}, r"num_logprobs in \[0, V = 5\], got 6"),
    ({"num_logprobs": -1}, r"num_logprobs in \[0, V = 5\], got -1"),
]


@pytest.mark.parametrize(("operands", "message"), BAD_OPERANDS)
def test_the_binding_checks_too(operands, message):
    """A caller who goes round Python's checks gets an error, not a wild read."""
    with pytest.raises(ValueError, match=r"llmkern\.sample: expected .*" + message):
        torch.ops.llmkern.sample.default(*(operator_arguments() | operands).values())
