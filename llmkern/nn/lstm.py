# SPDX-License-Identifier: Apache-2.0
"""Drop-in for torch.nn.LSTM."""

from itertools import chain
from operator import itemgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from llmkern import ops
from llmkern.nn._weights import (
    Snapshot,
    checked_dtype,
    is_arithmetic_alone,
    is_plain,
    parameters_of,
)
from llmkern.ops import _seed
from llmkern.ops._checks import ShapeError

State = tuple[Tensor, Tensor]
_LAYERS = torch.ops.llmkern.lstm_layers.default


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
        proj_size: P; if not 0, h is projected to P elements (Sak et al. 2014).
        device, dtype: of the parameters.

    Beyond torch, by keyword alone; all masks are drawn anew at every call in training, from torch's generator:
        layer_norm: layer-normalised gates and cell (Ba et al. 2016, as in Haste), with parameters ``norm_gates_l0``
            [2, 4*H] and ``norm_cell_l0`` [2, H] for each layer and direction.
        zoneout_h, zoneout_c: probabilities that an element of h and c keeps its value of the step before, in training;
            in evaluation the expectation takes its place (Krueger et al. 2017).
        weight_dropout: probability of zeroing an element of the recurrent weights, in training, the same for all steps
            (Merity et al. 2018, https://arxiv.org/abs/1708.02182).
        locked_dropout: ``dropout`` zeroes the same elements at all steps (Gal & Ghahramani 2016).
        recompute: in training keep outputs and cell states alone, a third of the memory, and compute the gates again in
            the backward pass, a third more arithmetic (on the CPU).

    Shapes, with S = num_layers * (2 if bidirectional else 1), and P = H without a projection:
        input [T, B, I] or, unbatched, [T, I]; hx = (h_0, c_0), [S, B, P] and [S, B, H], or [S, P] and [S, H]; None
        means zeros. A PackedSequence is taken too, sorted or not, and then the output is one.
        lengths int64 [B]: row b has lengths[b] steps; its output is 0 beyond them, and h_n, c_n are the states after
        them. Rows need not be sorted.
        reset bool [T, B], as the input without I: a row's state is zero before the steps at which it is set, where
        another document begins. Layers that read backwards forget at the same boundaries.
        output [T, B, P * directions]; h_n, c_n as h_0, c_0. With return_cells also the cell states of all steps, [S, T,
        B, H], [S, B, T, H] with batch_first, or [S, T, H].

    Raises:
        TypeError, ValueError: as :func:`llmkern.ops.lstm`, and for options that do not fit.

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
        *,
        layer_norm: bool = False,
        zoneout_h: float = 0.0,
        zoneout_c: float = 0.0,
        weight_dropout: float = 0.0,
        locked_dropout: bool = False,
        recompute: bool = False,
    ) -> None:
        probabilities = {"zoneout_h": zoneout_h, "zoneout_c": zoneout_c}
        for name, p in (probabilities | {"weight_dropout": weight_dropout}).items():
            if not 0 <= p <= 1:
                raise ValueError(f"llmkern.LSTM: expected {name} in [0, 1], got {p}")
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
        self.layer_norm = layer_norm
        self.zoneout_h, self.zoneout_c = zoneout_h, zoneout_c
        self.weight_dropout, self.locked_dropout = weight_dropout, locked_dropout
        self.recompute = recompute
        if layer_norm:
            for suffix in self._suffixes():
                for name, rows in (("norm_gates", 4 * hidden_size), ("norm_cell", hidden_size)):
                    empty = torch.empty(2, rows, device=device, dtype=dtype)
                    self.register_parameter(name + suffix, nn.Parameter(empty))
            self.reset_parameters()
        self._snapshot: Snapshot | None = None

    def reset_parameters(self) -> None:
        """As in torch: uniform in +-1/sqrt(H). Gains of layer norm are 1, its bias 0."""
        super().reset_parameters()
        for name, parameter in self.named_parameters():
            if name.startswith("norm_"):
                nn.init.ones_(parameter)
            if name.startswith("norm_cell"):
                nn.init.zeros_(parameter[1])

    def quantize_weights(self, dtype: torch.dtype | None) -> None:
        """Takes a snapshot with weights in 8 bits; it is read from now on where no gradients are wanted, on the CPU.

        Each row of a weight is rounded to multiples of its largest magnitude / 127. States, sums and the parameters
        themselves stay as they are; gradients, autocast, compiled and traced calls see the parameters. What is written
        to the parameters afterwards does not reach the snapshot: quantise again.

        Args:
            dtype: torch.int8, or None to go back.

        Raises:
            TypeError: another dtype, or the weights are not float32.
        """
        dtype = checked_dtype("LSTM", dtype)
        self._snapshot = None if dtype is None else Snapshot(self._layers(), dtype)

    def _layers(self) -> list[dict[str, Tensor]]:
        """What ops.lstm takes of every layer and direction."""
        return [self._parameters_of(index) for index in range(len(self._all_weights))]

    def flatten_parameters(self) -> None:
        """Does nothing: the kernels take the parameters as they are."""

    def extra_repr(self) -> str:
        options = ("layer_norm", "zoneout_h", "zoneout_c", "weight_dropout", "locked_dropout")
        ours = [f"{name}={getattr(self, name)}" for name in (*options, "recompute")]
        changed = [text for text in ours if not text.endswith(("=False", "=0.0", "=0"))]
        return ", ".join([super().extra_repr(), *changed])

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: State | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
        return_cells: bool = False,
    ) -> Any:
        if lengths is None and reset is None and not return_cells and is_arithmetic_alone():
            results = self._forward_at_once(input, hx) if type(input) is Tensor else None
            if results is not None:
                return results
        if isinstance(input, PackedSequence):
            if lengths is not None or reset is not None or return_cells:
                raise ValueError(
                    "llmkern.LSTM: expected no lengths, reset or return_cells beside a PackedSequence"
                )
            return self._forward_packed(input, hx)
        batched = self._check_input(input)
        x = input if batched else input.unsqueeze(1)
        x = x.transpose(0, 1) if self.batch_first and batched else x
        if reset is not None:
            reset = self._steps_first(reset, batched)
        h_0, c_0 = self._initial_state(x, hx, batched)
        output, h_n, c_n, cells = self._run_layers(x, h_0, c_0, lengths, reset, return_cells)
        if not batched:
            output, h_n, c_n = output.squeeze(1), h_n.squeeze(1), c_n.squeeze(1)
        elif self.batch_first:
            output = output.transpose(0, 1)
        if not return_cells:
            return output, (h_n, c_n)
        steps = torch.stack(cells)
        if not batched:
            steps = steps.squeeze(2)
        elif self.batch_first:
            steps = steps.transpose(1, 2)
        return output, (h_n, c_n), steps

    def _forward_at_once(self, input: Tensor, hx: State | None) -> tuple[Tensor, State] | None:
        """All layers in one call of an operator that has nothing but what plain layers need in evaluation.

        None where there is more to do, or something wrong: the way layer by layer says what.
        """
        training, dropout, weight_dropout, *others = _options(self.__dict__)
        if any(others) or (training and (dropout or weight_dropout)):
            return None
        parameters = parameters_of(self, [*chain.from_iterable(self._all_weights)])
        if not is_plain(*parameters):
            return None
        packed: list[Tensor] = []
        if self._snapshot is not None and self._snapshot.serves(parameters[1]):
            parameters, packed = self._snapshot.flat
        try:
            h_0, c_0 = self._zeros(input) if hx is None else hx
            output, h_n, c_n = _LAYERS(input, h_0, c_0, parameters, packed, self.batch_first)
        except (TypeError, ValueError, NotImplementedError):
            return None
        return output, (h_n, c_n)

    def _zeros(self, input: Tensor) -> State:
        rows = [input.shape[0 if self.batch_first else 1]] if input.dim() == 3 else []
        zeros = input.new_zeros(self.num_layers, *rows, self.hidden_size)
        return zeros, zeros

    def _steps_first(self, reset: Tensor, batched: bool) -> Tensor:
        if not isinstance(reset, Tensor):
            raise TypeError(
                f"llmkern.LSTM: expected reset to be a Tensor, got {type(reset).__name__}"
            )
        if reset.dim() != 1 + batched:
            shape = "[T]" if not batched else "[B, T]" if self.batch_first else "[T, B]"
            raise ValueError(
                f"llmkern.LSTM: expected reset of shape {shape}, got {list(reset.shape)}"
            )
        if not batched:
            return reset.unsqueeze(1)
        return reset.transpose(0, 1) if self.batch_first else reset

    def _forward_packed(
        self, input: PackedSequence, hx: State | None
    ) -> tuple[PackedSequence, State]:
        """Rows in the order of the packed data, the longest first; states in the order of the caller."""
        data, batch_sizes, order, place = input
        places, lengths = _places(batch_sizes)
        T, B = len(batch_sizes), len(lengths)
        places, lengths = places.to(data.device), lengths.to(data.device)
        # torch's own padding fills a slice for each length, and its backward pass copies all of it as often.
        padding = data.new_zeros(T * B, *data.shape[1:])
        steps = padding.index_copy(0, places, data).unflatten(0, (T, B))
        self._check_input(steps.transpose(0, 1) if self.batch_first else steps)
        h_0, c_0 = self._initial_state(steps, hx, batched=True)
        if order is not None:
            h_0, c_0 = h_0.index_select(1, order), c_0.index_select(1, order)
        output, h_n, c_n, _ = self._run_layers(steps, h_0, c_0, lengths)
        packed = output.flatten(0, 1).index_select(0, places)
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
        layers, B, H = len(self._all_weights), x.shape[1], self.hidden_size
        P = self.proj_size or H
        if hx is None:
            zeros = x.new_zeros(layers, B, H)
            return (zeros if P == H else x.new_zeros(layers, B, P)), zeros
        if len(hx) != 2:
            raise ValueError(f"llmkern.LSTM: expected hx to be (h_0, c_0), got {len(hx)} values")
        for name, state, letter, size in zip(
            ("h_0", "c_0"), hx, ("P" if self.proj_size else "H", "H"), (P, H), strict=True
        ):
            letters, shape = f"S, B, {letter}", [layers, B, size]
            if not batched:
                letters, shape = f"S, {letter}", [layers, size]
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

    def _suffixes(self) -> list[str]:
        """What the names of a layer's parameters end in, by layer and direction."""
        return [names[0].removeprefix("weight_ih") for names in self._all_weights]

    def _run_layers(
        self,
        x: Tensor,
        h_0: Tensor,
        c_0: Tensor,
        lengths: Tensor | None,
        reset: Tensor | None = None,
        return_cells: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        directions = 2 if self.bidirectional else 1
        states: list[tuple[Tensor, ...]] = []
        zoneout = self.zoneout_h > 0 or self.zoneout_c > 0
        seeds = _seed.drawn(None, (len(h_0),), x.device) if zoneout and self.training else None
        for layer in range(self.num_layers):
            outputs = []
            for direction in range(directions):
                index = layer * directions + direction
                output, *state = ops.lstm(
                    x,
                    h_0[index],
                    c_0[index],
                    **self._weights_of(index),
                    reverse=direction == 1,
                    lengths=lengths,
                    reset=_boundaries_backwards(reset) if direction == 1 else reset,
                    zoneout_h=self.zoneout_h,
                    zoneout_c=self.zoneout_c,
                    seed=None if seeds is None else seeds[index],
                    recompute=self.recompute,
                    return_cells=return_cells,
                )
                outputs.append(output)
                states.append(tuple(state))
            x = outputs[0] if directions == 1 else torch.cat(outputs, dim=2)
            if layer < self.num_layers - 1:
                x = self._drop(x)
        h_n, c_n, *cells = zip(*states, strict=True)
        return x, _stacked(h_n), _stacked(c_n), list(cells[0]) if cells else []

    def _weights_of(self, index: int) -> dict[str, Tensor]:
        """Arguments of ops.lstm for one layer and direction, for this call."""
        weights = self._parameters_of(index)
        if self.weight_dropout > 0 and self.training:
            weights["weight_hh"] = ops.dropout(weights["weight_hh"], self.weight_dropout)
        elif self._snapshot is not None and self._snapshot.serves(weights["weight_hh"]):
            return self._snapshot.layers[index]
        return weights

    def _parameters_of(self, index: int) -> dict[str, Tensor]:
        names = self._all_weights[index]
        suffix = names[0].removeprefix("weight_ih")
        parameters: dict[str, Tensor] = {
            name.removesuffix(suffix): parameter
            for name, parameter in zip(names, parameters_of(self, names), strict=True)
        }
        if self.layer_norm:
            for name in ("norm_gates", "norm_cell"):
                parameters[name] = getattr(self, name + suffix)
        return parameters

    def _drop(self, x: Tensor) -> Tensor:
        if self.dropout == 0 or not self.training:
            return x
        return (
            ops.dropout(x, self.dropout, locked=True)
            if self.locked_dropout
            else F.dropout(x, self.dropout)
        )


# What decides whether torch.ops.llmkern.lstm_layers will do; the last ones it lacks altogether.
_options = itemgetter(
    "training",
    "dropout",
    "weight_dropout",
    "bidirectional",
    "proj_size",
    "layer_norm",
    "zoneout_h",
    "zoneout_c",
)


def _stacked(states: tuple[Tensor, ...]) -> Tensor:
    return torch.stack(states) if len(states) > 1 else states[0].unsqueeze(0)


def _boundaries_backwards(reset: Tensor | None) -> Tensor | None:
    """Who reads backwards forgets before the last step of a document: a boundary lies before the step that is set."""
    return None if reset is None else torch.cat([reset[1:], torch.zeros_like(reset[:1])])


def _places(batch_sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Where in [T * B] the rows of packed data lie, and the lengths of the sequences."""
    rows = torch.arange(int(batch_sizes[0]), device=batch_sizes.device)
    runs = rows < batch_sizes.unsqueeze(1)
    return runs.flatten().nonzero().squeeze(1), runs.sum(0)
