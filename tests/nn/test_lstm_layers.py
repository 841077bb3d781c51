# SPDX-License-Identifier: Apache-2.0
"""Without gradients all layers run in one call of an operator: the same bits as layer by layer, and the same errors."""

import itertools

import pytest
import torch

import llmkern
from llmkern.nn import lstm as module_of_lstm

pytestmark = pytest.mark.usefixtures("one_thread")
I, H = 7, 37  # noqa: E741


@pytest.fixture
def calls(monkeypatch):
    """How often the operator has run."""
    made = []
    operator = module_of_lstm._LAYERS
    monkeypatch.setattr(module_of_lstm, "_LAYERS", lambda *a: (made.append(1), operator(*a))[1])
    return made


def inputs_of(layer, shape, given=True):
    dtype = layer.weight_ih_l0.dtype
    x = torch.randn(*shape, I, dtype=dtype)
    rows = shape[:0] if len(shape) == 1 else shape[not layer.batch_first :][:1]
    state = [torch.randn(layer.num_layers, *rows, H, dtype=dtype) for _ in "hc"]
    return x, tuple(state) if given else None


def flat(results):
    output, (h_n, c_n) = results
    return output, h_n, c_n


def layer_by_layer(layer, x, hx):
    """What the operator does not take: all cell states."""
    with torch.no_grad():
        output, state, _ = layer(x, hx, return_cells=True)
    return output, *state


@pytest.mark.parametrize("given", [True, False], ids=["state", "no state"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (6, 1), (5, 3), (1,), (4,)], ids=str)
@pytest.mark.parametrize("batch_first", [False, True])
def test_the_same_bits(isa, calls, batch_first, shape, given):
    dtypes = torch.float32, torch.float64, torch.bfloat16, torch.float16
    for num_layers, bias, dtype in itertools.product((1, 2, 4), (True, False), dtypes):
        layer = llmkern.nn.LSTM(I, H, num_layers, bias, batch_first, dtype=dtype)
        x, hx = inputs_of(layer, shape, given)
        with torch.no_grad():
            got = flat(layer(x, hx))
        assert len(calls) == 1
        for a, b in zip(got, layer_by_layer(layer, x, hx), strict=True):
            assert torch.equal(a, b) and a.dtype == b.dtype
        calls.clear()


def test_weights_of_eight_bits(isa, calls):
    layer = llmkern.nn.LSTM(I, H, 3)
    layer.quantize_weights(torch.int8)
    for shape in ((1, 1), (5, 3)):
        x, hx = inputs_of(layer, shape)
        with torch.inference_mode():
            got = flat(layer(x, hx))
        assert all(map(torch.equal, got, layer_by_layer(layer, x, hx)))
    assert len(calls) == 2
    layer.quantize_weights(None)
    with torch.no_grad():
        assert not torch.equal(layer(x, hx)[0], got[0])


def test_strided_arguments(calls):
    layer = llmkern.nn.LSTM(I, H, 2)
    x, (h, c) = torch.randn(3, 2 * I, 2).mT[..., ::2], torch.randn(2, 2, H, 2).unbind(-1)
    with torch.no_grad():
        layer.bias_hh_l1.set_(torch.randn(8 * H)[::2])
        got = flat(layer(x, (h, c)))
    assert len(calls) == 1
    assert all(map(torch.equal, got, layer_by_layer(layer, x, (h, c))))


def test_threads_change_nothing(on_threads):
    layer = llmkern.nn.LSTM(I, 256, 2)
    x = torch.randn(1, 1, I)
    with torch.no_grad():
        one, two = (on_threads(n, lambda: flat(layer(x))) for n in (1, 2))
    assert all(map(torch.equal, one, two))


