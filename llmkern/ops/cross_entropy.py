# SPDX-License-Identifier: Apache-2.0
"""Linear layer and cross entropy in one operator; the [N, V] logits never exist as a whole.

    l = W x + b
    loss = (1 - e) w_y (lse - l_y) + (e / V) sum_v w_v (lse - l_v),   lse = log sum_v exp(l_v)

with y the target, e the label smoothing (Szegedy et al. 2016) and w the class weights.
"""

import torch
from torch import Tensor

from llmkern.ops import _autocast, _checks

_OP = "linear_cross_entropy"
_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


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

    The arguments are those of ``torch.nn.functional.linear_cross_entropy`` (torch 2.13).

    Args:
        input: [..., D], float32 or float64, on CUDA also bfloat16 or float16. Under autocast on CUDA it and the
            weights are cast to its dtype.
        linear_weight: [V, D].
        target: class ids, int64 [...], each in [0, V) or equal to ignore_index.
        linear_bias: [V] or None.
        weight: class weights [V], or None for ones.
        reduction: "none" gives a loss per row; "sum" their sum; "mean" the sum over the sum of the targets' weights.
        ignore_index: rows with this target count for nothing; None means -100.
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
    input, linear_weight, linear_bias, weight = _autocast.cast(  # type: ignore[assignment]
        input, linear_weight, linear_bias, weight
    )
    _validate(input, linear_weight, target, linear_bias, weight, reduction, label_smoothing)
    loss, _, _ = torch.ops.llmkern.linear_cross_entropy.default(
        input.reshape(target.numel(), input.shape[-1]),
        linear_weight,
        linear_bias,
        target.reshape(-1),
        weight,
        _REDUCTIONS[reduction],
        -100 if ignore_index is None else ignore_index,
        float(label_smoothing),
    )
    return loss.view(target.shape) if reduction == "none" else loss


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
    _checks.check_float_like(_OP, {**floats, "weight": weight})
    _checks.check_dtype(_OP, "target", target, [torch.int64])
    _checks.check_same_device(_OP, {"input": input, "target": target})
    _checks.check_dim(_OP, "linear_weight", linear_weight, "V, D")
    V, D = linear_weight.shape
    if input.dim() == 0 or input.shape[-1] != D:
        raise ValueError(
            f"llmkern.{_OP}: expected input of shape [..., D] = [..., {D}], got {list(input.shape)}"
        )
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
    input, weight, bias, target, class_weight, reduction, ignore_index, label_smoothing
):
    wide = _checks.widened(input.dtype)
    loss = input.new_empty(target.shape if reduction == 0 else (), dtype=wide)
    lse = input.new_empty(target.shape, dtype=torch.float64)
    return loss, lse, input.new_empty((), dtype=wide)


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
):
    grad_bias = input.new_empty(0 if bias is None else weight.shape[0])
    return input.new_empty(input.shape), input.new_empty(weight.shape), grad_bias


def _save_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    input, weight, bias, target, class_weight, *ctx.options = inputs
    _, lse, total_weight = output
    ctx.mark_non_differentiable(lse, total_weight)
    ctx.save_for_backward(input, weight, bias, target, class_weight, lse, total_weight)


def _backward(ctx, grad_loss, _lse, _total_weight):  # type: ignore[no-untyped-def]
    saved = ctx.saved_tensors  # once: a checkpoint computes them for a single look
    bias = saved[2]
    grad_input, grad_weight, grad_bias = torch.ops.llmkern.linear_cross_entropy_backward.default(
        grad_loss, *saved, *ctx.options
    )
    return grad_input, grad_weight, None if bias is None else grad_bias, *[None] * 5


def _refuse_double_backward(ctx, *grads):  # type: ignore[no-untyped-def]
    raise RuntimeError(
        f"llmkern.{_OP}: expected a single backward pass, got a request for second derivatives; "
        "use torch.nn.functional.cross_entropy where they are needed"
    )


torch.library.register_autograd(
    "llmkern::linear_cross_entropy", _backward, setup_context=_save_for_backward
)
torch.library.register_autograd("llmkern::linear_cross_entropy_backward", _refuse_double_backward)
