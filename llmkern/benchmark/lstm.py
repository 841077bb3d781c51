# SPDX-License-Identifier: Apache-2.0
"""Cases of the LSTM layer: decoding step by step, reading a sequence, training. I = H, one layer, zero dropout."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import llmkern
from llmkern.benchmark.case import (
    OURS,
    Case,
    Contender,
    Phase,
    Workload,
    agreement,
    named,
    tolerance_of,
)

FLOAT_BYTES = 4
# float32 against float32: two roundings apart, growing with T.
TOLERANCE = 2e-5
# What torch does by default on a GPU: products of float32 rounded to 10 bits.
TF32, TF32_TOLERANCE = ", TF32", 2e-2
# Weights rounded to 8 bits beside their own; and the same with rounded activations.
DYNAMIC = "nn.LSTM, dynamic int8"
INT8_TOLERANCE, DYNAMIC_TOLERANCE = 2e-2, 8e-2

State = tuple[Tensor, Tensor]
LayerRun = Callable[[Tensor, State], tuple[Tensor, State]]


def decode(H: int, B: int = 1, dtype: torch.dtype = torch.float32) -> Case:
    """One step, T = 1, through the module: what a decoder does for each token."""

    def build() -> Workload:
        ours, peer, cell = _layers(H, dtype)
        x, *state = (torch.randn(1, B, H, dtype=dtype) for _ in range(3))
        step, cell_state = x[0], (state[0][0], state[1][0])
        layers = {OURS: ours, **_as_configured("nn.LSTM", peer, dtype)}
        contenders = {
            name: Contender(lambda run=run: run(x, tuple(state)), _last_state)  # type: ignore[misc]
            for name, run in layers.items()
        }
        contenders["nn.LSTMCell"] = Contender(lambda: cell(step, cell_state))
        return Workload(contenders, _agreement(dtype))

    weights = 4 * H * (H + H + 2) * dtype.itemsize  # and two biases
    phase = Phase("step", flops=8 * B * H * (H + H), bytes=weights, working_set=weights)
    name = named(f"decode-H{H}-B{B}", dtype)
    return Case("lstm", name, build, [phase], dtype=dtype, graph=True)


def sequence(H: int, B: int, T: int, dtype: torch.dtype = torch.float32) -> Case:
    """A whole sequence forward, no gradients: reading a prompt, evaluating."""

    def build() -> Workload:
        ours, peer, cell = _layers(H, dtype)
        x, state = torch.randn(T, B, H, dtype=dtype), _zeros(B, H, dtype)
        layers = {OURS: ours, **_as_configured("nn.LSTM", peer, dtype)}
        layers["nn.LSTMCell loop"] = _unrolled(cell)
        contenders = {
            name: Contender(lambda run=run: run(x, state))  # type: ignore[misc]
            for name, run in layers.items()
        }
        return Workload(contenders, _agreement(dtype))

    name = named(f"sequence-H{H}-B{B}-T{T}", dtype)
    phases = forward_phases(H, H, B, T, dtype.itemsize)
    return Case("lstm", name, build, phases, dtype=dtype)


def quantized(H: int, B: int, T: int) -> Case:
    """Forward with weights of 8 bits and everything else in float32; T = 1 is a decoder's step."""

    def build() -> Workload:
        _, peer, _ = _layers(H, torch.float32)
        x, state = torch.randn(T, B, H), _zeros(B, H, torch.float32)
        layers = {OURS: _quantized(peer), DYNAMIC: _dynamically_quantized(peer), "nn.LSTM": peer}
        contenders = {
            name: Contender(lambda run=run: run(x, state))  # type: ignore[misc]
            for name, run in layers.items()
        }
        return Workload(contenders, agreement(INT8_TOLERANCE, {DYNAMIC: DYNAMIC_TOLERANCE}))

    kind = "decode" if T == 1 else "sequence"
    name = f"{kind}-H{H}-B{B}" + (f"-T{T}" if T > 1 else "") + "-int8"
    return Case("lstm", name, build, forward_phases(H, H, B, T, size=1))


