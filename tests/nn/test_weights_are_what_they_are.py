# SPDX-License-Identifier: Apache-2.0
"""No result depends on a guess whether weights have changed: whoever writes to them, the next call reads what is there.

The ways to write that are listed here leave no trace in a parameter's address, version or optimizer.
"""

import copy
import gc
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import llmkern
from llmkern.nn import snapshot_weights

I, H = 5, 21  # noqa: E741


def layers(dtype=torch.float64):
    return llmkern.nn.LSTM(I, H, dtype=dtype), llmkern.nn.LSTMCell(I, H, dtype=dtype)


@pytest.fixture(params=["LSTM", "LSTMCell"])
def module(request):
    return getattr(llmkern.nn, request.param)(I, H).double()


@pytest.fixture(params=[True, False], ids=["grad", "no_grad"])
def gradients(request):
    """Without gradients all layers of a module run in one call."""
    with torch.set_grad_enabled(request.param):
        yield request.param


def run(module, rows=1):
    dtype = next(module.parameters()).dtype
    x = torch.linspace(-1, 1, rows * I, dtype=torch.float64).reshape(rows, I).to(dtype)
    return torch.cat([t.reshape(-1) for t in module(x)[1]])


def exact(module, rows=1):
    """What torch makes of the weights as they are."""
    twin = getattr(nn, type(module).__name__)(I, H).double()
    twin.load_state_dict({name: t.clone() for name, t in module.state_dict().items()})
    return run(twin, rows)


def train(module, **options):
    with torch.enable_grad():
        run(module).sum().backward()
    run(module)
    torch.optim.SGD(module.parameters(), 1.0, **options).step()


def numpy_view(p):
    view = p.detach().numpy()
    view *= 2


def dlpack_view(p):
    np.from_dlpack(p.detach()).flags.writeable or pytest.skip("numpy's views are read-only here")
    np.from_dlpack(p.detach())[...] *= 2


def storage(p):
    other = (p.detach() * 2).contiguous()
    p.untyped_storage().copy_(other.untyped_storage())


CHANGES = {
    "nothing": lambda m: None,
    "in place": lambda m: [p.detach().mul_(2) for p in m.parameters()],
    "data.mul_": lambda m: [p.data.mul_(2) for p in m.parameters()],
    "data.copy_": lambda m: [p.data.copy_(p.data + 1) for p in m.parameters()],
    "data.clamp_": lambda m: [p.data.clamp_(-0.01, 0.01) for p in m.parameters()],
    "foreach on data": lambda m: torch._foreach_mul_([p.data for p in m.parameters()], 2.0),
    "polyak": lambda m: [p.data.lerp_(torch.ones_like(p), 0.5) for p in m.parameters()],
    "numpy": lambda m: [numpy_view(p) for p in m.parameters()],
    "storage": lambda m: [storage(p) for p in m.parameters()],
    "an optimizer": train,
    "a fused optimizer": lambda m: train(m, fused=True),
    "load_state_dict": lambda m: m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()}),
    "another tensor": lambda m: [setattr(p, "data", p.data + 1) for p in m.parameters()],
    "another tensor, twice": lambda m: [
        setattr(p, "data", p.data - 0.1) for p in [*m.parameters()] * 2
    ],
    "dtype": lambda m: m.float().double(),
    "a narrow dtype": lambda m: m.bfloat16().double(),
}


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("change", CHANGES)
def test_a_call_reads_what_is_there(module, gradients, change, rows):
    run(module, rows)
    CHANGES[change](module)
    assert torch.allclose(run(module, rows), exact(module, rows), rtol=1e-12, atol=1e-12)


def test_what_another_process_writes(module, gradients):
    """A parameter in shared memory, written by somebody else's mapping of it."""
    for p in module.parameters():
        p.data = p.data.share_memory_()
    run(module)
    for p in module.parameters():
        handle = p.untyped_storage()._share_filename_cpu_()
        theirs = torch.UntypedStorage._new_shared_filename_cpu(*handle)
        torch.tensor([], dtype=p.dtype).set_(theirs, 0, p.shape).mul_(2)
    assert torch.allclose(run(module), exact(module), rtol=1e-12, atol=1e-12)


def test_addresses_are_reused():
    """Fresh layers whose parameters are replaced twice land on addresses that were others' before."""
    with torch.no_grad():
        for _ in range(50):
            m = llmkern.nn.LSTM(I, H, dtype=torch.float64)
            run(m)
            for p in m.parameters():
                p.data = p.data - 0.1
                p.data = p.data - 0.1
            assert torch.allclose(run(m), exact(m), rtol=1e-12, atol=1e-12)
            del m
            gc.collect(0)


def test_steps_of_one_graph_with_a_write_between_them(module):
    """Nobody promised that weights stay while a graph lives: the next step reads the new ones, as torch's does."""
    first = run(module)
    assert first.requires_grad  # the graph lives
    for p in module.parameters():
        p.data.mul_(2)
    assert torch.allclose(run(module), exact(module), rtol=1e-12, atol=1e-12)


