# SPDX-License-Identifier: Apache-2.0
"""Derivatives in forward mode through every variant of the layer, against differences; none is silently zero."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, jvp
from torch.nn.utils.rnn import pack_padded_sequence

import llmkern
from tests.conftest import assert_close

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Of torch: formulas that forward mode decomposes are compiled by the deprecated torch.jit.script.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
T, B, I, H = 4, 3, 2, 5  # noqa: E741

# Options of the layer, arguments of the call.
VARIANTS = {
    "plain": ({}, {}),
    "no bias": ({"bias": False}, {}),
    "two layers, both ways": ({"num_layers": 2, "bidirectional": True}, {}),
    "batch first": ({"batch_first": True}, {}),
    "projection": ({"proj_size": 3}, {}),
    "layer norm": ({"layer_norm": True}, {}),
    "zoneout": ({"zoneout_h": 0.3, "zoneout_c": 0.4}, {}),
    "dropout": ({"num_layers": 2, "dropout": 0.4}, {}),
    "locked dropout": ({"num_layers": 2, "dropout": 0.4, "locked_dropout": True}, {}),
    "weight dropout": ({"weight_dropout": 0.4}, {}),
    "recompute": ({"recompute": True}, {}),
    "reset": ({}, {"reset": torch.arange(T * B).view(T, B) % 5 == 3}),
    "lengths": ({"bidirectional": True}, {"lengths": torch.tensor([4, 0, 2])}),
    "cells": ({"bidirectional": True}, {"return_cells": True}),
    "packed": ({"bidirectional": True}, {"packed": torch.tensor([4, 1, 2])}),
}
VARIANTS["together"] = (
    {"proj_size": 3, "layer_norm": True, "zoneout_h": 0.3, "weight_dropout": 0.4, "num_layers": 2},
    {"reset": VARIANTS["reset"][1]["reset"], "lengths": torch.tensor([4, 0, 2])},
)


def run(module, parameters, x, hx, options):
    """The results as a flat tuple; with the same masks at every call."""
    torch.manual_seed(5)
    options = dict(options)
    lengths = options.pop("packed", None)
    if lengths is not None:  # torch's own packing has no derivative in forward mode, and says so
        packed = pack_padded_sequence(torch.zeros(T, B, I), lengths, enforce_sorted=False)
        x = packed._replace(data=x.flatten(0, 1)[: len(packed.data)])
    output, (h_n, c_n), *cells = functional_call(module, parameters, (x, hx), options)
    return (output if lengths is None else output.data, h_n, c_n, *cells)


def problem(name):
    layer, options = VARIANTS[name]
    module = llmkern.nn.LSTM(I, H, dtype=torch.float64, **layer)
    layers = len(module._all_weights)
    x = torch.randn(T, B, I, dtype=torch.float64)
    if module.batch_first:
        x = x.transpose(0, 1)
    hx = tuple(torch.randn(layers, B, n, dtype=torch.float64) for n in (module.proj_size or H, H))
    parameters = {n: p.detach() for n, p in module.named_parameters()}
    return (lambda *a: run(module, *a, options)), (parameters, x, hx)


def differences(f, at, along, step=1e-6):
    """(f(at + step * along) - f(at - step * along)) / (2 * step)."""
    move = torch.utils._pytree.tree_map
    ahead, behind = (f(*move(lambda a, t, s=s: a + s * t, at, along)) for s in (step, -step))
    return [(a - b) / (2 * step) for a, b in zip(ahead, behind, strict=True)]


@pytest.mark.parametrize("name", VARIANTS)
def test_layer(name):
    f, at = problem(name)
    along = torch.utils._pytree.tree_map(torch.randn_like, at)
    _, tangents = jvp(f, at, along)
    for got, expected in zip(tangents, differences(f, at, along), strict=True):
        assert expected.abs().max() > 1e-3
        assert_close(got, expected, 1e-7)


@pytest.mark.parametrize("name", VARIANTS)
def test_layer_at_a_dual_number(name):
    """Without torch.func; along the input alone, and along one weight alone."""
    f, (parameters, x, hx) = problem(name)
    weight = next(n for n in parameters if n.startswith("weight_hh"))
    for chosen in ("x", weight):
        plain = x if chosen == "x" else parameters[weight]
        along = torch.randn_like(plain)

        def of_chosen(value, chosen=chosen):
            if chosen == "x":
                return f(parameters, value, hx)
            return f(parameters | {weight: value}, x, hx)

        with forward_ad.dual_level():
            results = of_chosen(forward_ad.make_dual(plain, along))
            tangents = [forward_ad.unpack_dual(t).tangent for t in results]
        expected = differences(of_chosen, (plain,), (along,))
        for got, truth in zip(tangents, expected, strict=True):
            assert_close(got, truth, 1e-7)


# ---- operators without a derivative


def calls_of(logits):
    """Operators whose results are numbers, not tokens alone."""
    ops, three = llmkern.ops, logits.expand(1, 2, -1)
    drafts = torch.zeros(1, 1, dtype=torch.int64)
    return {
        "sample": lambda: ops.sample(logits, seed=1).logprob,
        "filter_logits": lambda: ops.filter_logits(logits, top_k=3),
        "temperature": lambda: ops.filter_logits(torch.zeros(2, 7), temperature=logits[:2].exp()),
        "bias": lambda: ops.filter_logits(torch.zeros(2, 7), logit_bias=logits),
        "beam_search_step": lambda: ops.beam_search_step(three, torch.zeros(1, 2)).score,
        "scores": lambda: ops.beam_search_step(torch.zeros(1, 2, 7), logits[None, :2]).score,
        "speculative_verify": lambda: ops.speculative_verify(drafts, None, three, seed=1)[2],
    }


NUMBERS = [*calls_of(torch.zeros(7))]


@pytest.mark.parametrize("name", NUMBERS)
def test_no_derivative_is_no_zero(name):
    """An error under the transforms and in forward mode, results without a gradient under autograd."""
    logits = torch.randn(7)

    def loss(logits):
        return calls_of(logits)[name]().sum()

    for transformed in (
        lambda: jvp(loss, (logits,), (logits,)),
        lambda: torch.func.grad(loss)(logits),
        lambda: torch.func.vjp(loss, logits),
        lambda: torch.func.jacfwd(loss)(logits),
    ):
        with pytest.raises(NotImplementedError, match=r"there is no derivative: pass .*detach"):
            transformed()
    with (
        forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match=r"expected .* that nobody differentiates"),
    ):
        loss(forward_ad.make_dual(logits, logits))
    assert not loss(logits.clone().requires_grad_()).requires_grad


@pytest.mark.parametrize("name", NUMBERS)
def test_whoever_detaches_may_draw_within_a_transform(name):
    logits = torch.randn(7)

    def loss(logits):
        return calls_of(logits.detach())[name]().nan_to_num(0, 0, 0).sum() * logits.sum()

    assert torch.func.grad(loss)(logits).isfinite().all()
    assert jvp(loss, (logits,), (logits,))[1].isfinite()


# ---- where forward mode meets reverse mode


@pytest.mark.parametrize(
    "name", ["plain", "projection", "layer norm", "reset", "lengths", "together"]
)
def test_a_gradient_of_a_dual_number(name):
    """The gradient is linear in what comes from above: its tangent along a change of that."""
    f, (parameters, x, hx) = problem(name)
    x = x.clone().requires_grad_()
    parameters = {n: p.clone().requires_grad_() for n, p in parameters.items()}
    output, *_ = f(parameters, x, hx)
    wanted = [x, *parameters.values()]
    upstream, along = torch.randn_like(output), torch.randn_like(output)
    expected = torch.autograd.grad(output, wanted, along, retain_graph=True)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(upstream, along)
        grads = torch.autograd.grad(output, wanted, dual)
        tangents = [forward_ad.unpack_dual(g).tangent for g in grads]
    for got, truth in zip(tangents, expected, strict=True):
        assert_close(got, truth)


def test_a_gradient_of_a_dual_number_through_a_loop_over_a_cell():
    cell = llmkern.nn.LSTMCell(I, H, dtype=torch.float64)
    x = torch.randn(B, I, dtype=torch.float64, requires_grad=True)
    output = cell(x, cell(x))[0]
    wanted = [x, *cell.parameters()]
    upstream, along = torch.randn_like(output), torch.randn_like(output)
    expected = torch.autograd.grad(output, wanted, along, retain_graph=True)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(upstream, along)
        grads = torch.autograd.grad(output, wanted, dual)
        tangents = [forward_ad.unpack_dual(g).tangent for g in grads]
    for got, truth in zip(tangents, expected, strict=True):
        assert_close(got, truth)


@pytest.mark.parametrize("name", ["plain", "together", "loss"])
def test_jvp_of_a_vjp(name):
    """A pullback within a transform that began when the pullback's own had ended."""
    if name == "loss":
        x, weight, target = torch.randn(5, 3), torch.randn(7, 3), torch.arange(5)
        output, pullback = torch.func.vjp(
            lambda x: llmkern.ops.linear_cross_entropy(x, weight, target, reduction="none"), x
        )
    else:
        f, (parameters, x, hx) = problem(name)
        output, pullback = torch.func.vjp(lambda x: f(parameters, x, hx)[0], x)
    upstream, along = torch.randn_like(output), torch.randn_like(output)
    _, (tangent,) = jvp(pullback, (upstream,), (along,))
    assert_close(tangent, pullback(along)[0])


@pytest.mark.parametrize("mode", ["grad", "no_grad"])
def test_what_was_recorded_of_a_layer_raises(mode):
    """An exported program calls the operator itself, which has no rule for forward mode."""
    layer = llmkern.nn.LSTM(I, H)
    x = torch.randn(T, B, I)
    program = torch.export.export(layer, (x,)).module()
    with (
        torch.set_grad_enabled(mode == "grad"),
        forward_ad.dual_level(),
        pytest.raises((NotImplementedError, RuntimeError), match=r"forward mode|forward AD"),
    ):
        program(forward_ad.make_dual(x, x))
    assert program(x)[0].shape == (T, B, H)