def training(H: int, B: int, T: int, dtype: torch.dtype = torch.float32) -> Case:
    """Forward and backward: gradients of the input and of every parameter."""

    def build() -> Workload:
        ours, peer, cell = _layers(H, dtype)
        runs: dict[str, tuple[LayerRun, nn.Module]] = {OURS: (ours, ours)}
        for name, run in _as_configured("nn.LSTM", peer, dtype).items():
            runs[name] = run, peer
        runs["nn.LSTMCell loop"] = _unrolled(cell), cell
        return _training_workload(H, B, T, dtype, runs)

    name = named(f"training-H{H}-B{B}-T{T}", dtype)
    phases = training_phases(H, B, T, dtype)
    return Case("lstm", name, build, phases, training=True, dtype=dtype)


def ragged_training(H: int, B: int, T: int, dtype: torch.dtype = torch.float32) -> Case:
    """Forward and backward of a PackedSequence: rows from T steps down to an eighth of them, 56 % of the padding."""
    lengths = torch.linspace(T, T / 8, B, device="cpu").round().long()
    rows = int(lengths.sum())

    def build() -> Workload:
        ours, peer, _ = _layers(H, dtype)
        batch_sizes = pack_padded_sequence(torch.empty(T, B, 1, device="cpu"), lengths).batch_sizes
        data = torch.randn(rows, H, dtype=dtype, requires_grad=True)
        grad = torch.randn(rows, H, dtype=dtype)

        def contender(run: Callable[..., Any], layer: nn.Module) -> Contender:
            wanted = [data, *layer.parameters()]

            def train() -> Any:
                output, _ = run(PackedSequence(data, batch_sizes))
                return torch.autograd.grad(output.data, wanted, grad)

            return Contender(train)

        contenders = {OURS: contender(ours, ours)}
        for name, run in _as_configured("nn.LSTM", peer, dtype).items():
            contenders[name] = contender(run, peer)
        return Workload(contenders, _agreement(dtype))

    phases = training_phases(H, rows / T, T, dtype)
    name = named(f"ragged-training-H{H}-B{B}-T{T}", dtype)
    return Case("lstm", name, build, phases, training=True, dtype=dtype)


def cell_training(H: int, B: int, T: int) -> Case:
    """Forward and backward of a Python loop over a cell, ours against torch's: custom recurrences are written so."""

    def build() -> Workload:
        _, _, peer = _layers(H, torch.float32)
        ours = llmkern.nn.LSTMCell(H, H)
        ours.load_state_dict(peer.state_dict())
        runs = {OURS: (_unrolled(ours), ours), "nn.LSTMCell loop": (_unrolled(peer), peer)}
        return _training_workload(H, B, T, torch.float32, runs)

    phases = training_phases(H, B, T, torch.float32)
    return Case("lstm", f"cell-training-H{H}-B{B}-T{T}", build, phases, training=True)


def forward_phases(
    I: int,  # noqa: E741
    H: int,
    B: float,
    T: int,
    size: int = FLOAT_BYTES,
) -> list[Phase]:
    """The input's share of the gates, one product over all steps; then T steps, each reading the recurrent weights.

    B rows a step, on average.
    """
    recurrent = 4 * H * H * size
    return [
        _product("input", B * T, 4 * H, I, size),
        Phase("recurrence", 8 * B * H * H, recurrent, recurrent, repeats=T),
    ]


def backward_phases(
    I: int,  # noqa: E741
    H: int,
    B: float,
    T: int,
    size: int = FLOAT_BYTES,
) -> list[Phase]:
    """T steps back through the recurrent weights, then the gradients of the weights and of the input."""
    recurrent = 4 * H * H * size
    return [
        Phase("recurrence backward", 8 * B * H * H, recurrent, recurrent, repeats=T),
        _product("weight_ih gradient", 4 * H, I, B * T, size),
        _product("weight_hh gradient", 4 * H, H, B * T, size),
        _product("input gradient", B * T, I, 4 * H, size),
    ]


def training_phases(H: int, B: float, T: int, dtype: torch.dtype) -> list[Phase]:
    size = dtype.itemsize
    return forward_phases(H, H, B, T, size) + backward_phases(H, H, B, T, size)


def _product(name: str, M: float, N: float, K: float, size: int) -> Phase:
    moved = (M * K + K * N + M * N) * size
    return Phase(name, 2 * M * N * K, moved, moved)