def test_a_write_that_autograd_sees_stops_the_backward_pass():
    cell = llmkern.nn.LSTMCell(I, H, dtype=torch.float64)
    loss = run(cell).sum()
    with torch.no_grad():
        cell.weight_hh.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_training_with_sgd_by_hand():
    """The losses of ten steps, written through .data, are torch's."""
    histories = []
    for kind in (nn.LSTM, llmkern.nn.LSTM):
        torch.manual_seed(0)
        m = kind(I, H, dtype=torch.float64)
        x, losses = torch.randn(7, 3, I, dtype=torch.float64), []
        for _ in range(10):
            with torch.no_grad():
                losses.append(m(x)[0].square().mean().item())  # validation, without gradients
            m.zero_grad()
            m(x)[0].square().mean().backward()
            for p in m.parameters():
                p.data -= 5.0 * p.grad
        histories.append(losses)
    assert histories[0][0] > 1.5 * histories[0][-1]
    assert np.allclose(*histories, rtol=1e-10)


def test_a_target_network_follows_by_polyak_averaging():
    """A target that is averaged through .data must move, as it did not when its weights were remembered."""
    torch.manual_seed(0)
    source, target = (llmkern.nn.LSTM(I, H, dtype=torch.float64) for _ in range(2))
    before = run(target).detach()
    for _ in range(200):
        for p, q in zip(target.parameters(), source.parameters(), strict=True):
            p.data.mul_(0.9).add_(q.data, alpha=0.1)
        with torch.no_grad():
            got = run(target)
    assert torch.allclose(got, run(source).detach(), atol=1e-7)
    assert not torch.allclose(got, before, atol=1e-3)


def test_no_hook_on_other_peoples_optimizers():
    from torch.optim import optimizer

    hooks = optimizer._global_optimizer_post_hooks
    assert not [hook for hook in hooks.values() if "llmkern" in getattr(hook, "__module__", "")]


def test_functional_parameters(module, gradients):
    """torch.func hands in other weights at every call, some of them without memory of their own."""
    run(module)
    doubled = {name: 2 * p.detach() for name, p in module.named_parameters()}
    x = torch.ones(1, I, dtype=torch.float64)
    got = torch.func.functional_call(module, doubled, (x,))
    for p in module.parameters():
        p.data.mul_(2)
    expected = module(x)
    pairs = zip(*map(torch.utils._pytree.tree_leaves, (got, expected)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


# ---- snapshots, which somebody asked for


def test_a_snapshot_stays_until_it_is_given_up(module):
    with torch.no_grad():
        before = run(module)
        with snapshot_weights(module):
            assert torch.equal(run(module), before)  # the same bits
            for p in module.parameters():
                p.data[..., :3].mul_(2)
            biases = [p for name, p in module.named_parameters() if "bias" in name]
            for p in biases:
                p.data[:3].mul_(0.5)
            assert torch.equal(run(module), before)
        assert not torch.equal(run(module), before)
        assert torch.allclose(run(module), exact(module), rtol=1e-12)


def test_a_snapshot_is_not_read_where_gradients_are_wanted(module):
    with snapshot_weights(module):
        for p in module.parameters():
            p.data.mul_(2)
        assert torch.allclose(run(module), exact(module), rtol=1e-12)
        run(module).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_a_snapshot_ends_with_an_error(module):
    with pytest.raises(KeyError), snapshot_weights(module):
        raise KeyError
    assert module._snapshot is None


def test_a_snapshot_of_a_whole_model():
    model = nn.Sequential(nn.Linear(I, I), nn.ModuleList(layers()), nn.LSTM(I, H))
    with snapshot_weights(model):
        assert all(m._snapshot is not None for m in model[1])
    assert all(m._snapshot is None for m in model[1])


def test_a_snapshot_of_another_dtype_is_not_read():
    module = llmkern.nn.LSTM(I, H)
    with torch.no_grad(), snapshot_weights(module):
        module.bfloat16()
        twin = copy.deepcopy(module)
        twin._snapshot = None
        assert torch.equal(run(module), run(twin))


def test_quantised_layers_keep_their_own_snapshot():
    module = llmkern.nn.LSTM(I, H)
    module.quantize_weights(torch.int8)
    with torch.no_grad():
        quantised = run(module)
        with snapshot_weights(module):
            assert torch.equal(run(module), quantised)
        assert torch.equal(run(module), quantised)
        for p in module.parameters():
            if p.dim() == 2:
                p.data.mul_(2)
        assert torch.equal(run(module), quantised)  # a snapshot
        module.quantize_weights(torch.int8)
        assert not torch.equal(run(module), quantised)


def test_copies_and_files(module):
    """A copy has the snapshot that its original had; a state_dict has none."""
    module = module.float()
    module.quantize_weights(torch.int8)
    with torch.no_grad():
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(run(twin), run(module))
    assert not [name for name in module.state_dict() if "snapshot" in name]
