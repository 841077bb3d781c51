# SPDX-License-Identifier: Apache-2.0
"""The composite layer: variants, second and third derivatives, where it takes over."""

import importlib

import pytest
import torch
from torch import Tensor

import llmkern
from llmkern.ops.lstm import composite as composite_layer
from tests.conftest import assert_close
from tests.ops.test_lstm import layer, run, torch_lstm, upstream_of
from tests.ops.test_lstm_variants import COMBINATIONS, by_formula, problem

pytestmark = pytest.mark.usefixtures("one_thread")

T, B, I, H, P = 5, 3, 4, 6, 2  # noqa: E741
LENGTHS = torch.tensor([5, 0, 2])
composite = composite_layer.lstm
lstm_module = importlib.import_module("llmkern.ops.lstm.layer")


def variant(shape=(T, B, I, H), dtype=torch.float64, projected=P) -> dict[str, Tensor]:
    """Everything the layer can have, by name."""
    T, B, I, H = shape  # noqa: E741
    shapes = {"input": (T, B, I), "h_0": (B, projected), "c_0": (B, H), "weight_ih": (4 * H, I)}
    shapes |= {"weight_hh": (4 * H, projected), "bias_ih": (4 * H,), "bias_hh": (4 * H,)}
    shapes |= {"weight_hr": (projected, H), "norm_gates": (2, 4 * H), "norm_cell": (2, H)}
    return {name: (torch.randn(s) / 2).to(dtype) for name, s in shapes.items()}


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (5, 3, 7, 13), (3, 0, 4, 5)], ids=str)
def test_plain_layer_is_that_of_the_kernels(shape, reverse):
    arguments, upstream = layer(shape), upstream_of(shape)
    got = run(lambda *a: composite(*a, reverse=reverse)[:3], arguments, upstream)
    expected = run(llmkern.ops.lstm, arguments, upstream, reverse=reverse)
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("chosen", COMBINATIONS, ids=lambda v: "+".join(sorted(v)) or "plain")
def test_variants_equal_the_formula(chosen, reverse):
    leaves, options = problem((4, 3, 2, 5, 3), chosen)
    with torch.no_grad():
        got = composite(**leaves, **options, reverse=reverse)
        expected = by_formula(**leaves, **options, reverse=reverse)
    for ours, truth in zip(got, expected, strict=True):
        assert_close(ours, truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_layers_compute_in_float32(dtype):
    """What leaves a step is rounded, once; the cell state, which is carried on, is not."""
    arguments = variant(dtype=dtype)
    output, h_n, c_n, cells = composite(**arguments)
    assert output.dtype == h_n.dtype == c_n.dtype == dtype and cells.dtype == torch.float32
    wide = {name: t.double() for name, t in arguments.items()}
    h, c = wide["h_0"], wide["c_0"]
    for t in range(T):
        step = {**wide, "input": wide["input"][t : t + 1], "h_0": h, "c_0": c}
        truth, _, c, _ = composite(**step)
        h = output[t].double()  # so that an error shows where it was made
        spacing = 2.0 ** (torch.frexp(truth[0]).exponent - 1) * torch.finfo(dtype).eps
        assert ((h - truth[0]).abs() <= 0.51 * spacing).all()
        assert (cells[t] - c).abs().max() < 1e-6


def test_what_lies_beyond_a_length_reaches_no_gradient():
    arguments = {name: t.requires_grad_() for name, t in variant().items()}
    with torch.no_grad():
        arguments["input"][2:, 2] = float("nan")
        arguments["input"][:, 1] = float("nan")
    outputs = composite(**arguments, lengths=LENGTHS)
    grads = torch.autograd.grad(sum(o.sum() for o in outputs), list(arguments.values()))
    assert all(g.isfinite().all() for g in grads)
    assert grads[0][:, 1].count_nonzero() == 0


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("chosen", COMBINATIONS, ids=lambda v: "+".join(sorted(v)) or "plain")
def test_gradgradcheck(chosen, reverse):
    leaves, options = problem((3, 2, 2, 3, 2), chosen)
    options |= {"reverse": reverse, "return_cells": reverse}

    def run(*values):
        return llmkern.ops.lstm(**dict(zip(leaves, values, strict=True)), **options)

    assert torch.autograd.gradgradcheck(
        run, list(leaves.values()), check_undefined_grad=False, fast_mode=len(chosen) != 1
    )


@pytest.mark.parametrize("wanted", range(7))
def test_second_derivatives_of_one_gradient_equal_torch(wanted):
    """Other subsets of what is given and wanted than a check of everything has."""
    arguments = [t.requires_grad_() for t in layer((3, 2, 4, 5))]
    weights = torch.randn_like(arguments[wanted])
    seconds = []
    for f in (llmkern.ops.lstm, torch_lstm):
        loss = f(*arguments)[wanted % 3].square().sum()
        (first,) = torch.autograd.grad(loss, arguments[wanted], create_graph=True)
        seconds.append(torch.autograd.grad((first * weights).sum(), arguments))
    for ours, torchs in zip(*seconds, strict=True):
        assert_close(ours, torchs)


def test_third_derivatives_equal_torch():
    thirds = []
    arguments = [t.requires_grad_() for t in layer((3, 2, 4, 5))]
    for f in (llmkern.ops.lstm, torch_lstm):
        values = f(*arguments)
        for _ in range(3):
            loss = sum(v.square().sum() for v in values)
            values = torch.autograd.grad(loss, arguments, create_graph=True)
        thirds.append(values)
    for ours, torchs in zip(*thirds, strict=True):
        assert_close(ours, torchs)


def test_a_gradient_penalty_trains():
    """The usual use: the norm of the input's gradient as a loss, backward() into the parameters."""
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    grads = []
    for cls in (llmkern.nn.LSTM, torch.nn.LSTM):
        torch.manual_seed(1)
        lstm = cls(5, 6, num_layers=2, bidirectional=True, dtype=torch.float64)
        leaf = x.clone().requires_grad_()
        with torch.autograd.graph.save_on_cpu():  # hooks on saved tensors do not disturb
            (grad,) = torch.autograd.grad(lstm(leaf)[0].tanh().sum(), leaf, create_graph=True)
            grad.square().sum().backward()
        grads.append([p.grad for p in lstm.parameters()])
    for ours, torchs in zip(*grads, strict=True):
        assert_close(ours, torchs)


@pytest.mark.parametrize("weights", [True, False])
def test_gradients_of_the_gates_are_differentiable_too(weights):
    """llmkern::lstm_backward by itself, as vmap uses it."""

    def backward(grad_output, x, h_0, c_0, w_ih, w_hh, b_ih, b_hh):
        with torch.no_grad():
            output, _, _, cells, *saved = torch.ops.llmkern.lstm.default(
                x, h_0, c_0, w_ih, w_hh, b_ih, b_hh, save_cells=True, save_gates=True
            )
        tensors = (grad_output, None, None, None, x, h_0, c_0, w_ih, w_hh, b_ih, b_hh)
        results = torch.ops.llmkern.lstm_backward.default(
            *tensors, *[None] * 6, output, cells, *saved, weights=weights
        )
        return [r for r in results if r.numel()]

    arguments = [upstream_of((3, 2, 2, 3))[0], *layer((3, 2, 2, 3))]
    assert torch.autograd.gradcheck(backward, [t.requires_grad_() for t in arguments])


CUDA_ONLY = {
    "weight_hr": lambda a: {"weight_hr": a["weight_hr"]},
    "norm": lambda a: {n: a[n] for n in ("norm_gates", "norm_cell")},
    "reset": lambda a: {"reset": torch.rand(T, B) < 0.3},
    "zoneout_h": lambda a: {"zoneout_h": 0.2},
    "zoneout_c": lambda a: {"zoneout_c": 0.2},
    "return_cells": lambda a: {"return_cells": True},
    "plain": lambda a: {},
}


@pytest.mark.parametrize("name", CUDA_ONLY)
def test_what_the_kernels_of_cuda_lack_takes_the_composite(monkeypatch, name):
    """There is no GPU here: the rule is asked about a tensor that says it is on one."""
    asked = []
    rule = lstm_module._beyond_kernels

    def on_cuda(input, variant):
        asked.append(variant)
        return rule(type("Cuda", (), {"is_cuda": True}), variant)

    called = []
    monkeypatch.setattr(lstm_module, "_beyond_kernels", on_cuda)
    monkeypatch.setattr(composite_layer, "lstm", lambda *a: called.append(1) or composite(*a))
    arguments = variant(projected=P if name == "weight_hr" else H)
    options = CUDA_ONLY[name](arguments)
    plain = [arguments[n] for n in list(arguments)[:7]]
    results = llmkern.ops.lstm(*plain, **options)
    assert asked == [name != "plain"] and len(called) == (name != "plain")
    cells = options.pop("return_cells", False)
    expected = composite(*plain, **options)[: 4 if cells else 3]
    for ours, truth in zip(results, expected, strict=True):
        assert_close(ours, truth)