def _layers(H: int, dtype: torch.dtype) -> tuple[llmkern.nn.LSTM, nn.LSTM, nn.LSTMCell]:
    """One set of parameters in llmkern's layer, torch's layer and torch's cell."""
    peer, ours = nn.LSTM(H, H, dtype=dtype), llmkern.nn.LSTM(H, H, dtype=dtype)
    cell = nn.LSTMCell(H, H, dtype=dtype)
    ours.load_state_dict(peer.state_dict())
    cell.load_state_dict({name.removesuffix("_l0"): x for name, x in peer.state_dict().items()})
    return ours, peer, cell


def _quantized(layer: nn.LSTM) -> LayerRun:
    """llmkern's layer, its weights of 8 bits packed beforehand."""
    weights = [parameter.detach() for parameter in layer.parameters()]
    packed = llmkern.ops.lstm_pack(weights[0], weights[1], dtype=torch.int8)

    def run(x: Tensor, state: State) -> tuple[Tensor, State]:
        output, h_n, c_n = llmkern.ops.lstm(x, state[0][0], state[1][0], *weights, packed=packed)
        return output, (h_n.unsqueeze(0), c_n.unsqueeze(0))

    return run


def _dynamically_quantized(layer: nn.LSTM) -> LayerRun:
    """torch's: activations are rounded to 8 bits too, with a scale for each step's batch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", UserWarning)
        quantize = torch.ao.quantization.quantize_dynamic
        (quantized,) = quantize(nn.ModuleList([layer]), {nn.LSTM}, dtype=torch.qint8)
    return quantized  # type: ignore[no-any-return]


def _as_configured(name: str, layer: LayerRun, dtype: torch.dtype) -> dict[str, LayerRun]:
    """torch's layer; on a GPU in float32 both in full precision, as llmkern has it, and in torch's default, TF32."""
    if torch.get_default_device().type != "cuda" or dtype != torch.float32:
        return {name: layer}
    return {name: with_precision(layer, "ieee"), name + TF32: with_precision(layer, "tf32")}


def with_precision(function: Callable[..., Any], precision: str) -> Callable[..., Any]:
    """The function, with cuDNN's LSTM in float32 computing in "ieee" or "tf32" from then on."""

    def run(*arguments: Any) -> Any:
        # Not put back afterwards: the backward pass is still to come, and every contender that cares sets it.
        torch.backends.cudnn.rnn.fp32_precision = precision  # type: ignore[attr-defined]
        return function(*arguments)

    return run


def _agreement(dtype: torch.dtype) -> Callable[[Mapping[str, Any]], float]:
    return agreement(tolerance_of(dtype, TOLERANCE), {"nn.LSTM" + TF32: TF32_TOLERANCE})


def _zeros(B: int, H: int, dtype: torch.dtype) -> State:
    return torch.zeros(1, B, H, dtype=dtype), torch.zeros(1, B, H, dtype=dtype)


def _unrolled(cell: nn.LSTMCell) -> LayerRun:
    """A cell in a loop, with the arguments and results of a layer."""

    def run(x: Tensor, state: State) -> tuple[Tensor, State]:
        h, c = state[0][0], state[1][0]
        outputs = []
        for step in x:
            h, c = cell(step, (h, c))
            outputs.append(h)
        return torch.stack(outputs), (h.unsqueeze(0), c.unsqueeze(0))

    return run


def _training_workload(
    H: int, B: int, T: int, dtype: torch.dtype, runs: Mapping[str, tuple[LayerRun, nn.Module]]
) -> Workload:
    x, state = torch.randn(T, B, H, dtype=dtype, requires_grad=True), _zeros(B, H, dtype)
    grad = torch.randn(T, B, H, dtype=dtype)

    def contender(run: LayerRun, layer: nn.Module) -> Contender:
        wanted = [x, *layer.parameters()]
        return Contender(lambda: torch.autograd.grad(run(x, state)[0], wanted, grad))

    contenders = {name: contender(run, layer) for name, (run, layer) in runs.items()}
    return Workload(contenders, _agreement(dtype))


def _last_state(result: tuple[Tensor, State]) -> list[Tensor]:
    return list(result[1])


QUICK = (decode(512), training(200, 20, 20))
