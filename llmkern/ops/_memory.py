# SPDX-License-Identifier: Apache-2.0
"""Memory that the CPU operators keep from one training step to the next."""

import torch


def empty_cache() -> None:
    """Frees the memory on the CPU that operators keep for their next call, as torch.cuda.empty_cache does for a GPU.

    From torch 2.11 on, gradients and what a forward pass saves for its backward pass come from a cache of large blocks
    where they have 1 MiB or more: memory that was used before costs no page faults. A block goes back when its last
    tensor is gone. The cache frees blocks by itself when other shapes have taken their place for a while (32 requests
    for each block), before the process forks, and when memory runs out. Call this after training, or before work that
    needs the memory for something else. Tensors that are alive keep theirs.

    Such tensors cannot be resized (``resize_``), and torch's profiler does not see their memory.

    Example:
        >>> loss.backward()
        >>> llmkern.ops.empty_cache()
    """
    torch.ops.llmkern.empty_cache()
