# SPDX-License-Identifier: Apache-2.0
"""Cases of the linear cross entropy: the head and the loss of a language model."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkern import ops
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
from llmkern.benchmark.embedding import zipf_ids

FLOAT_BYTES = 4
TOLERANCE = 2e-5

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def forward(N: int, V: int, D: int, dtype: torch.dtype = torch.float32) -> Case:
    """The loss alone: evaluation."""

    def build() -> Workload:
        x, weight, target = _inputs(N, V, D, dtype)
        return Workload(
            {
                name: Contender(lambda loss=loss: [loss(x, weight, target)])  # type: ignore[misc]
                for name, loss in _losses().items()
            },
            agreement(tolerance_of(dtype, TOLERANCE)),
        )

    name = named(f"forward-N{N}-V{V}-D{D}", dtype)
    phases = [forward_phase(N, V, D, dtype.itemsize)]
    return Case("cross_entropy", name, build, phases, dtype=dtype)


def training(N: int, V: int, D: int, dtype: torch.dtype = torch.float32) -> Case:
    """The loss and the gradients of input and weight."""

    def build() -> Workload:
        x, weight, target = _inputs(N, V, D, dtype)
        wanted = [x.requires_grad_(), weight.requires_grad_()]

        def contender(loss: Loss) -> Contender:
            return Contender(lambda: torch.autograd.grad(loss(x, weight, target), wanted))

        contenders = {name: contender(loss) for name, loss in _losses().items()}
        return Workload(contenders, agreement(tolerance_of(dtype, TOLERANCE)))

    name = named(f"training-N{N}-V{V}-D{D}", dtype)
    phases = [forward_phase(N, V, D, dtype.itemsize), *backward_phases(N, V, D, dtype.itemsize)]
    return Case("cross_entropy", name, build, phases, training=True, dtype=dtype)


def forward_phase(N: int, V: int, D: int, size: int = FLOAT_BYTES) -> Phase:
    """One product; the logits need not exist."""
    moved = (N * D + V * D) * size
    return Phase("logits", 2 * N * V * D, moved, moved)


def backward_phases(N: int, V: int, D: int, size: int = FLOAT_BYTES) -> list[Phase]:
    """Two products. Computing the logits again is not counted: it is a choice, not the work."""
    moved = (N * D + V * D) * size
    return [
        Phase("input gradient", 2 * N * V * D, moved, moved),
        Phase("weight gradient", 2 * N * V * D, moved, moved),
    ]


def _inputs(N: int, V: int, D: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(N, D, dtype=dtype), torch.randn(V, D, dtype=dtype) / D**0.5, zipf_ids(N, V)


def _losses() -> dict[str, Loss]:
    losses: dict[str, Loss] = {
        OURS: ops.linear_cross_entropy,
        "F.linear + F.cross_entropy": _materialized,
    }
    # On a GPU the compiler fuses all but the products; on a CPU it would need a C++ compiler.
    if torch.get_default_device().type == "cuda":
        torch.compiler.reset()  # it compiles a function for so many shapes and no more
        losses["F.linear + F.cross_entropy, compiled"] = torch.compile(_materialized, dynamic=False)
    # From torch 2.13 on. Without options it is the line above; with options it works in chunks, as llmkern does.
    if hasattr(F, "linear_cross_entropy"):
        options = nn.LinearCrossEntropyOptions()
        losses["F.linear_cross_entropy, chunked"] = lambda x, weight, target: (
            F.linear_cross_entropy(x, weight, target, options=options)
        )
    return losses


def _materialized(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight), target)


QUICK = (training(400, 10_000, 200),)
