# SPDX-License-Identifier: Apache-2.0
"""Linear cross entropy with given probabilities: parity with the reference and with torch, bits, the compiler."""

import functools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import llmkern
from llmkern import _reference
from tests.conftest import TOLERANCE, assert_close, assert_no_less_accurate
from tests.ops.test_cross_entropy import LARGE_SHAPES, REDUCTIONS, SMALL_SHAPES, cast, torch_loss

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = [
    {},
    {"linear_bias": True, "label_smoothing": 0.1},
    {"linear_bias": True, "weight": True, "label_smoothing": 0.3},
    {"weight": True, "label_smoothing": 1.0},
]
CASES = [
    (s, o, r, d) for s in SMALL_SHAPES for o in range(4) for r in REDUCTIONS for d in TOLERANCE
]
CASES += [(s, 2, "mean", d) for s in LARGE_SHAPES for d in (torch.float32, torch.bfloat16)]
IN_TORCH = hasattr(nn, "LinearCrossEntropyLoss")


def arguments_of(shape, option, dtype=torch.float64) -> tuple[dict[str, Tensor], dict]:
    """Differentiable arguments and options; values are of float32. Rows of the target need not sum to 1."""
    N, D, V = shape
    options = dict(OPTIONS[option])
    tensors = {"input": torch.randn(N, D), "linear_weight": torch.randn(V, D) / D**0.5}
    tensors["target"] = torch.randn(N, V).softmax(-1)
    tensors["target"][1::2] *= 1.5
    if options.pop("linear_bias", False):
        tensors["linear_bias"] = torch.randn(V)
    if options.pop("weight", False):
        options["weight"] = torch.rand(V).to(dtype)
    return cast(tensors, dtype), options


def run(f, tensors, options, upstream) -> list[Tensor]:
    """The loss, then the gradients of every tensor."""
    tensors = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    loss = f(**tensors, **options)
    return [loss.detach(), *torch.autograd.grad(loss, list(tensors.values()), upstream)]


@functools.cache
def reference_case(shape, option, reduction):
    tensors, options = arguments_of(shape, option)
    options["reduction"] = reduction
    upstream = torch.randn(shape[:1] if reduction == "none" else ()).double()
    # As a GradScaler does: float16 has no numbers for the gradients of a mean over many rows.
    upstream *= shape[0] if reduction == "mean" else 1
    names = {"weight": "class_weight", "linear_weight": "weight", "linear_bias": "bias"}
    arrays = {
        names.get(k, k): v.numpy() if isinstance(v, Tensor) else v for k, v in (*options.items(),)
    }
    arrays |= {names.get(k, k): t.numpy() for k, t in tensors.items()}
    loss = _reference.linear_cross_entropy(**arrays)
    grads = dict(
        zip(
            ("input", "linear_weight", "linear_bias", "target"),
            _reference.linear_cross_entropy_backward(upstream.numpy(), **arrays),
            strict=True,
        )
    )
    expected = [torch.from_numpy(np.asarray(a)) for a in (loss, *(grads[k] for k in tensors))]
    return tensors, options, upstream, expected


@pytest.mark.parametrize(("shape", "option", "reduction", "dtype"), CASES)
def test_equals_reference_and_torch(on_isas, shape, option, reduction, dtype):
    tensors, options, upstream, expected = reference_case(shape, option, reduction)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    call = (cast(tensors, dtype), cast(options, dtype), upstream.to(wide))
    call[0]["target"] = tensors["target"].to(wide)
    if dtype not in (torch.float32, torch.float64):  # the same function of rounded arguments
        exact = cast(call[0], torch.float64), cast(call[1], torch.float64), upstream
        expected = run(torch_loss, *exact)
    for _ in on_isas():
        got = run(llmkern.ops.linear_cross_entropy, *call)
        for ours, truth in zip(got, expected, strict=True):
            assert_close(ours, truth, 2 * TOLERANCE[dtype])
    if dtype == torch.float64:
        for ours, torchs in zip(got, run(torch_loss, *call), strict=True):
            assert_close(ours, torchs)


@pytest.mark.parametrize(("D", "scale"), [(30, 0.3), (200, 0.07)])
def test_float32_is_as_accurate_as_torch(isa, D, scale):
    tensors = {"input": torch.randn(50, D), "linear_weight": torch.randn(1003, D) * scale}
    tensors["target"] = torch.randn(50, 1003).softmax(-1)
    call = (tensors, {"reduction": "none", "label_smoothing": 0.1}, torch.randn(50))
    truth = run(torch_loss, cast(tensors, torch.float64), call[1], call[2].double())
    results = run(llmkern.ops.linear_cross_entropy, *call), run(torch_loss, *call), truth
    for name, a, b, c in zip(("loss", *tensors), *results, strict=True):
        assert_no_less_accurate(name, a, b, c)


def test_classes_are_probabilities_of_one():
    N, D, V = 6, 5, 9
    tensors = {"input": torch.randn(N, D).double(), "linear_weight": torch.randn(V, D).double()}
    target = torch.randint(V, (N,))
    one_hot = torch.nn.functional.one_hot(target, V).double()
    for options in ({}, {"label_smoothing": 0.2}, {"reduction": "none", "label_smoothing": 0.2}):
        hard, soft = (
            llmkern.ops.linear_cross_entropy(**tensors, target=t, **options)
            for t in (target, one_hot)
        )
        assert_close(soft, hard)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (2, 0)], ids=str)
