# SPDX-License-Identifier: Apache-2.0
"""Every combination of what torch.nn.LSTM can be told, in float64: outputs, final states and all gradients."""

import itertools

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import llmkern
from tests.conftest import assert_close

pytestmark = pytest.mark.usefixtures("one_thread")

T, B, I, H, P = 5, 4, 3, 6, 2  # noqa: E741
OPTIONS = {
    "num_layers": (1, 3),
    "bias": (True, False),
    "batch_first": (False, True),
    "bidirectional": (False, True),
    "proj_size": (0, P),
}
MATRIX = [
    dict(zip(OPTIONS, values, strict=True)) for values in itertools.product(*OPTIONS.values())
]
SORTED, UNSORTED = [5, 5, 3, 1], [2, 5, 1, 5]


def twins(**options):
    """Dropout is there, and does nothing in evaluation."""
    dropout = 0.4 if options["num_layers"] > 1 else 0.0
    theirs = torch.nn.LSTM(I, H, dropout=dropout, dtype=torch.float64, **options).eval()
    ours = llmkern.nn.LSTM(I, H, dropout=dropout, dtype=torch.float64, **options).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def inputs_of(kind, batch_first):
    """The tensor to differentiate by, and what makes the module's input of it."""
    if kind == "unbatched":
        return torch.randn(T, I, dtype=torch.float64), lambda x: x
    x = torch.randn(*((B, T) if batch_first else (T, B)), I, dtype=torch.float64)
    if kind == "batched":
        return x, lambda x: x
    lengths, is_sorted = (SORTED, True) if kind == "packed, sorted" else (UNSORTED, False)
    return x, lambda x: pack_padded_sequence(
        x, lengths, batch_first=batch_first, enforce_sorted=is_sorted
    )


def results(lstm, x, prepare, state):
    leaves = [t.clone().requires_grad_() for t in (x, *(state or ()))]
    hx = tuple(leaves[1:]) if state else None
    output, (h_n, c_n) = lstm(prepare(leaves[0]), hx)
    layout = []
    if isinstance(output, PackedSequence):
        output, *layout = output
    torch.manual_seed(4)
    values = [output, h_n, c_n]
    upstream = [torch.randn_like(v) for v in values]
    return layout, [*values, *torch.autograd.grad(values, [*leaves, *lstm.parameters()], upstream)]


@pytest.mark.parametrize("given", [True, False], ids=["state", "no state"])
@pytest.mark.parametrize("kind", ["unbatched", "batched", "packed, sorted", "packed, unsorted"])
@pytest.mark.parametrize("options", MATRIX, ids=lambda o: "-".join(str(v) for v in o.values()))
def test_equals_torch(options, kind, given):
    ours, theirs = twins(**options)
    x, prepare = inputs_of(kind, options["batch_first"])
    S = options["num_layers"] * (2 if options["bidirectional"] else 1)
    rows = [] if kind == "unbatched" else [B]
    columns = options["proj_size"] or H, H
    state = [torch.randn(S, *rows, n, dtype=torch.float64) for n in columns] if given else None
    layout, got = results(ours, x, prepare, state)
    torchs_layout, expected = results(theirs, x, prepare, state)
    for a, b in zip(layout, torchs_layout, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    for a, b in zip(got, expected, strict=True):
        assert a.stride() == b.stride() or a.numel() == 0
        assert_close(a, b)
