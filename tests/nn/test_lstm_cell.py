# SPDX-License-Identifier: Apache-2.0
"""llmkern.nn.LSTMCell against torch's: one step, loops, and everything that autograd may do to a loop."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import llmkern
from tests.conftest import assert_close

pytestmark = pytest.mark.usefixtures("one_thread")
T, B, I, H = 6, 3, 7, 19  # noqa: E741
NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def twins(dtype=torch.float64, **options):
    theirs = nn.LSTMCell(I, H, dtype=dtype, **options)
    ours = llmkern.nn.LSTMCell(I, H, dtype=dtype, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.fixture
def deferred(monkeypatch):
    """How many steps each product over steps had; the plain path makes none."""
    seen = []

    class Spy:
        default = staticmethod(
            lambda *steps: seen.append(len(steps[0])) or operator.default(*steps)
        )

    operator = torch.ops.llmkern.lstm_weight_gradients
    monkeypatch.setattr(torch.ops.llmkern, "lstm_weight_gradients", Spy)
    return seen


def data(*shapes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(*s, dtype=dtype, generator=generator).requires_grad_() for s in shapes]


def leaves(dtype=torch.float64):
    return data((T, B, I), (B, H), (B, H), dtype=dtype)


def unroll(cell, x, h, c):
    outputs = []
    for step in x:
        h, c = cell(step, (h, c))
        outputs.append(h)
    return torch.stack(outputs), h, c


def loss_of(cell, x, h, c):
    outputs, h, c = unroll(cell, x, h, c)
    return outputs.sin().sum() + h.square().sum() - c.cos().sum()


def same(ours, theirs, tolerance=None):
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            assert_close(a, b, tolerance)


def both(f, **options):
    """f(cell) for ours and theirs gives the same tensors."""
    ours, theirs = twins(**options)
    same(f(ours), f(theirs))
    return ours


@pytest.mark.parametrize("given", [True, False], ids=["state", "no state"])
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
@pytest.mark.parametrize("bias", [True, False])
def test_cell_is_torchs(bias, batched, given):
    theirs = nn.LSTMCell(I, H, bias=bias, dtype=torch.float64)
    ours = llmkern.nn.LSTMCell(I, H, bias=bias, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    assert isinstance(ours, nn.LSTMCell) and repr(ours) == repr(theirs)
    batch = [B] if batched else []
    leaves = [torch.randn(*batch, n, dtype=torch.float64) for n in (I, H, H)]
    results = []
    for cell in (ours, theirs):
        x, h_0, c_0 = leaves = [t.detach().requires_grad_() for t in leaves]
        h_1, c_1 = cell(x, (h_0, c_0) if given else None)
        loss = h_1.sin().sum() + c_1.square().sum()
        used = [*(leaves if given else leaves[:1]), *cell.parameters()]
        results.append([h_1, c_1, *torch.autograd.grad(loss, used)])
    for a, b in zip(*results, strict=True):
        assert_close(a, b)


def test_bad_input_of_the_cell():
    cell = llmkern.nn.LSTMCell(I, H)
    x, state = torch.zeros(2, I), torch.zeros(2, H)
    with pytest.raises(TypeError, match=r"llmkern\.LSTMCell: expected a Tensor, got list"):
        cell([1.0])
    with pytest.raises(
        ValueError, match=r"llmkern\.LSTMCell: .* \[B, I\] or \[I\], got \[1, 2, 7\]"
    ):
        cell(x[None])
    with pytest.raises(
        ValueError, match=r"llmkern\.lstm_cell: .*h_0 of shape .* = \[2, 19\], got \[19\]"
    ):
        cell(x, (state[0], state))
    with pytest.raises(ValueError, match=r"llmkern\.lstm_cell: .*h_0 of shape .* got \[1, 2, 19\]"):
        cell(x[0], (state, state))


# ---- loops


def gradients(cell):
    arguments = leaves(cell.weight_ih.dtype)
    return torch.autograd.grad(loss_of(cell, *arguments), [*arguments, *cell.parameters()])


@pytest.mark.parametrize("bias", [True, False])
def test_loop(deferred, bias):
    cell = both(gradients, bias=bias)
    assert deferred == [T]
    grads = gradients(cell)
    assert len({g.data_ptr() for g in grads}) == len(grads)  # clipping one must not clip another


def test_loop_on_every_instruction_set(isa):
    both(gradients)


def test_float32():
    ours, theirs = twins(torch.float32)
    same(gradients(ours), gradients(theirs), 4e-6)


def test_more_steps_than_are_multiplied_together(on_threads):
    """The products go over 512 rows at a time; their bits do not depend on the threads."""

    def run(cell):
        x, h, c = data((5, 200, I), (200, H), (200, H))
        return torch.autograd.grad(loss_of(cell, x, h, c), [x, h, *cell.parameters()])

    cell = both(run)
    for a, b in zip(
        on_threads(1, lambda: run(cell)), on_threads(2, lambda: run(cell)), strict=True
    ):
        assert torch.equal(a, b)


def test_batches_of_different_sizes(deferred):
    """Rows leave the batch as their sequences end; an empty one is a step too."""

    def run(cell):
        x, h, c = leaves()
        total = 0
        for t, rows in enumerate((3, 3, 2, 1, 0, 0)):
            h, c = cell(x[t, :rows], (h[:rows], c[:rows]))
            total = total + h.sin().sum()
        return torch.autograd.grad(total, [x, *cell.parameters()])

    both(run)
    assert deferred == [6]


def test_strided_and_expanded_gradients():
    def run(cell):
        x, h, c = data((B, T, I), (H, B), (1, H))
        _, h, c = unroll(cell, x.transpose(0, 1), h.t(), c.expand(B, H))
        return torch.autograd.grad(h.sum() + c.t()[::2].sum(), [x, *cell.parameters()])

    both(run)


def test_backward_accumulates(deferred):
    def run(cell):
        for _ in range(2):
            loss_of(cell, *leaves()).backward()
        return [p.grad for p in cell.parameters()]

    both(run)
    assert deferred == [T, T]


def test_retain_graph(deferred):
    def run(cell):
        arguments = leaves()
        loss, wanted = loss_of(cell, *arguments), [*arguments, *cell.parameters()]
        first = torch.autograd.grad(loss, wanted, retain_graph=True)
        return [*first, *torch.autograd.grad(loss, wanted)]

    both(run)
    assert deferred == [T, T]


def test_two_losses_that_share_steps(deferred):
    def run(cell):
        x, h_0, c_0 = leaves()
        _, h, c = unroll(cell, x[:3], h_0, c_0)
        _, _, last = unroll(cell, x[3:], h, c)
        wanted = [x, *cell.parameters()]
        early = torch.autograd.grad(h.sin().sum(), wanted, retain_graph=True)
        late = torch.autograd.grad(last.square().sum() + c.sum(), wanted)
        return [*early, *late]

    both(run)
    assert deferred == [3, T]


@pytest.mark.parametrize("wanted", ["x", "h_0", "c_0", *NAMES])
def test_gradient_of_one_tensor(deferred, wanted):
    def run(cell):
        x, h_0, c_0 = leaves()
        tensors = {"x": x, "h_0": h_0, "c_0": c_0, **dict(cell.named_parameters())}
        loss = loss_of(cell, x, h_0, c_0)
        some = torch.autograd.grad(loss, tensors[wanted], retain_graph=True)
        if isinstance(cell, llmkern.nn.LSTMCell):
            assert cell._loops._latest().left == {}
        loss.backward(inputs=[tensors[wanted]])
        return [*some, *[t.grad for t in tensors.values()]]

    cell = both(run)
    assert deferred == ([T, T] if wanted in NAMES else [])
    assert cell._loops._latest() is None  # nothing of the graph is left


def test_truncated_backpropagation(deferred):
    def run(cell):
        x, h, c = leaves()
        for part in x.split(2):
            _, h, c = unroll(cell, part, h.detach(), c.detach())
            (h.sum() + c.sum()).backward()
        return [x.grad, *[p.grad for p in cell.parameters()]]

    both(run)
    assert deferred == [2, 2, 2]


def test_truncated_backpropagation_with_an_optimizer():
    """The copies of the weights follow the optimizer, in both directions."""

    def run(cell):
        optimizer = torch.optim.SGD(cell.parameters(), 0.1)
        x, h, c = leaves()
        for part in x.split(2):
            _, h, c = unroll(cell, part, h.detach(), c.detach())
            optimizer.zero_grad()
            (h.sum() + c.sum()).backward()
            optimizer.step()
        return [x.grad, *cell.parameters()]

    both(run)


def test_steps_that_nobody_asks_about():
    """A step whose results lead nowhere, and one of which a function gives no gradient."""

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, t):
            return t.clone()

        @staticmethod
        def backward(ctx, _):
            return None

    def run(cell):
        x, h, c = leaves()
        cell(x[0], (h, c))
        h_1, c_1 = cell(x[1], (h, c))
        h_2, _ = cell(x[2], (Nothing.apply(h_1), Nothing.apply(c_1)))
        wanted = [h, *cell.parameters()]
        return torch.autograd.grad(h_2.sum(), wanted, allow_unused=True, materialize_grads=True)

    both(run)


def test_frozen_parameters(deferred):
    def run(cell):
        cell.weight_hh.requires_grad_(False)
        cell.bias_ih.requires_grad_(False)
        some = torch.autograd.grad(loss_of(cell, *leaves()), [cell.weight_ih, cell.bias_hh])
        loss = loss_of(cell, *leaves())
        cell.weight_hh.requires_grad_(True)
        again = loss_of(cell, *leaves()) + loss
        return [*some, *torch.autograd.grad(again, [cell.weight_ih, cell.weight_hh])]

    both(run)
    assert deferred == [T, T, T]

    def all_frozen(cell):
        cell.requires_grad_(False)
        x, h, c = leaves()
        return torch.autograd.grad(loss_of(cell, x, h, c), [x, h, c])

    both(all_frozen)
    assert len(deferred) == 3


def test_threads_over_one_graph_and_their_own(deferred):
    """Each backward pass finds what its own steps left."""
    cell, theirs = twins()
    arguments = leaves()
    shared = loss_of(cell, *arguments)
    expected = torch.autograd.grad(loss_of(theirs, *arguments), [*theirs.parameters()])
    results, start = [], threading.Barrier(4)

    def work(i):
        start.wait()
        for _ in range(5):
            loss = shared if i % 2 else loss_of(cell, *arguments)
            results.append(torch.autograd.grad(loss, [*cell.parameters()], retain_graph=True))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(results) == len(deferred) == 20
    for result in results:
        same(result, expected)


def test_an_error_in_the_middle_of_a_backward_pass(deferred):
    """What the interrupted pass left with the hub reaches no other pass, and goes with the graph."""

    class FaultError(Exception):
        pass

    armed = [True]

    def fail(grad):
        if armed[0]:
            raise FaultError

    def run(cell):
        armed[0] = True
        x, h, c = leaves()
        _, h_3, c_3 = unroll(cell, x[:3], h, c)
        h_3.register_hook(fail)
        _, h_6, c_6 = unroll(cell, x[3:], h_3, c_3)
        loss, wanted = h_6.sum() + c_6.sum(), [x, *cell.parameters()]
        with pytest.raises(FaultError):
            torch.autograd.grad(loss, wanted, retain_graph=True)
        armed[0] = False
        return torch.autograd.grad(loss, wanted)

    cell = both(run)
    assert deferred == [T]
    gc.collect()
    assert cell._loops._latest() is None


def test_graphs_are_freed():
    """No reference cycle: a graph goes with its last tensor, without the collector."""
    cell, _ = twins()
    gc.disable()
    try:
        loss = loss_of(cell, *leaves())
        loop = cell._loops._latest
        assert loop() is not None
        loss.backward(retain_graph=True)
        assert loop() is not None
        del loss
        assert loop() is None
    finally:
        gc.enable()


def test_hooks_of_parameters(deferred):
    def run(cell):
        seen, accumulated = [], {}
        cell.weight_hh.register_hook(lambda g: seen.append(g.clone()) or g * 2)
        cell.weight_hh.register_post_accumulate_grad_hook(lambda p: accumulated.update(hh=p.grad))
        node = torch.autograd.graph.get_gradient_edge(cell.bias_ih).node  # as DDP does it
        node.register_hook(lambda *_: accumulated.update(ih=cell.bias_ih.grad))
        loss_of(cell, *leaves()).backward()
        assert len(seen) == 1 and len(accumulated) == 2
        return [*seen, accumulated["hh"], accumulated["ih"], cell.weight_hh.grad]

    both(run)
    assert deferred == [T]


@pytest.mark.parametrize("name", ["weight_ih", "weight_hh"])
def test_weights_changed_before_the_backward_pass(name):
    for cell in twins():
        loss = loss_of(cell, *leaves())
        with torch.no_grad():
            getattr(cell, name).mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_inputs_changed_before_the_backward_pass():
    for cell in twins():
        x, h, c = leaves()
        step = x[0] * 1
        h_1, _ = cell(step, (h, c))
        step.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            h_1.sum().backward()


def test_weights_replaced_while_a_graph_lives(deferred):
    def run(cell):
        before = loss_of(cell, *leaves())
        old = dict(cell.named_parameters())
        for name, p in old.items():
            setattr(cell, name, nn.Parameter(p.detach() * 2))
        after = loss_of(cell, *leaves())
        return torch.autograd.grad(before + after, [*old.values(), *cell.parameters()])

    both(run)
    assert sorted(deferred) == [T, T]


def test_dtype_changed_while_a_graph_lives():
    ours, theirs = twins()
    for cell in (ours, theirs):
        cell.kept = loss_of(cell, *leaves())
        cell.float()
    same(gradients(ours), gradients(theirs), 4e-6)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(deferred, reentrant):
    def run(cell):
        x, h, c = leaves()
        for part in x.split(2):
            _, h, c = checkpoint(unroll, cell, part, h, c, use_reentrant=reentrant)
        (h.sum() + c.sum()).backward()
        return [x.grad, *[p.grad for p in cell.parameters()]]

    both(run)
    assert sum(deferred) == T


def test_saved_tensors_hooks():
    def run(cell):
        with torch.autograd.graph.save_on_cpu():
            loss = loss_of(cell, *leaves())
        return torch.autograd.grad(loss, [*cell.parameters()])

    both(run)


def test_create_graph(deferred):
    """Gradients that may be differentiated are ordinary ones: the hub has no part in them."""

    def run(cell):
        arguments = leaves()
        wanted = [*arguments, *cell.parameters()]
        grads = torch.autograd.grad(loss_of(cell, *arguments), wanted, create_graph=True)
        assert all(g.requires_grad for g in grads)
        return grads

    both(run)
    assert deferred == []


# ---- what is not a leaf, not a tensor of memory, or not run by the engine


def test_weights_that_are_computed(deferred):
    def run(cell):
        parametrizations.weight_norm(cell, "weight_hh")
        some = torch.autograd.grad(loss_of(cell, *leaves()), [*cell.parameters()])
        with parametrize.cached():
            return [*some, *torch.autograd.grad(loss_of(cell, *leaves()), [*cell.parameters()])]

    both(run)
    assert deferred == []


def test_functional_call():
    def run(cell):
        weights = {n: (2 * p).detach().requires_grad_() for n, p in cell.named_parameters()}
        x, h, c = leaves()
        h_1, c_1 = torch.func.functional_call(cell, weights, (x[0], (h, c)))
        return torch.autograd.grad(h_1.sum() + c_1.square().sum(), [*weights.values()])

    both(run)


def test_compile():
    torch.compiler.reset()
    ours, theirs = twins()
    compiled = torch.compile(unroll, fullgraph=True, backend="aot_eager")

    def gradients_of(run, cell):
        arguments = leaves()
        outputs, h, c = run(cell, *arguments)
        loss = outputs.sin().sum() + h.sum() - c.sum()
        return torch.autograd.grad(loss, [*arguments, *cell.parameters()])

    same(gradients_of(compiled, ours), gradients_of(unroll, theirs))


def test_export():
    cell, _ = twins()
    arguments = (torch.randn(B, I).double(), tuple(torch.randn(2, B, H).double()))
    same(torch.export.export(cell, arguments).module()(*arguments), cell(*arguments))


def test_autocast():
    """As the functional operator; gradients have the dtypes of their tensors."""
    cell, _ = twins(torch.float32)
    x, h, c = leaves(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = cell(x[0], (h.bfloat16(), c))
        expected = llmkern.ops.lstm_cell(x[0], h.bfloat16(), c, *cell.parameters())
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    (got[0].sum() + got[1].sum()).backward()
    assert cell.weight_ih.grad.dtype == torch.float32 and h.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(deferred, dtype):
    """Sums over all steps are rounded once: as close to float64 as the layer's own gradients."""
    cell = llmkern.nn.LSTMCell(I, H, dtype=dtype)
    layer = llmkern.nn.LSTM(I, H, dtype=dtype)
    layer.load_state_dict({name + "_l0": p for name, p in cell.state_dict().items()})
    x, h, c = (
        t.detach().requires_grad_() for t in data((40, 30, I), (30, H), (30, H), dtype=dtype)
    )

    def loss(outputs):
        return outputs.float().sin().sum()

    ours = torch.autograd.grad(loss(unroll(cell, x, h, c)[0]), [x, *cell.parameters()])
    whole = torch.autograd.grad(loss(layer(x, (h[None], c[None]))[0]), [x, *layer.parameters()])
    assert deferred == [40]
    exact = copy.deepcopy(layer).double()
    truth = torch.autograd.grad(
        exact(x.double(), (h[None].double(), c[None].double()))[0].sin().sum(),
        list(exact.parameters()),
    )
    for a, b, t in zip(ours[1:], whole[1:], truth, strict=True):
        assert a.dtype == dtype
        error, reference = ((g.double() - t).square().mean().sqrt() for g in (a, b))
        assert error <= 1.5 * reference, (error, reference)


