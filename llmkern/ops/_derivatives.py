# SPDX-License-Identifier: Apache-2.0
"""What the derivatives of several operators share: where a kernel has none, those of plain torch operations."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_LIBRARY = torch.library.Library("llmkern", "IMPL")


def in_forward_mode() -> bool:
    """Whether derivatives are taken in forward mode: within torch.func.jvp or torch.autograd.forward_ad.dual_level."""
    return forward_ad._current_level >= 0


def register_autograd(
    operator: torch._ops.OpOverload,
    backward: Callable[..., Any],
    setup_context: Callable[..., None],
) -> None:
    """torch.library.register_autograd, and an error in forward mode, of which that would make nothing: no tangent.

    The functions of llmkern.ops do not come here in forward mode; a trace or an exported program may.
    """
    name = operator._opname
    info = torch._library.autograd.Info(backward, setup_context)
    recorded = torch._library.autograd.make_autograd_impl(operator, info)

    def kernel(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        if in_forward_mode() and any(map(_is_dual, [*args, *kwargs.values()])):
            raise NotImplementedError(
                f"llmkern::{name}: expected no derivative in forward mode of the operator itself; "
                "call the layer, or the function in llmkern.ops, not what was recorded of it"
            )
        return recorded(keyset, *args, **kwargs)

    _LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)


def _is_dual(value: object) -> bool:
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return False
    return forward_ad.unpack_dual(value).tangent is not None


def saved_tensors(ctx: Any) -> tuple[Any, ...]:
    """What a forward pass has saved, for a backward pass to compute with; taken once, for checkpoints give it once.

    A pullback of torch.func may run when the level of its forward pass has ended: its tensors are that level's no more.
    """
    saved = ctx.saved_tensors
    if not torch._C._are_functorch_transforms_active():
        return saved  # type: ignore[no-any-return]
    return tuple(t if t is None else torch._C._functorch.unwrap_if_dead(t) for t in saved)


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
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    stacked = tuple(torch.stack(r) for r in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)
