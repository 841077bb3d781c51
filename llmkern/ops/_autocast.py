# SPDX-License-Identifier: Apache-2.0
"""torch.autocast for the operators: as torch does it for nn.LSTM and for matrix products."""

from typing import Any

import torch
from torch import Tensor

_CASTABLE = torch.float32, torch.bfloat16, torch.float16


def cast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors in the dtype of the autocast region, if there is one on their device; float64 stays, as in torch."""
    return _as(_dtype_of_region(next(t for t in tensors if t is not None)), tensors)


def cast_recurrent(c_0: Tensor, *tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors of an LSTM layer in the dtype of the autocast region or, on the CPU, of its state, if that is wider.

    There torch multiplies in the region's dtype and adds to the state in the wider one of both, which is what the layer
    returns; so a state that is carried on from step to step keeps its bits. On CUDA torch casts all.
    """
    dtype = _dtype_of_region(c_0)
    if dtype is not None and c_0.device.type == "cpu" and c_0.dtype in _CASTABLE:
        dtype = torch.promote_types(dtype, c_0.dtype)
    return _as(dtype, tensors)


def _dtype_of_region(tensor: Tensor) -> torch.dtype | None:
    device = tensor.device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def _as(dtype: torch.dtype | None, tensors: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
    if dtype is None:
        return tensors
    return tuple(t.to(dtype) if t is not None and t.dtype in _CASTABLE else t for t in tensors)
