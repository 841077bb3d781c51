# SPDX-License-Identifier: Apache-2.0
"""torch.utils.flop_counter counts for our operators what it counts for the same model in torch's own."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import llmkern
from llmkern.ops.lstm import composite
from llmkern.ops.lstm.arguments import PARAMETERS
from tests.ops.test_lstm_variants import problem

pytestmark = pytest.mark.usefixtures("one_thread")
T, B, I, H, V = 5, 3, 4, 6, 11  # noqa: E741

# Operators that multiply no matrices.
WITHOUT_PRODUCTS = {
    *("embedding", "embedding_backward", "dropout", "mask", "sample", "multinomial"),
    *("beam_search_step", "speculative_verify", "lstm_pack"),
}


def counted(f, *arguments):
    """FLOPs of f(*arguments), and of its gradients of those of them that want one."""
    with FlopCounterMode(display=False) as forward:
        results = f(*arguments)
    results = [results] if isinstance(results, torch.Tensor) else results
    wanted = [a for a in arguments if a is not None and a.requires_grad]
    loss = sum(r.square().sum() for r in results)
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(loss, wanted)
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("frozen", [(), (*PARAMETERS,), ("input",)], ids=str)
@pytest.mark.parametrize("chosen", [(), ("projection",), ("layer_norm", "lengths")], ids=str)
def test_layer(chosen, frozen):
    leaves, options = problem((T, B, I, H, 2), chosen)
    for name in frozen:
        if name in leaves:
            leaves[name].requires_grad_(False)
    names = list(leaves)

    def with_names(f):
        return lambda *a: f(**dict(zip(names, a, strict=True)), **options)[:3]

    ours, torchs = (with_names(f) for f in (llmkern.ops.lstm, composite.lstm))
    got, expected = counted(ours, *leaves.values()), counted(torchs, *leaves.values())
    assert got == expected and min(got) > 0


def test_model_without_gradients():
    """All layers in one operator."""
    ours = llmkern.nn.LSTM(I, H, num_layers=3)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        ours(torch.randn(T, B, I))
    assert counter.get_total_flops() == 2 * T * B * 4 * H * (I + 5 * H)


@pytest.mark.parametrize("frozen", [False, True])
def test_loop_over_a_cell(frozen):
    totals = []
    for module in (llmkern.nn, nn):
        cell = module.LSTMCell(I, H)
        state = tuple(torch.randn(2, B, H).requires_grad_())
        if frozen:
            cell.weight_ih.requires_grad_(False)
        with FlopCounterMode(display=False) as counter:
            h, c = state
            for x in torch.randn(T, B, I).requires_grad_():
                h, c = cell(x, (h, c))
            (h.sum() + c.sum()).backward()
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] or (frozen and totals[0] > totals[1])


@pytest.mark.parametrize("frozen", [None, "input", "weight"])
def test_linear_cross_entropy(frozen):
    x, weight = torch.randn(T, I), torch.randn(V, I)
    x.requires_grad_(frozen != "input")
    weight.requires_grad_(frozen != "weight")
    target = torch.randint(V, (T,))
    got = counted(lambda x, w: llmkern.ops.linear_cross_entropy(x, w, target), x, weight)
    expected = counted(lambda x, w: F.cross_entropy(F.linear(x, w), target), x, weight)
    assert sum(got) == sum(expected) > 0
    # The gradient of the input alone is made where the logits are.
    assert got[1] == (0 if frozen == "weight" else expected[1])


def test_every_operator_that_multiplies_is_counted():
    """A new operator has a formula, or is named above."""
    from torch.utils.flop_counter import flop_registry

    ours = [s for s in torch._C._jit_get_all_schemas() if s.name.startswith("llmkern::")]
    tensors = {
        schema.name.removeprefix("llmkern::")
        for schema in ours
        if any("Tensor" in str(a.type) for a in schema.arguments)
    }
    counted = {n for n in tensors if getattr(torch.ops.llmkern, n) in flop_registry}
    assert {"lstm", "lstm_backward", "linear_cross_entropy"} <= counted
    assert tensors - counted == WITHOUT_PRODUCTS
