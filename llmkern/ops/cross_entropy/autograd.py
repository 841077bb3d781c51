# SPDX-License-Identifier: Apache-2.0
"""First and second derivatives of llmkern::linear_cross_entropy, for autograd and for torch.func."""

from typing import Any

import torch

from llmkern.ops._derivatives import (
    in_forward_mode,
    one_by_one,
    register_autograd,
    saved_tensors,
    vjp,
)
from llmkern.ops.cross_entropy import composite

# Among the arguments of llmkern::linear_cross_entropy: those that may have gradients, and all tensors.
_INPUT, _WEIGHT, _BIAS, _TARGET, _CLASS_WEIGHT = range(5)
_TENSORS = slice(0, 5)
_INPUT_ALONE = [True, False, False, False]


def _save_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.options = inputs[_TENSORS.stop : -1]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[_TENSORS], *output[1:])


def _backward(ctx, grad_loss, *_):  # type: ignore[no-untyped-def]
    *saved, input_gradient = saved_tensors(ctx)
    tensors, needs = saved[_TENSORS], ctx.needs_input_grad[_TENSORS]
    # What no kernel computes: anything in forward mode, and the gradient of class weights.
    composed = [i for i in range(5) if needs[i] and (in_forward_mode() or i == _CLASS_WEIGHT)]
    by_kernel = [needs[i] and i not in composed for i in range(_CLASS_WEIGHT)]
    grads = dict(zip(composed, _gradients(grad_loss, tensors, ctx.options, composed), strict=True))
    if by_kernel == _INPUT_ALONE and input_gradient.numel() > 0 and not torch.is_grad_enabled():
        grads[_INPUT] = _scaled(input_gradient, grad_loss, tensors[_INPUT].dtype)
    elif any(by_kernel):
        grads |= enumerate(_run_backward(grad_loss, *saved, *ctx.options, *by_kernel))
    return *[grads[i] if needs[i] else None for i in range(5)], *[None] * 4


def _scaled(input_gradient, grad_loss, dtype):  # type: ignore[no-untyped-def]
    """The gradient of the input from the one that the forward pass made for an upstream gradient of 1."""
    return (input_gradient * (grad_loss[:, None] if grad_loss.dim() else grad_loss)).to(dtype)


def _gradients(grad_loss, tensors, options, places):  # type: ignore[no-untyped-def]
    """The gradients of the tensors at these places, differentiable themselves."""
    if not places:
        return ()

    def loss_of(*variables):  # type: ignore[no-untyped-def]
        given = list(tensors)
        for i, variable in zip(places, variables, strict=True):
            given[i] = variable
        return (composite.linear_cross_entropy(*given, *options),)

    _, pullback = vjp(loss_of, *[tensors[i] for i in places])
    return pullback((grad_loss,))


# Among the arguments of llmkern::linear_cross_entropy_backward, after the gradient of the loss, the tensors and what
# the forward pass saved: its numbers, and which gradients are wanted.
_OPTIONS, _NEEDS = slice(8, 11), slice(11, 15)


def _save_for_second_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.options, ctx.needs = inputs[_OPTIONS], inputs[_NEEDS]
    ctx.set_materialize_grads(False)
    # What the forward pass saved is a function of these.
    ctx.save_for_backward(*inputs[: 1 + _TENSORS.stop])


def _second_backward(ctx, *grads):  # type: ignore[no-untyped-def]
    """Differentiates the gradients of the composite loss; whoever asks for a graph of that gets one."""
    saved = saved_tensors(ctx)
    needed = [i for i, needs in enumerate(ctx.needs_input_grad[: len(saved)]) if needs]
    wanted = [i for i, grad in enumerate(grads) if grad is not None and ctx.needs[i]]
    results = [None] * len(ctx.needs_input_grad)

    def first_gradients(*variables):  # type: ignore[no-untyped-def]
        given = list(saved)
        for i, variable in zip(needed, variables, strict=True):
            given[i] = variable
        grad_loss, *tensors = given
        return tuple(_gradients(grad_loss, tensors, ctx.options, wanted))

    _, pullback = vjp(first_gradients, *[saved[i] for i in needed])
    for i, grad in zip(needed, pullback(tuple(grads[i] for i in wanted)), strict=True):
        results[i] = grad
    return tuple(results)


register_autograd(torch.ops.llmkern.linear_cross_entropy.default, _backward, _save_for_backward)
register_autograd(
    torch.ops.llmkern.linear_cross_entropy_backward.default,
    _second_backward,
    _save_for_second_backward,
)


class Loss(torch.autograd.Function):
    """llmkern::linear_cross_entropy under torch.func, whose transforms no gradient registered with torch.library
    serves.
    """

    setup_context = staticmethod(_save_for_backward)
    backward = staticmethod(_backward)

    @staticmethod
    def forward(*args: Any) -> Any:
        return torch.ops.llmkern.linear_cross_entropy.default(*args)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return one_by_one(Loss.apply, info.batch_size, in_dims, args)


class LossBackward(torch.autograd.Function):
    """llmkern::linear_cross_entropy_backward under the transforms of torch.func."""

    setup_context = staticmethod(_save_for_second_backward)
    backward = staticmethod(_second_backward)

    @staticmethod
    def forward(*args: Any) -> Any:
        return torch.ops.llmkern.linear_cross_entropy_backward.default(*args)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return one_by_one(LossBackward.apply, info.batch_size, in_dims, args)


def _run_backward(*args: Any) -> Any:
    if torch._C._are_functorch_transforms_active():
        return LossBackward.apply(*args)  # type: ignore[no-untyped-call]
    return torch.ops.llmkern.linear_cross_entropy_backward.default(*args)
