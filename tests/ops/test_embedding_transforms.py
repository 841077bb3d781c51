# SPDX-License-Identifier: Apache-2.0
"""Embedding in forward mode and under torch.func: against torch's own operator and against loops."""

import pytest
import torch
import torch.fx.experimental.proxy_tensor
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import llmkern
from tests.conftest import assert_close

# torch's own, the first time it is asked for derivatives in forward mode.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

N, V, D = 4, 7, 3
OPTIONS = [
    {},
    {"padding_idx": 2},
    {"scale_grad_by_freq": True},
    {"padding_idx": -1, "scale_grad_by_freq": True},
]
IDS = torch.tensor([[1, 2, 2], [6, 0, 2]])
MAPPED_IDS = torch.tensor([[1, 2, 2, 0, 2], [6, 6, 6, 6, 6], [0, 1, 2, 3, 4], [2, 2, 6, 6, 0]])


def tables(*shape):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(*shape, V, D, dtype=torch.float64, generator=generator)


def ours(ids, table, **options):
    return llmkern.ops.embedding(ids, table, **options)


def loss_of(gather, ids, table, **options):
    return gather(ids, table, **options).sin().square().sum()


def test_a_tangent_by_hand():
    """Not the silent zero that a gradient registered with torch.library has."""
    table, tangent = torch.arange(6.0).reshape(3, 2), torch.tensor([[1.0, 2.0], [3.0, 4.0], [5, 6]])
    ids = torch.tensor([2, 2, 1])
    output, got = jvp(lambda t: ours(ids, t), (table,), (tangent,))
    assert output.tolist() == [[4, 5], [4, 5], [2, 3]]
    assert got.tolist() == [[5, 6], [5, 6], [3, 4]]
    _, total = jvp(lambda t: (ours(ids, t) * torch.tensor([1.0, 0.0])).sum(), (table,), (tangent,))
    assert total == 13


@pytest.mark.parametrize("call", [ours, llmkern.nn.Embedding], ids=["function", "layer"])
def test_dual_numbers(call):
    table, tangent = tables(2)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(table, tangent)
        if call is ours:
            output = ours(IDS, dual)
        else:
            layer = llmkern.nn.Embedding(V, D, dtype=torch.float64)
            output = torch.func.functional_call(layer, {"weight": dual}, (IDS,))
        primal, got = forward_ad.unpack_dual(output)
    assert torch.equal(primal, table[IDS])
    assert torch.equal(got, tangent[IDS])


@pytest.mark.parametrize("options", [{}, {"padding_idx": 2}], ids=str)
def test_gradcheck_in_every_mode(options):
    """scale_grad_by_freq has no place here: what it makes is no gradient of the gather."""
    table = tables().requires_grad_()
    ids = IDS if not options else IDS[IDS != 2]  # nor has a padding row that occurs
    f = lambda t: ours(ids, t, **options).sin()  # noqa: E731
    modes = {"check_forward_ad": True, "check_batched_grad": True}
    assert torch.autograd.gradcheck(f, table, check_batched_forward_grad=True, **modes)
    assert torch.autograd.gradgradcheck(f, table, check_fwd_over_rev=True, check_rev_over_rev=True)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_backward_in_every_mode(options):
    """It is linear in its gradient whatever the options."""
    gradient = torch.randn(2, 3, D, dtype=torch.float64, requires_grad=True)
    table = tables()

    def backward(g):
        return vjp(lambda t: ours(IDS, t, **options), table)[1](g)[0]

    tangent = torch.randn_like(gradient)
    _, got = jvp(backward, (gradient.detach(),), (tangent,))
    assert_close(got, backward(tangent))
    matrix = jacrev(backward)(gradient.detach()).reshape(V * D, -1)
    assert_close(matrix, jacfwd(backward)(gradient.detach()).reshape(V * D, -1))
    assert_close(matrix @ tangent.flatten(), got.flatten())


@pytest.mark.parametrize("options", [{}, {"padding_idx": 2}], ids=str)
def test_second_derivatives_are_torchs(options):
    table, tangent = tables(2)

    def results(gather):
        loss = lambda t: loss_of(gather, IDS, t, **options)  # noqa: E731
        return (
            jvp(grad(loss), (table,), (tangent,))[1],
            grad(lambda t: jvp(loss, (t,), (tangent,))[1])(table),
            hessian(loss)(table),
            jacrev(jacrev(loss))(table),
            jacfwd(jacfwd(loss))(table),
            jacrev(jacfwd(loss))(table),
            jacrev(lambda t: gather(IDS, t, **options))(table),
            jacfwd(lambda t: gather(IDS, t, **options))(table),
        )

    for got, expected in zip(results(ours), results(F.embedding), strict=True):
        assert expected.abs().max() > 0
        assert_close(got, expected)


