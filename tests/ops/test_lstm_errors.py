# SPDX-License-Identifier: Apache-2.0
"""LSTM layer and cell: every wrong argument has its error, in Python and at the binding."""

import pytest
import torch

import llmkern
from tests.ops.test_lstm import NAMES, layer


def one_bad(name, change):
    """Arguments of a good call, one of them changed."""
    arguments = dict(zip(NAMES, layer((2, 3, 4, 5), dtype=torch.float32), strict=True))
    arguments[name] = change(arguments[name])
    return arguments


BAD_CALLS = [
    ("input", lambda t: t.tolist(), TypeError, "expected input to be a Tensor, got list"),
    ("bias_hh", lambda t: 3, TypeError, "expected bias_hh to be a Tensor, got int"),
    ("input", lambda t: t.half(), TypeError, "h_0 of input's dtype float16, got float32"),
    (
        "input",
        lambda t: t.int(),
        TypeError,
        "input of dtype float32 or float64 or bfloat16 or float16, got int32",
    ),
    ("c_0", lambda t: t.double(), TypeError, "c_0 of input's dtype float32, got float64"),
    ("bias_ih", lambda t: t.double(), TypeError, "bias_ih of input's dtype float32, got float64"),
    ("weight_hh", lambda t: t.to("meta"), ValueError, "input on cpu and weight_hh on meta"),
    ("input", lambda t: t[0], ValueError, r"input of shape \[T, B, I\], got \[3, 4\]"),
    (
        "input",
        lambda t: t[:0],
        ValueError,
        r"at least one time step, got input of shape \[0, 3, 4\]",
    ),
    ("weight_hh", lambda t: t[0], ValueError, r"weight_hh of shape \[4\*H, H\], got \[5\]"),
    ("weight_hh", lambda t: t[:16], ValueError, r"\[4\*H, H\] = \[20, 5\], got \[16, 5\]"),
    ("weight_hh", lambda t: t[:0, :0], ValueError, r"at least one hidden unit, .* \[0, 0\]"),
    ("weight_ih", lambda t: t.T, ValueError, r"weight_ih of shape .* = \[20, 4\], got \[4, 20\]"),
    ("h_0", lambda t: t[:2], ValueError, r"h_0 of shape \[B, H\] = \[3, 5\], got \[2, 5\]"),
    ("c_0", lambda t: t[None], ValueError, r"c_0 of shape \[B, H\] = \[3, 5\], got \[1, 3, 5\]"),
    ("bias_ih", lambda t: t[:-1], ValueError, r"bias_ih of shape \[4\*H\] = \[20\], got \[19\]"),
    (
        "bias_hh",
        lambda t: None,
        ValueError,
        "expected both bias_ih and bias_hh or neither, got one",
    ),
]


@pytest.mark.parametrize(("name", "change", "error", "message"), BAD_CALLS)
def test_bad_input(name, change, error, message):
    with pytest.raises(error, match=r"llmkern\.lstm: .*" + message):
        llmkern.ops.lstm(**one_bad(name, change))


def test_bad_input_of_the_cell():
    with pytest.raises(ValueError, match=r"llmkern\.lstm_cell: .*input of shape \[B, I\]"):
        llmkern.ops.lstm_cell(*layer((2, 3, 4, 5)))


BAD_BINDING_CALLS = [
    ("input", lambda t: t.half(), "weight_hh of dtype Half, got Float"),
    ("input", lambda t: t[0], r"input of 3 dimensions, got shape \[3, 4\]"),
    ("input", lambda t: t[:0], r"at least one time step, got input of shape \[0, 3, 4\]"),
    ("input", lambda t: t[..., :3], r"weight_ih of shape \[20, 3\], got \[20, 4\]"),
    ("h_0", lambda t: t[:, :4], r"h_0 of shape \[3, 5\], got \[3, 4\]"),
    ("c_0", lambda t: t.double(), "c_0 of dtype Float, got Double"),
    ("weight_hh", lambda t: t[0], r"weight_hh of 2 dimensions, got shape \[5\]"),
    (
        "weight_hh",
        lambda t: t[:, :0],
        r"at least one hidden unit, got weight_hh of shape \[20, 0\]",
    ),
    ("weight_hh", lambda t: t[:-1], r"weight_hh of shape \[4\*H, H\], got \[19, 5\]"),
    ("bias_ih", lambda t: None, "expected both biases or neither, got one"),
    ("bias_hh", lambda t: t[1:], r"bias_hh of shape \[20\], got \[19\]"),
    ("bias_hh", lambda t: t.double(), "bias_hh of dtype Float, got Double"),
]


