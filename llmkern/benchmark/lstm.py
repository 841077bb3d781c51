# SPDX-License-Identifier: Apache-2.0
"""Cases of the LSTM layer: decoding step by step, reading a sequence, training. I = H, one layer, zero dropout."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import llmkern
from llmkern.benchmark.case import OURS, Case, Contender, Phase, Workload, agreement

FLOAT_BYTES = 4
# float32 against float32: two roundings apart, growing with T.
TOLERANCE = 2e-5

State = tuple[Tensor, Tensor]
LayerRun = Callable[[Tensor, State], tuple[Tensor, State]]


def decode(H: int, B: int = 1) -> Case:
    """One step, T = 1, through the module: what a decoder does for each token."""

    def build() -> Workload:
        ours, peer, cell = _layers(H)
        x, state = torch.randn(1, B, H), (torch.randn(1, B, H), torch.randn(1, B, H))
        step, cell_state = x[0], (state[0][0], state[1][0])
        return Workload(
            {
                OURS: Contender(lambda: ours(x, state), _last_state),
                "nn.LSTM": Contender(lambda: peer(x, state), _last_state),
                "nn.LSTMCell": Contender(lambda: cell(step, cell_state)),
            },
            agreement(TOLERANCE),
        )

    weights = 4 * H * (H + H + 2) * FLOAT_BYTES  # and two biases
    phase = Phase("step", flops=8 * B * H * (H + H), bytes=weights, working_set=weights)
    return Case("lstm", f"decode-H{H}-B{B}", build, [phase])


def sequence(H: int, B: int, T: int) -> Case:
    """A whole sequence forward, no gradients: reading a prompt, evaluating."""

    def build() -> Workload:
        ours, peer, cell = _layers(H)
        x, state = torch.randn(T, B, H), (torch.zeros(1, B, H), torch.zeros(1, B, H))
        unrolled = _unrolled(cell)
        return Workload(
            {
                OURS: Contender(lambda: ours(x, state)),
                "nn.LSTM": Contender(lambda: peer(x, state)),
                "nn.LSTMCell loop": Contender(lambda: unrolled(x, state)),
            },
            agreement(TOLERANCE),
        )

    return Case("lstm", f"sequence-H{H}-B{B}-T{T}", build, forward_phases(H, H, B, T))


def training(H: int, B: int, T: int) -> Case:
    """Forward and backward: gradients of the input and of every parameter."""

    def build() -> Workload:
        ours, peer, cell = _layers(H)
        runs = {OURS: ours, "nn.LSTM": peer}
        return _training_workload(
            H, B, T, runs | {"nn.LSTMCell loop": _unrolled(cell)}, (ours, peer, cell)
        )

    phases = forward_phases(H, H, B, T) + backward_phases(H, H, B, T)
    return Case("lstm", f"training-H{H}-B{B}-T{T}", build, phases, training=True)


def cell_training(H: int, B: int, T: int) -> Case:
    """Forward and backward of a Python loop over a cell, ours against torch's: custom recurrences are written so."""

    def build() -> Workload:
        _, _, peer = _layers(H)
        ours = llmkern.nn.LSTMCell(H, H)
        ours.load_state_dict(peer.state_dict())
        runs = {OURS: _unrolled(ours), "nn.LSTMCell loop": _unrolled(peer)}
        return _training_workload(H, B, T, runs, (ours, peer))

    phases = forward_phases(H, H, B, T) + backward_phases(H, H, B, T)
    return Case("lstm", f"cell-training-H{H}-B{B}-T{T}", build, phases, training=True)


def forward_phases(I: int, H: int, B: int, T: int) -> list[Phase]:  # noqa: E741
    """The input's share of the gates, one product over all steps; then T steps, each reading the recurrent weights."""
    recurrent = 4 * H * H * FLOAT_BYTES
    return [
        _product("input", B * T, 4 * H, I),
        Phase("recurrence", 8 * B * H * H, recurrent, recurrent, repeats=T),
    ]


def backward_phases(I: int, H: int, B: int, T: int) -> list[Phase]:  # noqa: E741
    """T steps back through the recurrent weights, then the gradients of the weights and of the input."""
    recurrent = 4 * H * H * FLOAT_BYTES
    return [
        Phase("recurrence backward", 8 * B * H * H, recurrent, recurrent, repeats=T),
        _product("weight_ih gradient", 4 * H, I, B * T),
        _product("weight_hh gradient", 4 * H, H, B * T),
        _product("input gradient", B * T, I, 4 * H),
    ]


def _product(name: str, M: int, N: int, K: int) -> Phase:
    moved = (M * K + K * N + M * N) * FLOAT_BYTES
    return Phase(name, 2 * M * N * K, moved, moved)


def _layers(H: int) -> tuple[llmkern.nn.LSTM, nn.LSTM, nn.LSTMCell]:
    """One set of parameters in llmkern's layer, torch's layer and torch's cell."""
    peer, ours, cell = nn.LSTM(H, H), llmkern.nn.LSTM(H, H), nn.LSTMCell(H, H)
    ours.load_state_dict(peer.state_dict())
    cell.load_state_dict({name.removesuffix("_l0"): x for name, x in peer.state_dict().items()})
    return ours, peer, cell


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
    H: int, B: int, T: int, runs: dict[str, LayerRun], layers: Sequence[nn.Module]
) -> Workload:
    x, state = (
        torch.randn(T, B, H, requires_grad=True),
        (torch.zeros(1, B, H), torch.zeros(1, B, H)),
    )
    grad = torch.randn(T, B, H)

    def contender(run: LayerRun, layer: nn.Module) -> Contender:
        wanted = [x, *layer.parameters()]
        return Contender(lambda: torch.autograd.grad(run(x, state)[0], wanted, grad))

    contenders = {
        name: contender(run, layer) for (name, run), layer in zip(runs.items(), layers, strict=True)
    }
    return Workload(contenders, agreement(TOLERANCE))


def _last_state(result: tuple[Tensor, State]) -> list[Tensor]:
    return list(result[1])


QUICK = (decode(512), training(200, 20, 20))
