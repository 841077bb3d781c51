# SPDX-License-Identifier: Apache-2.0
"""LSTM layer and cell: parity with the reference and with torch, accuracy, determinism, extremes, errors."""

import functools

import numpy as np
import pytest
import torch
from torch import Tensor

import llmkern
from llmkern import _reference
from tests.conftest import TOLERANCE, assert_close, assert_no_less_accurate

pytestmark = pytest.mark.usefixtures("one_thread")

# T, B, I, H: ones, primes, the widths of classic language models, more than one block of the matrix product in each of
# its three sizes (512 rows, 256 terms, 32 columns), and an empty batch.
SMALL_SHAPES = [(1, 1, 1, 1), (5, 3, 7, 13), (3, 9, 300, 33), (61, 9, 3, 5), (3, 0, 4, 5)]
# shape, reverse, bias
CASES = [
    (s, reverse, bias) for s in SMALL_SHAPES for reverse in (False, True) for bias in (True, False)
]
CASES += [
    ((2, 2, 3, 650), True, True),
    ((2, 2, 3, 650), False, False),
    ((2, 1, 2, 1150), False, True),
]
NAMES = ("input", "h_0", "c_0", "weight_ih", "weight_hh", "bias_ih", "bias_hh")
RESULTS = ("output", "h_n", "c_n")


def layer(shape, bias=True, dtype=torch.float64) -> tuple[Tensor, ...]:
    """Random arguments of a layer; every value is a float32, so that both dtypes compute the same function."""
    T, B, I, H = shape  # noqa: E741
    shapes = [(T, B, I), (B, H), (B, H), (4 * H, I), (4 * H, H), (4 * H,), (4 * H,)]
    tensors = [torch.randn(s) for s in shapes]
    tensors[3:] = [t * 0.6 / H**0.5 for t in tensors[3:]]  # as large as torch's initial ones
    return tuple(t.to(dtype) for t in (tensors if bias else tensors[:5]))


def upstream_of(shape, dtype=torch.float64) -> tuple[Tensor, ...]:
    T, B, _, H = shape
    return tuple(torch.randn(s).to(dtype) for s in ((T, B, H), (B, H), (B, H)))


def torch_lstm(input, h_0, c_0, *parameters, reverse=False):
    """What torch computes; it has no backward direction on its own, but time can be turned round."""
    x = input.flip(0) if reverse else input
    output, h_n, c_n = torch.lstm(
        x, (h_0[None], c_0[None]), parameters, len(parameters) == 4, 1, 0.0, False, False, False
    )
    return output.flip(0) if reverse else output, h_n[0], c_n[0]


def run(f, arguments, upstream, **options) -> list[Tensor]:
    """Outputs, then the gradients of every argument."""
    arguments = [t.clone().requires_grad_() for t in arguments]
    outputs = f(*arguments, **options)
    return [t.detach() for t in outputs] + list(torch.autograd.grad(outputs, arguments, upstream))


@functools.cache
def reference_case(shape, reverse, bias):
    arguments, upstream = layer(shape, bias), upstream_of(shape)
    arrays = [t.numpy() for t in arguments]
    outputs = _reference.lstm(*arrays, reverse=reverse)
    *grads, grad_bias = _reference.lstm_backward(
        *(t.numpy() for t in upstream), *arrays, reverse=reverse
    )
    expected = [*outputs, *grads, *([grad_bias, grad_bias] if bias else [])]
    return arguments, upstream, [torch.from_numpy(np.asarray(e)) for e in expected]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("shape", "reverse", "bias"), CASES, ids=str)
def test_outputs_and_gradients_equal_reference_and_torch(isa, shape, reverse, bias, dtype):
    arguments, upstream, expected = reference_case(shape, reverse, bias)
    arguments, upstream = [t.to(dtype) for t in arguments], [t.to(dtype) for t in upstream]
    got = run(llmkern.ops.lstm, arguments, upstream, reverse=reverse)
    assert len(got) == len(expected)
    for ours, truth in zip(got, expected, strict=True):
        assert_close(ours, truth)
    # torch's own LSTM cannot run backwards over an empty batch; its float32 is the subject of the next test.
    if shape[1] > 0 and dtype == torch.float64:
        torchs = run(torch_lstm, arguments, upstream, reverse=reverse)
        for ours, other in zip(got, torchs, strict=True):
            assert_close(ours, other)


