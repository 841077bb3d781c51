# SPDX-License-Identifier: Apache-2.0
"""Packed sequences in and out, as torch.nn.LSTM has them."""

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

import llmkern
from tests.conftest import assert_close


def pair(**options):
    ours, theirs = llmkern.nn.LSTM(3, 19, **options), torch.nn.LSTM(3, 19, **options)
    theirs.load_state_dict(ours.state_dict())
    return ours.double(), theirs.double()


def sequences(lengths):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, 3, dtype=torch.float64, generator=generator) for n in lengths]


def results(lstm, packed, state):
    packed = packed._replace(data=packed.data.clone().requires_grad_())
    output, (h_n, c_n) = lstm(packed, state)
    loss = output.data.square().sum() + h_n.sum() + c_n.square().sum()
    wanted = [packed.data, *lstm.parameters(), *(state or [])]
    return output, [output.data, h_n, c_n, *torch.autograd.grad(loss, wanted)]


@pytest.mark.parametrize("lengths", [[7, 5, 5, 1], [2, 6, 1, 6, 3], [4], [3, 3]], ids=str)
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}]
)
def test_equals_torch(isa, lengths, with_state, options):
    ours, theirs = pair(**options)
    is_sorted = lengths == sorted(lengths, reverse=True)
    packed = pack_sequence(sequences(lengths), enforce_sorted=is_sorted)
    layers = 4 if options else 1
    state = None
    if with_state:
        state = tuple(
            torch.randn(layers, len(lengths), 19, dtype=torch.float64, requires_grad=True)
            for _ in range(2)
        )
    output, got = results(ours, packed, state)
    other, expected = results(theirs, packed, state)
    for mine, torchs in zip(got, expected, strict=True):
        assert_close(mine, torchs)
    for mine, torchs in zip(output[1:], other[1:], strict=True):
        assert (mine is None and torchs is None) or torch.equal(mine, torchs)
    assert torch.equal(pad_packed_sequence(output)[1], torch.tensor(lengths))


def test_errors():
    lstm, _ = pair()
    packed = pack_sequence(sequences([2, 1]))
    with pytest.raises(
        ValueError, match="expected no lengths, reset or return_cells beside a PackedSequence"
    ):
        lstm(packed, lengths=torch.tensor([2, 1]))
    with pytest.raises(
        ValueError, match=r"h_0 of shape \[S, B, H\] = \[1, 2, 19\], got \[1, 3, 19\]"
    ):
        lstm(packed, (torch.zeros(1, 3, 19), torch.zeros(1, 3, 19)))
    wide = packed._replace(data=torch.zeros(3, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"with I = 3, got \[2, 2, 4\]"):
        lstm(wide)
