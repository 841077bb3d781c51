# SPDX-License-Identifier: Apache-2.0
"""torch.autocast for the operators: as torch does it for nn.LSTM and for matrix products."""

import torch
from torch import Tensor


def cast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in the dtype of the autocast region, if there is one on their device.

    On CUDA that is the region's own. The CPU kernels have float32 at least, so there 16-bit tensors become float32.
    float64 stays, as under torch's own rules.
    """
    device = next(t.device.type for t in tensors if t is not None)
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.float32 if device == "cpu" else torch.get_autocast_dtype(device)
    eligible = (torch.float32, torch.bfloat16, torch.float16)
    return tuple(t.to(dtype) if t is not None and t.dtype in eligible else t for t in tensors)