@functools.cache
def float32_case(shape):
    """Arguments and upstream gradients, what torch makes of them, and the truth."""
    arguments, upstream = layer(shape), upstream_of(shape)
    truth = run(torch_lstm, arguments, upstream)
    arguments, upstream = [t.float() for t in arguments], [t.float() for t in upstream]
    return arguments, upstream, run(torch_lstm, arguments, upstream), truth


@pytest.mark.parametrize(
    "shape", [(1024, 2, 16, 40), (35, 20, 200, 200), (9, 3, 65, 650), (3, 2, 1150, 1150)], ids=str
)
def test_float32_is_as_accurate_as_torch(isa, shape):
    """Also over a thousand steps, where errors would pile up."""
    arguments, upstream, torchs, truth = float32_case(shape)
    got = run(llmkern.ops.lstm, arguments, upstream)
    for name, a, b, c in zip(RESULTS + NAMES, got, torchs, truth, strict=True):
        assert_no_less_accurate(name, a, b, c)


def test_reference_by_hand():
    """One unit, every weight 0: the gates are the sigmoid of the biases, and nothing depends on the input."""
    bias = np.array([0.0, np.log(3.0), 0.5, -np.log(3.0)])  # i = 1/2, f = 3/4, o = 1/4
    x, state, zeros = np.ones((2, 1, 1)), np.full((1, 1), 2.0), np.zeros((4, 1))
    output, h_n, c_n = _reference.lstm(x, state, state, zeros, zeros, bias, np.zeros(4))
    c_0 = 0.75 * 2 + 0.5 * np.tanh(0.5)
    c_1 = 0.75 * c_0 + 0.5 * np.tanh(0.5)
    expected = [0.25 * np.tanh(c_0), 0.25 * np.tanh(c_1)]
    np.testing.assert_allclose(output.ravel(), expected, rtol=1e-15)
    np.testing.assert_allclose([h_n[0, 0], c_n[0, 0]], [expected[1], c_1], rtol=1e-15)
    grads = _reference.lstm_backward(
        None, None, np.ones((1, 1)), x, state, state, zeros, zeros, bias, bias * 0
    )
    assert [g.ravel().tolist() for g in grads[:2]] == [[0, 0], [0]]
    np.testing.assert_allclose(grads[2].ravel(), 0.75 * 0.75)  # through both forget gates
    assert np.all(grads[5][3] == 0)  # c_n does not see the output gate


@pytest.mark.parametrize("reverse", [False, True])
def test_cell_is_one_step(isa, reverse):
    arguments = layer((1, 4, 6, 9))
    h_1, c_1 = llmkern.ops.lstm_cell(arguments[0][0], *arguments[1:])
    output, h_n, c_n = llmkern.ops.lstm(*arguments, reverse=reverse)
    assert torch.equal(h_1, h_n) and torch.equal(c_1, c_n) and torch.equal(h_1, output[0])
    expected = torch.lstm_cell(arguments[0][0], arguments[1:3], *arguments[3:])
    assert_close(h_1, expected[0])
    assert_close(c_1, expected[1])


