# SPDX-License-Identifier: Apache-2.0
"""Drop-ins for torch.nn.LSTM and torch.nn.LSTMCell."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from llmkern import ops
from llmkern.nn._packing import PackedWeights, checked_dtype
from llmkern.ops._checks import ShapeError

State = tuple[Tensor, Tensor]


class LSTM(nn.RNNBase):
    """``torch.nn.LSTM`` on llmkern's kernels: same constructor, parameters, state_dict, outputs and shapes.

    It derives from ``nn.RNNBase`` because ``torch.compile`` refuses every instance of ``nn.LSTM``, subclasses too.

    Args:
        input_size, hidden_size: I and H.
        num_layers: layers on top of one another; each reads the output of the one below.
        bias: whether the gates have biases.
        batch_first: input and output are [B, T, ...] instead of [T, B, ...]; states are [.., B, H] either way.
        dropout: probability of zeroing an element between layers, in training.
        bidirectional: a second set of layers reads backwards; outputs are concatenated.
        proj_size: must be 0; projections are not provided yet.
        device, dtype: of the parameters.

    Shapes, with S = num_layers * (2 if bidirectional else 1):
        input [T, B, I] or, unbatched, [T, I]; hx = (h_0, c_0), each [S, B, H] or [S, H]; None means zeros.
        A PackedSequence is taken too, sorted or not, and then the output is one.
        lengths int64 [B]: row b has lengths[b] steps; its output is 0 beyond them, and h_n, c_n are the states after
        them. Rows need not be sorted.
        output [T, B, H * directions]; h_n, c_n as h_0, c_0.

    Raises:
        TypeError, ValueError: as :func:`llmkern.ops.lstm`, and for options that are not provided.

    Example:
        >>> lstm = llmkern.nn.LSTM(256, 512, num_layers=2, dropout=0.2)
        >>> output, (h_n, c_n) = lstm(torch.randn(35, 20, 256))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        if proj_size != 0:
            raise ValueError(f"llmkern.LSTM: expected proj_size 0, got {proj_size}")
        super().__init__(
            "LSTM",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device,
            dtype,
        )
        self._packed = PackedWeights()

    def quantize_weights(self, dtype: torch.dtype | None) -> None:
        """Reads float32 weights in 8 bits from now on, where no gradients are wanted (``torch.no_grad()``), on the CPU.

        Each row of a weight is rounded to multiples of its largest magnitude / 127. States, sums and the parameters
        themselves stay as they are; gradients, other dtypes and autocast see the parameters.

        Args:
            dtype: torch.int8, or None to go back.

        Raises:
            TypeError: another dtype.
        """
        self._packed = PackedWeights(checked_dtype("LSTM", dtype))

    def flatten_parameters(self) -> None:
        """Does nothing: the kernels take the parameters as they are."""

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: State | None = None,
        *,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, State]:
        if isinstance(input, PackedSequence):
            if lengths is not None:
                raise ValueError(
                    "llmkern.LSTM: expected no lengths beside a PackedSequence, which has its own"
                )
            return self._forward_packed(input, hx)
        batched = self._check_input(input)
        x = input if batched else input.unsqueeze(1)
        x = x.transpose(0, 1) if self.batch_first and batched else x
        h_0, c_0 = self._initial_state(x, hx, batched)
        output, h_n, c_n = self._run_layers(x, h_0, c_0, lengths)
        if not batched:
            return output.squeeze(1), (h_n.squeeze(1), c_n.squeeze(1))
        return output.transpose(0, 1) if self.batch_first else output, (h_n, c_n)

    def _forward_packed(
        self, input: PackedSequence, hx: State | None
    ) -> tuple[PackedSequence, State]:
        """Rows in the order of the packed data, the longest first; states in the order of the caller."""
        data, batch_sizes, order, place = input
        steps, lengths = pad_packed_sequence(PackedSequence(data, batch_sizes))
        self._check_input(steps.transpose(0, 1) if self.batch_first else steps)
        h_0, c_0 = self._initial_state(steps, hx, batched=True)
        if order is not None:
            h_0, c_0 = h_0.index_select(1, order), c_0.index_select(1, order)
        output, h_n, c_n = self._run_layers(steps, h_0, c_0, lengths.to(data.device))
        packed = pack_padded_sequence(output, lengths).data
        if place is not None:
            h_n, c_n = h_n.index_select(1, place), c_n.index_select(1, place)
        return PackedSequence(packed, batch_sizes, order, place), (h_n, c_n)

    def _check_input(self, input: Tensor) -> bool:
        """Whether the input has a batch dimension."""
        if not isinstance(input, Tensor):
            raise TypeError(f"llmkern.LSTM: expected a Tensor, got {type(input).__name__}")
        if input.dim() not in (2, 3) or input.shape[-1] != self.input_size:
            shape = "[B, T, I]" if self.batch_first else "[T, B, I]"
            raise ShapeError(
                f"llmkern.LSTM: expected input of shape {shape} or [T, I] with I = {self.input_size}, "
                f"got {list(input.shape)}"
            )
        return input.dim() == 3

    def _initial_state(self, x: Tensor, hx: State | None, batched: bool) -> State:
        layers, B, H = self._layers(), x.shape[1], self.hidden_size
        if hx is None:
            zeros = x.new_zeros(layers, B, H)
            return zeros, zeros
        letters, shape = ("S, B, H", [layers, B, H]) if batched else ("S, H", [layers, H])
        if len(hx) != 2:
            raise ValueError(f"llmkern.LSTM: expected hx to be (h_0, c_0), got {len(hx)} values")
        for name, state in zip(("h_0", "c_0"), hx, strict=True):
            if not isinstance(state, Tensor):
                raise TypeError(
                    f"llmkern.LSTM: expected {name} to be a Tensor, got {type(state).__name__}"
                )
            if list(state.shape) != shape:
                raise ShapeError(
                    f"llmkern.LSTM: expected {name} of shape [{letters}] = {shape}, got {list(state.shape)}"
                )
        h_0, c_0 = hx
        return (h_0, c_0) if batched else (h_0.unsqueeze(1), c_0.unsqueeze(1))

    def _layers(self) -> int:
        return self.num_layers * (2 if self.bidirectional else 1)

    def _run_layers(
        self, x: Tensor, h_0: Tensor, c_0: Tensor, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        directions = 2 if self.bidirectional else 1
        weights, h_n, c_n = self.all_weights, [], []
        for layer in range(self.num_layers):
            outputs = []
            for direction in range(directions):
                index = layer * directions + direction
                weight_ih, weight_hh, *biases = weights[index]
                output, h, c = ops.lstm(
                    x,
                    h_0[index],
                    c_0[index],
                    weight_ih,
                    weight_hh,
                    *biases,
                    reverse=direction == 1,
                    lengths=lengths,
                    packed=self._packed.get(index, x.shape[0] * x.shape[1], weight_ih, weight_hh),
                )
                outputs.append(output)
                h_n.append(h)
                c_n.append(c)
            x = outputs[0] if directions == 1 else torch.cat(outputs, dim=2)
            if self.dropout > 0 and self.training and layer < self.num_layers - 1:
                x = F.dropout(x, self.dropout)
        return x, torch.stack(h_n), torch.stack(c_n)


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
        batched = input.dim() == 2
        x = input if batched else input.unsqueeze(0)
        if hx is None:
            zeros = x.new_zeros(x.shape[0], self.hidden_size)
            h_0, c_0 = zeros, zeros
        else:
            h_0, c_0 = hx if batched else (hx[0].unsqueeze(0), hx[1].unsqueeze(0))
        packed = self._packed.get(0, x.shape[0], self.weight_ih, self.weight_hh)
        h_1, c_1 = ops.lstm_cell(
            x, h_0, c_0, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh, packed=packed
        )
        return (h_1, c_1) if batched else (h_1.squeeze(0), c_1.squeeze(0))
