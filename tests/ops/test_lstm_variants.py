# SPDX-License-Identifier: Apache-2.0
"""Variants of the LSTM layer, alone and together, against their formulas: values and gradients in float64."""

import itertools
from collections.abc import Set

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import llmkern
from tests.conftest import assert_close

pytestmark = pytest.mark.usefixtures("one_thread")

# T, B, I, H, P: less than a vector of units; more than one panel; rows beyond one tile.
SHAPES = [(3, 2, 4, 5, 3), (4, 15, 3, 37, 18), (2, 1, 1, 1, 1)]

NAMES = ("projection", "layer_norm", "zoneout", "seed", "reset", "lengths")
COMBINATIONS = [
    frozenset(itertools.compress(NAMES, flags))
    for flags in itertools.product((False, True), repeat=len(NAMES))
    if flags[2] or not flags[3]  # a seed is for zoneout
]


def named(variant: Set[str]) -> str:
    """The same in every process, unlike the order of a set: where many run tests, they compare the names."""
    return "+".join(sorted(variant)) or "plain"


def problem(shape, variant, dtype=torch.float64):
    """Differentiable arguments and options of ops.lstm."""
    T, B, I, H, P = shape  # noqa: E741
    P = P if "projection" in variant else H
    sizes = {"input": (T, B, I), "h_0": (B, P), "c_0": (B, H)}
    sizes |= {"weight_ih": (4 * H, I), "weight_hh": (4 * H, P), "bias_ih": (4 * H,)}
    sizes |= {"bias_hh": (4 * H,)}
    if "projection" in variant:
        sizes["weight_hr"] = P, H
    if "layer_norm" in variant:
        sizes |= {"norm_gates": (2, 4 * H), "norm_cell": (2, H)}
    leaves = {name: torch.randn(s, dtype=torch.float64).to(dtype) for name, s in sizes.items()}
    for name in ("weight_ih", "weight_hh", "weight_hr"):
        if name in leaves:
            leaves[name] /= leaves[name].shape[1] ** 0.5
    options = {}
    if "zoneout" in variant:
        options |= {"zoneout_h": 0.3, "zoneout_c": 0.45}
    if "seed" in variant:
        options["seed"] = torch.tensor(7)
    if "reset" in variant:
        options["reset"] = torch.rand(T, B) < 0.4
    if "lengths" in variant:
        options["lengths"] = torch.randint(T + 1, (B,))
    return {name: leaf.requires_grad_() for name, leaf in leaves.items()}, options


def by_formula(
    input: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
    weight_hr: Tensor | None = None,
    norm_gates: Tensor | None = None,
    norm_cell: Tensor | None = None,
    zoneout_h: float = 0.0,
    zoneout_c: float = 0.0,
    seed: Tensor | None = None,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, ...]:
    """kernels/lstm.h, a step after the other: output, h_n, c_n and cell states."""
    (T, B, _), H = input.shape, c_0.shape[1]
    h, c = h_0, c_0
    outputs, cells = [torch.zeros_like(h_0)] * T, [torch.zeros_like(c_0)] * T

    def kept(p: float, purpose: int, columns: int, t: int) -> Tensor:
        if seed is None or p == 0:
            return torch.full((B, columns), p, dtype=input.dtype)
        mask = torch.ops.llmkern.mask(seed, purpose, T * B, columns, p)
        return mask[t * B : (t + 1) * B].to(input.dtype)

    for t in reversed(range(T)) if reverse else range(T):
        h_prev, c_prev = h, c
        if reset is not None:
            h_prev, c_prev = h * ~reset[t, :, None], c * ~reset[t, :, None]
        of_input, of_hidden = input[t] @ weight_ih.T, h_prev @ weight_hh.T
        if norm_gates is not None:
            of_input = F.layer_norm(of_input, [4 * H], norm_gates[0])
            of_hidden = F.layer_norm(of_hidden, [4 * H], norm_gates[1])
        i, f, g, o = (of_input + bias_ih + of_hidden + bias_hh).chunk(4, 1)
        c_new = f.sigmoid() * c_prev + i.sigmoid() * g.tanh()
        squashed = c_new if norm_cell is None else F.layer_norm(c_new, [H], *norm_cell)
        h_new = o.sigmoid() * squashed.tanh()
        if weight_hr is not None:
            h_new = h_new @ weight_hr.T
        z_c, z_h = kept(zoneout_c, 3, H, t), kept(zoneout_h, 4, h_0.shape[1], t)
        c_new, h_new = z_c * c_prev + (1 - z_c) * c_new, z_h * h_prev + (1 - z_h) * h_new
        runs = torch.ones(B, 1, dtype=torch.bool) if lengths is None else (t < lengths)[:, None]
        h, c = torch.where(runs, h_new, h), torch.where(runs, c_new, c)
        outputs[t], cells[t] = torch.where(runs, h_new, 0), torch.where(runs, c_new, 0)
    return torch.stack(outputs), h, c, torch.stack(cells)


