# SPDX-License-Identifier: Apache-2.0
"""Linear cross entropy in plain, differentiable operations of torch: the formulas of csrc/kernels/cross_entropy.h.

It takes over where the kernels have nothing: second derivatives, derivatives in forward mode, gradients of class
weights, and given probabilities on CUDA. Any device, any dtype. All logits exist at once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from llmkern.ops import _checks

NONE, MEAN, SUM = 0, 1, 2


def linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """The arguments of torch.ops.llmkern.linear_cross_entropy; returns its loss.

    A class out of range, which a caller on the CPU has looked for before, gives a loss of NaN, as on CUDA.
    """
    wide = _checks.widened(input.dtype)
    b = None if bias is None else bias.to(wide)
    cross_entropies = -F.linear(input.to(wide), weight.to(wide), b).log_softmax(-1)
    if class_weight is not None:
        cross_entropies = cross_entropies * class_weight.to(wide)
    share = label_smoothing / weight.shape[0]
    if target.is_floating_point():
        losses = (cross_entropies * ((1 - label_smoothing) * target + share)).sum(-1)
        return _reduced(losses, losses.new_ones(losses.shape), reduction)
    counts, known = target != ignore_index, (target >= 0) & (target < weight.shape[0])
    y = torch.where(counts & known, target, 0)
    losses = (1 - label_smoothing) * cross_entropies.gather(-1, y[..., None]).squeeze(-1)
    if label_smoothing > 0:
        losses = losses + share * cross_entropies.sum(-1)
    losses = torch.where(counts, losses.where(known, float("nan")), 0)
    weights = counts.to(wide) if class_weight is None else counts * class_weight.to(wide)[y]
    return _reduced(losses, weights, reduction)


def _reduced(losses: Tensor, weights: Tensor, reduction: int) -> Tensor:
    if reduction == NONE:
        return losses
    return losses.sum() if reduction == SUM else losses.sum() / weights.sum()
