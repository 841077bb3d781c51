# SPDX-License-Identifier: Apache-2.0
"""What the derivatives of several operators share: where a kernel has none, those of plain torch operations."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad


def in_forward_mode() -> bool:
    """Whether derivatives are taken in forward mode: within torch.func.jvp or torch.autograd.forward_ad.dual_level."""
    return forward_ad._current_level >= 0


def vjp(f, *primals):  # type: ignore[no-untyped-def]
    """torch.func.vjp, which refuses to run beside hooks for saved tensors, for the world outside of torch.func too.

    The gradients are differentiable wherever gradients are recorded.
    """
    if torch._C._are_functorch_transforms_active():
        return torch.func.vjp(f, *primals)
    go_on = torch.is_grad_enabled()
    with torch.enable_grad():
        variables = [
            t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in primals
        ]
        outputs = f(*variables)

    def pullback(upstream):  # type: ignore[no-untyped-def]
        pairs = [(o, u) for o, u in zip(outputs, upstream, strict=True) if o.requires_grad]
        if not pairs or not variables:
            return [torch.zeros_like(v) for v in variables]
        return torch.autograd.grad(
            [o for o, _ in pairs],
            variables,
            [u for _, u in pairs],
            create_graph=go_on,
            materialize_grads=True,
        )

    return outputs, pullback


def one_by_one(
    call: Callable[..., Any], n: int, in_dims: Sequence[int | None], args: Sequence[Any]
) -> Any:
    """A vmap rule that serves every operator: the samples run one after another."""
    results = [
        call(*[a if at is None else a.select(at, i) for a, at in zip(args, in_dims, strict=True)])
        for i in range(n)
    ]
    stacked = tuple(torch.stack(r) for r in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)