def values_and_gradients(layer, leaves, upstream, **options):
    outputs = layer(**leaves, **options)
    return [*outputs, *torch.autograd.grad(outputs, list(leaves.values()), upstream)]


@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recomputed"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("variant", COMBINATIONS, ids=named)
def test_values_and_gradients(variant, reverse, recompute):
    for shape in SHAPES:
        leaves, options = problem(shape, variant)
        with torch.no_grad():
            expected = by_formula(**leaves, **options, reverse=reverse)
        upstream = [torch.randn_like(t) for t in expected]
        expected = values_and_gradients(by_formula, leaves, upstream, **options, reverse=reverse)
        options |= {"reverse": reverse, "recompute": recompute, "return_cells": True}
        got = values_and_gradients(llmkern.ops.lstm, leaves, upstream, **options)
        for ours, truth in zip(got, expected, strict=True):
            assert_close(ours, truth, 1e-10)


EVERYTHING = frozenset(NAMES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("variant", [EVERYTHING, EVERYTHING - {"lengths", "projection"}], ids=named)
def test_on_every_instruction_set(isa, variant, dtype):
    """Panels of 2 to 16 units, and gates that a recomputation makes again."""
    for recompute in (False, True):
        leaves, options = problem((5, 8, 20, 67, 35), variant, dtype)
        exact = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
        upstream = [torch.randn_like(t) for t in by_formula(**leaves, **options)]
        truth = values_and_gradients(by_formula, exact, [t.double() for t in upstream], **options)
        options |= {"recompute": recompute, "return_cells": True}
        got = values_and_gradients(llmkern.ops.lstm, leaves, upstream, **options)
        for ours, expected in zip(got, truth, strict=True):
            assert_close(ours, expected, 2e-5 if dtype == torch.float32 else 1e-11)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    "variant",
    [
        EVERYTHING,
        EVERYTHING - {"lengths"},
        EVERYTHING - {"layer_norm"},
        EVERYTHING - {"layer_norm", "lengths"},
    ],
    ids=named,
)
def test_same_bits_on_any_number_of_threads(isa, on_threads, variant, recompute):
    """Two threads divide the rows, without layer norm; three the panels."""
    leaves, options = problem((4, 21, 30, 200, 90), variant, torch.float32)
    upstream = [torch.randn_like(t) for t in by_formula(**leaves, **options)]
    options |= {"recompute": recompute, "return_cells": True}

    def once():
        return values_and_gradients(llmkern.ops.lstm, leaves, upstream, **options)

    for other in (2, 3):
        for a, b in zip(on_threads(1, once), on_threads(other, once), strict=True):
            assert torch.equal(a, b)


def test_a_row_does_not_depend_on_the_batch(isa):
    leaves, options = problem((4, 9, 5, 40, 21), EVERYTHING - {"seed"}, torch.float32)
    whole = llmkern.ops.lstm(**leaves, **options, return_cells=True)
    row = slice(6, 7)
    for name in ("input", "h_0", "c_0"):
        leaves[name] = leaves[name][..., row, :]
    options |= {"reset": options["reset"][:, row], "lengths": options["lengths"][row]}
    for ours, all_rows in zip(
        llmkern.ops.lstm(**leaves, **options, return_cells=True), whole, strict=True
    ):
        assert torch.equal(ours, all_rows[..., row, :])


