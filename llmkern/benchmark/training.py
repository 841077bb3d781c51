# SPDX-License-Identifier: Apache-2.0
"""Cases of a whole training step: forward, loss, backward, clipping, SGD, as the trainer does it."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkern.benchmark import cross_entropy, embedding, lstm
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
from llmkern.models import LanguageModel

MAX_GRAD_NORM = 5.0
# Small enough that a thousand timed steps leave the model as it was.
LEARNING_RATE = 1e-6
TOLERANCE = 1e-4

State = tuple[Tensor, Tensor]
LossFunction = Callable[[Tensor, Tensor, State], tuple[Tensor, State]]


class TorchLanguageModel(nn.Module):
    """The same model of torch.nn layers, with the same names of parameters.

    Args:
        V, H, layers: vocabulary, width of embedding and LSTM, number of LSTM layers.
    """

    def __init__(self, V: int, H: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, H)
        self.lstm = nn.LSTM(H, H, layers, batch_first=True)
        self.head = nn.Linear(H, V)

    def loss(self, ids: Tensor, targets: Tensor, state: State) -> tuple[Tensor, State]:
        output, state = self.lstm(self.embedding(ids), state)
        return F.cross_entropy(self.head(output).flatten(0, 1), targets.flatten()), state


def step(
    name: str,
    V: int,
    H: int,
    B: int,
    T: int,
    *,
    layers: int = 2,
    dtype: torch.dtype = torch.float32,
) -> Case:
    """One step of truncated BPTT on random ids, dropout off, the state carried from step to step.

    bfloat16 is the trainer's precision="bf16": autocast over parameters of float32.
    """

    def build() -> Workload:
        ours, peer = LanguageModel(V, H, H, layers), TorchLanguageModel(V, H, layers)
        peer.load_state_dict(ours.state_dict())
        ids = embedding.zipf_ids(B * (T + 1), V).view(B, T + 1)
        losses: dict[str, tuple[nn.Module, LossFunction]] = {OURS: (ours, ours.loss)}
        losses["torch.nn layers"] = peer, peer.loss
        if ids.is_cuda:  # the compiler leaves nn.LSTM as it is and fuses what is around it
            torch.compiler.reset()
            losses["torch.nn layers, compiled"] = peer, torch.compile(peer.loss, dynamic=False)
            # The peers in the precision that llmkern has, not in torch's default for an LSTM.
            losses = {name: (m, lstm.with_precision(f, "ieee")) for name, (m, f) in losses.items()}
        contenders = {
            name: _contender(model, _cast(loss, dtype), ids, layers, H)
            for name, (model, loss) in losses.items()
        }
        return Workload(contenders, agreement(tolerance_of(dtype, TOLERANCE)))

    return Case(
        "training",
        named(f"{name}-V{V}-H{H}-B{B}-T{T}", dtype),
        build,
        _phases(V, H, B, T, layers, dtype.itemsize),
        training=True,
        tokens=B * T,
        dtype=dtype,
    )


def _cast(loss_function: LossFunction, dtype: torch.dtype) -> LossFunction:
    if dtype == torch.float32:
        return loss_function

    def loss(ids: Tensor, targets: Tensor, state: State) -> tuple[Tensor, State]:
        with torch.autocast(ids.device.type, dtype):
            return loss_function(ids, targets, state)

    return loss


def _contender(
    model: nn.Module, loss_function: LossFunction, ids: Tensor, layers: int, H: int
) -> Contender:
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    zeros = torch.zeros(layers, ids.shape[0], H, device=ids.device)
    state = (zeros, zeros)

    def run() -> tuple[Tensor, Tensor]:
        nonlocal state
        optimizer.zero_grad()
        loss, (h, c) = loss_function(inputs, targets, state)
        state = h.detach(), c.detach()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        return loss.detach(), norm

    return Contender(run)


def _phases(V: int, H: int, B: int, T: int, layers: int, size: int) -> list[Phase]:
    N = B * T
    phases = [embedding.gather_phase(V, H, N)]
    for _ in range(layers):
        phases += lstm.forward_phases(H, H, B, T, size)
    phases += [cross_entropy.forward_phase(N, V, H, size)]
    phases += cross_entropy.backward_phases(N, V, H, size)
    for _ in range(layers):
        phases += lstm.backward_phases(H, H, B, T, size)
    parameters = (2 * V * H + V + layers * (8 * H * H + 8 * H)) * embedding.FLOAT_BYTES
    # The norm reads every gradient; the update reads parameter and gradient and writes the parameter.
    return [
        *phases,
        embedding.gradient_phase(V, H, N),
        Phase("norm", bytes=parameters, working_set=parameters),
        Phase("update", bytes=3 * parameters, working_set=2 * parameters, traffic="copy"),
    ]


QUICK = (step("zaremba-small", V=10_000, H=200, B=20, T=20),)
