# SPDX-License-Identifier: Apache-2.0
"""llmkern.nn.LSTM under what torch offers any module: checkpoints, export, the compiler, autocast."""

import contextlib
import copy

import pytest
import torch
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import llmkern
from tests.conftest import assert_close

pytestmark = pytest.mark.usefixtures("one_thread")

T, B, I, H = 5, 3, 7, 9  # noqa: E741
LENGTHS = torch.tensor([5, 0, 3])


def twins(dtype=torch.float64, **options):
    ours = llmkern.nn.LSTM(I, H, dtype=dtype, **options)
    theirs = torch.nn.LSTM(I, H, dtype=dtype, **options)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def gradients(module, call, x):
    """The loss and its gradients of the input and of every parameter."""
    leaf = x.clone().requires_grad_()
    output, (h_n, c_n) = call(leaf)
    loss = output.square().sum() + h_n.sin().sum() - c_n.cos().sum()
    return [loss, *torch.autograd.grad(loss, [leaf, *module.parameters()])]


def assert_all_close(got, expected, tolerance=None):
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b, tolerance)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(use_reentrant):
    ours, theirs = twins(num_layers=2, bidirectional=True, dropout=0.3)
    x = torch.randn(T, B, I, dtype=torch.float64)
    results = []
    for module in (ours, theirs):
        torch.manual_seed(3)
        leaf = x.clone().requires_grad_()
        output, _ = checkpoint(module, leaf, use_reentrant=use_reentrant)
        output.square().sum().backward()
        results.append([output, leaf.grad, *[p.grad for p in module.parameters()]])
    assert_all_close(*results)


def test_second_derivatives_through_a_checkpoint():
    ours, theirs = twins()
    x = torch.randn(T, B, I, dtype=torch.float64)
    seconds = []
    for call in (lambda x: checkpoint(ours, x, use_reentrant=False), theirs):
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(call(leaf)[0].square().sum(), leaf, create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), leaf)[0])
    assert_close(*seconds)


@pytest.mark.parametrize("with_lengths", [False, True])
def test_export_and_run(tmp_path, with_lengths):
    """The exported program takes other batches and sequence lengths, also from its file."""
    ours, _ = twins(num_layers=2, bidirectional=True, batch_first=True)
    ours.eval()
    x = torch.randn(B, T, I, dtype=torch.float64)
    batch, time = torch.export.Dim("batch"), torch.export.Dim("time")
    shapes = {"input": {0: batch, 1: time}}
    kwargs = {"lengths": LENGTHS} if with_lengths else {}
    shapes |= {"lengths": {0: batch}} if with_lengths else {}
    program = torch.export.export(ours, (x,), kwargs, dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "lstm.pt2")
    loaded = torch.export.load(tmp_path / "lstm.pt2")
    for rows, steps in ((B, T), (1, 2), (6, 31)):
        x = torch.randn(rows, steps, I, dtype=torch.float64)
        kwargs = {"lengths": torch.arange(rows) % (steps + 1)} if with_lengths else {}
        expected, state = ours(x, **kwargs)
        for exported in (program, loaded):
            output, got = exported.module()(x, **kwargs)
            assert torch.equal(output, expected)
            assert all(torch.equal(a, b) for a, b in zip(got, state, strict=True))


def test_export_for_training():
    """Gradients flow through an exported program."""
    ours, theirs = twins()
    x = torch.randn(T, B, I, dtype=torch.float64)
    trained = torch.export.export(ours, (x,)).module()
    assert_all_close(gradients(trained, trained, x), gradients(theirs, theirs, x))


