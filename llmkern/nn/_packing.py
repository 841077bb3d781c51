# SPDX-License-Identifier: Apache-2.0
"""Copies of LSTM weights in the kernels' own order, kept as long as the weights do not change."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from llmkern import ops

# From so many rows on, copying the weights costs little beside using them; and in training they change at every step.
_ROWS = 64

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def checked_dtype(module: str, dtype: torch.dtype | None) -> torch.dtype | None:
    """What weights may be quantised to."""
    if dtype not in (None, torch.int8):
        raise TypeError(f"llmkern.{module}: expected a dtype of torch.int8 or None, got {dtype}")
    return dtype


# Fused optimizers write to parameters without a trace in their version counters.
_optimizer_steps = 0


def _count_step(*_: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_step)


def parameters_of(module: nn.Module, names: Sequence[str]) -> list[Any]:
    """The module's parameters of these names.

    Looked up where they mostly are: as attributes each takes half a microsecond, of a step that takes ten.
    """
    own = module._parameters
    return [own[name] if name in own else getattr(module, name) for name in names]


class PackedWeights:
    """A cache that a module owns; it is neither saved nor copied with it.

    Whether weights may have changed is seen from their addresses, their version counters, and the steps that any
    optimizer has taken. Writing into a parameter through ``.data`` or from outside of torch escapes all three.

    Args:
        dtype: torch.int8 to keep float32 weights in 8 bits where no gradients are wanted; None: as they are.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self._kept: dict[int, _Kept] = {}
        self._dtype = dtype

    def __deepcopy__(self, memo: dict[int, Any]) -> "PackedWeights":
        return PackedWeights(self._dtype)

    def __reduce__(self) -> tuple[type, tuple[torch.dtype | None]]:
        return PackedWeights, (self._dtype,)

    def get(
        self,
        index: int,
        rows: int,
        weight_ih: Tensor,
        weight_hh: Tensor,
        backward: bool = False,
    ) -> Tensor | None:
        """The copy for the index-th pair of weights, or None where there is nothing to gain or to keep.

        Args:
            index: of the layer and direction.
            rows: T * B of this call.
            weight_ih, weight_hh: [4*H, I], [4*H, H].
            backward: for the backward pass.
        """
        inference = not (torch.is_grad_enabled() or backward)
        if torch.compiler.is_compiling() or not (inference or rows < _ROWS):
            return None
        if torch.is_autocast_enabled("cpu"):  # the operator takes other weights than these
            return None
        dtype = self._dtype if inference and weight_hh.dtype == torch.float32 else None
        place = ~index if backward else index
        kept = self._kept.get(place)
        if kept is not None and kept.is_of(weight_ih, weight_hh, dtype):
            return kept.packed
        if not _is_plain(weight_ih, weight_hh):
            return None
        if backward:
            pack = torch.ops.llmkern.lstm_pack_backward.default
            packed = pack(weight_ih.detach(), weight_hh.detach())
        else:
            packed = ops.lstm_pack(weight_ih, weight_hh, dtype=dtype)
        self._kept[place] = _Kept(weight_ih, weight_hh, _key(weight_ih, weight_hh), dtype, packed)
        return packed


class _Kept(NamedTuple):
    weight_ih: Tensor
    weight_hh: Tensor
    key: tuple[int, ...]
    dtype: torch.dtype | None
    packed: Tensor

    def is_of(self, weight_ih: Tensor, weight_hh: Tensor, dtype: torch.dtype | None) -> bool:
        same = self.weight_ih is weight_ih and self.weight_hh is weight_hh and self.dtype == dtype
        return same and self.key == _key(weight_ih, weight_hh)


def _key(weight_ih: Tensor, weight_hh: Tensor) -> tuple[int, ...]:
    """What differs if one of the two has been written to."""
    return (
        weight_ih.data_ptr(),
        weight_ih._version,
        weight_hh.data_ptr(),
        weight_hh._version,
        _optimizer_steps,
    )


def _is_plain(*weights: Tensor) -> bool:
    """CPU parameters with a version counter; torch.func's wrappers have no memory to look at."""
    return all(
        type(w) in (nn.Parameter, Tensor)
        and w.device.type == "cpu"
        and w.dtype in _DTYPES
        and not w.is_inference()
        and not torch._C._functorch.is_functorch_wrapped_tensor(w)
        for w in weights
    )
