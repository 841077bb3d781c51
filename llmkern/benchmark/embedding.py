# SPDX-License-Identifier: Apache-2.0
"""Cases of the embedding gather and its dense gradient, on ids drawn as words are in a text."""

import torch
import torch.nn.functional as F
from torch import Tensor

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

FLOAT_BYTES, ID_BYTES = 4, 8
# Up to so many ids a GPU does the work faster than Python asks for it.
_FEW = 1024


def zipf_ids(N: int, V: int) -> Tensor:
    """N ids in [0, V), id v drawn with probability proportional to 1 / (v + 1) (Zipf 1949).

    The same on every call and every device.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    weights = 1.0 / torch.arange(1, V + 1, dtype=torch.float64, device="cpu")
    ids = torch.multinomial(weights, N, replacement=True, generator=generator)
    return ids.to(torch.get_default_device())


def forward(V: int, D: int, N: int, dtype: torch.dtype = torch.float32) -> Case:
    """N rows gathered from a [V, D] table."""

    def build() -> Workload:
        weight, ids = torch.randn(V, D, dtype=dtype), zipf_ids(N, V)
        return Workload(
            {
                OURS: Contender(lambda: ops.embedding(ids, weight)),
                "F.embedding": Contender(lambda: F.embedding(ids, weight)),
            },
            agreement(0.0),
        )

    name = named(f"forward-V{V}-D{D}-N{N}", dtype)
    phases = [gather_phase(V, D, N, dtype.itemsize)]
    return Case("embedding", name, build, phases, dtype=dtype, cold=True, graph=N <= _FEW)


def training(V: int, D: int, N: int, dtype: torch.dtype = torch.float32) -> Case:
    """The gather, and a fresh dense gradient of the table."""

    def build() -> Workload:
        weight, ids = torch.randn(V, D, dtype=dtype, requires_grad=True), zipf_ids(N, V)
        grad = torch.randn(N, D, dtype=dtype)
        return Workload(
            {
                OURS: Contender(
                    lambda: torch.autograd.grad(ops.embedding(ids, weight), weight, grad)
                ),
                "F.embedding": Contender(
                    lambda: torch.autograd.grad(F.embedding(ids, weight), weight, grad)
                ),
            },
            agreement(tolerance_of(dtype, 1e-5)),
        )

    phases = [gather_phase(V, D, N, dtype.itemsize), gradient_phase(V, D, N, dtype.itemsize)]
    return Case(
        "embedding",
        named(f"training-V{V}-D{D}-N{N}", dtype),
        build,
        phases,
        training=True,
        dtype=dtype,
        cold=True,
        graph=N <= _FEW,
    )


def gather_phase(V: int, D: int, N: int, size: int = FLOAT_BYTES) -> Phase:
    """Each distinct row read once (its repeats come from a nearer cache), N rows written."""
    distinct = int(zipf_ids(N, V).unique().numel())
    moved = (distinct + N) * D * size + N * ID_BYTES
    return Phase("gather", bytes=moved, working_set=moved, traffic="copy")


def gradient_phase(V: int, D: int, N: int, size: int = FLOAT_BYTES) -> Phase:
    """N rows of the gradient read, the whole table's gradient written once."""
    moved = (N + V) * D * size + N * ID_BYTES
    return Phase("gradient", bytes=moved, working_set=moved, traffic="copy")


QUICK = (forward(10_000, 400, 700), training(10_000, 400, 700))
