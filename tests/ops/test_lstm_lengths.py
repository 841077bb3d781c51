# SPDX-License-Identifier: Apache-2.0
"""Rows of different lengths: as if each had been run alone, and as torch does it with packed sequences."""

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import llmkern
from tests.conftest import assert_close

LENGTHS = torch.tensor([3, 7, 1, 0, 5, 7, 2])
T, B, I, H = 7, 7, 3, 19  # noqa: E741


def layer(dtype=torch.float64):
    shapes = [(T, B, I), (B, H), (B, H), (4 * H, I), (4 * H, H), (4 * H,), (4 * H,)]
    return [(torch.randn(s, dtype=torch.float64) / 2).to(dtype) for s in shapes]


def row_by_row(input, h_0, c_0, *weights, reverse):
    """Every row alone over its own steps."""
    output, h_n, c_n = input.new_zeros(T, B, H), h_0.clone(), c_0.clone()
    for b, length in enumerate(LENGTHS.tolist()):
        if length:
            rows = input[:length, b : b + 1], h_0[b : b + 1], c_0[b : b + 1]
            output[:length, b : b + 1], h_n[b : b + 1], c_n[b : b + 1] = llmkern.ops.lstm(
                *rows, *weights, reverse=reverse
            )
    return output, h_n, c_n


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_as_if_every_row_were_alone(isa, reverse, dtype):
    """Outputs to the bit; gradients of weights are sums over rows, taken in another order."""
    upstream = [torch.randn(T, B, H, dtype=dtype), *torch.randn(2, B, H, dtype=dtype)]
    results = []
    for run in (
        row_by_row,
        lambda *a, reverse: llmkern.ops.lstm(*a, reverse=reverse, lengths=LENGTHS),
    ):
        torch.manual_seed(1)
        arguments = [t.requires_grad_() for t in layer(dtype)]
        outputs = run(*arguments, reverse=reverse)
        results.append((outputs, torch.autograd.grad(outputs, arguments, upstream)))
    (expected, expected_grads), (got, grads) = results
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(grads[:3], expected_grads[:3], strict=True))
    for ours, other in zip(grads[3:], expected_grads[3:], strict=True):
        assert_close(ours, other)


@pytest.mark.parametrize("reverse", [False, True])
def test_gradients(reverse):
    arguments = [t[..., :2] if t.dim() == 3 else t for t in layer()]
    arguments[3] = arguments[3][:, :2]
    arguments = [t.contiguous().requires_grad_() for t in arguments]
    assert torch.autograd.gradcheck(
        lambda *a: llmkern.ops.lstm(*a, reverse=reverse, lengths=LENGTHS), arguments, fast_mode=True
    )


@pytest.mark.parametrize("batch_first", [False, True])
def test_module_equals_torch_with_packed_sequences(batch_first):
    options = {"num_layers": 2, "bidirectional": True, "batch_first": batch_first}
    ours, theirs = llmkern.nn.LSTM(I, H, **options), torch.nn.LSTM(I, H, **options)
    theirs.load_state_dict(ours.state_dict())
    lengths = LENGTHS.clamp(min=1)  # torch has no empty rows
    x = torch.randn(B, T, I) if batch_first else torch.randn(T, B, I)
    packed = pack_padded_sequence(x, lengths, batch_first=batch_first, enforce_sorted=False)
    expected, expected_state = theirs(packed)
    expected, _ = pad_packed_sequence(expected, batch_first=batch_first, total_length=T)
    output, state = ours(x, lengths=lengths)
    for got, truth in zip([output, *state], [expected, *expected_state], strict=True):
        assert_close(got, truth)


def test_lengths_of_another_integer_type():
    arguments = layer()
    got = llmkern.ops.lstm(*arguments, lengths=LENGTHS.int())
    assert torch.equal(got[0], llmkern.ops.lstm(*arguments, lengths=LENGTHS)[0])


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        (LENGTHS + 1, ValueError, r"expected lengths in \[0, T\] = \[0, 7\], got 8 in row 1"),
        (-LENGTHS, ValueError, r"expected lengths in \[0, T\] = \[0, 7\], got -3 in row 0"),
        (LENGTHS[:3], ValueError, r"expected lengths of shape \[B\] = \[7\], got \[3\]"),
        (LENGTHS.float(), TypeError, "expected lengths of dtype int32 or int64, got float32"),
        ([1] * B, TypeError, "expected lengths to be a Tensor, got list"),
    ],
)
def test_bad_lengths(lengths, error, message):
    with pytest.raises(error, match=rf"llmkern\.lstm: {message}"):
        llmkern.ops.lstm(*layer(), lengths=lengths)


@pytest.mark.parametrize("wrong", [-1, T + 1])
def test_the_binding_checks_too(wrong):
    lengths = LENGTHS.clone()
    lengths[2] = wrong
    with pytest.raises(ValueError, match=rf"lengths in \[0, T = 7\], got {wrong} in row 2"):
        torch.ops.llmkern.lstm.default(*layer(), lengths=lengths)


def test_without_recompiling_for_other_lengths():
    compiled = torch.compile(
        lambda lengths, *a: llmkern.ops.lstm(*a, lengths=lengths)[0],
        fullgraph=True,
        backend="eager",
    )
    arguments = layer()
    for lengths in (LENGTHS, LENGTHS.flip(0)):
        expected = llmkern.ops.lstm(*arguments, lengths=lengths)[0]
        assert torch.equal(compiled(lengths, *arguments), expected)
