# SPDX-License-Identifier: Apache-2.0
"""Drop-in for torch.nn.LSTMCell."""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from llmkern import ops
from llmkern.nn._weights import Snapshot, checked_dtype, is_plain, parameters_of
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
        self._snapshot: Snapshot | None = None
        self._loops = _Loops()

    def quantize_weights(self, dtype: torch.dtype | None) -> None:
        """As :meth:`LSTM.quantize_weights`."""
        dtype = checked_dtype("LSTMCell", dtype)
        self._snapshot = None if dtype is None else Snapshot(self._layers(), dtype)

    def _layers(self) -> list[dict[str, Tensor]]:
        """What ops.lstm_cell takes, as of the single layer of an LSTM."""
        named = zip(_NAMES, parameters_of(self, _NAMES), strict=True)
        return [{name: t for name, t in named if t is not None}]

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
        weights = parameters_of(self, _NAMES)
        if torch.is_grad_enabled() and _is_untransformed(x, *hx):
            loop = self._loops.get(weights)
            if loop is not None:
                return loop.step(x, *hx)
        if self._snapshot is not None and self._snapshot.serves(weights[1]):
            return ops.lstm_cell(x, *hx, **self._snapshot.layers[0])
        return ops.lstm_cell(x, *hx, *weights)


class _Loops:
    """The loop that the latest steps belong to, as long as their graph lives; neither saved nor copied."""

    def __init__(self) -> None:
        self._latest: weakref.ref[LstmLoop] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Loops":
        return _Loops()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _Loops, ()

    def get(self, weights: Sequence[Any]) -> LstmLoop | None:
        """The loop over these weights, the latest one or a new one; None where their gradients cannot be deferred."""
        loop = None if self._latest is None else self._latest()
        if loop is not None and loop.is_of(weights):
            return loop
        if not can_defer(weights):
            return None
        loop = LstmLoop(weights)
        self._latest = weakref.ref(loop)
        return loop


def _is_untransformed(*tensors: Any) -> bool:
    """Whether these are plain tensors outside of the compiler, tracing, autocast, and transforms of torch.func."""
    looked_at = (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch.is_autocast_enabled("cpu")
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
    )
    return not looked_at and is_plain(*tensors)
