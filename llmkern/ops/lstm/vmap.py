# SPDX-License-Identifier: Apache-2.0
"""torch.vmap over LSTM layers: rows are independent of one another, so the mapped dimension joins the batch.

Where the samples do not share their parameters, or a result depends on more than its row, they run one after another.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from llmkern.ops._derivatives import one_by_one

# The dimension in which rows lie, in every argument and result; None: not per row.
_STATES = (1, 0, 0)
_PARAMETERS = (None,) * 7
_MASKS = (0, 1, None)
_SAVED = (1, 1, 1, 2, 1)
_FORWARD = (*_STATES, *_PARAMETERS, *_MASKS, None)
_RESULTS = (*_STATES, *_SAVED[1:])
_BACKWARD = (*_STATES, 1, *_STATES, *_PARAMETERS, *_MASKS, *_SAVED)
_GRADIENTS = (*_STATES, 1)


def layer(call: Callable[..., Any], info: Any, in_dims: Sequence[int | None], *args: Any) -> Any:
    """The vmap rule of llmkern::lstm; ``call`` runs it."""
    n, tensors = info.batch_size, len(_FORWARD)
    zoneout_h, zoneout_c = args[tensors : tensors + 2]
    masks = args[12] is not None and (zoneout_h > 0 or zoneout_c > 0)  # a row's place is in them
    if masks or not _foldable(_FORWARD, in_dims):
        return one_by_one(call, n, in_dims, args)
    results = call(*_fold(args[:tensors], in_dims, _FORWARD, n), *args[tensors:])
    return _unfold(results, _RESULTS, n)


def backward(call: Callable[..., Any], info: Any, in_dims: Sequence[int | None], *args: Any) -> Any:
    """The vmap rule of llmkern::lstm_backward; ``call`` runs it."""
    n, tensors = info.batch_size, len(_BACKWARD)
    zoneout_h, zoneout_c, reverse, weights = args[tensors : tensors + 4]
    # Elsewhere the gradients of the gates, all that rows have on their own, do not tell those of the weights.
    plain = all(args[i] is None for i in (11, 12, 14, 15)) and zoneout_h == zoneout_c == 0
    if not plain or args[4].is_cuda or not _foldable(_BACKWARD, in_dims):
        return one_by_one(call, n, in_dims, args)
    folded = _fold(args[:tensors], in_dims, _BACKWARD, n)
    results = call(*folded, zoneout_h, zoneout_c, reverse, False)
    per_row, dims = _unfold(results[:4], _GRADIENTS, n)
    if not weights:
        return (*per_row, *results[4:]), (*dims, *[None] * 6)
    input, h_0, output = (folded[i] for i in (4, 5, 17))
    first = h_0.unsqueeze(0)
    previous = torch.cat([output[1:], first] if reverse else [first, output[:-1]])
    grad_gates, (x, h) = per_row[3], _unfold((input, previous), (1, 1), n)[0]
    grads = (
        torch.einsum("tnbg,tnbi->ngi", grad_gates, x),
        torch.einsum("tnbg,tnbi->ngi", grad_gates, h),
        grad_gates.sum((0, 2)),
    )
    none, _, _, *variant = results[4:]
    return (*per_row[:3], none, *grads, *variant), (*dims[:3], None, 0, 0, 0, *[None] * 3)


def _foldable(dims: Sequence[int | None], in_dims: Sequence[int | None]) -> bool:
    """Whether nothing is mapped but what has rows."""
    return all(at is None or dim is not None for at, dim in zip(in_dims, dims, strict=False))


def _fold(
    tensors: Sequence[Any], in_dims: Sequence[int | None], dims: Sequence[int | None], n: int
) -> list[Any]:
    """Every tensor with n times the rows: [.., B, ..] as [.., n * B, ..]."""
    folded = []
    for tensor, at, dim in zip(tensors, in_dims, dims, strict=False):
        if tensor is not None and dim is not None and not _is_absent(tensor, at):
            if at is None:
                sizes = [*tensor.shape[:dim], n, *tensor.shape[dim:]]
                tensor = tensor.unsqueeze(dim).expand(sizes)
            else:
                tensor = tensor.movedim(at, dim)
            tensor = tensor.flatten(dim, dim + 1)
        folded.append(tensor)
    return folded


def _unfold(tensors: Sequence[Tensor], dims: Sequence[int], n: int) -> Any:
    """The inverse, and where the mapped dimension lies in each."""
    at = tuple(None if _is_absent(t) else dim for t, dim in zip(tensors, dims, strict=True))
    unfolded = tuple(
        t if dim is None else t.unflatten(dim, (n, t.shape[dim] // n))
        for t, dim in zip(tensors, at, strict=True)
    )
    return unfolded, at


def _is_absent(tensor: Tensor, at: int | None = None) -> bool:
    """What nobody asked for is an empty vector."""
    return tensor.dim() == (1 if at is None else 2) and tensor.numel() == 0
