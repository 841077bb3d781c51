# SPDX-License-Identifier: Apache-2.0
"""Linear layer and cross entropy in one operator; the [N, V] logits never exist as a whole.

    l = W x + b
    loss = sum_v w_v t_v (lse - l_v),   t = (1 - e) p + e / V,   lse = log sum_v exp(l_v)

with w the class weights, e the label smoothing (Szegedy et al. 2016) and p the target: 1 for its class, or given.
"""

from typing import Any

import torch
from torch import Tensor

from llmkern.ops import _autocast, _checks
from llmkern.ops._derivatives import in_forward_mode
from llmkern.ops.cross_entropy import autograd, composite

_OP = "linear_cross_entropy"
_REDUCTIONS = {"none": composite.NONE, "mean": composite.MEAN, "sum": composite.SUM}


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross entropy, in nats, between ``input @ linear_weight.T + linear_bias`` and target.

    The arguments are those of ``torch.nn.functional.linear_cross_entropy`` (torch 2.13). Differentiable any number of
    times, under torch.func too, with respect to every floating-point argument. The first derivatives of input, weights,
    bias and probabilities have kernels, which compute those that are wanted. The others (second ones, forward mode,
    those of class weights) and, on CUDA, all of given probabilities are plain operations of torch, on whole logits.

    Args:
        input: [..., D], float32, float64, bfloat16 or float16. Under autocast it and the weights are cast to its dtype.
        linear_weight: [V, D].
        target: class ids, int64 [...], each in [0, V) or equal to ignore_index; or the probability of every class, of
            any floating-point dtype, [..., V].
        linear_bias: [V] or None.
        weight: class weights [V], or None for ones.
        reduction: "none" gives a loss per row; "sum" their sum; "mean" the sum over the sum of the targets' weights,
            for probabilities over the number of rows.
        ignore_index: rows with this target count for nothing; None means -100. None for probabilities.
        label_smoothing: in [0, 1].

    Returns:
        The loss: a scalar, or for "none" of target's shape, of input's dtype, or float32 where that has 16 bits. "mean"
        over no row at all is NaN, as in torch.

    Raises:
        TypeError: an argument is no tensor, or its dtype is another one.
        ValueError: a shape, a device, reduction or label_smoothing does not fit.
        IndexError: a target is out of range; the message names its position and value.

    Example:
        >>> hidden, head = torch.randn(35, 20, 512), torch.randn(10000, 512) / 23
        >>> loss = llmkern.ops.linear_cross_entropy(hidden, head, torch.randint(10000, (35, 20)))
    """
    for name, tensor in (("input", input), ("linear_weight", linear_weight), ("target", target)):
        _checks.check_tensor(_OP, name, tensor)
    tensors = _autocast.cast(input, linear_weight, linear_bias, weight)
    input, linear_weight, linear_bias, weight = tensors
    _validate(input, linear_weight, target, linear_bias, weight, reduction, label_smoothing)
    if target.is_floating_point():
        if ignore_index is not None:
            raise _checks.ShapeError(
                f"llmkern.{_OP}: expected no ignore_index for probabilities, got {ignore_index}"
            )
        rows = target[..., 0]  # of this shape are the losses
        flat = target.to(_checks.widened(input.dtype)).reshape(rows.numel(), target.shape[-1])
    else:
        rows, flat = target, target.reshape(-1)
    loss = _run(
        input.reshape(rows.numel(), input.shape[-1]),
        linear_weight,
        linear_bias,
        flat,
        weight,
        _REDUCTIONS[reduction],
        -100 if ignore_index is None else ignore_index,
        float(label_smoothing),
    )
    return loss.view(rows.shape) if reduction == "none" else loss


def _run(*arguments: Any) -> Tensor:
    """The operator, or what takes its place where it has no kernel."""
    input, weight, bias, target, class_weight, *_, ignore_index, _ = arguments
    transformed = torch._C._are_functorch_transforms_active()
    # The compiler understands no autograd.Function under torch.func.
    compiled = transformed and torch.compiler.is_dynamo_compiling()
    if compiled or in_forward_mode() or (input.is_cuda and target.is_floating_point()):
        _check_classes(target, weight.shape[0], ignore_index)
        return composite.linear_cross_entropy(*arguments)
    if transformed:
        return autograd.Loss.apply(*arguments, False)[0]  # type: ignore[no-any-return,no-untyped-call]
    # Alone, the gradient of the input costs least where the logits are.
    others = (weight, bias, target, class_weight)
    alone = input.requires_grad and not any(t is not None and t.requires_grad for t in others)
    saves = alone and torch.is_grad_enabled() and not torch.jit.is_tracing()
    return torch.ops.llmkern.linear_cross_entropy.default(*arguments, saves)[0]  # type: ignore[no-any-return]


def _check_classes(target: Tensor, V: int, ignore_index: int) -> None:
    """The operator's own check, where the values can be looked at."""
    if target.is_cuda or target.is_floating_point() or torch.compiler.is_compiling():
        return
    while torch._C._functorch.is_gradtrackingtensor(target):
        target = torch._C._functorch.get_unwrapped(target)
    if torch._C._functorch.is_batchedtensor(target):
        return
    wrong = ((target != ignore_index) & ((target < 0) | (target >= V))).nonzero()
    if len(wrong):
        i = int(wrong[0])
        raise IndexError(
            f"llmkern.{_OP}: expected targets in [0, {V}) or {ignore_index}, got {target[i].item()} "
            f"at position {i} of the flattened targets"
        )