def test_weights_of_eight_bits_in_training(deferred):
    """They are for inference: a training step, and its backward pass, takes the parameters."""
    ours, theirs = twins(torch.float32)
    ours.quantize_weights(torch.int8)
    same(gradients(ours), gradients(theirs), 4e-6)
    assert deferred == [T]


def test_without_gradients():
    def run(cell):
        with torch.inference_mode():
            some = unroll(cell, *leaves())
        with torch.no_grad():
            return [*some, *unroll(cell, *leaves())]

    ours, theirs = twins()
    same(run(ours), run(theirs))
    assert ours._loops._latest is None
    same(gradients(ours), gradients(theirs))  # with copies of the weights made in inference mode


def test_copies():
    """A copy has neither the loop nor its hub."""
    ours, theirs = twins()
    loss = loss_of(ours, *leaves())
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert twin._loops._latest is None
        same(gradients(twin), gradients(theirs))
    assert weakref.ref(ours._loops._latest()) is not None
    loss.backward()


def test_errors_of_a_training_step():
    cell, _ = twins()
    x, h, c = leaves()
    with pytest.raises(
        ValueError, match=r"llmkern\.lstm_cell: expected c_0 of shape .* = \[3, 19\], got \[2, 19\]"
    ):
        cell(x[0], (h, c[:2]))
    with pytest.raises(TypeError, match=r"lstm_cell: expected h_0 of input's dtype float64"):
        cell(x[0], (h.float(), c))
    with pytest.raises(ValueError, match=r"lstm_cell: expected weight_ih of shape .*= \[76, 6\]"):
        cell(x[0, :, :6], (h, c))