def test_strided_arguments():
    arguments, upstream = layer((4, 3, 5, 6)), upstream_of((4, 3, 5, 6))
    strided = [torch.stack([t, t * 0 + 7], dim=-1)[..., 0] for t in arguments]
    assert not any(t.is_contiguous() for t in strided)
    every_second = [torch.stack([t, t], dim=-1)[..., 0] for t in upstream]
    for a, b in zip(
        run(llmkern.ops.lstm, strided, every_second),
        run(llmkern.ops.lstm, arguments, upstream),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_expanded_arguments_and_gradients():
    """Initial states expanded over the batch, and the gradient of sum(), have stride 0: the classic silent bug."""
    x, h_0, c_0, *parameters = layer((4, 3, 5, 6))
    h_0, c_0 = h_0[:1].clone().requires_grad_(), c_0[:1].clone().requires_grad_()
    grads = []
    for f in (llmkern.ops.lstm, torch_lstm):
        output, h_n, c_n = f(x, h_0.expand(3, 6), c_0.expand(3, 6), *parameters)
        grads.append(torch.autograd.grad(output.sum() + h_n.sum() + 2 * c_n.sum(), (h_0, c_0)))
    for ours, torchs in zip(*grads, strict=True):
        assert_close(ours, torchs)


@pytest.mark.parametrize("shape", [(9, 33, 70, 130), (3, 2, 40, 650)], ids=str)
def test_same_bits_on_any_number_of_threads(isa, on_threads, shape):
    arguments, upstream = layer(shape, dtype=torch.float32), upstream_of(shape, torch.float32)

    def once():
        return run(llmkern.ops.lstm, arguments, upstream, reverse=True)

    for other in (2, 3):
        for a, b in zip(on_threads(1, once), on_threads(other, once), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_does_not_depend_on_the_batch(isa, dtype):
    shape = (5, 19, 41, 67)
    arguments, upstream = layer(shape, dtype=dtype), upstream_of(shape, dtype)
    whole = run(llmkern.ops.lstm, arguments, upstream)
    for rows in (slice(0, 1), slice(7, 8), slice(3, 16), slice(18, 19)):
        part = [t[..., rows, :] for t in arguments[:3]]
        alone = run(llmkern.ops.lstm, [*part, *arguments[3:]], [t[..., rows, :] for t in upstream])
        for a, b in zip(alone[:6], whole[:6], strict=True):  # outputs and gradients of a row
            assert torch.equal(a, b[..., rows, :])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gates_are_accurate_for_any_argument(isa, dtype):
    """With one input, weights of 1 and an empty state every gate's argument is exactly the input."""
    x = torch.cat(
        [torch.linspace(-90, 90, 3001), torch.logspace(-30, -1, 500), torch.tensor([0.0])]
    )
    x = torch.cat([x, -x]).to(dtype)
    B, H = len(x), 3
    state, w_hh = torch.zeros(B, H, dtype=dtype), torch.zeros(4 * H, H, dtype=dtype)
    w_ih = torch.ones(4 * H, 1, dtype=dtype)
    _, _, _, _, gates, _, _ = torch.ops.llmkern.lstm.default(
        x[None, :, None], state, state, w_ih, w_hh, save_gates=True
    )
    truth = x.double()[:, None]
    error = (gates[0].double() - truth.sigmoid()) / truth.sigmoid()
    error[:, 2 * H : 3 * H] = (gates[0, :, 2 * H : 3 * H].double() - truth.tanh()) / (
        truth.tanh() + (truth == 0)
    )
    # Below -87 the float32 sigmoid stays at 1.6e-38 where torch's goes on to denormal numbers.
    assert error[truth[:, 0] > -87].abs().max() < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saturated_gates(isa, dtype):
    """Gate arguments of 1e4 either way: the gates are 0 and 1 exactly, and so are outputs and gradients."""
    arguments, upstream = layer((4, 3, 1, 21), dtype=dtype), upstream_of((4, 3, 1, 21), dtype)
    arguments = list(arguments)
    arguments[0] = arguments[0].sign() * 1e4
    arguments[3] = arguments[3].sign()
    truth = run(torch_lstm, [t.double() for t in arguments], [t.double() for t in upstream])
    got = run(llmkern.ops.lstm, arguments, upstream)
    for a, b in zip(got, truth, strict=True):
        assert torch.isfinite(a).all()
        assert (a - b).abs().max() <= TOLERANCE[dtype] * b.abs().max() + 1e-30


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nan_is_seen_and_stays_in_its_row(isa, dtype):
    arguments = layer((4, 3, 5, 21), dtype=dtype)
    clean, _, _ = llmkern.ops.lstm(*arguments)
    arguments[0][2, 1, 3] = float("nan")
    output, h_n, c_n = llmkern.ops.lstm(*arguments)
    assert torch.equal(output[:, [0, 2]], clean[:, [0, 2]])
    assert torch.equal(output[:2], clean[:2])
    assert output[2:, 1].isnan().all() and h_n[1].isnan().all() and c_n[1].isnan().all()
