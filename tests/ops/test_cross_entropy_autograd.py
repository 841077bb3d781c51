# SPDX-License-Identifier: Apache-2.0
"""Linear cross entropy under autograd and the compiler: gradcheck, opcheck, partial passes, torch.compile."""

import pytest
import torch
import torch.utils.checkpoint
from torch.func import grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

import llmkern
from tests.conftest import assert_close
from tests.ops.test_cross_entropy import OPTIONS, REDUCTIONS, arguments_of, torch_loss

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = (5, 3, 4)
CODES = {"none": 0, "mean": 1, "sum": 2}


def positional(option, reduction, dtype=torch.float64):
    """Arguments of torch.ops.llmkern.linear_cross_entropy."""
    tensors, target, options = arguments_of(SHAPE, option, dtype)
    return (
        tensors["input"],
        tensors["linear_weight"],
        tensors.get("linear_bias"),
        target,
        options.get("weight"),
        CODES[reduction],
        options.get("ignore_index", -100),
        options.get("label_smoothing", 0.0),
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("option", range(len(OPTIONS)))
def test_gradcheck(option, reduction):
    tensors, target, options = arguments_of(SHAPE, option)

    def loss(*values):
        return llmkern.ops.linear_cross_entropy(
            **dict(zip(tensors, values, strict=True)), target=target, reduction=reduction, **options
        )

    assert torch.autograd.gradcheck(loss, [t.requires_grad_() for t in tensors.values()])


@pytest.mark.parametrize(("option", "reduction"), [(0, "none"), (4, "mean"), (1, "sum")])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_opcheck(requires_grad, option, reduction):
    input, weight, bias, *rest = positional(option, reduction, torch.float32)
    for tensor in (input, weight, bias):
        if tensor is not None:
            tensor.requires_grad_(requires_grad)
    torch.library.opcheck(
        torch.ops.llmkern.linear_cross_entropy.default, (input, weight, bias, *rest)
    )


@pytest.mark.parametrize("needs_weight", [True, False])
@pytest.mark.parametrize(("option", "reduction"), [(0, "none"), (4, "mean")])
def test_opcheck_of_the_backward(option, reduction, needs_weight):
    *tensors, code, ignore_index, smoothing = positional(option, reduction)
    loss, lse, total, _ = torch.ops.llmkern.linear_cross_entropy.default(
        *tensors, code, ignore_index, smoothing
    )
    needs = (True, needs_weight, tensors[2] is not None, False)
    arguments = (loss, *tensors, lse, total, code, ignore_index, smoothing, *needs)
    torch.library.opcheck(torch.ops.llmkern.linear_cross_entropy_backward.default, arguments)


@pytest.mark.parametrize("wanted", ["input", "linear_weight", "linear_bias"])
def test_backward_to_one_argument(wanted):
    tensors, target, options = arguments_of(SHAPE, 4)
    tensors[wanted].requires_grad_()
    grads = []
    for f in (llmkern.ops.linear_cross_entropy, torch_loss):
        tensors[wanted].grad = None
        f(**tensors, target=target, **options).backward()
        assert [k for k, t in tensors.items() if t.grad is not None] == [wanted]
        grads.append(tensors[wanted].grad)
    assert_close(*grads)


def test_nothing_requires_grad():
    tensors, target, _ = arguments_of(SHAPE, 1)
    assert not llmkern.ops.linear_cross_entropy(**tensors, target=target).requires_grad
    tensors["input"].requires_grad_()
    with torch.no_grad():
        assert not llmkern.ops.linear_cross_entropy(**tensors, target=target).requires_grad


def test_what_is_saved_is_not_differentiable():
    input, *rest = positional(0, "mean")
    outputs = torch.ops.llmkern.linear_cross_entropy.default(input.requires_grad_(), *rest)
    assert [t.requires_grad for t in outputs] == [True, False, False, False]


def test_retain_graph():
    tensors, target, options = arguments_of(SHAPE, 4)
    inputs = [t.requires_grad_() for t in tensors.values()]
    loss = llmkern.ops.linear_cross_entropy(**tensors, target=target, **options)
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    second = torch.autograd.grad(loss, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_within_a_checkpoint():
    """What is saved may be looked at once."""
    tensors, target, options = arguments_of(SHAPE, 0)
    values = [t.requires_grad_() for t in tensors.values()]

    def loss(*values):
        return llmkern.ops.linear_cross_entropy(
            **dict(zip(tensors, values, strict=True)), target=target, **options
        )

    again = torch.utils.checkpoint.checkpoint(loss, *values, use_reentrant=False)
    got, expected = (torch.autograd.grad(f, values) for f in (again, loss(*values)))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_target_changed_before_the_backward_pass():
    """The logits are computed again in the backward pass, so a changed argument must be noticed."""
    tensors, target, _ = arguments_of(SHAPE, 0)
    loss = llmkern.ops.linear_cross_entropy(
        tensors["input"].requires_grad_(), tensors["linear_weight"], target
    )
    target.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def loss_of(tensors, target, options):
    return llmkern.ops.linear_cross_entropy(**tensors, target=target, **options).square().sum()


def compiled_gradients(compiled, N, option, reduction):
    tensors, target, options = arguments_of((N, *SHAPE[1:]), option)
    call = (
        {k: t.requires_grad_() for k, t in tensors.items()},
        target,
        options | {"reduction": reduction},
    )
    inputs = list(tensors.values())
    got = torch.autograd.grad(compiled(*call), inputs)
    for a, b in zip(got, torch.autograd.grad(loss_of(*call), inputs), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize(("option", "reduction"), [(0, "none"), (4, "mean")])
def test_compile_without_recompiles_over_batch_sizes(option, reduction):
    torch.compiler.reset()
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager", dynamic=True)
    compiled_gradients(compiled, 6, option, reduction)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for N in (4, 9, 2):
            compiled_gradients(compiled, N, option, reduction)


def test_compile_static():
    torch.compiler.reset()
    compiled_gradients(torch.compile(loss_of, fullgraph=True, backend="aot_eager"), 5, 4, "sum")


# ---- graphs made by others: every one of them is the loss again, gradients included


def layer_and_batch(*, frozen=False):
    layer = llmkern.nn.LinearCrossEntropyLoss(*SHAPE[1:], bias=True, dtype=torch.float64)
    layer.requires_grad_(not frozen)
    return layer, (torch.randn(6, SHAPE[1]).double(), torch.randint(SHAPE[2], (6,)))


def assert_trains_as(layer, graph, batch):
    """One step of training through the graph and one through the layer, with other values than it was made with."""
    layer.requires_grad_()
    x, target = batch
    losses, grads = [], []
    for call in (layer, graph):
        layer.zero_grad()
        leaf = (x * 2 - 1).requires_grad_()
        loss = call(leaf, target.flip(0))
        loss.backward()
        losses.append(loss)
        grads.append([leaf.grad, *[p.grad.clone() for p in layer.parameters()]])
    assert_close(*losses)
    for a, b in zip(*grads, strict=True):
        assert_close(b, a)


traced = pytest.mark.filterwarnings(
    "ignore:`torch.jit.trace:DeprecationWarning", "ignore::torch.jit.TracerWarning"
)


@traced
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("recording", [False, True])
def test_trace_with_its_own_check(frozen, recording):
    layer, (x, target) = layer_and_batch(frozen=frozen)
    with torch.set_grad_enabled(recording):
        graph = torch.jit.trace(layer, (x.requires_grad_(recording), target))
    x = x.detach()
    assert_trains_as(layer, graph, (x, target))
    longer = torch.cat([x, x + 1]), torch.cat([target, target])
    assert_trains_as(layer, graph, longer)


@traced
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_trace_of_probabilities(reduction):
    layer, (x, _) = layer_and_batch()
    layer.reduction = reduction
    target = torch.randn(6, SHAPE[2]).double().softmax(-1)
    graph = torch.jit.trace(layer, (x, target))
    longer = torch.cat([x, x + 1]), torch.cat([target, target])
    assert_close(graph(*longer), layer(*longer))


@pytest.mark.parametrize("recording", [False, True])
def test_export(recording):
    layer, batch = layer_and_batch()
    with torch.set_grad_enabled(recording):
        graph = torch.export.export(layer, batch).module()
    parameters = dict(layer.named_parameters())
    for name, p in graph.named_parameters():
        p.data = parameters[name].data
        parameters[name].grad = p.grad = torch.zeros_like(p)
    x, target = batch
    for f in (layer, graph):
        f(x, target).backward()
    for name, p in graph.named_parameters():
        assert_close(p.grad, parameters[name].grad)


def test_graphs_of_transforms():
    """make_fx and the compiler, of gradients by torch.func."""
    tensors, target, options = arguments_of(SHAPE, 4)
    values = tuple(tensors.values())

    def loss(*values):
        return llmkern.ops.linear_cross_entropy(
            **dict(zip(tensors, values, strict=True)), target=target, **options
        )

    transforms = [
        loss,
        grad(loss, (0, 1, 2)),
        vmap(grad(loss, (0, 1)), in_dims=(None, None, 0)),
    ]
    for transform in transforms:
        call = (
            values
            if transform is not transforms[2]
            else (*values[:2], torch.stack([values[2]] * 3))
        )
        expected = tree_leaves(transform(*call))
        torch.compiler.reset()
        for graph in (
            make_fx(transform)(*call),
            torch.compile(transform, fullgraph=True, backend="aot_eager"),
        ):
            for a, b in zip(tree_leaves(graph(*call)), expected, strict=True):
                assert_close(a, b)


@pytest.mark.parametrize("wanted", ["input", "linear_weight"])
def test_compiled_with_frozen_arguments(wanted):
    torch.compiler.reset()
    tensors, target, options = arguments_of(SHAPE, 4)
    tensors[wanted].requires_grad_()
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    (got,) = torch.autograd.grad(compiled(tensors, target, options), tensors[wanted])
    assert_close(got, torch.autograd.grad(loss_of(tensors, target, options), tensors[wanted])[0])
