# SPDX-License-Identifier: Apache-2.0
"""LSTM under torch.func: vmap of every argument, per-sample gradients, jacobians, derivatives in forward mode."""

import copy

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, stack_module_state, vmap

import llmkern
from llmkern.ops.lstm import vmap as lstm_vmap
from tests.conftest import assert_close
from tests.ops.test_lstm import layer, torch_lstm
from tests.ops.test_lstm_variants import NAMES, named, problem

pytestmark = pytest.mark.usefixtures("one_thread")

# torch's own, the first time it is asked for derivatives in forward mode.
forward_mode = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")

N, T, B, I, H = 3, 5, 2, 4, 6  # noqa: E741
SHAPE = (T, B, I, H)


def assert_all_close(got, expected):
    got, expected = (torch.utils._pytree.tree_leaves(r) for r in (got, expected))
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b)


def loss_of(*arguments, **options):
    output, h_n, c_n = llmkern.ops.lstm(*arguments, **options)
    return output.square().sum() + h_n.sin().sum() - c_n.sum()


def mapped(arguments, dims):
    """N samples of those arguments that have a dimension to be mapped over, and the samples one by one."""
    stacked = [
        a if d is None else torch.stack([a + n / 9 for n in range(N)], d)
        for a, d in zip(arguments, dims, strict=True)
    ]
    samples = [
        [a if d is None else a.select(d, n) for a, d in zip(stacked, dims, strict=True)]
        for n in range(N)
    ]
    return stacked, samples


# Of input, h_0, c_0, the weights, the biases.
IN_DIMS = {
    "input": (0, *[None] * 6),
    "input, along its last dimension": (3, *[None] * 6),
    "states": (None, 1, 2, *[None] * 4),
    "input and states": (1, 0, 0, *[None] * 4),
    "a weight": (None, None, None, None, 0, None, None),
    "a bias": (0, None, None, None, None, 1, None),
    "everything": (2, 1, 0, 2, 1, 0, 1),
}


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dims", IN_DIMS.values(), ids=IN_DIMS)
def test_mapped_arguments(dims, reverse):
    """Outputs, and the gradients of every argument for every sample."""
    stacked, samples = mapped(layer(SHAPE), dims)

    def both(*arguments):
        outputs = llmkern.ops.lstm(*arguments, reverse=reverse)
        grads = grad(lambda *a: loss_of(*a, reverse=reverse), argnums=tuple(range(7)))(*arguments)
        return *outputs, *grads

    got = vmap(both, in_dims=dims)(*stacked)
    assert_all_close(got, [torch.stack(r) for r in zip(*[both(*s) for s in samples], strict=True)])


RESET = torch.arange(N * T * B).reshape(N, T, B) % 5 == 0
# Tensors, where they are mapped, and numbers.
OPTIONS = {
    "lengths": ({"lengths": torch.tensor([5, 2])}, None, {}),
    "mapped lengths": ({"lengths": torch.tensor([[5, 2], [0, 1], [3, 3]])}, 0, {}),
    "reset": ({"reset": RESET[0]}, None, {}),
    "mapped reset": ({"reset": RESET}, 0, {}),
    "zoneout": ({}, None, {"zoneout_h": 0.3, "zoneout_c": 0.5}),
    "zoneout by a seed": ({"seed": torch.tensor(3)}, None, {"zoneout_h": 0.3, "zoneout_c": 0.5}),
    "a mapped seed": ({"seed": torch.tensor([3, 1, 4])}, 0, {"zoneout_h": 0.3}),
}


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("options", "dim", "numbers"), OPTIONS.values(), ids=OPTIONS)
def test_options(options, dim, numbers, reverse):
    """With the same seed every sample has the same masks, those it would have alone."""
    stacked, samples = mapped(layer(SHAPE), IN_DIMS["input"])

    def both(arguments, options):
        def loss(*a):
            return loss_of(*a, **options, **numbers, reverse=reverse)

        return loss(*arguments), grad(loss, argnums=tuple(range(7)))(*arguments)

    got = vmap(both, in_dims=(list(IN_DIMS["input"]), dim))(stacked, options)
    each = [
        both(s, {name: o if dim is None else o[n] for name, o in options.items()})
        for n, s in enumerate(samples)
    ]
    losses, grads = zip(*each, strict=True)
    expected = torch.stack(losses), [torch.stack(g) for g in zip(*grads, strict=True)]
    assert_all_close(got, expected)


