# SPDX-License-Identifier: Apache-2.0
"""The derivatives of an operator that is linear, written once for autograd, forward mode, torch.func and compilers.

torch.library.register_autograd knows neither forward mode, where its derivative is silently zero, nor torch.func, where
it raises. Here the operator itself has all of them, so that no caller has to ask who looks on.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

_LIBRARY = torch.library.Library("llmkern", "FRAGMENT")


class _Modes(NamedTuple):
    """What torch turns off while it runs a function's forward, and what the outer levels of torch.func look at."""

    reverse: bool
    forward: bool


def register(
    operator: torch._ops.OpOverload,
    *,
    setup_context: Callable[..., None],
    backward: Callable[..., tuple[Any, ...]],
    jvp: Callable[..., Any],
    vmap: Callable[..., tuple[Any, Any]],
) -> None:
    """Gives an operator of the native library its derivatives and its rule for vmap.

    Args:
        operator: an overload without keyword-only arguments.
        setup_context, backward, jvp: those of torch.autograd.Function. The gradients may end with that of the last
            tensor. All of them call operators that are differentiable the same way.
        vmap: as for torch.library.register_vmap.
    """

    def forward(ctx: Any, *args: Any) -> Any:
        *inputs, modes = args
        output = _below_autograd(operator, inputs, modes)
        setup_context(ctx, inputs, output)
        return output

    def padded_backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        results = backward(ctx, *grads)
        return (*results, *[None] * (len(ctx.needs_input_grad) - len(results)))

    rules = {"forward": forward, "backward": padded_backward, "jvp": jvp}
    members = {name: staticmethod(rule) for name, rule in rules.items()}
    function: Any = type(f"{operator._opname}_derivatives", (_SingleLevelFunction,), members)

    def differentiable(*args: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            modes = _Modes(torch.is_grad_enabled(), torch._C._is_fwd_grad_enabled())
            # One level of transforms at a time, as for torch's own operators: the call below reaches the next one.
            with enable_single_level_autograd_function():
                return function.apply(*args, modes)
        if _is_recorded(args):
            return function.apply(*args, None)
        return _below_autograd(operator, args, None)

    _LIBRARY.impl(operator._opname, differentiable, "Autograd")
    torch.library.register_vmap(operator, vmap)


def _is_recorded(args: tuple[Any, ...]) -> bool:
    """Whether there is somebody to tell of derivatives, outside of torch.func."""
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
        return True
    if torch._C._len_torch_dispatch_stack():
        return True  # a tracer: what it would record of the question below does not belong to its graph
    return any(
        torch._VF._unpack_dual(arg, level=0)[1] is not None
        for arg in args
        if isinstance(arg, Tensor) and arg.is_floating_point()
    )


def _below_autograd(operator: Any, args: Any, modes: _Modes | None) -> Any:
    if modes is None:
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)
    with (
        torch.set_grad_enabled(modes.reverse),
        forward_ad._set_fwd_grad_enabled(modes.forward),
        torch._C._AutoDispatchBelowAutograd(),
    ):
        return operator(*args)
