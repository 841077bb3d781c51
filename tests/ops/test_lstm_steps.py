# SPDX-License-Identifier: Apache-2.0
"""The operators behind a loop over cells: steps that read weights where they lie, and one product over many steps."""

import pytest
import torch

import llmkern
from tests.conftest import assert_close
from tests.ops.test_lstm import layer

pytestmark = pytest.mark.usefixtures("one_thread")
ops = torch.ops.llmkern


def saved_of(arguments, reverse=False):
    output, _, _, *saved = ops.lstm.default(
        *arguments, reverse=reverse, save_cells=True, save_gates=True
    )
    return output, *saved


@pytest.mark.parametrize("shape", [(20, 33, 19), (3, 7, 40), (1, 1, 1), (2, 5, 131)], ids=str)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
def test_a_step_backward_has_the_bits_of_a_sequence(isa, dtype, shape):
    """One step multiplies by the weights where they lie; two pack them first. The second one adds nothing here."""
    B, I, H = shape  # noqa: E741
    two = layer((2, B, I, H), dtype=dtype)
    one = [two[0][:1], *two[1:]]
    grad = torch.randn(2, B, H).to(dtype)
    grad[1] = 0
    results = []
    for arguments, upstream in ((one, grad[:1]), (two, grad)):
        call = (upstream, None, None, None, *arguments, *[None] * 6, *saved_of(arguments))
        results.append(ops.lstm_backward.default(*call))
    for a, b in zip(results[0][1:3], results[1][1:3], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(results[0][0], results[1][0][:1])


def steps_of(rows, I, P, H, dtype=torch.float64):  # noqa: E741
    return [[torch.randn(n, columns, dtype=dtype) for n in rows] for columns in (4 * H, I, P)]


@pytest.mark.parametrize("rows", [(1,), (0,), (3, 0, 5, 1), (511, 2, 600, 1, 1), (0, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weight_gradients(isa, rows, dtype):
    gates, input, previous = steps_of(rows, 7, 19, 19, dtype)
    grad_ih, grad_hh, grad_bias = ops.lstm_weight_gradients.default(gates, input, previous)
    da, x, h = (torch.cat(parts).double() for parts in (gates, input, previous))
    assert_close(grad_ih, da.T @ x)
    assert_close(grad_hh, da.T @ h)
    assert_close(grad_bias, da.sum(0))


def test_weight_gradients_of_strided_steps(on_threads):
    def run():
        generator = torch.Generator().manual_seed(3)
        gates, input, previous = (
            torch.randn(5, 130, 2 * n, generator=generator)[..., ::2].unbind()
            for n in (4 * 64, 33, 64)
        )
        return ops.lstm_weight_gradients.default(gates, input, previous), gates, input

    (grads, gates, input), (again, _, _) = on_threads(1, run), on_threads(2, run)
    assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))
    assert_close(grads[0], torch.cat(gates).double().T @ torch.cat(input).double())


def test_opcheck():
    torch.library.opcheck(ops.lstm_weight_gradients.default, tuple(steps_of((2, 3), 4, 5, 5)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g, x, h: ([], x, h), "at least one step, got none"),
        (lambda g, x, h: (g, x[:1], h), "2 steps of input, got 1"),
        (lambda g, x, h: (g, [x[0], x[0]], h), r"input of shape \[3, 4\], got \[2, 4\]"),
        (lambda g, x, h: (g, x, [h[0], h[1][0]]), r"previous of shape \[3, 5\], got \[5\]"),
        (lambda g, x, h: ([g[0], g[1][:, 1:]], x, h), r"grad_gates of shape \[3, 20\]"),
        (lambda g, x, h: (g, [x[0], x[1].float()], h), "input of dtype Double, got Float"),
        (lambda *a: [[t.int() for t in part] for part in a], "grad_gates of dtype .*, got Int"),
        (lambda g, x, h: (g, [t[0] for t in x], h), r"input of 2 dimensions, got shape \[4\]"),
    ],
)
def test_errors_of_weight_gradients(change, message):
    with pytest.raises(ValueError, match=r"llmkern\.lstm: expected " + message):
        ops.lstm_weight_gradients.default(*change(*steps_of((2, 3), 4, 5, 5)))


def step_of(dtype=torch.float32, shape=(3, 7, 19), bias=True):
    B, I, H = shape  # noqa: E741
    input, h_0, c_0, *weights = layer((1, B, I, H), dtype=dtype)
    return [input[0], h_0, c_0, *weights[:2], *(weights[2:4] if bias else (None, None))]


def gradients_of(dtype, B, H):
    return [torch.randn(B, H).to(dtype) for _ in "hc"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(20, 33, 19), (1, 1, 1), (2, 0, 5), (0, 3, 4)], ids=str)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
