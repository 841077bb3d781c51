# SPDX-License-Identifier: Apache-2.0
"""torch.vmap over LSTM layers: rows are independent of one another, so the mapped dimension joins the batch.

Where the samples do not share their parameters, or a result depends on more than its row, they run one after another.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from llmkern.ops._derivatives import one_by_one
from llmkern.ops.lstm.arguments import Backward, BackwardResults, Forward, ForwardResults

# The dimension in which rows lie, in arguments and results; no other has any.
_ROWS = {"input": 1, "h_0": 0, "c_0": 0, "lengths": 0, "reset": 1}
_ROWS |= {"output": 1, "h_n": 0, "c_n": 0, "cells": 1, "gates": 1, "normalized": 2, "scales": 1}
_ROWS |= {"grad_output": 1, "grad_h_n": 0, "grad_c_n": 0, "grad_cells": 1}
_ROWS |= {"grad_input": 1, "grad_h_0": 0, "grad_c_0": 0, "grad_gates": 1}

Dims = dict[str, int | None]


def layer(call: Callable[..., Any], info: Any, in_dims: Sequence[int | None], *args: Any) -> Any:
    """The vmap rule of llmkern::lstm; ``call`` runs it."""
    n, given, at = info.batch_size, Forward(*args), dict(zip(Forward._fields, in_dims, strict=True))
    if _masks_know_rows(given) or not _foldable(at):
        return one_by_one(call, n, in_dims, args)
    results = ForwardResults(*call(*_fold(given, at, n)))
    return _unfold(results._asdict(), n)


def backward(call: Callable[..., Any], info: Any, in_dims: Sequence[int | None], *args: Any) -> Any:
    """The vmap rule of llmkern::lstm_backward; ``call`` runs it."""
    n, given = info.batch_size, Backward(*args)
    at = dict(zip(Backward._fields, in_dims, strict=True))
    if _masks_know_rows(given) or not _foldable(at) or (given.weights and not _is_plain(given)):
        return one_by_one(call, n, in_dims, args)
    folded = Backward(*_fold(given, at, n))
    results = BackwardResults(*call(*folded._replace(weights=False)))
    unfolded, dims = _unfold(results._asdict(), n)
    if not given.weights:
        return unfolded, dims
    first = folded.h_0.unsqueeze(0)
    steps = [folded.output[1:], first] if given.reverse else [first, folded.output[:-1]]
    rows, _ = _unfold({"input": folded.input, "output": torch.cat(steps)}, n)
    found, found_at = BackwardResults(*unfolded), BackwardResults(*dims)
    found = found._replace(
        grad_gates=results.grad_weight_ih,  # nobody asked for them: empty
        grad_weight_ih=torch.einsum("tnbg,tnbi->ngi", found.grad_gates, rows[0]),
        grad_weight_hh=torch.einsum("tnbg,tnbi->ngi", found.grad_gates, rows[1]),
        grad_bias=found.grad_gates.sum((0, 2)),
    )
    found_at = found_at._replace(grad_gates=None, grad_weight_ih=0, grad_weight_hh=0, grad_bias=0)
    return tuple(found), tuple(found_at)


def _masks_know_rows(given: Forward | Backward) -> bool:
    """Whether a row's place in the batch is in the masks that are drawn for it."""
    return given.seed is not None and (given.zoneout_h > 0 or given.zoneout_c > 0)


def _is_plain(given: Backward) -> bool:
    """Whether the gradients of the gates, all that rows have on their own, tell those of the weights."""
    variants = given.weight_hr, given.norm_gates, given.lengths, given.reset
    return all(v is None for v in variants) and given.zoneout_h == given.zoneout_c == 0


def _foldable(at: Dims) -> bool:
    """Whether nothing is mapped but what has rows."""
    return all(dim is None or name in _ROWS for name, dim in at.items())


def _fold(given: Forward | Backward, at: Dims, n: int) -> list[Any]:
    """Every tensor with n times the rows: [.., B, ..] as [.., n * B, ..]."""
    folded = []
    for name, value in given._asdict().items():
        rows, mapped = _ROWS.get(name), at[name]
        if value is not None and rows is not None and not _is_absent(value, mapped):
            if mapped is None:
                sizes = [*value.shape[:rows], n, *value.shape[rows:]]
                value = value.unsqueeze(rows).expand(sizes)
            else:
                value = value.movedim(mapped, rows)
            value = value.flatten(rows, rows + 1)
        folded.append(value)
    return folded


def _unfold(results: dict[str, Any], n: int) -> tuple[tuple[Any, ...], tuple[int | None, ...]]:
    """The inverse, and where the mapped dimension lies in each."""
    dims = tuple(None if _is_absent(value) else _ROWS.get(name) for name, value in results.items())
    unfolded = tuple(
        value if dim is None else value.unflatten(dim, (n, value.shape[dim] // n))
        for value, dim in zip(results.values(), dims, strict=True)
    )
    return unfolded, dims


def _is_absent(tensor: Any, at: int | None = None) -> bool:
    """What nobody asked for is an empty vector."""
    return bool(tensor.dim() == (1 if at is None else 2) and tensor.numel() == 0)