@pytest.mark.parametrize("chosen", [{"projection"}, {"layer_norm"}, set(NAMES)], ids=named)
def test_variants(chosen):
    """Per-sample gradients of what only some layers have."""
    leaves, options = problem((T, B, I, H, 3), chosen)
    leaves = {name: leaf.detach() for name, leaf in leaves.items()}
    x = leaves.pop("input")
    xs = torch.stack([x, -x, x / 2])

    def loss(leaves, x):
        return llmkern.ops.lstm(x, **leaves, **options)[0].square().sum()

    got = vmap(grad(loss, argnums=(0, 1)), in_dims=(None, 0))(leaves, xs)
    for n, x in enumerate(xs):
        expected = grad(loss, argnums=(0, 1))(leaves, x)
        assert_all_close(torch.utils._pytree.tree_map(lambda t, n=n: t[n], got), expected)


def twins(**options):
    ours = llmkern.nn.LSTM(I, H, dtype=torch.float64, **options)
    theirs = torch.nn.LSTM(I, H, dtype=torch.float64, **options)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("batched", [False, True])
def test_per_sample_gradients_of_a_model(batched):
    """As differential privacy takes them: the gradient of every parameter for every sample, in one call."""
    ours, theirs = twins(num_layers=2, bidirectional=True, batch_first=True)
    x = torch.randn(*(N, B, T, I) if batched else (N, T, I), dtype=torch.float64)

    def loss(parameters, x):
        return functional_call(ours, parameters, (x,))[0].square().sum()

    parameters = {name: p.detach() for name, p in ours.named_parameters()}
    got = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for n in range(N):
        theirs.zero_grad()
        theirs(x[n])[0].square().sum().backward()
        for name, p in theirs.named_parameters():
            assert_close(got[name][n], p.grad)


def test_per_sample_gradients_in_one_pass(monkeypatch):
    """Folded into the batch, not sample by sample."""
    calls = []
    original = lstm_vmap.one_by_one
    monkeypatch.setattr(lstm_vmap, "one_by_one", lambda *a: calls.append(1) or original(*a))
    x, *rest = layer(SHAPE)
    vmap(grad(loss_of, argnums=(0, 3, 4)), in_dims=(0, *[None] * 6))(x.expand(N, *x.shape), *rest)
    assert not calls


def test_gradient_of_a_mapped_layer():
    """The other order: vmap inside, the gradient outside, by torch.func and by backward()."""
    x, *rest = layer(SHAPE)
    xs = torch.stack([x, -x, x / 2])

    def total(w_hh):
        rest[3] = w_hh
        return vmap(lambda x: loss_of(x, *rest))(xs).sum()

    w_hh = rest[3].clone()
    got = grad(total)(w_hh)
    leaf = w_hh.clone().requires_grad_()
    total(leaf).backward()
    assert_close(leaf.grad, got)
    rest[3] = w_hh
    expected = sum(grad(loss_of, argnums=4)(x, *rest) for x in xs)
    assert_close(got, expected)


def test_ensemble():
    """Several models' parameters stacked."""
    models = [twins()[0] for _ in range(N)]
    parameters, buffers = stack_module_state(models)
    skeleton = copy.deepcopy(models[0]).to("meta")
    x = torch.randn(T, B, I, dtype=torch.float64)

    def run(parameters, buffers, x):
        return functional_call(skeleton, (parameters, buffers), (x,))

    got = vmap(run, in_dims=(0, 0, None))(parameters, buffers, x)
    for n, model in enumerate(models):
        assert_all_close([got[0][n], got[1][0][n], got[1][1][n]], model(x))


