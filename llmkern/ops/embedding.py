# SPDX-License-Identifier: Apache-2.0
"""Embedding gather.

    out[..., :] = weight[ids[...], :]

The gradient is dense and summed in the order of the ids, column by column: the same bits on any number of threads.
"""

import torch
from torch import Tensor

from llmkern.ops import _checks

_OP = "embedding"


def embedding(
    ids: Tensor,
    weight: Tensor,
    *,
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
) -> Tensor:
    """Looks up rows of an embedding table.

    Args:
        ids: any shape, int64 or int32, each in [0, V).
        weight: the table, [V, D], float32 or float64, on CUDA also bfloat16 or float16 (contiguous is fastest).
        padding_idx: a row that gets no gradient; negative counts from the end.
        scale_grad_by_freq: divide each row's gradient by the number of times its id occurs in ``ids``.

    Returns:
        ``ids.shape + [D]``, of weight's dtype.

    Raises:
        TypeError: an argument is no tensor, or its dtype is another one.
        ValueError: a shape, a device or padding_idx does not fit.
        IndexError: an id is out of range; the message names its position and value.

    Example:
        >>> table = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> llmkern.ops.embedding(torch.tensor([1, 1, 0]), table).tolist()
        [[3.0, 4.0], [3.0, 4.0], [1.0, 2.0]]
    """
    padding_row = _validate(ids, weight, padding_idx)
    return torch.ops.llmkern.embedding.default(ids, weight, padding_row, scale_grad_by_freq)


def _validate(ids: Tensor, weight: Tensor, padding_idx: int | None) -> int:
    """The row without a gradient, -1 for none."""
    _checks.check_tensor(_OP, "ids", ids)
    _checks.check_tensor(_OP, "weight", weight)
    _checks.check_dtype(_OP, "ids", ids, _checks.INDEX_DTYPES)
    _checks.check_dtype(_OP, "weight", weight, _checks.float_dtypes(weight))
    _checks.check_dim(_OP, "weight", weight, "V, D")
    _checks.check_same_device(_OP, {"ids": ids, "weight": weight})
    if padding_idx is None:
        return -1
    V = weight.shape[0]
    if not -V <= padding_idx < V:
        raise ValueError(
            f"llmkern.embedding: expected padding_idx in [{-V}, {V}), got {padding_idx}"
        )
    return padding_idx % V


@torch.library.register_fake("llmkern::embedding")
def _embedding_fake(ids: Tensor, weight: Tensor, padding_idx: int, scale_by_freq: bool) -> Tensor:
    return weight.new_empty([*ids.shape, weight.shape[1]])


@torch.library.register_fake("llmkern::embedding_backward")
def _embedding_backward_fake(
    grad: Tensor, ids: Tensor, num_embeddings: int, padding_idx: int, scale_by_freq: bool
) -> Tensor:
    return grad.new_empty([num_embeddings, grad.shape[-1]])


def _save_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ids, weight, ctx.padding_idx, ctx.scale_by_freq = inputs
    ctx.num_embeddings = weight.shape[0]
    ctx.save_for_backward(ids)


def _backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    if not ctx.needs_input_grad[1]:
        return None, None, None, None
    (ids,) = ctx.saved_tensors
    grad_weight = torch.ops.llmkern.embedding_backward.default(
        grad, ids, ctx.num_embeddings, ctx.padding_idx, ctx.scale_by_freq
    )
    return None, grad_weight, None, None


def _save_for_double_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, ids, _, ctx.padding_idx, ctx.scale_by_freq = inputs
    ctx.save_for_backward(ids)


def _double_backward(ctx, grad_grad_weight: Tensor):  # type: ignore[no-untyped-def]
    """The backward is linear in its gradient, so its own gradient is a masked, scaled gather."""
    (ids,) = ctx.saved_tensors
    rows = grad_grad_weight
    if ctx.scale_by_freq:
        counts = torch.bincount(ids.reshape(-1), minlength=rows.shape[0])
        rows = rows / counts.clamp(min=1).to(rows.dtype)[:, None]
    if ctx.padding_idx >= 0:
        rows = rows.index_fill(0, torch.tensor([ctx.padding_idx], device=rows.device), 0)
    grad = torch.ops.llmkern.embedding.default(ids, rows, -1, False)
    return grad, None, None, None, None


torch.library.register_autograd("llmkern::embedding", _backward, setup_context=_save_for_backward)
torch.library.register_autograd(
    "llmkern::embedding_backward", _double_backward, setup_context=_save_for_double_backward
)