# Where the ids and the table are mapped.
IN_DIMS = [(0, None), (1, None), (None, 0), (None, 1), (0, 0), (1, 2)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dims", IN_DIMS, ids=str)
def test_mapped_arguments(dims, options):
    """Outputs, gradients, and the gradients of the gradients, against a loop."""
    ids = MAPPED_IDS.movedim(0, dims[0]) if dims[0] is not None else MAPPED_IDS[0]
    table = tables(N).movedim(0, dims[1]) if dims[1] is not None else tables()
    each = [
        [a if at is None else a.select(at, n) for a, at in zip((ids, table), dims, strict=True)]
        for n in range(N)
    ]

    def results(ids, table):
        loss = lambda t: loss_of(ours, ids, t, **options)  # noqa: E731
        twice = grad(lambda t: grad(loss)(t).cos().sum())
        return ours(ids, table, **options), grad(loss)(table), twice(table)

    got = vmap(results, in_dims=dims)(ids, table)
    expected = zip(*[results(*sample) for sample in each], strict=True)
    for ours_, loops in zip(got, expected, strict=True):
        assert_close(ours_, torch.stack(loops))


def test_per_sample_gradients_have_the_bits_of_a_loop():
    table = tables().float()
    per_sample = vmap(grad(lambda t, ids: loss_of(ours, ids, t)), in_dims=(None, 0))
    alone = [grad(lambda t: loss_of(ours, ids, t))(table) for ids in MAPPED_IDS]  # noqa: B023
    assert torch.equal(per_sample(table, MAPPED_IDS), torch.stack(alone))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_transforms_of_16_bits(dtype):
    table, tangent = tables(2).to(dtype)
    _, got = jvp(lambda t: ours(IDS, t), (table,), (tangent,))
    assert got.dtype == dtype
    assert torch.equal(got, tangent[IDS])
    grads = vmap(grad(lambda t, ids: ours(ids, t).float().sum()), (None, 0))(table, MAPPED_IDS)
    counts = torch.stack([torch.bincount(ids, minlength=V) for ids in MAPPED_IDS])
    assert torch.equal(grads, counts[..., None].expand(N, V, D).to(dtype))


def test_the_operators_themselves_under_vmap():
    table, gradient = tables(), torch.randn(N, 5, D, dtype=torch.float64)
    gather, scatter = (
        torch.ops.llmkern.embedding.default,
        torch.ops.llmkern.embedding_backward.default,
    )
    got = vmap(lambda ids: gather(ids, table, -1, False))(MAPPED_IDS)
    assert torch.equal(got, table[MAPPED_IDS])
    got = vmap(lambda g, ids: scatter(g, ids, V, 2, True))(gradient, MAPPED_IDS)
    loop = [scatter(g, ids, V, 2, True) for g, ids in zip(gradient, MAPPED_IDS, strict=True)]
    assert torch.equal(got, torch.stack(loop))
    got = vmap(lambda g: scatter(g, MAPPED_IDS[0], V, 2, True))(gradient)
    assert_close(got, torch.stack([scatter(g, MAPPED_IDS[0], V, 2, True) for g in gradient]))
    got = vmap(lambda ids: scatter(gradient[0], ids, V, 2, True))(MAPPED_IDS)
    assert_close(got, torch.stack([scatter(gradient[0], ids, V, 2, True) for ids in MAPPED_IDS]))


def test_an_id_of_a_sample_never_means_a_row_of_another():
    wrong = MAPPED_IDS.clone()
    wrong[1, 3] = V  # of sample 2, were the tables one
    scatter = torch.ops.llmkern.embedding_backward.default
    with pytest.raises(IndexError, match=r"llmkern\.embedding: expected ids in"):
        vmap(lambda ids: scatter(torch.ones(5, D), ids, V, -1, False))(wrong)
    with pytest.raises(IndexError, match=r"\[0, 7\), got 7 at position \[1, 3\]"):
        vmap(grad(lambda t, ids: ours(ids, t).sum()), (None, 0))(tables(), wrong)


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: grad(f),
        lambda f: lambda t: jvp(f, (t,), (t.cos(),))[1],
        lambda f: lambda t: vmap(grad(f))(torch.stack([t, t.sin()])),
    ],
    ids=["grad", "jvp", "vmap of grad"],
)
def test_compiled_and_traced_transforms(transform):
    table = tables()
    f = transform(lambda t: loss_of(ours, IDS, t, padding_idx=2))
    expected = f(table)
    graph = torch.fx.experimental.proxy_tensor.make_fx(f)(table)
    assert any(node.target is torch.ops.llmkern.embedding.default for node in graph.graph.nodes)
    assert torch.equal(graph(table), expected)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(table), expected)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_dual_numbers(backend):
    def tangent_of(table, tangent):
        with forward_ad.dual_level():
            output = ours(IDS, forward_ad.make_dual(table, tangent))
            return forward_ad.unpack_dual(output).tangent

    table, tangent = tables(2)
    compiled = torch.compile(tangent_of, fullgraph=True, backend=backend)
    assert torch.equal(compiled(table, tangent), tangent[IDS])


@pytest.mark.parametrize("gradients", [False, True])
def test_a_graph_records_the_operator_and_nothing_else(gradients):
    table = tables().requires_grad_(gradients)
    graph = torch.fx.experimental.proxy_tensor.make_fx(lambda t: ours(IDS, t))(table).graph
    called = [node.target for node in graph.nodes if node.op == "call_function"]
    assert called == [torch.ops.llmkern.embedding.default]


def test_a_trace_made_without_gradients_can_be_trained():
    layer = llmkern.nn.Embedding(V, D, padding_idx=2)
    with torch.no_grad():
        traced = torch.jit.trace(layer, (IDS,))
    exported = torch.export.export(layer, (IDS,)).module()
    for module in (traced, exported):
        layer.weight.grad = None
        module(IDS).square().sum().backward()
        weight = layer.weight if module is traced else module.weight
        expected = torch.autograd.grad(layer(IDS).square().sum(), layer.weight)[0]
        assert torch.equal(weight.grad, expected)


def test_a_frozen_table_has_no_backward():
    table = tables()
    scale = torch.ones(D, dtype=torch.float64, requires_grad=True)
    with torch.autograd.profiler.profile() as profile:
        (ours(IDS, table) * scale).sum().backward()
    assert "llmkern::embedding" in {event.name for event in profile.function_events}
    assert not any("embedding_backward" in event.name for event in profile.function_events)
    assert_close(scale.grad, table[IDS].sum((0, 1)))
