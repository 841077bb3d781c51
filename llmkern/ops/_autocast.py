# SPDX-License-Identifier: Apache-2.0
"""torch.autocast for the operators: as torch does it for nn.LSTM and for matrix products."""

import torch
from torch import Tensor


def cast(*tensors: Tensor | None, sixteen_bits_on_cpu: bool = False) -> tuple[Tensor | None, ...]:
    """The tensors in the dtype of the autocast region, if there is one on their device.

    On the CPU most kernels have float32 at least: there 16-bit tensors become float32, unless ``sixteen_bits_on_cpu``
    says that these take the region's own dtype. float64 stays, as under torch's own rules.
    """
    device = next(t.device.type for t in tensors if t is not None)
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return tensors
    wide = device == "cpu" and not sixteen_bits_on_cpu
    dtype = torch.float32 if wide else torch.get_autocast_dtype(device)
    eligible = (torch.float32, torch.bfloat16, torch.float16)
    return tuple(t.to(dtype) if t is not None and t.dtype in eligible else t for t in tensors)
