# SPDX-License-Identifier: Apache-2.0
"""The LSTM layer in plain, differentiable operations of torch: the formulas of csrc/kernels/lstm.h, step by step.

It takes over where the kernels have nothing: second derivatives, and the variants on CUDA. Any device, any dtype; as in
the kernels, 16-bit layers compute in float32, and the output is rounded once a step.
"""

from collections.abc import Iterable
from itertools import repeat

import torch
import torch.nn.functional as F
from torch import Tensor

from llmkern.ops import _checks

_EPS = 1e-5
# Purpose of csrc/kernels/philox.h.
_ZONEOUT_CELL, _ZONEOUT_HIDDEN = 3, 4


def lstm(
    input: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    weight_hr: Tensor | None = None,
    norm_gates: Tensor | None = None,
    norm_cell: Tensor | None = None,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    seed: Tensor | None = None,
    zoneout_h: float = 0.0,
    zoneout_c: float = 0.0,
    reverse: bool = False,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The arguments of torch.ops.llmkern.lstm; returns its output, h_n, c_n and cells.

    ``shift`` [T, B, 4*H] is added to the gates before activation: the gradient of that sum, grad_gates, is its own.
    """
    dtype, wide = input.dtype, _checks.widened(input.dtype)
    T, B, _ = input.shape
    runs = None if lengths is None else torch.arange(T, device=input.device)[:, None] < lengths
    x, h, c = input.to(wide), h_0.to(wide), c_0.to(wide)
    if (
        runs is not None
    ):  # what lies beyond a row's length must not reach the weights' gradient, were it NaN
        x = x.masked_fill(~runs[..., None], 0)
    gain_ih, gain_hh = (None, None) if norm_gates is None else norm_gates.to(wide).unbind()
    from_input = _normalized(F.linear(x, weight_ih.to(wide)), gain_ih)
    for extra in (bias_ih, bias_hh, shift):
        from_input = from_input if extra is None else from_input + extra.to(wide)
    recurrent = weight_hh.to(wide)
    projection = None if weight_hr is None else weight_hr.to(wide)
    gain_c, bias_c = (None, None) if norm_cell is None else norm_cell.to(wide).unbind()
    per_step = (
        from_input.unbind(),
        _steps(runs),
        _steps(reset),
        _masks(seed, _ZONEOUT_HIDDEN, T, B, h_0.shape[1], zoneout_h),
        _masks(seed, _ZONEOUT_CELL, T, B, c_0.shape[1], zoneout_c),
    )
    steps = list(zip(*per_step, strict=False))
    outputs, cells = [], []
    for a_t, runs_t, reset_t, zone_h, zone_c in reversed(steps) if reverse else steps:
        h_before, c_before = (
            (h, c) if reset_t is None else (_zeroed(h, reset_t), _zeroed(c, reset_t))
        )
        i, f, g, o = (a_t + _normalized(F.linear(h_before, recurrent), gain_hh)).chunk(4, dim=-1)
        c_new = f.sigmoid() * c_before + i.sigmoid() * g.tanh()
        h_new = o.sigmoid() * _normalized(c_new, gain_c, bias_c).tanh()
        h_new = h_new if projection is None else F.linear(h_new, projection)
        h_new = _zoned_out(h_new, h_before, zoneout_h, zone_h).to(dtype).to(wide)
        c_new = _zoned_out(c_new, c_before, zoneout_c, zone_c)
        if runs_t is None:
            h, c = h_new, c_new
            outputs.append(h)
            cells.append(c)
        else:
            h, c = torch.where(runs_t[:, None], h_new, h), torch.where(runs_t[:, None], c_new, c)
            outputs.append(_zeroed(h, ~runs_t))
            cells.append(_zeroed(c, ~runs_t))
    if reverse:
        outputs.reverse()
        cells.reverse()
    return torch.stack(outputs).to(dtype), h.to(dtype), c.to(dtype), torch.stack(cells)


def _steps(per_step: Tensor | None) -> Iterable[Tensor | None]:
    """Of every step: its part of [T, ...], or None."""
    return repeat(None) if per_step is None else per_step.unbind()


def _normalized(v: Tensor, gain: Tensor | None, bias: Tensor | None = None) -> Tensor:
    return v if gain is None else F.layer_norm(v, v.shape[-1:], gain, bias, _EPS)


def _zeroed(state: Tensor, rows: Tensor) -> Tensor:
    return state.masked_fill(rows[:, None], 0)


def _masks(
    seed: Tensor | None, purpose: int, T: int, B: int, columns: int, p: float
) -> Iterable[Tensor | None]:
    """Of every step: where zoneout keeps the value of the step before, [B, columns]."""
    if seed is None or p == 0:
        return repeat(None)
    mask = torch.ops.llmkern.mask.default(seed, purpose, T * B, columns, p)
    return mask.view(T, B, columns).unbind()


def _zoned_out(new: Tensor, before: Tensor, p: float, mask: Tensor | None) -> Tensor:
    if p == 0:
        return new
    return p * before + (1 - p) * new if mask is None else torch.where(mask, before, new)
