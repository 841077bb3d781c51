# SPDX-License-Identifier: Apache-2.0
"""The CUDA bindings on tensors of the CPU: test_operators.py runs this in a process of its own.

The library loaded here registers the CUDA half of csrc/ops, with emulated kernels, over the CPU's operators. From then
on everything that Python does on the CPU takes the path it would take on a GPU: checks, allocation, the framework's
products, launches, gradients.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import llmkern
from llmkern.ops import _checks
from llmkern.training import Trainer, TrainingArguments
from tests import promises
from tests.conftest import TOLERANCE, assert_close, assert_no_less_accurate
from tests.ops import philox_oracle as oracle

from . import build

SIXTEEN_BIT = (torch.bfloat16, torch.float16)


EVERYTHING: dict[str, Any] = {"return_entropy": True, "return_rank": True}


def draws() -> list[tuple[Tensor | None, ...]]:
    """Every output of a thousand seeds under one setting after another, and of some calls with all there is to give."""
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(8, 173, generator=generator)
    logits[:, ::17] = -0.0
    settings: list[dict[str, Any]] = [
        {},
        {"temperature": 0.7},
        {"top_k": 20, "top_p": 0.9},
        {"min_p": 0.1},
        {"typical_p": 0.6},
        {"temperature": 0.0},
    ]
    outputs: list[tuple[Tensor | None, ...]] = []
    for seed in range(0, 1000, 8):
        options = settings[seed // 8 % len(settings)]
        options |= {"seed": torch.arange(seed, seed + 8), "position": seed}
        outputs.append(llmkern.ops.sample(logits, num_logprobs=5, **options, **EVERYTHING))
        outputs.append(llmkern.ops.sample(logits, return_logprob=False, **options))
    for dtype in (torch.float32, torch.float64, *SIXTEEN_BIT):
        outputs += adjusted_draws(logits.to(dtype), generator)
    return outputs


def adjusted_draws(logits: Tensor, generator: torch.Generator) -> list[tuple[Tensor | None, ...]]:
    """With penalties, every form of bias and mask, and logits whose rows are apart."""
    B, V = logits.shape
    ids = torch.randint(-1, V, (B, 12), generator=generator)
    words = torch.randint(-(2**31), 2**31, (B, -(-V // 32)), generator=generator).to(torch.int32)
    adjustments: list[dict[str, Any]] = [
        {"logit_bias": {5: 2.0}, "allowed": torch.rand(V, generator=generator) < 0.9},
        {"logit_bias": [{b: -3.0, 7: 1.5} for b in range(B)], "allowed": words},
        {"logit_bias": torch.randn(B, V, generator=generator), "allowed": words[0]},
        {},
    ]
    options: dict[str, Any] = {"prompt_ids": ids, "output_ids": ids.flip(0), "temperature": 1.1}
    options |= {"repetition_penalty": 1.3, "presence_penalty": 0.2, "frequency_penalty": 0.1}
    apart = torch.full((B, V + 3), float("nan"), dtype=logits.dtype)
    apart[:, :V] = logits
    outputs: list[tuple[Tensor | None, ...]] = []
    for adjusted in adjustments:
        call = options | adjusted
        n = V if "logit_bias" in adjusted else 3
        outputs.append(
            llmkern.ops.sample(apart[:, :V], seed=3, num_logprobs=n, **call, **EVERYTHING)
        )
        outputs.append((llmkern.ops.filter_logits(logits, top_p=0.8, **call),))
    return outputs


def train() -> list[float]:
    """The losses of a small model's epochs."""
    torch.manual_seed(0)
    model = llmkern.models.LanguageModel(11, 8, 12, 2, dropout=0.1)
    text = torch.arange(200) * 7 % 11
    arguments = TrainingArguments(batch_size=4, bptt=6, epochs=2, tensorboard=False)
    result = Trainer(model, arguments, text, show_progress=False).train()
    return [epoch["train_loss"] for epoch in result.history]