def _validate(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    label_smoothing: float,
) -> None:
    floats = {"input": input, "linear_weight": linear_weight, "linear_bias": linear_bias}
    _checks.check_float_like(_OP, {**floats, "weight": weight}, _checks.ANY_FLOAT_DTYPES)
    if not target.is_floating_point():
        _checks.check_dtype(_OP, "target", target, [torch.int64])
    _checks.check_same_device(_OP, {"input": input, "target": target})
    _checks.check_dim(_OP, "linear_weight", linear_weight, "V, D")
    V, D = linear_weight.shape
    if V == 0:
        raise _checks.ShapeError(
            f"llmkern.{_OP}: expected at least one class, got linear_weight of shape [0, {D}]"
        )
    if input.dim() == 0 or input.shape[-1] != D:
        raise ValueError(
            f"llmkern.{_OP}: expected input of shape [..., D] = [..., {D}], got {list(input.shape)}"
        )
    if target.is_floating_point():
        _checks.check_shape(_OP, "target", target, "..., V", [*input.shape[:-1], V])
    else:
        _checks.check_shape(_OP, "target", target, "...", input.shape[:-1])
    for name, vector in (("linear_bias", linear_bias), ("weight", weight)):
        if vector is not None:
            _checks.check_shape(_OP, name, vector, "V", [V])
    if reduction not in _REDUCTIONS:
        raise ValueError(
            f"llmkern.{_OP}: expected reduction to be none, mean or sum, got {reduction!r}"
        )
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(
            f"llmkern.{_OP}: expected label_smoothing in [0, 1], got {label_smoothing}"
        )


@torch.library.register_fake("llmkern::linear_cross_entropy")
def _forward_fake(  # type: ignore[no-untyped-def]
    input,
    weight,
    bias,
    target,
    class_weight,
    reduction,
    ignore_index,
    label_smoothing,
    save_gradient=False,
):
    N, D = input.shape
    wide = _checks.widened(input.dtype)
    saves = save_gradient and not input.is_cuda
    return (
        input.new_empty((N,) if reduction == composite.NONE else (), dtype=wide),
        input.new_empty(N, dtype=torch.float64),
        input.new_empty((), dtype=wide),
        input.new_empty((N, D) if saves else (0,), dtype=wide),
    )


@torch.library.register_fake("llmkern::linear_cross_entropy_backward")
def _backward_fake(  # type: ignore[no-untyped-def]
    grad_loss,
    input,
    weight,
    bias,
    target,
    class_weight,
    lse,
    total_weight,
    reduction,
    ignore_index,
    label_smoothing,
    needs_input,
    needs_weight,
    needs_bias,
    needs_target,
):
    return (
        input.new_empty(input.shape if needs_input else (0,)),
        input.new_empty(weight.shape if needs_weight else (0,)),
        input.new_empty(weight.shape[:1] if needs_bias else (0,)),
        input.new_empty(target.shape if needs_target else (0,), dtype=_checks.widened(input.dtype)),
    )
