# SPDX-License-Identifier: Apache-2.0
"""Drop-in for torch.nn.LinearCrossEntropyLoss."""

from typing import Any

from torch import Tensor, nn

from llmkern import ops

# torch has the class from 2.13 on; before that there is nothing to be a subclass of.
_Base: Any = getattr(nn, "LinearCrossEntropyLoss", nn.Module)


class LinearCrossEntropyLoss(_Base):
    """A linear layer and the cross entropy of its logits, which are never stored as a whole.

    Args:
        in_features: D. num_classes: V.
        out_features: must be (); losses over further dimensions are not provided.
        bias: whether the linear layer has a bias.
        device, dtype: of the parameters: float32, float64, bfloat16 or float16.
        reduction, weight, ignore_index, label_smoothing: see :func:`llmkern.ops.linear_cross_entropy`.
        options: how torch should cut the logits into chunks. The kernel always does, and picks the size itself.

    Shapes:
        input [..., D]; target int64 [...], or [..., V] for the probability of every class. The loss is a scalar, or for
        reduction "none" [...].
        Parameters: ``linear.weight`` [V, D], ``linear.bias`` [V].

    Raises:
        ValueError: weight has another shape than [V], or label_smoothing or out_features has a value not provided.

    Example:
        >>> loss = llmkern.nn.LinearCrossEntropyLoss(512, 10000)
        >>> loss(torch.randn(700, 512), torch.randint(10000, (700,))).backward()
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: Any = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
    ) -> None:
        nn.Module.__init__(self)
        if tuple(out_features) != ():
            raise ValueError(
                f"llmkern.LinearCrossEntropyLoss: expected out_features (), got {out_features}"
            )
        if not 0.0 <= label_smoothing <= 1.0:
            raise ValueError(
                "llmkern.LinearCrossEntropyLoss: expected label_smoothing in [0, 1], "
                f"got {label_smoothing}"
            )
        if weight is not None and tuple(weight.shape) != (num_classes,):
            raise ValueError(
                f"llmkern.LinearCrossEntropyLoss: expected weight of shape [{num_classes}], "
                f"got {list(weight.shape)}"
            )
        self.register_buffer("weight", weight)
        self.num_classes, self.reduction, self.out_features = num_classes, reduction, ()
        self.ignore_index, self.label_smoothing = ignore_index, label_smoothing
        self.options = options
        self.linear = nn.Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return ops.linear_cross_entropy(
            input,
            self.linear.weight,
            target,
            linear_bias=self.linear.bias,
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
        )