@pytest.mark.parametrize(("name", "change", "message"), BAD_BINDING_CALLS)
def test_the_binding_checks_too(name, change, message):
    """A caller who goes round Python's checks gets an error, not a wild read."""
    with pytest.raises(ValueError, match=r"llmkern\.lstm: .*" + message):
        torch.ops.llmkern.lstm.default(*one_bad(name, change).values())


def test_the_binding_refuses_integers():
    expected = r"input of dtype float32, float64, bfloat16 or float16, got Int"
    with pytest.raises(ValueError, match=expected):
        torch.ops.llmkern.lstm.default(*layer((2, 3, 4, 5), dtype=torch.int32))
    weights = layer((2, 3, 4, 5), dtype=torch.int32)[3:5]
    with pytest.raises(
        ValueError, match="weight_hh of dtype float32, float64, bfloat16 or float16"
    ):
        llmkern.ops.lstm_pack(*weights)


def packed_cases():
    """Name, input's arguments, packed weights that are not theirs, the error."""
    x, h, c, w_ih, w_hh = layer((2, 3, 4, 5), bias=False, dtype=torch.float32)
    narrow = [t.bfloat16() for t in (x, h, c, w_ih, w_hh)]
    pack = llmkern.ops.lstm_pack
    expected = "expected packed to be what lstm_pack makes of weights with I, H, P = 4, 5, 5"
    return {
        "another layer": ((x, h, c, w_ih, w_hh), pack(w_ih[:, :3], w_hh), expected),
        "too short": ((x, h, c, w_ih, w_hh), pack(w_ih, w_hh)[:8], expected),
        "no header": ((x, h, c, w_ih, w_hh), torch.zeros(4096), expected),
        "another dtype": (
            (x, h, c, w_ih, w_hh),
            pack(*narrow[3:]),
            "expected packed of dtype Float",
        ),
        "int8 beside bfloat16": (
            narrow,
            pack(w_ih, w_hh, dtype=torch.int8),
            "expected packed of dtype BFloat16",
        ),
    }


@pytest.mark.parametrize("case", packed_cases())
def test_packed_weights_of_something_else(case):
    arguments, packed, message = packed_cases()[case]
    with pytest.raises(ValueError, match=r"llmkern\.lstm: " + message):
        llmkern.ops.lstm(*arguments, packed=packed)


def test_a_cut_off_pack_is_not_read(isa):
    """Its header is right, its size is not."""
    x, h, c, w_ih, w_hh = layer((2, 3, 4, 50), bias=False, dtype=torch.float32)
    packed = llmkern.ops.lstm_pack(w_ih, w_hh)
    expected, _, _ = llmkern.ops.lstm(x, h, c, w_ih, w_hh)
    got, _, _ = llmkern.ops.lstm(x, h, c, w_ih, w_hh, packed=packed[:64].clone())
    assert torch.equal(got, expected)


def test_int8_is_for_float32_without_gradients():
    x, h, c, w_ih, w_hh = layer((2, 3, 4, 5), bias=False, dtype=torch.float32)
    packed = llmkern.ops.lstm_pack(w_ih, w_hh, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"llmkern\.lstm: expected no gradients with int8 weights"):
        llmkern.ops.lstm(x.requires_grad_(), h, c, w_ih, w_hh, packed=packed)
    with pytest.raises(TypeError, match=r"dtype float64, or int8 for float32 weights, got int8"):
        llmkern.ops.lstm_pack(w_ih.double(), w_hh.double(), dtype=torch.int8)
    with pytest.raises(TypeError, match=r"dtype float32, or int8 for float32 weights, got float16"):
        llmkern.ops.lstm_pack(w_ih, w_hh, dtype=torch.float16)


@pytest.mark.parametrize(
    "name", ["grad_output", "grad_h_n", "grad_c_n", "grad_cells", "output", "cells", "gates"]
)
@pytest.mark.parametrize(
    "change", [lambda t: t[:, :1], lambda t: t.double()], ids=["shape", "dtype"]
)
def test_the_backward_binding_checks_too(name, change):
    x, h_0, c_0, w_ih, w_hh = layer((2, 3, 4, 5), bias=False, dtype=torch.float32)
    output, _, _, *saved = torch.ops.llmkern.lstm.default(
        x, h_0, c_0, w_ih, w_hh, save_cells=True, save_gates=True
    )
    arguments = {"grad_output": output, "grad_h_n": h_0, "grad_c_n": c_0, "grad_cells": saved[0]}
    arguments |= {"input": x, "h_0": h_0, "c_0": c_0, "weight_ih": w_ih, "weight_hh": w_hh}
    arguments |= dict.fromkeys(("bias_ih", "bias_hh", "weight_hr", "norm_gates", "norm_cell"))
    arguments |= {"lengths": None, "reset": None, "seed": None, "output": output}
    arguments |= dict(zip(("cells", "gates", "normalized", "scales"), saved, strict=True))
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=rf"llmkern\.lstm: expected {name} of"):
        torch.ops.llmkern.lstm_backward.default(*arguments.values())