def test_any_leading_shape(shape, reduction):
    x, weight = torch.randn(*shape, 5).double(), torch.randn(7, 5).double()
    target = torch.randn(*shape, 7).double().softmax(-1)
    loss = llmkern.ops.linear_cross_entropy(x, weight, target, reduction=reduction)
    flat = torch_loss(x.reshape(-1, 5), weight, target.reshape(-1, 7), reduction=reduction)
    assert loss.shape == (shape if reduction == "none" else ())
    assert_close(loss.reshape(flat.shape).nan_to_num(7), flat.nan_to_num(7))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_probabilities_of_another_dtype(dtype):
    """They are brought to float32; their gradient has their own dtype."""
    x, weight = torch.randn(4, 3), torch.randn(5, 3)
    target = torch.randn(4, 5).softmax(-1).to(dtype).requires_grad_()
    loss = llmkern.ops.linear_cross_entropy(x, weight, target)
    assert loss.dtype == torch.float32
    expected = torch_loss(x.double(), weight.double(), target.detach().double())
    assert_close(loss, expected)
    loss.backward()
    assert target.grad.dtype == dtype


def test_strided_probabilities():
    x, weight = torch.randn(6, 5).double(), torch.randn(9, 5).double()
    target = torch.randn(9, 6).double().softmax(0)
    shared = target[:, :1].T.expand(6, 9)
    for t in (target.T, shared):
        loss = llmkern.ops.linear_cross_entropy(x, weight, t)
        assert_close(loss, torch_loss(x, weight, t.contiguous()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bits_on_threads_and_rows_alone(isa, on_threads, dtype):
    tensors, options = arguments_of((29, 300, 65), 2, dtype)
    tensors["target"], options["reduction"] = tensors["target"].float(), "none"
    upstream = torch.randn(29)

    def once():
        return run(llmkern.ops.linear_cross_entropy, tensors, options, upstream)

    whole = on_threads(1, once)
    for other in (2, 3):
        assert all(torch.equal(a, b) for a, b in zip(whole, on_threads(other, once), strict=True))
    for rows in (slice(0, 1), slice(3, 20), slice(28, 29)):
        part = tensors | {k: tensors[k][rows] for k in ("input", "target")}
        alone = run(llmkern.ops.linear_cross_entropy, part, options, upstream[rows])
        for i in (0, 1, 3):  # loss, and the gradients of input and target
            assert torch.equal(alone[i], whole[i][rows])


def test_high_level(isa):
    """All logits near 1e4: a loss of log V all the same, up to what the logits themselves lose."""
    x, weight = torch.full((1, 1), 1e4), torch.ones(64, 1)
    target = torch.full((1, 64), 1 / 64)
    loss = llmkern.ops.linear_cross_entropy(x, weight, target)
    assert_close(loss, torch.tensor(64.0).double().log(), 1e-6)


def test_opcheck():
    tensors, options = arguments_of((5, 3, 4), 2, torch.float32)
    arguments = (
        *(tensors[k].requires_grad_() for k in ("input", "linear_weight", "linear_bias", "target")),
        options["weight"],
        1,
        -100,
        0.3,
    )
    op = torch.ops.llmkern.linear_cross_entropy.default
    for saves in (False, True):
        torch.library.opcheck(op, (*arguments, saves))


def test_compile():
    torch.compiler.reset()
    tensors, options = arguments_of((5, 3, 4), 2)
    values = [t.requires_grad_() for t in tensors.values()]

    def loss(*values):
        named = dict(zip(tensors, values, strict=True))
        return llmkern.ops.linear_cross_entropy(**named, **options)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        torch.autograd.grad(compiled(*values), values),
        torch.autograd.grad(loss(*values), values),
        strict=True,
    ):
        assert_close(a, b)


@pytest.mark.skipif(not IN_TORCH, reason="torch has the class from 2.13 on")
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_layer_is_a_drop_in(reduction, smoothing):
    D, V = 6, 11
    options = {"reduction": reduction, "label_smoothing": smoothing, "bias": True}
    options["weight"] = torch.rand(V).double()
    ours = llmkern.nn.LinearCrossEntropyLoss(D, V, dtype=torch.float64, **options)
    theirs = nn.LinearCrossEntropyLoss(D, V, dtype=torch.float64, **options)
    theirs.load_state_dict(ours.state_dict())
    x, target = torch.randn(7, D).double(), torch.randn(7, V).double().softmax(-1)
    grads = []
    for layer in (ours, theirs):
        leaves = [x.clone().requires_grad_(), target.clone().requires_grad_(), *layer.parameters()]
        loss = layer(*leaves[:2])
        grads.append([loss, *torch.autograd.grad(loss.square().sum(), leaves)])
        assert layer(x[0], target[0]).shape == ()
    for a, b in zip(*grads, strict=True):
        assert_close(a, b)
    for layer in (ours, theirs):
        layer.ignore_index = -100
        with pytest.raises(RuntimeError, match="ignore_index"):
            layer(x, target)