@pytest.mark.parametrize("argnum", range(7))
def test_jacrev(argnum):
    arguments = layer((3, 2, 2, 3))
    got = jacrev(lambda *a: llmkern.ops.lstm(*a), argnums=argnum)(*arguments)

    def of_one(f):
        def run(a):
            return f(*arguments[:argnum], a, *arguments[argnum + 1 :])

        return run

    assert_all_close(got, torch.autograd.functional.jacobian(of_one(torch_lstm), arguments[argnum]))


@forward_mode
def test_second_derivatives_by_every_road():
    """grad of grad, and hessian, whose outer derivative is taken in forward mode."""
    x, *rest = layer((3, 2, 2, 3))

    def loss(x):
        return loss_of(x, *rest)

    def torchs(x):
        output, h_n, c_n = torch_lstm(x, *rest)
        return output.square().sum() + h_n.sin().sum() - c_n.sum()

    expected = torch.autograd.functional.hessian(torchs, x)
    assert_close(hessian(loss)(x), expected)
    assert_close(jacrev(jacrev(loss))(x), expected)
    v = torch.randn_like(x)
    assert_close(grad(lambda x: (grad(loss)(x) * v).sum())(x), (expected * v).sum((-1, -2, -3)))


@forward_mode
def test_forward_mode():
    arguments = layer((3, 2, 2, 3))
    tangents = tuple(torch.randn_like(a) for a in arguments)
    _, got = jvp(llmkern.ops.lstm, arguments, tangents)
    jacobians = torch.autograd.functional.jacobian(torch_lstm, arguments)
    for ours, row in zip(got, jacobians, strict=True):
        terms = zip(row, tangents, strict=True)
        assert_close(ours, sum((j.flatten(-t.dim()) @ t.flatten()) for j, t in terms))


@forward_mode
def test_cell():
    cell, theirs = (m.LSTMCell(I, H, dtype=torch.float64) for m in (llmkern.nn, torch.nn))
    theirs.load_state_dict(cell.state_dict())
    x, h, c = (torch.randn(N, n, dtype=torch.float64) for n in (I, H, H))
    parameters = dict(cell.named_parameters())

    def loss(parameters, x, h, c):
        return functional_call(cell, parameters, (x, (h, c)))[0].square().sum()

    got = vmap(grad(loss, argnums=(0, 1)), in_dims=(None, 0, 0, 0))(parameters, x, h, c)
    for n in range(N):
        one = grad(loss, argnums=(0, 1))(parameters, x[n], h[n], c[n])
        assert_all_close({k: v[n] for k, v in got[0].items()}, one[0])
        assert_close(got[1][n], one[1])

    def along(module):
        return jvp(lambda x: module(x, (h, c)), (x,), (x.cos(),))[1]

    assert_all_close(along(cell), along(theirs))


@forward_mode
@pytest.mark.parametrize("name", ["LSTM", "LSTMCell"])
def test_dual_numbers(name):
    """The same without torch.func, among parameters that want gradients."""
    ours, theirs = (getattr(m, name)(I, H, dtype=torch.float64) for m in (llmkern.nn, torch.nn))
    theirs.load_state_dict(ours.state_dict())
    x, along = torch.randn(2, N, I, dtype=torch.float64)
    tangents = []
    for module in (ours, theirs):
        with forward_ad.dual_level():
            output = module(forward_ad.make_dual(x, along))[0]
            tangents.append(forward_ad.unpack_dual(output).tangent)
    assert_close(*tangents)


@pytest.mark.parametrize("steps", [1, 3])
def test_second_derivatives_of_a_loop_over_cells(steps):
    ours, theirs = (m.LSTMCell(I, H, dtype=torch.float64) for m in (llmkern.nn, torch.nn))
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(N, I, dtype=torch.float64, requires_grad=True)
    seconds = []
    for cell in (ours, theirs):
        state = None
        for _ in range(steps):
            state = cell(x, state)
        loss = state[0].square().sum() + state[1].sin().sum()
        wanted = [x, *cell.parameters()]
        first = torch.autograd.grad(loss, wanted, create_graph=True)
        seconds.append(torch.autograd.grad(sum(g.square().sum() for g in first), wanted))
    assert_all_close(*seconds)
