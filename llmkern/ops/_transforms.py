# SPDX-License-Identifier: Apache-2.0
"""What the operators share under torch.func and in forward mode.

What torch.library registers serves neither: a gradient raises there, and a derivative in forward mode would silently be
zero. An operator has an autograd.Function with rules of its own for them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def active() -> bool:
    """Whether a transform of torch.func or a level of forward mode looks on."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def one_by_one(
    call: Callable[..., Tensor], n: int, in_dims: Sequence[int | None], args: Sequence[Any]
) -> tuple[Tensor, int]:
    """The vmap rule of an operator whose n samples have nothing to share."""
    results = [
        call(*[a if at is None else a.select(at, i) for a, at in zip(args, in_dims, strict=True)])
        for i in range(n)
    ]
    return torch.stack(results), 0
