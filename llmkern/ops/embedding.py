# SPDX-License-Identifier: Apache-2.0
"""Embedding gather.

    out[..., :] = weight[ids[...], :]

The gradient is dense and summed in the order of the ids, column by column: the same bits on any number of threads.
"""

import torch
from torch import Tensor

from llmkern.ops import _checks, _derivatives, _linear_derivatives

_OP = "embedding"
_GATHER = torch.ops.llmkern.embedding.default
_SCATTER = torch.ops.llmkern.embedding_backward.default


def embedding(
    ids: Tensor,
    weight: Tensor,
    *,
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
) -> Tensor:
    """Looks up rows of an embedding table.

    Differentiable any number of times, in forward mode and under torch.func too. Gradients of 16-bit types are summed
    in float32 and rounded once.

    Args:
        ids: any shape, int64 or int32, each in [0, V).
        weight: the table, [V, D], float32, float64, bfloat16 or float16 (contiguous is fastest).
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
    return _GATHER(ids, weight, padding_row, scale_grad_by_freq)


def _validate(ids: Tensor, weight: Tensor, padding_idx: int | None) -> int:
    """The row without a gradient, -1 for none."""
    _checks.check_tensor(_OP, "ids", ids)
    _checks.check_tensor(_OP, "weight", weight)
    _checks.check_dtype(_OP, "ids", ids, _checks.INDEX_DTYPES)
    _checks.check_dtype(_OP, "weight", weight, _checks.ANY_FLOAT_DTYPES)
    _checks.check_dim(_OP, "weight", weight, "V, D")
    _checks.check_same_device(_OP, {"ids": ids, "weight": weight})
    if padding_idx is None:
        return -1
    V = _checks.size(weight, 0)
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
    ids, weight, *ctx.options = inputs
    ctx.num_embeddings = weight.shape[0]
    ctx.save_for_backward(ids)
    ctx.save_for_forward(ids)


def _backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    (ids,) = ctx.saved_tensors
    return None, _SCATTER(grad, ids, ctx.num_embeddings, *ctx.options)


def _jvp(ctx, _, tangent: Tensor, *__):  # type: ignore[no-untyped-def]
    """The gather is linear in the table."""
    (ids,) = ctx.saved_tensors
    return _GATHER(ids, tangent, *ctx.options)


def _vmap(info, in_dims, ids: Tensor, weight: Tensor, *options):  # type: ignore[no-untyped-def]
    if in_dims[1] is None:
        return _GATHER(ids, weight, *options), in_dims[0]
    return _derivatives.one_by_one(_GATHER, info.batch_size, in_dims, (ids, weight, *options))


def _save_for_double_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, ids, *ctx.options = inputs
    ctx.save_for_backward(ids)
    ctx.save_for_forward(ids)


def _double_backward(ctx, grad_grad_weight: Tensor):  # type: ignore[no-untyped-def]
    """The backward is linear in its gradient, so its own gradient is a masked, scaled gather."""
    (ids,) = ctx.saved_tensors
    num_embeddings, padding_idx, scale_by_freq = ctx.options
    rows = _GATHER(ids, grad_grad_weight, -1, False)
    if scale_by_freq:
        flat = ids.reshape(-1).long()
        ones = torch.ones_like(flat, dtype=_checks.widened(rows.dtype))
        counts = ones.new_zeros(num_embeddings).index_add(0, flat, ones)
        rows = (rows / counts[ids].unsqueeze(-1)).to(rows.dtype)
    if padding_idx >= 0:
        rows = rows.masked_fill((ids == padding_idx).unsqueeze(-1), 0)
    return (rows,)


def _backward_jvp(ctx, tangent: Tensor, *_):  # type: ignore[no-untyped-def]
    (ids,) = ctx.saved_tensors
    return _SCATTER(tangent, ids, *ctx.options)


def _backward_vmap(  # type: ignore[no-untyped-def]
    info, in_dims, grad: Tensor, ids: Tensor, num_embeddings: int, padding_idx: int, *scale_by_freq
):
    """One call for all n samples: those of the same ids lie side by side, [V, n, D], others in one table, [n, V, D]."""
    n, (grad_dim, ids_dim, *_) = info.batch_size, in_dims
    if ids_dim is None:
        columns = grad.movedim(grad_dim, -2).flatten(-2)
        sums = _SCATTER(columns, ids, num_embeddings, padding_idx, *scale_by_freq)
        return sums.unflatten(1, (n, columns.shape[-1] // n)), 1
    ids = ids.movedim(ids_dim, 0)
    grad = grad.expand(n, *grad.shape) if grad_dim is None else grad.movedim(grad_dim, 0)
    if padding_idx >= 0:
        grad = grad.masked_fill((ids == padding_idx).unsqueeze(-1), 0)
    first = torch.arange(n, device=ids.device).mul(num_embeddings).view(-1, *[1] * (ids.dim() - 1))
    # An id out of range must not end in the table of another sample.
    rows = torch.where((ids >= 0) & (ids < num_embeddings), ids + first, -1)
    sums = _SCATTER(grad, rows, n * num_embeddings, -1, *scale_by_freq)
    return sums.unflatten(0, (n, num_embeddings)), 0


_linear_derivatives.register(
    _GATHER, setup_context=_save_for_backward, backward=_backward, jvp=_jvp, vmap=_vmap
)
_linear_derivatives.register(
    _SCATTER,
    setup_context=_save_for_double_backward,
    backward=_double_backward,
    jvp=_backward_jvp,
    vmap=_backward_vmap,
)
