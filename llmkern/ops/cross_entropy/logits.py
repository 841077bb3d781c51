# SPDX-License-Identifier: Apache-2.0
"""The logits of a linear head, for decoders: W x + b, a row's independent of the rows beside it."""

import torch
from torch import Tensor

from llmkern.ops import _checks

_OP = "linear_logits"


def linear_logits(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer without gradients, whose rows have the same bits alone and in any batch.

    torch's product rounds differently for different numbers of rows; a token then depends on who else is decoded.

    Args:
        input: [N, D], float32, float64, bfloat16 or float16, on the CPU; sums are float32 for 16-bit types.
        weight: [V, D]. bias: [V] or None. Of input's dtype.

    Returns:
        Logits [N, V], float32 for 16-bit types.

    Raises:
        TypeError: an argument is no tensor, or its dtype is another one.
        ValueError: a shape or a device does not fit.
        RuntimeError: an argument requires gradients where they are recorded; there is no derivative.

    Example:
        >>> hidden, head = torch.randn(3, 512), torch.nn.Linear(512, 10000)
        >>> with torch.no_grad():
        ...     logits = llmkern.ops.linear_logits(hidden, head.weight, head.bias)
    """
    given = {"input": input, "weight": weight, **({} if bias is None else {"bias": bias})}
    for name, tensor in given.items():
        _checks.check_tensor(_OP, name, tensor)
    _checks.check_float_like(_OP, given, _checks.ANY_FLOAT_DTYPES)  # type: ignore[arg-type]
    _checks.check_dim(_OP, "input", input, "N, D")
    _checks.check_dim(_OP, "weight", weight, "V, D")
    V, D = weight.shape[0], input.shape[1]
    _checks.check_shape(_OP, "weight", weight, "V, D", [V, D])
    if bias is not None:
        _checks.check_shape(_OP, "bias", bias, "V", [V])
    if torch.is_grad_enabled() and any(t.requires_grad for t in given.values()):
        raise RuntimeError(
            "llmkern.linear_logits: expected no gradients, got an argument that requires them; call it under "
            "torch.no_grad()"
        )
    return torch.ops.llmkern.linear_logits.default(input, weight, bias)


@torch.library.register_fake("llmkern::linear_logits")
def _linear_logits_fake(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return input.new_empty(input.shape[0], weight.shape[0], dtype=_checks.widened(input.dtype))