@pytest.mark.parametrize("with_lengths", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_over_varying_lengths_of_the_sequence(backend, with_lengths):
    torch.compiler.reset()
    ours, _ = twins(num_layers=2, bidirectional=True)
    compiled = torch.compile(ours, fullgraph=True, backend=backend, dynamic=True)

    def check(steps):
        x = torch.randn(steps, B, I, dtype=torch.float64)
        options = {"lengths": LENGTHS.clamp(max=steps)} if with_lengths else {}
        got = gradients(ours, lambda x: compiled(x, **options), x)
        assert_all_close(got, gradients(ours, lambda x: ours(x, **options), x))

    check(4)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for steps in (6, 40, 2):
            check(steps)


def test_compile_without_being_told_about_dynamic_shapes():
    """The second length makes the compiler generalise; a third compilation is one too many."""
    torch.compiler.reset()
    ours, _ = twins()
    count = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours, fullgraph=True, backend=count)
    for steps in (4, 6, 40, 2, 9):
        x = torch.randn(steps, B, I, dtype=torch.float64)
        assert_all_close(gradients(ours, compiled, x), gradients(ours, ours, x))
    assert count.frame_count <= 2


def test_a_compiled_step_of_decoding_takes_no_stale_weights():
    """A single step keeps packed weights outside of the compiler; inside it must see every change."""
    torch.compiler.reset()
    ours, theirs = twins()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 1, I, dtype=torch.float64)
    with torch.no_grad():
        for _ in range(3):
            assert_close(compiled(x)[0], theirs(x)[0])
            assert_close(ours(x)[0], theirs(x)[0])
            for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
                q.copy_(p.mul_(0.9))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_on_the_cpu(dtype):
    """The layer runs in the region's dtype, as the products around it; gradients are the parameters' own."""
    ours, _ = twins(torch.float32)
    linear = torch.nn.Linear(I, I)
    x = torch.randn(T, B, I)
    with torch.autocast("cpu", dtype=dtype):
        output, (h_n, c_n) = ours(linear(x))
        loss = linear(output[..., :I]).float().square().sum()
    assert output.dtype == h_n.dtype == c_n.dtype == dtype
    expected, _ = copy.deepcopy(ours).to(dtype)(linear(x).to(dtype))
    assert_close(output, expected, 4 * torch.finfo(dtype).eps)
    grads = torch.autograd.grad(loss, [*ours.parameters(), *linear.parameters()])
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads)


def test_backward_in_evaluation_mode():
    """cuDNN has no such thing; the input's gradient of a trained model is wanted all the same."""
    ours, theirs = twins(num_layers=2, dropout=0.5)
    x = torch.randn(T, B, I, dtype=torch.float64)
    ours.eval()
    theirs.eval()
    assert_all_close(gradients(ours, ours, x), gradients(theirs, theirs, x))


def test_deterministic_mode():
    ours, theirs = twins(num_layers=2, bidirectional=True)
    x = torch.randn(T, B, I, dtype=torch.float64)
    expected = gradients(ours, ours, x)
    with contextlib.ExitStack() as stack:
        stack.callback(torch.use_deterministic_algorithms, False)
        torch.use_deterministic_algorithms(True)
        for _ in range(2):
            got = gradients(ours, ours, x)
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert_all_close(expected, gradients(theirs, theirs, x))


def test_functional_call():
    ours, theirs = twins(num_layers=2)
    parameters = {n: (p * 0.7).detach().requires_grad_() for n, p in ours.named_parameters()}
    x = torch.randn(1, 2, I, dtype=torch.float64)
    ours(x)  # few rows: packed weights of the module's own parameters are kept now
    grads = []
    for module in (ours, theirs):
        output, _ = functional_call(module, parameters, (x,))
        grads.append([output, *torch.autograd.grad(output.sum(), list(parameters.values()))])
    assert_all_close(*grads)


def test_aot_functions():
    """Forward and backward traced ahead of time into graphs that call the two operators."""
    from functorch.compile import aot_function, make_boxed_func

    ours, _ = twins()
    graphs = []

    def keep(graph, _):
        graphs.append(graph.code)
        return make_boxed_func(graph)

    names = [n for n, _ in ours.named_parameters()]

    def run(x, *values):
        return functional_call(ours, dict(zip(names, values, strict=True)), (x,))[0]

    traced = aot_function(run, fw_compiler=keep, bw_compiler=keep)
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    arguments = [x, *ours.parameters()]
    got = torch.autograd.grad(traced(*arguments).square().sum(), arguments)
    assert_all_close(got, torch.autograd.grad(run(*arguments).square().sum(), arguments))
    assert "llmkern.lstm.default" in graphs[0] and "llmkern.lstm_backward.default" in graphs[1]
