# SPDX-License-Identifier: Apache-2.0
"""Compares every operator with its scalar reference on this machine; behind ``llmkern check``.

The reference (``llmkern._reference``) is each kernel again, in float64 and by the formula. What it gets is what the
operator got, so the error shown is the operator's own: the largest difference over the largest expected value.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import llmkern._reference as _reference
from llmkern import ops

# What results of a dtype may lose: the sums here have a few hundred terms, of which those of 16 bits are rounded once.
_TOLERANCE = {
    torch.float32: 2e-5,
    torch.float64: 1e-12,
    torch.bfloat16: 3e-2,
    torch.float16: 8e-3,
}
# Of an LSTM with weights in 8 bits: its activations have 16, so each is off by 1.5e-5 of the largest one of its row.
_BYTES_TOLERANCE = 5e-5
_ISAS = ("generic", "avx2", "avx512")

Pairs = list[tuple[Tensor, object]]


@dataclass(frozen=True)
class Check:
    """One operator, forward and backward, on one build of the kernels.

    Attributes:
        op: its name. dtype: of its inputs. isa: instruction set.
        error: largest difference from the reference, relative to the reference's largest value.
        tolerance: the error that still passes; 0 means equality.
    """

    op: str
    dtype: str
    isa: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance


def check() -> list[Check]:
    """Runs every operator on every instruction set this machine has.

    Returns:
        A :class:`Check` for each; all of them ``ok`` on a healthy installation.
    """
    before = torch.ops.llmkern.cpu_isa()
    available = _ISAS[: _ISAS.index(torch.ops.llmkern.cpu_isa_detected()) + 1]
    try:
        return [result for isa in available for result in _check_isa(isa)]
    finally:
        torch.ops.llmkern.select_cpu_isa(before)


def _check_isa(isa: str) -> Iterator[Check]:
    torch.ops.llmkern.select_cpu_isa(isa)
    cases: dict[str, Callable[[torch.dtype], Pairs]] = {
        "dropout": _dropout,
        "embedding": _embedding,
        "lstm": _lstm,
        "linear_cross_entropy": _linear_cross_entropy,
        "linear_logits": _linear_logits,
    }
    for op, case in cases.items():
        for dtype, tolerance in _TOLERANCE.items():
            yield Check(op, _name(dtype), isa, _largest_error(case(dtype)), tolerance)
    yield Check("lstm", "int8", isa, _largest_error(_lstm_of_bytes()), _BYTES_TOLERANCE)
    exact: dict[str, Callable[[torch.dtype], Pairs]] = {
        "sample": _sample,
        "filter_logits": _filter_logits,
        "beam_search_step": _beam_search_step,
        "speculative_verify": _speculative_verify,
        "multinomial": _multinomial,
    }
    for op, case in exact.items():
        for dtype in _TOLERANCE:
            yield Check(op, _name(dtype), isa, _largest_error(case(dtype)), 0.0)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _largest_error(pairs: Pairs) -> float:
    return max(_error(got, expected) for got, expected in pairs)


def _error(got: Tensor, expected: object) -> float:
    want = torch.as_tensor(np.asarray(expected), dtype=torch.float64)
    have = got.detach().double()
    if have.shape != want.shape or not torch.equal(have.isnan(), want.isnan()):
        return float("inf")
    error = (have - want).nan_to_num().abs().max().item()
    return error / max(want.nan_to_num().abs().max().item(), 1e-30)


def _random(dtype: torch.dtype, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5).to(dtype)


def _array(tensor: Tensor) -> np.ndarray:
    """What the reference takes: float64 for every floating dtype, which loses nothing."""
    tensor = tensor.detach()
    return (tensor.double() if tensor.is_floating_point() else tensor).numpy()


def _dropout(dtype: torch.dtype) -> Pairs:
    x = _random(dtype, 4, 9, 65).requires_grad_()
    output = ops.dropout(x, 0.3, locked=True, seed=5)
    upstream = _random(dtype, *output.shape)
    (grad,) = torch.autograd.grad(output, x, upstream)
    pairs = (output, x), (grad, upstream)
    return [
        (got.reshape(36, 65), _reference.dropout(_array(values.reshape(36, 65)), 5, 0.3, 9))
        for got, values in pairs
    ]


def _embedding(dtype: torch.dtype) -> Pairs:
    table = _random(dtype, 37, 65).requires_grad_()
    ids = torch.arange(100) * 7 % 37
    output = ops.embedding(ids, table, padding_idx=3)
    upstream = _random(dtype, *output.shape)
    (grad,) = torch.autograd.grad(output, table, upstream)
    return [
        (output, _reference.embedding(ids.numpy(), _array(table))),
        (grad, _reference.embedding_backward(_array(upstream), ids.numpy(), 37, 3)),
    ]


def _lstm(dtype: torch.dtype) -> Pairs:
    T, B, I, H, P = 6, 5, 33, 70, 20  # noqa: E741
    inputs = _lstm_inputs(dtype, T, B, I, H, H)
    pairs = _lstm_pairs(inputs, {}, {}) + _lstm_pairs(inputs, {}, {"reverse": True})
    parameters: dict[str, Any] = {
        "weight_hr": _random(dtype, P, H).requires_grad_(),
        "norm_gates": (_random(dtype, 2, 4 * H) + 1).detach().requires_grad_(),
        "norm_cell": (_random(dtype, 2, H) + 1).detach().requires_grad_(),
    }
    options: dict[str, Any] = {
        "zoneout_h": 0.2,
        "zoneout_c": 0.4,
        "seed": torch.tensor(3),
        "reset": torch.arange(T * B).view(T, B) % 7 == 0,
        "lengths": torch.tensor([T, 2, 0, T - 1, T]),
    }
    return pairs + _lstm_pairs(_lstm_inputs(dtype, T, B, I, H, P), parameters, options)


def _lstm_inputs(dtype: torch.dtype, T: int, B: int, I: int, H: int, P: int) -> list[Tensor]:  # noqa: E741
    shapes = [(T, B, I), (B, P), (B, H), (4 * H, I), (4 * H, P), (4 * H,), (4 * H,)]
    return [_random(dtype, *shape).requires_grad_() for shape in shapes]


def _lstm_pairs(inputs: list[Tensor], parameters: dict[str, Any], options: dict[str, Any]) -> Pairs:
    lstm: Callable[..., tuple[Tensor, ...]] = ops.lstm
    outputs = lstm(*inputs, **parameters, **options, return_cells=True)
    upstream = [_random(output.dtype, *output.shape) for output in outputs]
    # The biases have the same gradient.
    grads = torch.autograd.grad(outputs, [*inputs[:6], *parameters.values()], upstream)
    arrays = [_array(tensor) for tensor in inputs]
    named = {
        k: _array(v) if isinstance(v, Tensor) else v for k, v in (parameters | options).items()
    }
    *above, cells = (_array(grad) for grad in upstream)
    results = _reference.lstm(*arrays, **named, return_cells=True)
    expected = _reference.lstm_backward(*above, *arrays, **named, grad_cells=cells)
    return [*zip(outputs, results, strict=True), *zip(grads, expected, strict=True)]


def _lstm_of_bytes() -> Pairs:
    """Weights in 8 bits: as exact weights that are rounded to multiples of the largest one of their row over 127."""
    inputs = [t.detach() for t in _lstm_inputs(torch.float32, T=6, B=5, I=33, H=70, P=70)]
    packed = ops.lstm_pack(*inputs[3:5], dtype=torch.int8)
    outputs = ops.lstm(*inputs, packed=packed)
    scales = [weight.abs().amax(dim=1, keepdim=True) / 127 for weight in inputs[3:5]]
    inputs[3:5] = [(w / s).round() * s for w, s in zip(inputs[3:5], scales, strict=True)]
    expected = _reference.lstm(*(_array(tensor) for tensor in inputs))
    return list(zip(outputs, expected, strict=True))


def _linear_cross_entropy(dtype: torch.dtype) -> Pairs:
    N, D, V = 30, 65, 501
    inputs = [_random(dtype, *shape).requires_grad_() for shape in ((N, D), (V, D), (V,))]
    hidden, weight, bias = inputs
    target = torch.arange(N) * 17 % V
    target[4] = -100
    loss = ops.linear_cross_entropy(
        hidden, weight, target, linear_bias=bias, reduction="none", label_smoothing=0.1
    )
    upstream = _random(dtype, N)
    grads = torch.autograd.grad(loss, inputs, upstream)
    arrays = (_array(hidden), _array(weight), target.numpy())
    options = {"bias": _array(bias), "reduction": "none", "label_smoothing": 0.1}
    *expected, _ = _reference.linear_cross_entropy_backward(_array(upstream), *arrays, **options)
    pairs: Pairs = [(loss, _reference.linear_cross_entropy(*arrays, **options))]
    return pairs + list(zip(grads, expected, strict=True))


def _linear_logits(dtype: torch.dtype) -> Pairs:
    """Held against the losses of the reference for every class as the target: lse - logit."""
    N, D, V = 5, 65, 33
    hidden, weight, bias = (_random(dtype, *shape) for shape in ((N, D), (V, D), (V,)))
    logits = ops.linear_logits(hidden, weight, bias)
    arrays, options = (_array(hidden), _array(weight)), {"bias": _array(bias), "reduction": "none"}
    losses = [
        _reference.linear_cross_entropy(*arrays, np.full(N, target), **options)
        for target in range(V)
    ]
    return [(-logits.log_softmax(1).mT, np.stack(losses))]


# Equality from here on: tokens, counts and even logprobs are defined to the bit.

_SETTINGS: dict[str, Any] = {
    "temperature": 0.9,
    "top_k": 200,
    "top_p": 0.95,
    "min_p": 0.001,
    "typical_p": 0.9,
}


def _tied_logits(dtype: torch.dtype, *shape: int) -> Tensor:
    """Multiples of a quarter, which every dtype holds exactly."""
    return ((_random(torch.float32, *shape) * 40).round() / 4).to(dtype)


def _expected_sample(logits: Tensor) -> dict[str, Any]:
    B = logits.shape[0]
    rows = np.tile([*_SETTINGS.values(), 1.0, 0.0, 0.0], (B, 1))
    seeds = np.ones(B, dtype=np.int64)
    return _reference.sample(logits.float().numpy(), rows, seeds, np.arange(B), num_logprobs=5)


def _sample(dtype: torch.dtype) -> Pairs:
    logits = _tied_logits(dtype, 64, 700)
    drawn = ops.sample(
        logits, **_SETTINGS, seed=1, num_logprobs=5, return_entropy=True, return_rank=True
    )
    expected = _expected_sample(logits)
    names = [name for name in drawn._fields if name != "valid"]
    return [(getattr(drawn, name), expected[name]) for name in names]


def _filter_logits(dtype: torch.dtype) -> Pairs:
    logits = _tied_logits(dtype, 64, 700)
    got, expected = ops.filter_logits(logits, **_SETTINGS), _expected_sample(logits)["processed"]
    dropped = -1e9  # a number that can be subtracted
    return [(got.nan_to_num(neginf=dropped), np.nan_to_num(expected, neginf=dropped))]


def _beam_search_step(dtype: torch.dtype) -> Pairs:
    logits, scores = _tied_logits(dtype, 8, 3, 700), _random(torch.float32, 8, 3)
    best = ops.beam_search_step(logits, scores)
    expected = _reference.beam_search_step(logits.float().numpy(), scores.numpy(), 6)
    return list(zip(best, expected, strict=True))


def _speculative_verify(dtype: torch.dtype) -> Pairs:
    B, n = 32, 3
    target, draft = _tied_logits(dtype, B, n + 1, 700), _tied_logits(dtype, B, n, 700)
    seeds, positions = torch.arange(B), torch.zeros(B, dtype=torch.int64)
    ids = ops.sample(draft.flatten(0, 1), seed=1).token.view(B, n)
    tokens, accepted, logprobs, _ = ops.speculative_verify(
        ids, draft, target, seed=seeds, position=positions
    )
    expected = _reference.speculative_verify(
        *(t.numpy() for t in (ids, draft.float(), target.float(), seeds, positions))
    )
    return list(zip((tokens, accepted, logprobs), expected, strict=True))


def _multinomial(dtype: torch.dtype) -> Pairs:
    weights = _random(dtype, 8, 700).abs()
    seeds, positions = np.full(8, 2), np.arange(8)
    return [
        (
            ops.multinomial(weights, 50, replacement, seed=2),
            _reference.multinomial(
                weights.double().numpy(), 50, replacement, False, seeds, positions
            ),
        )
        for replacement in (False, True)
    ]
