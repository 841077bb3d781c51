# SPDX-License-Identifier: Apache-2.0
"""What is measured: a case, its contenders, and the work that a perfect implementation could not avoid."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

OURS = "llmkern"
# Ends the name of a contender that is replayed as a CUDA graph.
GRAPH = ", graph"
# Two contenders in 16 bits each round in their own places: so many units in the last place apart, at most.
_ROUNDINGS = 16


def flattened(result: Any) -> Iterator[Tensor]:
    """The tensors of nested tuples, in order: ``(output, (h_n, c_n))`` is three."""
    if isinstance(result, Tensor):
        yield result
    else:
        for part in result:
            yield from flattened(part)


@dataclass(frozen=True)
class Contender:
    """One way to do the work.

    Args:
        run: does it once. Nothing but this is timed.
        tensors: turns what run returned into tensors that are the same for every contender.
        capturable: run can become a CUDA graph: it never waits for the GPU.
    """

    run: Callable[[], Any]
    tensors: Callable[[Any], Sequence[Tensor]] = lambda result: list(flattened(result))
    capturable: bool = True


def rival(peer: str) -> str:
    """What a peer is compared with: llmkern, or its graph where the peer is one."""
    return OURS + GRAPH if peer.endswith(GRAPH) else OURS


def tolerance_of(dtype: torch.dtype, float32: float) -> float:
    """What two right results may differ by: ``float32`` as given, in 16 bits a few units in the last place."""
    return float32 if dtype == torch.float32 else _ROUNDINGS * torch.finfo(dtype).eps


def named(name: str, dtype: torch.dtype) -> str:
    """A case's name, with its dtype where that is not float32: ``decode-H512-B1-bfloat16``."""
    return name if dtype == torch.float32 else f"{name}-{dtype_name(dtype)}"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def agreement(
    tolerance: float, looser: Mapping[str, float] | None = None
) -> Callable[[Mapping[str, Any]], float]:
    """A check: every tensor of every contender equals llmkern's.

    Args:
        tolerance: on the largest difference, relative to the largest value of the peer's tensor.
        looser: peer -> tolerance, for peers that compute less precisely; they do not count for the returned error.

    Returns:
        A function from contender name -> its tensors to the largest relative difference, for :class:`Workload`.
    """

    excused = looser or {}

    def check(tensors: Mapping[str, Sequence[Tensor]]) -> float:
        worst = 0.0
        for peer in tensors.keys() - {OURS}:
            pairs = zip(tensors[OURS], tensors[peer], strict=True)
            error = max(_relative_error(got, expected) for got, expected in pairs)
            allowed = excused.get(peer.removesuffix(GRAPH), tolerance)
            if not error <= allowed:
                raise RuntimeError(
                    f"expected {OURS} within {allowed:.1e} of {peer}, got a difference of {error:.1e}"
                )
            if peer.removesuffix(GRAPH) not in excused:
                worst = max(worst, error)
        return worst

    return check


def _relative_error(got: Tensor, expected: Tensor) -> float:
    if got.numel() != expected.numel():
        raise RuntimeError(
            f"expected {expected.numel()} values as from the peer, got {got.numel()}"
        )
    got, expected = got.detach().flatten().double(), expected.detach().flatten().double()
    scale = expected.abs().max().clamp(min=1e-30)
    return ((got - expected).abs().max() / scale).item()


@dataclass(frozen=True)
class Workload:
    """A case made real: tensors allocated, layers built.

    Args:
        contenders: name -> contender, timed in this order; llmkern is the first.
        check: raises RuntimeError when the contenders' tensors are not what they should be; returns the largest error.
        copies: sets of inputs that the runs take in turn.
        absent: peer -> why it could not take part.
    """

    contenders: Mapping[str, Contender]
    check: Callable[[Mapping[str, Any]], float]
    copies: int = 1
    absent: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Phase:
    """Work that cannot overlap with the phases beside it; its floor is the slower of arithmetic and memory.

    Args:
        name: for the reader of the results.
        flops: multiplications and additions of the formula, a fused multiply-add being two; nothing recomputed counts.
        bytes: what must be moved at least, each datum once.
        working_set: bytes in use while the phase runs: they decide which memory level is the one to measure by.
        traffic: "read" for data that are only read, "copy" where about as much is written; copy counts both ways.
        repeats: how often, one after another.
    """

    name: str
    flops: float = 0.0
    bytes: float = 0.0
    working_set: float = 0.0
    traffic: Literal["read", "copy"] = "read"
    repeats: int = 1


@dataclass(frozen=True)
class Case:
    """Something to measure; cheap until it is built.

    Args:
        family: "lstm", "embedding", ...
        name: words joined by "-" (``decode-H512-B1``), so that ``pytest -k "decode and H512"`` selects it.
        build: allocates on torch's default device, and returns the workload.
        phases: the work, one phase at least; its floor is the sum over phases.
        training: gradients are computed; otherwise everything runs under inference mode.
        tokens: tokens processed by one run, for a rate in tokens/s; 0 shows none.
        dtype: what is multiplied: it decides the arithmetic's ceiling.
        cold: on a GPU, runs take inputs in turn from sets that together exceed the L2 cache.
        graph: on a GPU, every contender is also timed as a CUDA graph: small work is slower to launch than to do.
        goal: from the floor, in seconds, to the time that llmkern means to stay below; None shows none.
    """

    family: str
    name: str
    build: Callable[[], Workload]
    phases: Sequence[Phase]
    training: bool = False
    tokens: int = 0
    dtype: torch.dtype = torch.float32
    cold: bool = False
    graph: bool = False
    goal: Callable[[float], float] | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def flops(self) -> float:
        return sum(phase.flops * phase.repeats for phase in self.phases)

    @property
    def bytes(self) -> float:
        return sum(phase.bytes * phase.repeats for phase in self.phases)