@pytest.mark.parametrize(
    ("options", "training"),
    [
        ({"bidirectional": True}, False),
        ({"proj_size": 5}, False),
        ({"layer_norm": True}, False),
        ({"zoneout_h": 0.5}, False),
        ({"zoneout_c": 0.5}, False),
        ({"weight_dropout": 0.5}, True),
        ({"dropout": 0.5, "num_layers": 2}, True),
    ],
    ids=str,
)
def test_other_options_go_layer_by_layer(calls, options, training):
    layer = llmkern.nn.LSTM(I, H, **options).train(training)
    x = torch.randn(4, 2, I)
    torch.manual_seed(1)
    expected = flat(layer(x))
    torch.manual_seed(1)
    with torch.no_grad():
        got = flat(layer(x))
    assert all(map(torch.equal, got, expected)) and not calls


def test_options_changed_later(calls):
    layer = llmkern.nn.LSTM(I, H, 2)
    x = torch.randn(4, 2, I)
    with torch.no_grad():
        first = layer(x)[0]
        layer.dropout = 0.5
        dropped = layer(x)[0]
        evaluated = layer.eval()(x)[0]
        layer.zoneout_h = 0.5
        held = layer(x)[0]
    assert len(calls) == 2
    assert torch.equal(first, evaluated)
    assert not torch.equal(first, dropped) and not torch.equal(first, held)


def test_parametrized_weights():
    layer = llmkern.nn.LSTM(I, H, 2)
    x, (h, c) = inputs_of(layer, (1, 2))
    torch.nn.utils.parametrizations.weight_norm(layer, "weight_hh_l1")
    with torch.no_grad():
        before = layer(x, (h, c))[0]
        layer.parametrizations.weight_hh_l1.original1.mul_(2)
        after = layer(x, (h, c))[0]
    assert torch.allclose(before, after, atol=1e-6)  # its direction alone counts
    assert torch.equal(after, layer(x, (h, c))[0])


@pytest.mark.filterwarnings("ignore")  # tracing is deprecated, and says so in many ways
@pytest.mark.parametrize("gradients", [True, False])
def test_a_trace_reads_its_weights_at_every_call(gradients):
    layer = llmkern.nn.LSTM(I, H)
    x = torch.randn(1, 1, I)
    with torch.set_grad_enabled(gradients):
        layer(x)
        traced = torch.jit.trace(layer, x)
        with torch.no_grad():
            layer.weight_hh_l0.mul_(2)
            layer.weight_ih_l0.mul_(2)
        assert torch.equal(traced(x)[0], layer(x)[0])


def test_hooks_run(calls):
    layer = llmkern.nn.LSTM(I, H)
    x, seen = torch.randn(1, 1, I), []
    layer.register_forward_pre_hook(lambda m, args: (2 * args[0],))
    layer.register_forward_hook(lambda m, args, results: seen.append(results[0]))
    with torch.no_grad():
        assert layer(x)[0] is seen[0]
        assert torch.equal(seen[0], layer.forward(2 * x)[0])
    assert len(calls) == 2


def test_errors_are_those_of_the_layers():
    layer = llmkern.nn.LSTM(I, H, 2)
    x, (h, c) = inputs_of(layer, (3, 2))
    wrong = [
        ((x.double(), None), TypeError, "weight_ih of input's dtype float64, got float32"),
        ((x[:0], None), ValueError, "at least one time step"),
        ((x[..., 1:], (h, c)), ValueError, r"input of shape \[T, B, I\]"),
        ((x[0, 0], None), ValueError, r"input of shape .*got \[7\]"),
        ((x, (h, c[:1])), ValueError, r"c_0 of shape \[S, B, H\] = \[2, 2, 37\], got \[1, 2, 37\]"),
        ((x, (h[:, 0], c)), ValueError, r"h_0 of shape .*got \[2, 37\]"),
        ((x, (h, c.double())), TypeError, "c_0 of input's dtype float32, got float64"),
        ((x, (h, c, c)), ValueError, r"hx to be \(h_0, c_0\), got 3 values"),
        ((x, (h.to("meta"), c)), ValueError, "every tensor on one device"),
        ((x.tolist(), None), TypeError, "a Tensor, got list"),
    ]
    with torch.no_grad():
        layer(x)
        for arguments, error, message in wrong:
            with pytest.raises(error, match=r"llmkern\.(LSTM|lstm): expected " + message):
                layer(*arguments)
