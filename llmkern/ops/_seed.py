# SPDX-License-Identifier: Apache-2.0
"""Where the operators' randomness begins: one int64 seed a call, from torch's generators."""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from llmkern.ops import _checks


def drawn(generator: Generator | None, shape: Sequence[int], device: torch.device) -> Tensor:
    """New seeds, int64, on the device.

    Drawn on the CPU by default: torch.manual_seed then gives the same numbers on every device, without a sync.
    """
    source = torch.device("cpu") if generator is None else generator.device
    seeds = torch.randint(-(2**63), 2**63 - 1, shape, generator=generator, device=source)
    return seeds.to(device, non_blocking=True)


def check_int64(op: str, name: str, value: object, letters: str) -> None:
    """``letters`` is the shape of a tensor that might be there instead."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(
            f"llmkern.{op}: expected {name} to be an int or an int64 Tensor [{letters}], "
            f"got {type(value).__name__}"
        )
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"llmkern.{op}: expected {name} in [-2^63, 2^63), got {value}")


def one(
    op: str, seed: int | Tensor | None, generator: Generator | None, device: torch.device
) -> Tensor:
    """The seed of a call, int64 [] on the device: the given one, or a new one."""
    if seed is None:
        return drawn(generator, (), device)
    if generator is not None:
        raise ValueError(f"llmkern.{op}: expected a seed or a generator, got both")
    if isinstance(seed, Tensor):
        _checks.check_dtype(op, "seed", seed, [torch.int64])
        _checks.check_shape(op, "seed", seed, "", [])
        return seed.to(device, non_blocking=True)
    check_int64(op, "seed", seed, "")
    return torch.full((), seed, dtype=torch.int64, device=device)
