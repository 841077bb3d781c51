# SPDX-License-Identifier: Apache-2.0
"""Drop-in for torch.nn.Embedding."""

import torch
from torch import Tensor, nn

from llmkern import ops


class Embedding(nn.Embedding):
    """``torch.nn.Embedding`` with a native gather and a native, deterministic gradient.

    Constructor, parameters and state_dict are torch's. ``max_norm`` renormalises the looked-up rows in place before
    the gather, as torch does. ``sparse=True`` asks for a sparse gradient, which is made by torch's own operator.

    Shapes:
        input: any shape, int64 or int32; output: ``input.shape + [embedding_dim]``.

    Raises:
        IndexError: an id is out of range; the message names its position and value.

    Example:
        >>> layer = llmkern.nn.Embedding(10000, 256, padding_idx=0)
        >>> layer(torch.tensor([[5, 0, 7]])).shape
        torch.Size([1, 3, 256])
    """

    def forward(self, input: Tensor) -> Tensor:
        if self.sparse:
            return super().forward(input)
        if self.max_norm is not None:
            with torch.no_grad():
                torch.embedding_renorm_(
                    self.weight.detach(), input.contiguous(), self.max_norm, self.norm_type
                )
        return ops.embedding(
            input,
            self.weight,
            padding_idx=self.padding_idx,
            scale_grad_by_freq=self.scale_grad_by_freq,
        )
