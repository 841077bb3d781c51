# SPDX-License-Identifier: Apache-2.0
"""LSTM layer under autograd and the compiler: gradcheck, opcheck, partial and repeated passes, torch.compile."""

import pytest
import torch

import llmkern
from tests.conftest import assert_close
from tests.ops.test_lstm import layer, run, torch_lstm, upstream_of
from tests.ops.test_lstm_variants import NAMES as VARIANTS
from tests.ops.test_lstm_variants import named, problem

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = (3, 2, 4, 5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("reverse", [False, True])
def test_gradcheck(reverse, bias):
    arguments = [t.requires_grad_() for t in layer(SHAPE, bias)]
    assert torch.autograd.gradcheck(lambda *a: llmkern.ops.lstm(*a, reverse=reverse), arguments)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_opcheck(requires_grad, bias):
    arguments = [t.requires_grad_(requires_grad) for t in layer(SHAPE, bias, dtype=torch.float32)]
    arguments += [] if bias else [None, None]
    options = {"reverse": True, "save_cells": True, "save_gates": True}
    torch.library.opcheck(torch.ops.llmkern.lstm.default, tuple(arguments), options)


def test_opcheck_of_the_backward():
    x, h_0, c_0, w_ih, w_hh = layer(SHAPE, bias=False)
    output, _, _, cells, *saved = torch.ops.llmkern.lstm.default(
        x, h_0, c_0, w_ih, w_hh, save_cells=True, save_gates=True
    )
    rest = (x, h_0, c_0, w_ih, w_hh, *[None] * 8, output, cells, *saved)
    backward = torch.ops.llmkern.lstm_backward.default
    for gradients in ((output, h_0, c_0, cells), (None, h_0, None, None), (None,) * 4):
        for weights in (True, False):
            torch.library.opcheck(backward, (*gradients, *rest), {"weights": weights})
    for gradient in backward(*[None] * 4, *rest):
        assert gradient.count_nonzero() == 0


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_backward_from_some_outputs(used):
    arguments, upstream = layer(SHAPE), upstream_of(SHAPE)

    def some(f):
        return lambda *a: [f(*a)[i] for i in used]

    upstream = [upstream[i] for i in used]
    for a, b in zip(
        run(some(llmkern.ops.lstm), arguments, upstream),
        run(some(torch_lstm), arguments, upstream),
        strict=True,
    ):
        assert_close(a, b)


@pytest.mark.parametrize("wanted", range(7))
def test_backward_to_one_argument(wanted):
    arguments, (upstream, _, _) = layer(SHAPE), upstream_of(SHAPE)
    arguments[wanted].requires_grad_()
    grads = []
    for f in (llmkern.ops.lstm, torch_lstm):
        arguments[wanted].grad = None
        f(*arguments)[0].backward(upstream)
        assert [t.grad is not None for t in arguments] == [i == wanted for i in range(7)]
        grads.append(arguments[wanted].grad)
    assert_close(*grads)


def test_nothing_requires_grad():
    assert not any(t.requires_grad for t in llmkern.ops.lstm(*layer(SHAPE)))
    arguments = [t.requires_grad_() for t in layer(SHAPE)]
    with torch.no_grad():
        assert not any(t.requires_grad for t in llmkern.ops.lstm(*arguments))
    with torch.inference_mode():
        assert llmkern.ops.lstm(*arguments)[0].is_inference()


def test_what_is_saved_is_not_differentiable():
    arguments = [t.requires_grad_() for t in layer(SHAPE)]
    outputs = torch.ops.llmkern.lstm.default(*arguments, save_cells=True, save_gates=True)
    assert [t.requires_grad for t in outputs] == [True] * 4 + [False] * 3


def test_retain_graph():
    arguments, upstream = [t.requires_grad_() for t in layer(SHAPE)], upstream_of(SHAPE)
    outputs = llmkern.ops.lstm(*arguments)
    first = torch.autograd.grad(outputs, arguments, upstream, retain_graph=True)
    second = torch.autograd.grad(outputs, arguments, upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_biases_do_not_share_their_gradient():
    """They are equal; clipping both in place must not clip one tensor twice."""
    arguments = [t.requires_grad_() for t in layer(SHAPE)]
    bias_ih, bias_hh = torch.autograd.grad(llmkern.ops.lstm(*arguments)[0].sum(), arguments[5:])
    assert torch.equal(bias_ih, bias_hh)
    bias_ih.zero_()
    assert bias_hh.count_nonzero() > 0


def test_output_changed_before_the_backward_pass():
    """The output is saved; changing it must be noticed, not give a wrong gradient."""
    arguments = [t.requires_grad_() for t in layer(SHAPE)]
    output, h_n, _ = llmkern.ops.lstm(*arguments)
    output.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h_n.sum().backward()


def loss_of(*arguments):
    output, h_n, c_n = llmkern.ops.lstm(*arguments)
    return output.square().sum() + h_n.sum() - c_n.sum()


def compiled_gradients(compiled, T):
    arguments = [t.requires_grad_() for t in layer((T, *SHAPE[1:]))]
    got = torch.autograd.grad(compiled(*arguments), arguments)
    for a, b in zip(got, torch.autograd.grad(loss_of(*arguments), arguments), strict=True):
        assert_close(a, b)


def test_compile_without_recompiles_over_sequence_lengths():
    torch.compiler.reset()
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager", dynamic=True)
    compiled_gradients(compiled, 3)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for T in (4, 9, 2):
            compiled_gradients(compiled, T)


@pytest.mark.parametrize("reverse", [False, True])
def test_compile_of_every_variant_without_recompiles(reverse):
    """Lengths, resets, masks of zoneout and a projection among the arguments, other ones at every call."""
    torch.compiler.reset()

    def loss(leaves, options):
        outputs = llmkern.ops.lstm(**leaves, **options, reverse=reverse, return_cells=True)
        return sum(o.square().sum() for o in outputs)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)

    def check(T):
        leaves, options = problem((T, 5, 4, 6, 2), set(VARIANTS))
        options["seed"] = torch.tensor(T)
        values = list(leaves.values())
        got = torch.autograd.grad(compiled(leaves, options), values)
        for a, b in zip(got, torch.autograd.grad(loss(leaves, options), values), strict=True):
            assert_close(a, b)

    check(3)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for T in (7, 9, 8):
            check(T)


@pytest.mark.parametrize("chosen", [{"projection"}, {"layer_norm"}, set(VARIANTS)], ids=named)
def test_opcheck_of_variants(chosen):
    leaves, options = problem((3, 2, 4, 5, 2), chosen)
    options |= {"reverse": True, "save_cells": True, "save_gates": True}
    torch.library.opcheck(torch.ops.llmkern.lstm.default, (), {**leaves, **options})


def test_compile_static():
    torch.compiler.reset()
    compiled_gradients(torch.compile(loss_of, fullgraph=True, backend="aot_eager"), 3)


def test_compile_of_one_output():
    """The compiler prunes what nobody uses, and hands zeros or nothing for its gradient."""
    torch.compiler.reset()

    def h_n_of(*arguments):
        return llmkern.ops.lstm(*arguments)[1:2]

    compiled = torch.compile(h_n_of, fullgraph=True, backend="aot_eager")
    arguments, upstream = layer(SHAPE), upstream_of(SHAPE)[1:2]
    eager = run(h_n_of, arguments, upstream)
    for a, b in zip(run(compiled, arguments, upstream), eager, strict=True):
        assert torch.equal(a, b)