DRAWS_ON_CPU = draws()
TRAINED_ON_CPU = train()


@pytest.fixture(scope="module", autouse=True)
def _emulated() -> None:
    torch.ops.load_library(build.library("operators"))


@pytest.fixture(autouse=True)
def _all_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_checks, "float_dtypes", lambda tensor: _checks.ANY_FLOAT_DTYPES)


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()


# ---- errors come later, and nothing breaks ----


def test_an_embedding_id_out_of_range_is_raised_by_the_next_call():
    table = torch.randn(5, 3)
    out = llmkern.ops.embedding(torch.tensor([[0, 4], [7, 1]]), table)
    assert torch.isnan(out[1, 0]).all()
    assert torch.equal(out[0], table[[0, 4]])
    with pytest.raises(
        IndexError, match=r"embedding: expected ids in \[0, 5\), got 7 at position 2"
    ):
        llmkern.ops.embedding(torch.tensor([0]), table)
    assert torch.equal(llmkern.ops.embedding(torch.tensor([3]), table)[0], table[3])


def test_a_target_out_of_range_is_raised_by_the_next_call():
    x, w = torch.randn(3, 4), torch.randn(5, 4)
    loss = llmkern.ops.linear_cross_entropy(x, w, torch.tensor([0, -3, 1]), reduction="none")
    assert torch.isnan(loss).tolist() == [False, True, False]
    with pytest.raises(IndexError, match=r"expected targets in \[0, 5\).*got -3 at position 1"):
        llmkern.ops.linear_cross_entropy(x, w, torch.tensor([0, 1, 2]))


def test_a_setting_out_of_range_is_raised_by_the_next_call():
    logits = torch.randn(3, 7)
    out = llmkern.ops.sample(logits, top_p=torch.tensor([0.5, 1.5, 0.5]), seed=1)
    assert out.valid.tolist() == [True, False, True]
    with pytest.raises(ValueError, match=r"sample: expected top_p in \(0, 1\], got 1.5 in row 1"):
        llmkern.ops.sample(logits, seed=1)


# ---- embedding ----


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *SIXTEEN_BIT])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("scale", [False, True])
def test_embedding(dtype, index, scale):
    ids = torch.randint(9, (5, 13)).to(index)
    table = leaf(9, 6, dtype=dtype)
    out = llmkern.ops.embedding(ids, table, padding_idx=2, scale_grad_by_freq=scale)
    assert torch.equal(out, table[ids])
    grad = torch.randn(5, 13, 6, dtype=torch.float64).to(dtype)
    (ours,) = torch.autograd.grad(out, table, grad)
    wide = table.detach().double().requires_grad_()
    expected = F.embedding(ids, wide, padding_idx=2, scale_grad_by_freq=scale)
    (theirs,) = torch.autograd.grad(expected, wide, grad.double())
    assert_close(ours, theirs.to(dtype), TOLERANCE.get(dtype, torch.finfo(dtype).eps))


def test_embedding_of_nothing():
    table = leaf(4, 3)
    out = llmkern.ops.embedding(torch.zeros(0, 2, dtype=torch.int64), table)
    out.sum().backward()
    assert out.shape == (0, 2, 3)
    assert torch.equal(table.grad, torch.zeros(4, 3, dtype=torch.float64))


# ---- dropout ----


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *SIXTEEN_BIT])
@pytest.mark.parametrize("locked", [False, True])
def test_dropout(dtype, locked):
    """The masks of the CPU, here and in the gradient."""
    mask = torch.from_numpy(oracle.mask(4, oracle.DROPOUT, 5 if locked else 15, 13, 0.25))
    x, ones = leaf(3, 5, 13, dtype=dtype), torch.ones(3, 5, 13, dtype=dtype)
    keep = ones.masked_fill(mask.reshape(-1, 5, 13), 0)
    y = llmkern.ops.dropout(x, 0.25, locked=locked, seed=4)
    assert_close(y, x * keep * torch.tensor(4 / 3, dtype=dtype), 2 * torch.finfo(dtype).eps)
    (grad,) = torch.autograd.grad(y, x, ones)
    assert_close(grad, keep * torch.tensor(4 / 3, dtype=dtype), 2 * torch.finfo(dtype).eps)
    assert torch.equal(torch.ops.llmkern.mask(torch.tensor(4), 2, 5, 13, 0.25), mask[:5])
    assert llmkern.ops.dropout(torch.zeros(2, 0), seed=1).shape == (2, 0)


