# SPDX-License-Identifier: Apache-2.0
"""Errors that CUDA kernels found in their input: raised by the next call on the device, or here."""

import torch


def raise_deferred_errors(device: torch.device | int | str | None = None) -> None:
    """Waits for a CUDA device and raises what llmkern's kernels found wrong with their input.

    An id out of range is only seen when the kernel runs, after the call has returned. Its row becomes NaN, the context
    lives on, and the next llmkern call on that device raises the error. Call this to be told at once: after a
    suspicious call, at the end of a step, before results are used. Without a CUDA device it does nothing.

    Args:
        device: a CUDA device; None means the current one.

    Raises:
        IndexError: an embedding id or a target was out of range.
        ValueError: a setting of ``sample`` was out of range.

    Example:
        >>> llmkern.ops.embedding(ids, table)
        >>> llmkern.ops.raise_deferred_errors()
    """
    if not torch.cuda.is_available():
        return
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        torch.ops.llmkern.raise_deferred_errors(torch.cuda.current_device())
