# SPDX-License-Identifier: Apache-2.0
"""LSTM layers in 16 bits: parity with the reference, and errors no larger than torch's at the same dtype."""

import functools

import pytest
import torch

import llmkern
from tests.conftest import assert_close, assert_no_less_accurate
from tests.ops.test_lstm import (
    CASES,
    NAMES,
    RESULTS,
    layer,
    reference_case,
    run,
    torch_lstm,
    upstream_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")

HALVES = [torch.bfloat16, torch.float16]


@functools.cache
def rounded_case(shape, reverse, bias, dtype):
    """Arguments that are numbers of the dtype, and what float64 makes of them."""
    arguments, upstream, _ = reference_case(shape, reverse, bias)
    arguments, upstream = [t.to(dtype) for t in arguments], [t.to(dtype) for t in upstream]
    truth = run(
        llmkern.ops.lstm,
        [t.double() for t in arguments],
        [t.double() for t in upstream],
        reverse=reverse,
    )
    return arguments, upstream, truth


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("shape", "reverse", "bias"), CASES, ids=str)
def test_outputs_and_gradients_in_16_bits(isa, shape, reverse, bias, dtype):
    """float64 equals the reference (test_lstm.py) and is the truth here."""
    arguments, upstream, truth = rounded_case(shape, reverse, bias, dtype)
    got = run(llmkern.ops.lstm, arguments, upstream, reverse=reverse)
    for ours, expected in zip(got, truth, strict=True):
        assert ours.dtype == dtype
        assert_close(ours, expected)


@functools.cache
def compared_case(shape, dtype):
    arguments, upstream = layer(shape, dtype=dtype), upstream_of(shape, dtype)
    truth = run(torch_lstm, [t.double() for t in arguments], [t.double() for t in upstream])
    return arguments, upstream, run(torch_lstm, arguments, upstream), truth


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize(
    "shape", [(1024, 2, 16, 40), (35, 20, 200, 200), (9, 3, 65, 131), (3, 4, 650, 650)], ids=str
)
def test_as_accurate_as_torch(isa, shape, dtype):
    arguments, upstream, torchs, truth = compared_case(shape, dtype)
    got = run(llmkern.ops.lstm, arguments, upstream)
    for name, a, b, c in zip(RESULTS + NAMES, got, torchs, truth, strict=True):
        assert_no_less_accurate(name, a, b, c)


@pytest.mark.parametrize("dtype", HALVES)
def test_cells_are_float32(isa, dtype):
    """A forget gate of 1 and input of 2^-12 a step: in 16 bits the sum would stop growing."""
    steps, small = 1024, 2.0**-12
    x, state = torch.ones(steps, 1, 1, dtype=dtype), torch.ones(1, 1, dtype=dtype)
    bias = torch.tensor([40.0, 40.0, small, 0.0], dtype=dtype)  # i = f = 1, g = 2^-12, o = 1/2
    zeros = torch.zeros(4, 1, dtype=dtype)
    _, _, c_n, cells = llmkern.ops.lstm(
        x, state, state, zeros, zeros, bias, bias * 0, return_cells=True
    )
    assert cells.dtype == torch.float32
    assert abs(cells[-1].item() - (1 + steps * small)) < 1e-4
    assert c_n.item() == torch.tensor(1 + steps * small).to(dtype).item()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", [(9, 33, 70, 131), (3, 2, 40, 650)], ids=str)
