# SPDX-License-Identifier: Apache-2.0
"""The gate functions themselves: sigmoid and tanh of floats all over their range, against float64."""

import torch
from torch import Tensor

STRIDE = 20011  # from one float to the next: some 100000 between the smallest and the bound, of either sign


def floats_up_to(bound: float) -> Tensor:
    last = int(torch.tensor(bound).view(torch.int32))
    magnitudes = torch.arange(1, last, STRIDE, dtype=torch.int32).view(torch.float32)
    return torch.cat([magnitudes, -magnitudes])


def gates_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """sigmoid(x) and tanh(x) [N, 16] as a layer saves them that multiplies by 1 and adds nothing."""
    H = 16
    ones, state = torch.ones(4 * H, 1), torch.zeros(len(x), H)
    arguments = x.view(1, -1, 1), state, state, ones, torch.zeros(4 * H, H), None, None
    gates = torch.ops.llmkern.lstm.default(*arguments, save_gates=True)[4]
    i, f, g, o = gates.view(-1, 4, H).unbind(1)
    for other in (f, o):
        torch.testing.assert_close(other, i, rtol=0, atol=0, equal_nan=True)
    return i, g


def errors(got: Tensor, truth: Tensor) -> Tensor:
    """In units of the last place of the truth."""
    exponent = torch.frexp(truth).exponent.clamp(min=-125)
    return (got.double() - truth).abs() / torch.ldexp(torch.ones_like(truth), exponent - 24)


def test_errors_in_units_of_the_last_place(isa):
    x = floats_up_to(86.0)
    for got, function in zip(gates_of(x), (torch.sigmoid, torch.tanh), strict=True):
        error = errors(got, function(x.double())[:, None])
        assert error.max() < 3.5
        assert error.square().mean().sqrt() < 0.5
    near = x[(x.abs() > 2**-7) & (x.abs() < 10)]
    for got, function in zip(gates_of(near), (torch.sigmoid, torch.tanh), strict=True):
        assert errors(got, function(near.double())[:, None]).square().mean().sqrt() < 0.75


def test_values_at_the_ends(isa):
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([0.0, inf, -inf, 3e38, -3e38, 88.0, -88.0, 1e-45, -1e-45, 1e-39, -1e-39, nan])
    sigmoid, tanh = (y[:, 0] for y in gates_of(x))
    assert sigmoid[:2].tolist() == [0.5, 1.0] and tanh[:3].tolist() == [0.0, 1.0, -1.0]
    assert (sigmoid[[2, 4, 6]] < 2e-38).all() and (sigmoid[[2, 4, 6]] >= 0).all()
    assert sigmoid[[3, 5]].tolist() == [1.0, 1.0] and tanh[3:7].tolist() == [1.0, -1.0, 1.0, -1.0]
    assert sigmoid[7:11].tolist() == [0.5] * 4 and torch.equal(tanh[7:11], x[7:11])
    assert sigmoid[11].isnan() and tanh[11].isnan()
