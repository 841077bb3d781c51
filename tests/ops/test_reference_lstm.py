# SPDX-License-Identifier: Apache-2.0
"""The LSTM's reference itself: against a few lines of torch, and its gradients against differences of its results."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmkern import _reference

from . import philox_oracle as oracle

T, B, I, H, P = 5, 3, 4, 17, 3  # noqa: E741
SEED = 11
PARAMETERS = ("weight_hr", "norm_gates", "norm_cell")


def zoned(
    before: Tensor, now: Tensor, purpose: int, p: float, seed: int | None, row: int
) -> Tensor:
    if seed is None:
        return p * before + (1 - p) * now
    columns = now.shape[0]
    mask = torch.from_numpy(oracle.mask(seed, purpose, T * B, columns, p)[row])
    return torch.where(mask, before, now)


def by_torch(
    input: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor,
    b_hh: Tensor,
    *,
    weight_hr: Tensor | None = None,
    norm_gates: Tensor | None = None,
    norm_cell: Tensor | None = None,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    seed: int | None = None,
    zoneout_h: float = 0.0,
    zoneout_c: float = 0.0,
    reverse: bool = False,
) -> tuple[Tensor, ...]:
    """csrc/kernels/lstm.h in torch, row by row: output, h_n, c_n, cells."""
    width, zero = h_0.shape[1], input.new_zeros(())
    outputs = [[zero.expand(width)] * B for _ in range(T)]
    cells = [[zero.expand(H)] * B for _ in range(T)]
    h_n, c_n = [], []
    for b in range(B):
        h, c = h_0[b], c_0[b]
        steps = range(T if lengths is None else int(lengths[b]))
        for t in reversed(steps) if reverse else steps:
            if reset is not None and reset[t, b]:
                h, c = h * 0, c * 0
            a_ih, a_hh = w_ih @ input[t, b], w_hh @ h
            if norm_gates is not None:
                a_ih = F.layer_norm(a_ih, (4 * H,)) * norm_gates[0]
                a_hh = F.layer_norm(a_hh, (4 * H,)) * norm_gates[1]
            i, f, g, o = (a_ih + b_ih + a_hh + b_hh).chunk(4)
            new = f.sigmoid() * c + i.sigmoid() * g.tanh()
            shown = new
            if norm_cell is not None:
                shown = F.layer_norm(new, (H,)) * norm_cell[0] + norm_cell[1]
            out = o.sigmoid() * shown.tanh()
            if weight_hr is not None:
                out = weight_hr @ out
            c = zoned(c, new, oracle.ZONEOUT_CELL, zoneout_c, seed, t * B + b)
            h = zoned(h, out, oracle.ZONEOUT_HIDDEN, zoneout_h, seed, t * B + b)
            outputs[t][b], cells[t][b] = h, c
        h_n.append(h)
        c_n.append(c)
    output, states = (torch.stack([torch.stack(row) for row in rows]) for rows in (outputs, cells))
    return output, torch.stack(h_n), torch.stack(c_n), states


def case(variant: tuple[str, ...]) -> tuple[list[Tensor], dict[str, Any]]:
    """The seven tensors of a plain layer, and the options that the named variants have."""
    width = P if "projection" in variant else H
    shapes = [(T, B, I), (B, width), (B, H), (4 * H, I), (4 * H, width), (4 * H,), (4 * H,)]
    tensors = [torch.randn(shape, dtype=torch.float64) / 2 for shape in shapes]
    options: dict[str, Any] = {}
    if "projection" in variant:
        options["weight_hr"] = torch.randn(P, H, dtype=torch.float64) / 2
    if "layer norm" in variant:
        options["norm_gates"] = torch.randn(2, 4 * H, dtype=torch.float64)
        options["norm_cell"] = torch.randn(2, H, dtype=torch.float64)
    if "zoneout" in variant or "expected zoneout" in variant:
        options |= {"zoneout_h": 0.3, "zoneout_c": 0.4}
        options |= {"seed": SEED} if "zoneout" in variant else {}
    if "reset" in variant:
        options["reset"] = torch.rand(T, B) < 0.4
    if "lengths" in variant:
        options["lengths"] = torch.tensor([T, 0, 3])
    if "reverse" in variant:
        options["reverse"] = True
    return tensors, options


def as_numpy(options: dict[str, Any]) -> dict[str, Any]:
    return {k: v.numpy() if isinstance(v, Tensor) else v for k, v in options.items()}


VARIANTS = [
    "projection",
    "layer norm",
    "zoneout",
    "expected zoneout",
    "reset",
    "lengths",
    "reverse",
]
PAIRS = [*itertools.combinations(VARIANTS, 2)]
ALL = [
    tuple(VARIANTS[:3] + VARIANTS[4:]),
    tuple(v for v in VARIANTS if v != "zoneout"),
]


@pytest.mark.parametrize("variant", [(), *((v,) for v in VARIANTS), *PAIRS, *ALL], ids=" and ".join)
def test_results_and_gradients_are_those_of_torch(variant):
    tensors, options = case(variant)
    results = _reference.lstm(*(t.numpy() for t in tensors), **as_numpy(options), return_cells=True)
    parameters = [name for name in PARAMETERS if name in options]
    leaves = [t.requires_grad_() for t in (*tensors, *(options[name] for name in parameters))]
    expected = by_torch(*tensors, **options)
    for got, want in zip(results, expected, strict=True):
        np.testing.assert_allclose(got, want.detach(), rtol=1e-12, atol=1e-14)

    upstream = [torch.randn_like(want) for want in expected]
    wanted = torch.autograd.grad(expected, leaves, upstream, allow_unused=True)
    options = {k: v.detach() if isinstance(v, Tensor) else v for k, v in options.items()}
    output, h_n, c_n, cells = (grad.numpy() for grad in upstream)
    grads = _reference.lstm_backward(
        output,
        h_n,
        c_n,
        *(t.detach().numpy() for t in tensors),
        **as_numpy(options),
        grad_cells=cells,
    )
    names = ("input", "h_0", "c_0", "weight_ih", "weight_hh", "bias", *parameters)
    for name, got, want in zip(names, grads, (*wanted[:6], *wanted[7:]), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("variant", ALL, ids=" and ".join)
def test_gradients_are_differences(variant):
    """Along random directions, one argument after another: nothing but the reference's own forward pass."""
    tensors, options = case(variant)
    parameters = [name for name in PARAMETERS if name in options]
    values = [t.numpy() for t in (*tensors[:6], *(options[name] for name in parameters))]
    fixed = as_numpy({k: v for k, v in options.items() if k not in PARAMETERS})

    def arguments(values: list[np.ndarray]) -> tuple[list[np.ndarray], dict[str, Any]]:
        return [*values[:6], tensors[6].numpy()], dict(zip(parameters, values[6:], strict=True))

    def results(values: list[np.ndarray]) -> tuple[np.ndarray, ...]:
        plain, variants = arguments(values)
        return _reference.lstm(*plain, **variants, **fixed, return_cells=True)

    rng = np.random.default_rng(0)
    above = [rng.standard_normal(result.shape) for result in results(values)]
    plain, variants = arguments(values)
    grads = _reference.lstm_backward(*above[:3], *plain, **variants, **fixed, grad_cells=above[3])

    def loss(values: list[np.ndarray]) -> float:
        return sum(float((g * r).sum()) for g, r in zip(above, results(values), strict=True))

    step = 1e-5
    for which, grad in enumerate(grads):
        direction = rng.standard_normal(values[which].shape)
        moved = [
            [v + sign * step * direction if i == which else v for i, v in enumerate(values)]
            for sign in (1, -1)
        ]
        difference = (loss(moved[0]) - loss(moved[1])) / (2 * step)
        assert difference == pytest.approx((grad * direction).sum(), rel=1e-6, abs=1e-7), which


def test_missing_gradients_are_zero():
    tensors, options = case(("projection", "reset"))
    plain, options = [t.numpy() for t in tensors], as_numpy(options)
    zeros = [np.zeros_like(r) for r in _reference.lstm(*plain, **options, return_cells=True)]
    ones = np.ones_like(zeros[2])
    sparse = _reference.lstm_backward(None, None, ones, *plain, **options)
    full = _reference.lstm_backward(*zeros[:2], ones, *plain, **options, grad_cells=zeros[3])
    for one, other in zip(sparse, full, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_gates": np.zeros((2, 4 * H))}, "both norm_gates and norm_cell"),
        ({"lengths": np.array([1, 2, T + 1])}, r"lengths in \[0, T\]"),
        ({"reset": np.zeros((B, T), bool)}, r"reset of shape \[5, 3\], got \[3, 5\]"),
        ({"weight_hr": np.zeros((H, P))}, r"weight_hr of shape \[17, 17\], got \[17, 3\]"),
    ],
)
def test_shapes_that_do_not_fit(change, message):
    tensors, _ = case(())
    with pytest.raises(ValueError, match=message):
        _reference.lstm(*(t.numpy() for t in tensors), **change)