def layers_arguments(dtype=torch.float32, packs=False):
    layer = llmkern.nn.LSTM(4, 5, 2, dtype=dtype)
    state = torch.zeros(2, 3, 5, dtype=dtype)
    parameters = [p.detach() for p in layer.parameters()]
    packed = [llmkern.ops.lstm_pack(*parameters[i : i + 2]) for i in (0, 4)] if packs else []
    return torch.zeros(2, 3, 4, dtype=dtype), state, state, parameters, packed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, h, c, w, p: (x[0, 0], h, c, w, p), r"input of 2 dimensions, got shape \[4\]"),
        (lambda x, h, c, w, p: (x[:0], h, c, w, p), "at least one time step"),
        (lambda x, h, c, w, p: (x, h[0], c, w, p), "h_0 of 3 dimensions"),
        (lambda x, h, c, w, p: (x, h[:0], c[:0], w, p), "at least one hidden unit"),
        (lambda x, h, c, w, p: (x, h[:, 1:], c, w, p), r"h_0 of shape \[2, 3, 5\]"),
        (lambda x, h, c, w, p: (x, h, c[1:], w, p), r"c_0 of shape \[2, 3, 5\], got \[1, 3, 5\]"),
        (lambda x, h, c, w, p: (x, h, c.double(), w, p), "c_0 of dtype Float, got Double"),
        (
            lambda x, h, c, w, p: (x, h, c, w[:7], p),
            "2 or 4 parameters for each of 2 layers, got 7",
        ),
        (lambda x, h, c, w, p: (x, h, c, [], p), "2 or 4 parameters for each of 2 layers, got 0"),
        (
            lambda x, h, c, w, p: (x, h, c, [w[0].double(), *w[1:]], p),
            "weight_ih of dtype Float, got Double",
        ),
        (
            lambda x, h, c, w, p: (x, h, c, [w[0], w[1][1:], *w[2:]], p),
            r"weight_hh of shape \[20, 5\], got \[19, 5\]",
        ),
        (
            lambda x, h, c, w, p: (x, h, c, [*w[:7], w[7][1:]], p),
            r"bias_hh of shape \[20\], got \[19\]",
        ),
        (lambda x, h, c, w, p: (x, h, c, w, p[:1]), "packed weights for none or each of 2 layers"),
        (lambda x, h, c, w, p: (x, h, c, w, [p[0].double(), p[1]]), "packed of dtype Float"),
        (lambda x, h, c, w, p: (x, h, c, w, [p[0][1:], p[1]]), "weights with I, H, P = 4, 5, 5"),
        (lambda x, h, c, w, p: (x, h, c, w, [p[0], p[0]]), "weights with I, H, P = 5, 5, 5"),
        (lambda x, h, c, w, p: (x[..., 1:], h, c, w, p), r"weight_ih of shape \[20, 3\]"),
        (lambda x, h, c, w, p: (x.int(), h, c, w, p), "(weight_ih|h_0) of dtype Int"),
    ],
)
def test_errors_of_layers(change, message):
    with pytest.raises(ValueError, match=r"llmkern\.lstm: expected .*" + message):
        torch.ops.llmkern.lstm_layers.default(*change(*layers_arguments(packs=True)))


def test_layers_packed_for_another_instruction_set_are_not_read():
    *arguments, packed = layers_arguments(packs=True)
    arguments[0], isa = torch.randn(2, 3, 4), torch.ops.llmkern.cpu_isa()
    torch.ops.llmkern.select_cpu_isa("generic")
    try:
        got = torch.ops.llmkern.lstm_layers.default(*arguments, packed)
        expected = torch.ops.llmkern.lstm_layers.default(*arguments, [])
    finally:
        torch.ops.llmkern.select_cpu_isa(isa)
    assert all(map(torch.equal, got, expected))


def test_opcheck_of_layers():
    for dtype in (torch.float32, torch.float64):
        arguments = layers_arguments(dtype, packs=True)
        torch.library.opcheck(torch.ops.llmkern.lstm_layers.default, arguments)
        x, h, c, parameters, packed = arguments
        unbatched = x[:, 0], h[:, 0], c[:, 0], parameters, packed, True
        torch.library.opcheck(torch.ops.llmkern.lstm_layers.default, unbatched)
