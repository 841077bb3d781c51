# SPDX-License-Identifier: Apache-2.0
"""The arguments and results of llmkern::lstm and llmkern::lstm_backward by their names, as the schemas have them.

Whoever calls these operators, or is called in their place, addresses tensors by these names alone; a test holds them
against the schemas in csrc/ops/lstm.cpp.
"""

from typing import Any, NamedTuple


class Forward(NamedTuple):
    """The arguments of torch.ops.llmkern.lstm."""

    input: Any
    h_0: Any
    c_0: Any
    weight_ih: Any
    weight_hh: Any
    bias_ih: Any = None
    bias_hh: Any = None
    weight_hr: Any = None
    norm_gates: Any = None
    norm_cell: Any = None
    lengths: Any = None
    reset: Any = None
    seed: Any = None
    packed: Any = None
    zoneout_h: float = 0.0
    zoneout_c: float = 0.0
    reverse: bool = False
    save_cells: bool = False
    save_gates: bool = False


class ForwardResults(NamedTuple):
    output: Any
    h_n: Any
    c_n: Any
    cells: Any
    gates: Any
    normalized: Any
    scales: Any


class Backward(NamedTuple):
    """The arguments of torch.ops.llmkern.lstm_backward."""

    grad_output: Any
    grad_h_n: Any
    grad_c_n: Any
    grad_cells: Any
    input: Any
    h_0: Any
    c_0: Any
    weight_ih: Any
    weight_hh: Any
    bias_ih: Any
    bias_hh: Any
    weight_hr: Any
    norm_gates: Any
    norm_cell: Any
    lengths: Any
    reset: Any
    seed: Any
    output: Any
    cells: Any
    gates: Any
    normalized: Any
    scales: Any
    zoneout_h: float = 0.0
    zoneout_c: float = 0.0
    reverse: bool = False
    weights: bool = True
    need_input: bool = True


class BackwardResults(NamedTuple):
    grad_input: Any
    grad_h_0: Any
    grad_c_0: Any
    grad_gates: Any
    grad_weight_ih: Any
    grad_weight_hh: Any
    grad_bias: Any
    grad_weight_hr: Any
    grad_norm_gates: Any
    grad_norm_cell: Any


# What a layer computes with; what chooses among its rows and steps; what it is told in numbers.
PARAMETERS = "weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr", "norm_gates", "norm_cell"
LAYER = "input", "h_0", "c_0", *PARAMETERS
MASKS = "lengths", "reset", "seed"
OPTIONS = "zoneout_h", "zoneout_c", "reverse"
# What a backward pass is given from above, and what it wants to know of the forward pass.
UPSTREAM = "grad_output", "grad_h_n", "grad_c_n", "grad_cells"
SAVED = "output", "cells", "gates", "normalized", "scales"
