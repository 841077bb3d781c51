# SPDX-License-Identifier: Apache-2.0
"""LSTM layers with weights in 8 bits: as a layer whose weights are the rounded ones."""

import pytest
import torch

import llmkern
from tests.conftest import assert_close
from tests.ops.test_lstm import layer

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = [
    (1, 1, 1, 1),
    (5, 3, 7, 13),
    (3, 9, 300, 33),
    (61, 1, 64, 65),
    (2, 2, 3, 650),
    (3, 4, 0, 5),
]


def rounded(weight):
    """What the format says: rows of multiples of the largest magnitude / 127."""
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    return torch.where(scale > 0, (weight / scale).round() * scale, 0.0)


def eight_bits(arguments, **options):
    packed = llmkern.ops.lstm_pack(*arguments[3:5], dtype=torch.int8)
    assert packed.dtype == torch.int8
    return llmkern.ops.lstm(*arguments, packed=packed, **options)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_float64_over_rounded_weights(isa, shape, reverse):
    arguments = list(layer(shape, dtype=torch.float32))
    got = eight_bits(arguments, reverse=reverse)
    arguments[3:5] = [rounded(w) if w.shape[1] else w for w in arguments[3:5]]
    truth = llmkern.ops.lstm(*[t.double() for t in arguments], reverse=reverse)
    for ours, expected in zip(got, truth, strict=True):
        assert ours.dtype == torch.float32
        # Activations of 16 bits: each is off by up to 1.5e-5 of the largest one of its row.
        assert_close(ours, expected, 5e-5 if shape[2] < 100 else 2e-4)


def test_small_activations_keep_their_precision(isa):
    """The scale of a row is its own: states and inputs of 1e-3 beside others of 1000."""
    arguments = list(layer((3, 2, 40, 50), dtype=torch.float32))
    for t in arguments[:2]:
        t[..., 0, :] *= 1e-3
        t[..., 1, :] *= 1e3
    arguments[2][0] *= 1e-3
    arguments[5:] = [b * 0 for b in arguments[5:]]
    got, _, _ = eight_bits(arguments)
    arguments[3:5] = [rounded(w) for w in arguments[3:5]]
    truth, _, _ = llmkern.ops.lstm(*[t.double() for t in arguments])
    assert_close(got[:, 0], truth[:, 0], 2e-4)


def test_same_bits_on_any_number_of_threads_and_beside_any_row(isa, on_threads):
    arguments = layer((4, 7, 70, 130), dtype=torch.float32)
    whole = on_threads(1, lambda: eight_bits(arguments))
    for a, b in zip(whole, on_threads(3, lambda: eight_bits(arguments)), strict=True):
        assert torch.equal(a, b)
    for rows in (slice(0, 1), slice(2, 4), slice(1, 7)):
        part = [t[..., rows, :].contiguous() for t in arguments[:3]]
        for a, b in zip(eight_bits([*part, *arguments[3:]]), whole, strict=True):
            assert torch.equal(a, b[..., rows, :])


def test_rows_of_different_lengths_and_variants(isa):
    x, h_0, c_0, w_ih, w_hh, b_ih, b_hh = layer((6, 4, 9, 21), dtype=torch.float32)
    w_hr = torch.randn(10, 21) * 0.3
    arguments = [x, h_0[:, :10].contiguous(), c_0, w_ih, w_hh[:, :10].contiguous(), b_ih, b_hh]
    options = {
        "lengths": torch.tensor([6, 0, 3, 5]),
        "reset": torch.rand(6, 4) < 0.3,
        "zoneout_h": 0.3,
        "seed": torch.tensor(5),
    }
    got = eight_bits(arguments, weight_hr=w_hr, **options)
    arguments[3:5] = [rounded(w) for w in arguments[3:5]]
    truth = llmkern.ops.lstm(*[t.double() for t in arguments], weight_hr=w_hr.double(), **options)
    for ours, expected in zip(got, truth, strict=True):
        assert_close(ours, expected, 5e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(isa, value):
    arguments = layer((4, 3, 5, 21), dtype=torch.float32)
    clean, _, _ = eight_bits(arguments)
    arguments[0][2, 1, 3] = value
    output, _, _ = eight_bits(arguments)
    assert torch.equal(output[:, [0, 2]], clean[:, [0, 2]])
    assert torch.equal(output[:2, 1], clean[:2, 1])
    if value != value:
        assert output[2:, 1].isnan().all()


def test_a_weight_that_is_not_finite_is_seen(isa):
    arguments = layer((2, 2, 5, 21), dtype=torch.float32)
    arguments[4][3, 7] = float("nan")  # the input gate of unit 3
    output, _, _ = eight_bits(arguments)
    assert output[0, :, 3].isnan().all()
    assert not output[0, :, 4].isnan().any()


@pytest.mark.parametrize("name", ["LSTM", "LSTMCell"])
def test_a_module_reads_them_where_no_gradients_are_wanted(name):
    module = getattr(llmkern.nn, name)(30, 40)
    x = torch.randn(1, 30)

    def state():
        return torch.cat([t.reshape(-1) for t in module(x)[1:][0]]).detach()

    exact = state()
    module.quantize_weights(torch.int8)
    assert torch.equal(state(), exact)  # gradients are wanted
    with torch.no_grad():
        quantised = state()
        twin = getattr(llmkern.nn, name)(30, 40)
        twin.load_state_dict(
            {k: rounded(v) if v.dim() == 2 else v for k, v in module.state_dict().items()}
        )
        module, kept = twin, module
        assert_close(quantised, state(), 5e-5)
        module = kept
        assert not torch.equal(quantised, exact)
        module.quantize_weights(None)
        assert torch.equal(state(), exact)
    with pytest.raises(
        TypeError, match=rf"llmkern\.{name}: expected a dtype of torch.int8 or None"
    ):
        module.quantize_weights(torch.float16)