def test_a_step_is_a_layer_of_one(isa, dtype, shape, bias):
    """Bit for bit, in both passes."""
    step = step_of(dtype, shape, bias)
    B, _, H = shape
    grads, layer_step = gradients_of(dtype, B, H), [step[0].unsqueeze(0), *step[1:]]
    output, h_n, c_n, *saved = ops.lstm.default(*layer_step, save_cells=True, save_gates=True)
    call = (None, *grads, None, *layer_step, *[None] * 6, output, *saved)
    expected = ops.lstm_backward.default(*call, weights=False)
    h_1, c_1, kept = ops.lstm_step.default(*step)
    assert torch.equal(h_1, h_n) and torch.equal(c_1, c_n)
    got = ops.lstm_step_backward.default(*grads, *step[2:5], kept)
    for a, b in zip(got, expected, strict=False):
        assert torch.equal(a, b.squeeze(0) if b.dim() == 3 else b)
    zero = ops.lstm_step_backward.default(None, None, *step[2:5], kept)
    assert not any(t.any() for t in zero)


def test_a_strided_step(on_threads):
    step = [t if t is None else torch.stack([t, t], -1)[..., 0] for t in step_of(shape=(5, 70, 90))]
    dense = [t.contiguous() for t in step]
    grads = [g.expand(5, 90) for g in torch.randn(2, 1, 90)]

    def run(arguments):
        results = ops.lstm_step.default(*arguments)
        return *results, *ops.lstm_step_backward.default(*grads, *arguments[2:5], results[-1])

    expected = run(dense)
    for threads in (1, 2):
        assert all(map(torch.equal, on_threads(threads, lambda: run(step)), expected))


def test_opcheck_of_a_step():
    tests = "test_schema", "test_faketensor"  # gradients are those of the loop's own autograd node
    for dtype in (torch.float64, torch.bfloat16):
        step = step_of(dtype)
        torch.library.opcheck(ops.lstm_step.default, tuple(step), test_utils=tests)
        saved = ops.lstm_step.default(*step)[2]
        backward = (*gradients_of(dtype, 3, 19), *step[2:5], saved)
        torch.library.opcheck(ops.lstm_step_backward.default, backward, test_utils=tests)


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (0, lambda t: t[:, 1:], r"input of shape \[3, 7\], got \[3, 6\]"),
        (0, lambda t: t.double(), "input of dtype Float, got Double"),
        (1, lambda t: t[1:], r"h_0 of shape \[3, 19\], got \[2, 19\]"),
        (2, lambda t: t[0], "c_0 of 2 dimensions"),
        (2, lambda t: t[:, :0], "at least one hidden unit"),
        (3, lambda t: t[0], "weight_ih of 2 dimensions"),
        (3, lambda t: t[1:], r"weight_ih of shape \[76, 7\], got \[75, 7\]"),
        (4, lambda t: t.double(), "weight_hh of dtype Float, got Double"),
        (5, lambda t: None, "both biases or neither"),
        (6, lambda t: t[1:], r"bias_hh of shape \[76\], got \[75\]"),
    ],
)
def test_errors_of_a_step(place, change, message):
    step = step_of()
    step[place] = change(step[place])
    with pytest.raises(ValueError, match=r"llmkern\.lstm: expected " + message):
        ops.lstm_step.default(*step)


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (0, lambda t: t[1:], r"grad_h of shape \[3, 19\], got \[2, 19\]"),
        (1, lambda t: t.double(), "grad_c of dtype Float, got Double"),
        (5, lambda t: t[1:], r"saved of shape \[1140\], got \[1139\]"),
        (5, lambda t: t.view(torch.int8), "saved of dtype Byte, got Char"),
    ],
)
def test_errors_of_a_step_backward(place, change, message):
    step = step_of()
    saved = ops.lstm_step.default(*step)[2]
    arguments = [*gradients_of(torch.float32, 3, 19), *step[2:5], saved]
    arguments[place] = change(arguments[place])
    with pytest.raises(ValueError, match=r"llmkern\.lstm: expected " + message):
        ops.lstm_step_backward.default(*arguments)


assert llmkern.ops  # registers the operators
