# SPDX-License-Identifier: Apache-2.0
"""Copies of LSTM weights in the kernels' own order, kept as long as the weights do not change."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from llmkern import ops

# From so many rows on, copying the weights costs little beside using them.
_ROWS = 64

# Fused optimizers write to parameters without a trace in their version counters.
_optimizer_steps = 0


def _count_step(*_: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_step)


class ModuleCache:
    """What a module keeps for itself; it is neither saved nor copied with it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "ModuleCache":
        return type(self)()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()


def parameters_of(module: nn.Module, names: Sequence[str]) -> list[Any]:
    """The module's parameters of these names.

    Looked up where they mostly are: as attributes each takes half a microsecond, of a step that takes ten.
    """
    own = module._parameters
    return [own[name] if name in own else getattr(module, name) for name in names]


class PackedWeights(ModuleCache):
    """Copies in the order of the forward kernels and, for cells, of the backward ones.

    Whether weights may have changed is seen from their addresses, their version counters, and the steps that any
    optimizer has taken. Writing into a parameter through ``.data`` or from outside of torch escapes all three.
    """

    def __init__(self) -> None:
        self._kept: dict[int, _Kept] = {}

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
        """
        if rows >= _ROWS or torch.compiler.is_compiling():
            return None
        place = ~index if backward else index
        kept = self._kept.get(place)
        if kept is not None and kept.is_of(weight_ih, weight_hh):
            return kept.packed
        if not _is_plain(weight_ih, weight_hh):
            return None
        pack = torch.ops.llmkern.lstm_pack_backward.default if backward else ops.lstm_pack
        packed = pack(weight_ih.detach(), weight_hh.detach())
        self._kept[place] = _Kept(weight_ih, weight_hh, _key(weight_ih, weight_hh), packed)
        return packed


class _Kept(NamedTuple):
    weight_ih: Tensor
    weight_hh: Tensor
    key: tuple[int, ...]
    packed: Tensor

    def is_of(self, weight_ih: Tensor, weight_hh: Tensor) -> bool:
        same = self.weight_ih is weight_ih and self.weight_hh is weight_hh
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
        and w.dtype in (torch.float32, torch.float64)
        and not w.is_inference()
        and not torch._C._functorch.is_functorch_wrapped_tensor(w)
        for w in weights
    )
