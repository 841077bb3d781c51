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


def checked_int64(op: str, name: str, value: object, letters: str) -> int:
    """The value as an int; ``letters`` is the shape of a tensor that might be there instead."""
    value = _checks.plain_number(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(
            f"llmkern.{op}: expected {name} to be an int or an int64 Tensor [{letters}], "
            f"got {type(value).__name__}"
        )
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"llmkern.{op}: expected {name} in [-2^63, 2^63), got {value}")
    return value


def one(
    op: str, seed: int | Tensor | None, generator: Generator | None, device: torch.device
) -> Tensor:
    """The seed of a call, int64 [] on the device: the given one, or a new one."""
    if seed is None:
        return drawn(generator, (), device)
    if generator is not None:
        raise ValueError(f"llmkern.{op}: expected a seed or a generator, got both")
    if isinstance(seed, Tensor):
        _checks.check_dtype(op, "seed", seed, _checks.INDEX_DTYPES)
        _checks.check_shape(op, "seed", seed, "", [])
        return seed.to(device, torch.int64, non_blocking=True)
    seed = checked_int64(op, "seed", seed, "")
    return torch.full((), seed, dtype=torch.int64, device=device)


def check_row_tensor(
    op: str, first: str, name: str, tensor: Tensor, B: int, device: torch.device
) -> None:
    """A number a row, or one for all, on the device of the argument ``first``."""
    if tensor.shape not in ((), (B,)):
        raise ValueError(
            f"llmkern.{op}: expected {name} of shape [B] = [{B}], got {list(tensor.shape)}"
        )
    check_device(op, first, name, tensor, device)


def check_device(op: str, first: str, name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(
            f"llmkern.{op}: expected every tensor on one device, got {first} on {device} "
            f"and {name} on {tensor.device}"
        )


def _int64_rows(
    op: str, first: str, name: str, value: Tensor, B: int, device: torch.device
) -> Tensor:
    _checks.check_dtype(op, name, value, _checks.INDEX_DTYPES)
    check_row_tensor(op, first, name, value, B, device)
    return value if value.dtype == torch.int64 else value.to(torch.int64)


def seeds(
    op: str,
    first: str,
    seed: int | Tensor | None,
    generator: Generator | None,
    B: int,
    device: torch.device,
) -> Tensor:
    """Of B rows: [1] or [B]."""
    if seed is None:
        return drawn(generator, (1,), device)
    if generator is not None:
        raise ValueError(f"llmkern.{op}: expected a seed or a generator, got both")
    if isinstance(seed, Tensor):
        rows = _int64_rows(op, first, "seed", seed, B, device)
        return rows if rows.dim() == 1 else rows.reshape(1)
    seed = checked_int64(op, "seed", seed, "B")
    return torch.full((1,), seed, dtype=torch.int64, device=device)


def positions(
    op: str,
    first: str,
    position: int | Tensor | None,
    seed_per_row: bool,
    B: int,
    device: torch.device,
) -> Tensor | None:
    """Of B rows: [1] or [B]; None is the operator's default."""
    if position is None:
        return None
    if isinstance(position, Tensor):
        rows = _int64_rows(op, first, "position", position, B, device)
        return rows if rows.dim() == 1 else rows.reshape(1)
    position = checked_int64(op, "position", position, "B")
    if B > 1 and not seed_per_row:
        raise ValueError(
            f"llmkern.{op}: expected seed to be a Tensor [B] beside an int position, got one seed for B = {B} rows, "
            f"which would give every row the same random number; pass position as a Tensor [B] if that is meant"
        )
    return torch.full((1,), position, dtype=torch.int64, device=device)
