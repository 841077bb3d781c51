# SPDX-License-Identifier: Apache-2.0
"""Memory that the CPU operators keep from one call to the next."""

import torch

from llmkern.ops import _sampling_arguments


def empty_cache() -> None:
    """Frees the memory on the CPU that operators keep for their next call, as torch.cuda.empty_cache does for a GPU.

    Call this after training, or before work that needs the memory for something else. It frees two kinds:

    * Every thread keeps the working memory of the kernels that it has run, megabytes to hundreds of them. Threads that
      are in an operator while this is called free theirs when they leave it.
    * From torch 2.11 on, gradients and what a forward pass saves for its backward pass come from a cache of large
      blocks where they have 1 MiB or more: memory that was used before costs no page faults. A block goes back when its
      last tensor is gone. The cache also frees blocks by itself when other shapes have taken their place for a while
      (32 requests for each block), before the process forks, and when memory runs out. Tensors that are alive keep
      theirs; they cannot be resized (``resize_``), and torch's profiler does not see their memory.

    Example:
        >>> loss.backward()
        >>> llmkern.ops.empty_cache()
    """
    _sampling_arguments.forget_settings()
    torch.ops.llmkern.empty_cache()