# ---- lstm ----


def lstm_pair(dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Any, Any]:
    ours = llmkern.nn.LSTM(5, 7, **options).to(dtype)
    theirs = torch.nn.LSTM(5, 7, **options).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def run_and_differentiate(lstm: Any, x: Tensor, state: tuple[Tensor, Tensor]) -> list[Tensor]:
    x = x.detach().requires_grad_()
    state = tuple(s.detach().requires_grad_() for s in state)
    output, (h_n, c_n) = lstm(x, state)
    loss = output.square().sum() + h_n.sum() + (c_n * c_n).sum()
    grads = torch.autograd.grad(loss, [x, *state, *lstm.parameters()])
    return [output, h_n, c_n, *grads]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_lstm(dtype, bidirectional, bias):
    ours, theirs = lstm_pair(dtype, num_layers=2, bidirectional=bidirectional, bias=bias)
    layers = 4 if bidirectional else 2
    x, *state = (leaf(4, 3, 5, dtype=dtype), *(leaf(layers, 3, 7, dtype=dtype) for _ in range(2)))
    for got, expected in zip(
        run_and_differentiate(ours, x, state), run_and_differentiate(theirs, x, state), strict=True
    ):
        assert_close(got, expected, 10 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
def test_lstm_in_16_bits_is_no_less_accurate_than_torch(dtype):
    ours, theirs = lstm_pair(dtype)
    _, exact = lstm_pair()
    exact.load_state_dict({name: value.double() for name, value in ours.state_dict().items()})
    x, *state = (leaf(24, 16, 5, dtype=dtype), *(leaf(1, 16, 7, dtype=dtype) for _ in range(2)))
    results = [
        run_and_differentiate(lstm, x.to(to), tuple(s.to(to) for s in state))
        for lstm, to in ((ours, dtype), (theirs, dtype), (exact, torch.float64))
    ]
    for i, (mine, torchs, truth) in enumerate(zip(*results, strict=True)):
        assert mine.dtype == dtype
        assert_no_less_accurate(f"result {i}", mine, torchs, truth)


def test_lstm_without_a_batch_and_of_one_step():
    lstm = llmkern.nn.LSTM(5, 7).double()
    assert lstm(torch.zeros(3, 0, 5, dtype=torch.float64))[0].shape == (3, 0, 7)
    cell = llmkern.nn.LSTMCell(5, 7).double()
    twin = torch.nn.LSTMCell(5, 7).double()
    twin.load_state_dict(cell.state_dict())
    x = leaf(2, 5)
    for got, expected in zip(cell(x), twin(x), strict=True):
        assert_close(got, expected)


def test_lstm_gradients():
    shapes = [(3, 2, 4), (2, 5), (2, 5), (20, 4), (20, 5), (20,), (20,)]
    inputs = [leaf(*shape) for shape in shapes]
    assert torch.autograd.gradcheck(lambda *a: llmkern.ops.lstm(*a, reverse=True), inputs)


@pytest.mark.parametrize("lengths", [None, torch.tensor([3, 1])])
@pytest.mark.parametrize("wanted", [(0,), (1, 2), (4,), (5, 6)], ids=str)
def test_lstm_gradients_that_are_wanted(wanted, lengths):
    """Those of some arguments alone, the weights or the input being frozen, are those among all."""
    shapes = [(3, 2, 4), (2, 5), (2, 5), (20, 4), (20, 5), (20,), (20,)]
    inputs = [leaf(*shape) for shape in shapes]

    def gradients(places):
        given = [t.detach().requires_grad_(i in places) for i, t in enumerate(inputs)]
        loss = sum(o.sin().sum() for o in llmkern.ops.lstm(*given, lengths=lengths))
        return torch.autograd.grad(loss, [given[i] for i in places])

    everything = gradients(range(7))
    for place, got in zip(wanted, gradients(wanted), strict=True):
        assert torch.equal(got, everything[place])


# ---- linear cross entropy ----


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_loss(reduction, smoothing, weighted):
    x, w, b = leaf(6, 4), leaf(9, 4), leaf(9)
    target = torch.tensor([0, 8, -100, 3, 3, 5])
    class_weight = torch.rand(9, dtype=torch.float64) if weighted else None
    options = {"weight": class_weight, "reduction": reduction, "label_smoothing": smoothing}
    ours = llmkern.ops.linear_cross_entropy(x, w, target, linear_bias=b, **options)
    theirs = F.cross_entropy(F.linear(x, w, b), target, **options)
    assert_close(ours, theirs)
    grad = torch.randn_like(ours)
    for got, expected in zip(
        torch.autograd.grad(ours, (x, w, b), grad),
        torch.autograd.grad(theirs, (x, w, b), grad),
        strict=True,
    ):
        assert_close(got, expected)


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
def test_loss_in_16_bits(dtype):
    x, w, target = leaf(40, 16, dtype=dtype), leaf(30, 16, dtype=dtype), torch.randint(30, (40,))
    loss = llmkern.ops.linear_cross_entropy(x, w, target)
    assert loss.dtype == torch.float32
    wide = [t.detach().double().requires_grad_() for t in (x, w)]
    expected = F.cross_entropy(F.linear(*wide), target)
    assert_close(loss, expected, 1e-6)
    grads, truth = torch.autograd.grad(loss, (x, w)), torch.autograd.grad(expected, wide)
    for got, exact in zip(grads, truth, strict=True):
        assert got.dtype == dtype
        assert_close(got, exact, 4 * torch.finfo(dtype).eps)


def test_loss_over_several_chunks():
    """More logits than a chunk's budget, so that gradients are summed over chunks."""
    N, V = 514, 65_800  # a chunk is 512 rows of float64
    x, w, b, target = leaf(N, 2), leaf(V, 2), leaf(V), torch.randint(V, (N,))
    ours = llmkern.ops.linear_cross_entropy(x, w, target, linear_bias=b)
    theirs = F.cross_entropy(F.linear(x, w, b), target)
    assert_close(ours, theirs)
    for got, expected in zip(
        torch.autograd.grad(ours, (x, w, b)), torch.autograd.grad(theirs, (x, w, b)), strict=True
    ):
        assert_close(got, expected, 1e-10)


@pytest.mark.parametrize("wanted", [{0}, {1}, {2}, {0, 2}], ids=str)
def test_loss_computes_the_gradients_that_are_wanted(wanted):
    tensors = [leaf(6, 4), leaf(9, 4), leaf(9)]
    target = torch.tensor([0, 8, -100, 3, 3, 5])
    for i, tensor in enumerate(tensors):
        tensor.requires_grad_(i in wanted)
    leaves = [tensors[i] for i in sorted(wanted)]
    x, w, b = tensors
    ours = llmkern.ops.linear_cross_entropy(x, w, target, linear_bias=b)
    theirs = F.cross_entropy(F.linear(x, w, b), target)
    for got, expected in zip(
        torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True
    ):
        assert_close(got, expected)
    saved = torch.ops.llmkern.linear_cross_entropy(x, w, b, target, None, 1, -100, 0.0, True)
    grads = torch.ops.llmkern.linear_cross_entropy_backward(
        torch.ones_like(ours),
        x,
        w,
        b,
        target,
        None,
        *saved[1:3],
        1,
        -100,
        0.0,
        *[i in wanted for i in range(4)],
    )
    assert [g.numel() for g in grads] == [
        t.numel() if i in wanted else 0 for i, t in enumerate(tensors)
    ] + [0]


def test_probabilities_have_no_kernel():
    x, w, target = leaf(6, 4), leaf(9, 4), torch.rand(6, 9, dtype=torch.float64)
    with pytest.raises(ValueError, match="expected classes on CUDA, got probabilities"):
        torch.ops.llmkern.linear_cross_entropy(x, w, None, target, None, 1, -100, 0.0)


def test_loss_of_nothing():
    x, w = leaf(0, 4), leaf(9, 4)
    loss = llmkern.ops.linear_cross_entropy(
        x, w, torch.zeros(0, dtype=torch.int64), reduction="sum"
    )
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(w.grad, torch.zeros(9, 4, dtype=torch.float64))


# ---- what the operators promise to the compiler ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fake_kernels_agree(dtype):
    ops = torch.ops.llmkern
    x, h, c = leaf(3, 2, 4, dtype=dtype), leaf(2, 5, dtype=dtype), leaf(2, 5, dtype=dtype)
    w_ih, w_hh = leaf(20, 4, dtype=dtype), leaf(20, 5, dtype=dtype)
    rows, target = leaf(6, 4, dtype=dtype), torch.randint(20, (6,))
    ids = torch.randint(20, (2, 3))
    settings = torch.tensor([[1, 0, 1, 0, 1, 1, 0, 0]], dtype=torch.float64)
    for op, arguments in (
        (ops.lstm, (x, h, c, w_ih, w_hh, *[None] * 9, 0.0, 0.0, False, True, True)),
        (ops.linear_cross_entropy, (rows, w_ih, None, target, None, 1, -100, 0.0)),
        (ops.embedding, (ids, w_ih, -1, False)),
        (ops.dropout, (x, torch.tensor(1), 0.5, 8)),
        (ops.mask, (torch.tensor(1), 2, 3, 17, 0.5)),
        (ops.sample, (w_ih.detach(), *[None] * 6, settings, ids[0, :1], None, 2, *[True] * 4)),
    ):
        torch.library.opcheck(op.default, arguments, test_utils=("test_schema", "test_faketensor"))


# ---- the whole ----


def test_tokens_of_a_thousand_seeds_are_those_of_the_cpu():
    for number, (on_cpu, emulated) in enumerate(zip(DRAWS_ON_CPU, draws(), strict=True)):
        for place, (expected, got) in enumerate(zip(on_cpu, emulated, strict=True)):
            if expected is None or got is None:
                assert got is expected, (number, place)
                continue
            assert got.dtype == expected.dtype
            bits = torch.int32 if got.dtype == torch.float32 else got.dtype
            assert torch.equal(got.view(bits), expected.view(bits)), (number, place)


def test_training_is_that_of_the_cpu():
    """But for rounding: the framework multiplies here, in an order of its own, and training amplifies it."""
    assert train() == pytest.approx(TRAINED_ON_CPU, rel=1e-4)


# Of operators whose products are the framework's, which here rounds by strides, and casts them under autocast; the
# rest is for a GPU. Variants of the LSTM have no kernels on one.
WITH_PRODUCTS = ("lstm", "cross_entropy")
OF_PRODUCTS = (
    promises.same_bits_on_every_run,
    promises.only_wanted_gradients,
    promises.gradients_are_right,
    promises.has_functional_gradients,
)


def fits(promise, op):
    return op.family not in WITH_PRODUCTS or (promise in OF_PRODUCTS and " with " not in op.name)


# torch's own, the first time it is asked for derivatives in forward mode.
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@promises.every_promise_of(promises.with_cuda_kernels(), fits=fits)
def test_promise(promise, op):
    promise(op, "cpu")