def test_same_bits_on_any_number_of_threads(isa, on_threads, shape, dtype):
    arguments, upstream = layer(shape, dtype=dtype), upstream_of(shape, dtype)

    def once():
        return run(llmkern.ops.lstm, arguments, upstream, reverse=True)

    for a, b in zip(on_threads(1, once), on_threads(3, once), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_row_does_not_depend_on_the_batch(isa, dtype):
    shape = (5, 19, 41, 67)
    arguments, upstream = layer(shape, dtype=dtype), upstream_of(shape, dtype)
    whole = run(llmkern.ops.lstm, arguments, upstream)
    for rows in (slice(0, 1), slice(7, 8), slice(3, 16), slice(18, 19)):
        part = [t[..., rows, :] for t in arguments[:3]]
        alone = run(llmkern.ops.lstm, [*part, *arguments[3:]], [t[..., rows, :] for t in upstream])
        for a, b in zip(alone[:6], whole[:6], strict=True):  # outputs and gradients of a row
            assert torch.equal(a, b[..., rows, :])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(isa, dtype, value):
    arguments = layer((4, 3, 5, 21), dtype=dtype)
    clean, _, _ = llmkern.ops.lstm(*arguments)
    arguments[0][2, 1, 3] = value
    arguments[3][:, 3] = 0  # inf * 0 is NaN
    clean, _, _ = llmkern.ops.lstm(arguments[0].nan_to_num(0, 0, 0), *arguments[1:])
    output, h_n, c_n = llmkern.ops.lstm(*arguments)
    assert torch.equal(output[:, [0, 2]], clean[:, [0, 2]])
    assert torch.equal(output[:2], clean[:2])
    assert output[2:, 1].isnan().all() and h_n[1].isnan().all() and c_n[1].isnan().all()


VARIANTS = {
    "projection": {"weight_hr": (5, 21)},
    "layer norm": {"norm_gates": (2, 84), "norm_cell": (2, 21)},
    "zoneout": {},
    "reset": {},
    "all": {"weight_hr": (5, 21), "norm_gates": (2, 84), "norm_cell": (2, 21)},
}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_in_16_bits(isa, variant, recompute, dtype):
    T, B, I, H = 6, 3, 9, 21  # noqa: E741
    tensors = {name: torch.rand(shape) * 0.5 + 0.2 for name, shape in VARIANTS[variant].items()}
    P = 5 if "weight_hr" in tensors else H
    x, h_0, c_0 = torch.randn(T, B, I), torch.randn(B, P), torch.randn(B, H)
    tensors |= {"input": x, "h_0": h_0, "c_0": c_0}
    tensors |= {"weight_ih": torch.randn(4 * H, I) * 0.2, "weight_hh": torch.randn(4 * H, P) * 0.2}
    tensors = {name: t.to(dtype) for name, t in tensors.items()}
    options = {"recompute": recompute}
    if variant in ("zoneout", "all"):
        options |= {"zoneout_h": 0.3, "zoneout_c": 0.2, "seed": torch.tensor(7)}
    if variant in ("reset", "all"):
        options |= {"reset": torch.rand(T, B) < 0.3}
    upstream = [torch.randn(shape).to(dtype) for shape in ((T, B, P), (B, P), (B, H))]
    results = []
    for wanted in (dtype, torch.float64):
        arguments = {name: t.to(wanted).requires_grad_() for name, t in tensors.items()}
        outputs = llmkern.ops.lstm(**arguments, **options)
        grads = torch.autograd.grad(
            outputs, list(arguments.values()), [u.to(wanted) for u in upstream]
        )
        results.append([*outputs, *grads])
    for ours, truth in zip(*results, strict=True):
        assert_close(ours, truth, 2 * torch.finfo(dtype).eps * (4 if "norm" in str(tensors) else 2))


@pytest.mark.parametrize("tokens", [1, 2, 511, 512, 513, 1030])
@pytest.mark.parametrize("dtype", HALVES)
def test_products_of_the_backward_pass_round_once(isa, dtype, tokens):
    """Depths around the blocks of the product, every width of a last panel, and odd ones."""
    for I, H in ((1, 1), (7, 3), (33, 5), (34, 9)):  # noqa: E741
        arguments, upstream = (
            layer((1, tokens, I, H), dtype=dtype),
            upstream_of((1, tokens, I, H), dtype),
        )
        output, _, _, cells, gates, *rest = torch.ops.llmkern.lstm.default(
            *arguments, save_cells=True, save_gates=True
        )
        saved = [*arguments, *[None] * 6, output, cells, gates, *rest]
        _, _, _, da, *_ = torch.ops.llmkern.lstm_backward.default(
            *upstream, None, *saved, weights=False
        )
        grads = torch.ops.llmkern.lstm_backward.default(*upstream, None, *saved)
        da, (x, h) = da[0].double(), (t.double() for t in (arguments[0][0], arguments[1]))
        expected = (da @ arguments[3].double(), da.T @ x, da.T @ h, da.sum(0))
        for got, truth in zip((grads[0][0], *grads[4:7]), expected, strict=True):
            rounding = torch.finfo(dtype).eps / 2 * truth.abs()
            exact = 1e-6 * truth.abs().max() + torch.finfo(dtype).smallest_normal
            assert ((got.double() - truth).abs() <= rounding + exact).all()


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_packed_weights_change_no_bit(isa, dtype):
    for shape in ((4, 3, 7, 13), (1, 1, 33, 50), (2, 7, 64, 32)):
        arguments = layer(shape, dtype=dtype)
        packed = llmkern.ops.lstm_pack(*arguments[3:5])
        assert packed.dtype == dtype
        expected = llmkern.ops.lstm(*arguments)
        for a, b in zip(llmkern.ops.lstm(*arguments, packed=packed), expected, strict=True):
            assert torch.equal(a, b)


def test_another_format_is_not_taken_for_ones_own(isa):
    """float32 weights that another instruction set has packed, and 8-bit ones beside others of the same size."""
    arguments = layer((3, 2, 31, 45), dtype=torch.float32)
    expected, _, _ = llmkern.ops.lstm(*arguments)
    for other in ("generic", "avx2", isa):
        torch.ops.llmkern.select_cpu_isa(other)
        packed = llmkern.ops.lstm_pack(*arguments[3:5])
        torch.ops.llmkern.select_cpu_isa(isa)
        got, _, _ = llmkern.ops.lstm(*arguments, packed=packed)
        assert torch.equal(got, expected)
        if other == isa:
            break


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("state", [torch.float32, *HALVES], ids=str)
def test_autocast_casts_as_by_hand(dtype, state):
    """To the region's dtype or that of the state, whatever is wider."""
    x, h_0, c_0, *parameters = layer((4, 3, 6, 9), dtype=torch.float32)
    arguments = x, h_0.to(state), c_0.to(state), *parameters
    with torch.autocast("cpu", dtype):
        got = llmkern.ops.lstm(*arguments)
    wider = torch.promote_types(dtype, state)
    expected = llmkern.ops.lstm(*[t.to(wider) for t in arguments])
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == wider and torch.equal(a, b)