def test_zoneout_is_a_function_of_the_seed():
    leaves, options = problem(SHAPES[1], {"zoneout"})
    first, again, other = (
        llmkern.ops.lstm(**leaves, **options, seed=torch.tensor(seed))[0] for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    options = {"zoneout_h": 1.0, "zoneout_c": 1.0, "seed": torch.tensor(1)}
    output, h_n, c_n = llmkern.ops.lstm(**leaves, **options)
    assert torch.equal(h_n, leaves["h_0"]) and torch.equal(c_n, leaves["c_0"])
    assert torch.equal(output, leaves["h_0"].expand_as(output))


def test_a_reset_forgets_what_came_before():
    """As if the sequence began there, to the bit."""
    leaves, _ = problem((6, 3, 4, 19, 19), {})
    reset = torch.zeros(6, 3, dtype=torch.bool)
    reset[2] = True
    output, h_n, c_n = llmkern.ops.lstm(**leaves, reset=reset)
    leaves["input"] = leaves["input"][2:]
    leaves |= {name: torch.zeros_like(leaves[name]) for name in ("h_0", "c_0")}
    for ours, fresh in zip((output[2:], h_n, c_n), llmkern.ops.lstm(**leaves), strict=True):
        assert torch.equal(ours, fresh)


def test_what_recomputation_saves():
    """Outputs and cell states alone: 2H a token and the arguments, where the gates take 4H more."""
    leaves, _ = problem((20, 8, 32, 32, 32), {}, torch.float32)
    arguments = {leaf.untyped_storage().data_ptr() for leaf in leaves.values()}
    saved: dict[bool, int] = {}
    for recompute in (False, True):
        tensors: dict[int, Tensor] = {}
        keep = lambda t, kept=tensors: kept.setdefault(t.untyped_storage().data_ptr(), t)  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            llmkern.ops.lstm(**leaves, recompute=recompute)
        sizes = [t.nbytes for address, t in tensors.items() if address not in arguments]
        saved[recompute] = sum(sizes)
    assert saved == {False: 20 * 8 * 32 * 6 * 4, True: 20 * 8 * 32 * 2 * 4}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"zoneout_h": 1.5}, ValueError, r"zoneout_h in \[0, 1\], got 1.5"),
        ({"zoneout_c": float("nan")}, ValueError, r"zoneout_c in \[0, 1\], got nan"),
        ({"seed": torch.zeros(2, dtype=torch.int64)}, ValueError, r"seed of shape \[\] = \[\]"),
        ({"seed": 3}, TypeError, "seed to be a Tensor, got int"),
        ({"reset": torch.zeros(3, 3)}, TypeError, "reset of dtype bool, got float32"),
        (
            {"reset": torch.zeros(3, 3, dtype=torch.bool)},
            ValueError,
            r"reset of shape \[T, B\] = \[3, 2\], got \[3, 3\]",
        ),
        ({"norm_cell": None}, ValueError, "both norm_gates and norm_cell or neither, got one"),
        (
            {"norm_gates": torch.zeros(4, 20, dtype=torch.float64)},
            ValueError,
            r"norm_gates of shape \[2, 4\*H\] = \[2, 20\], got \[4, 20\]",
        ),
        (
            {"weight_hr": torch.zeros(3, 6, dtype=torch.float64)},
            ValueError,
            r"weight_hr of shape \[P, H\] = \[3, 5\], got \[3, 6\]",
        ),
        (
            {"h_0": torch.zeros(2, 5, dtype=torch.float64)},
            ValueError,
            r"h_0 of shape \[B, P\] = \[2, 3\], got \[2, 5\]",
        ),
    ],
    ids=lambda v: "+".join(v) if isinstance(v, dict) else "",
)
def test_bad_arguments(change, error, message):
    leaves, options = problem(SHAPES[0], EVERYTHING)
    with pytest.raises(error, match=rf"llmkern\.lstm: expected {message}"):
        llmkern.ops.lstm(**{**leaves, **options, **change})
