# SPDX-License-Identifier: Apache-2.0
"""Drop-in for torch.nn.LSTMCell."""

import functools
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from llmkern import ops
from llmkern.nn._packing import PackedWeights, checked_dtype, parameters_of
from llmkern.ops.lstm.loop import LstmLoop, can_defer

State = tuple[Tensor, Tensor]
_NAMES = "weight_ih", "weight_hh", "bias_ih", "bias_hh"


class LSTMCell(nn.LSTMCell):
    """``torch.nn.LSTMCell`` on llmkern's kernels: one step of an LSTM layer.

    Shapes:
        input [B, I] or [I]; hx = (h_0, c_0), each [B, H] or [H], zeros when None; returns (h_1, c_1) of their shape.

    Example:
        >>> cell = llmkern.nn.LSTMCell(256, 512)
        >>> h_1, c_1 = cell(torch.randn(20, 256))
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._packed = PackedWeights()
        self._loops = _Loops()

    def quantize_weights(self, dtype: torch.dtype | None) -> None:
        """As :meth:`LSTM.quantize_weights`."""
        self._packed = PackedWeights(checked_dtype("LSTMCell", dtype))

    def forward(self, input: Tensor, hx: State | None = None) -> State:
        if not isinstance(input, Tensor):
            raise TypeError(f"llmkern.LSTMCell: expected a Tensor, got {type(input).__name__}")
        if input.dim() not in (1, 2):
            raise ValueError(
                f"llmkern.LSTMCell: expected input of shape [B, I] or [I], got {list(input.shape)}"
            )
        if input.dim() == 2:
            return self._step(input, hx)
        rows = None if hx is None else (hx[0].unsqueeze(0), hx[1].unsqueeze(0))
        h_1, c_1 = self._step(input.unsqueeze(0), rows)
        return h_1.squeeze(0), c_1.squeeze(0)

    def _step(self, x: Tensor, hx: State | None) -> State:
        if hx is None:
            zeros = x.new_zeros(x.shape[0], self.hidden_size)
            hx = zeros, zeros
        weights = weight_ih, weight_hh, bias_ih, bias_hh = parameters_of(self, _NAMES)
        # One row, however many there are: the next step needs the same copy.
        packed = self._packed.get(0, 1, weight_ih, weight_hh)
        if packed is not None and torch.is_grad_enabled() and _is_plain(x, *hx):
            loop = self._loops.get(weights, packed, self._packed)
            if loop is not None:
                return loop.step(x, *hx)
        return ops.lstm_cell(x, *hx, weight_ih, weight_hh, bias_ih, bias_hh, packed=packed)


class _Loops:
    """The loop that the latest steps belong to, as long as their graph lives; neither saved nor copied."""

    def __init__(self) -> None:
        self._latest: weakref.ref[LstmLoop] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Loops":
        return _Loops()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _Loops, ()

    def get(self, weights: Sequence[Any], packed: Tensor, cache: PackedWeights) -> LstmLoop | None:
        """The loop over these weights, the latest one or a new one; None where their gradients cannot be deferred."""
        loop = None if self._latest is None else self._latest()
        if loop is not None and loop.is_of(weights, packed):
            return loop
        if not can_defer(weights):
            return None
        pack_backward = functools.partial(cache.get, 0, 1, weights[0], weights[1], True)
        loop = LstmLoop(weights, packed, pack_backward)
        self._latest = weakref.ref(loop)
        return loop


def _is_plain(*tensors: Tensor) -> bool:
    """Tensors of this machine's memory, outside of torch.func's transforms and of derivatives in forward mode."""
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    return not transformed and all(type(t) in (Tensor, nn.Parameter) and t.is_cpu for t in tensors)
