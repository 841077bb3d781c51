# SPDX-License-Identifier: Apache-2.0
"""Copies of LSTM weights in the kernels' own order, kept as long as the weights do not change."""

from collections.abc import Sequence
from itertools import chain
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
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


def records_nothing() -> bool:
    """Whether a module's call is arithmetic alone: no gradients, no tracing, no transform and no cast of it."""
    return not (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


class PackedWeights:
    """A cache that a module owns; it is neither saved nor copied with it.

    Whether weights may have changed is seen from their addresses, their version counters, and the steps that any
    optimizer has taken. Writing into a parameter through ``.data`` or from outside of torch escapes all three.

    Args:
        dtype: torch.int8 to keep float32 weights in 8 bits where no gradients are wanted; None: as they are.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self._kept: dict[int, _Kept] = {}
        self._layers: _Layers | None = None
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
        if torch._C._get_tracing_state() is not None:  # the copy would be a constant of the trace
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

    def layers(self, module: nn.RNNBase) -> Tensor | None:
        """What ``torch.ops.llmkern.lstm_layers`` takes as ``packed`` of a module, where :func:`records_nothing`.

        That no parameter has changed since is seen at once: one by one it takes as long as a small layer. None where
        an option is in use that the operator lacks, or as in :meth:`get`.
        """
        own = module.__dict__
        training, dropout, weight_dropout, *others = _options(own)
        if any(others) or (training and (dropout or weight_dropout)):
            return None
        kept = self._layers
        if kept is not None and kept.key == _key_of_all(own["_parameters"], kept.parameters):
            return kept.packed
        self._layers = self._new_layers(own["_parameters"], module._all_weights)
        return None if self._layers is None else self._layers.packed

    def _new_layers(self, own: dict[str, Any], names: list[list[str]]) -> "_Layers | None":
        if not own.keys() >= set(chain.from_iterable(names)):
            return None
        parameters = [own[name] for name in chain.from_iterable(names)]
        if not _is_plain(*parameters) or len({p.dtype for p in parameters}) > 1:
            return None
        pieces: list[Tensor] = []
        for index, of_layer in enumerate(names):
            weight_ih, weight_hh, *biases = (own[name] for name in of_layer)
            packed = self.get(index, 1, weight_ih, weight_hh)
            if packed is None or any(bias.shape != weight_hh.shape[:1] for bias in biases):
                return None
            pieces += [_bytes_of(packed), _filled_up([_bytes_of(bias) for bias in biases])]
        together, dtype = torch.cat(pieces), self._kept[0].packed.dtype
        for index, place in enumerate(together.split([len(piece) for piece in pieces])[::2]):
            # The weights are not kept twice.
            self._kept[index] = self._kept[index]._replace(packed=place.view(dtype))
        return _Layers(_key_of_all(own, parameters), parameters, together.view(dtype))


class _Kept(NamedTuple):
    weight_ih: Tensor
    weight_hh: Tensor
    key: tuple[int, ...]
    dtype: torch.dtype | None
    packed: Tensor

    def is_of(self, weight_ih: Tensor, weight_hh: Tensor, dtype: torch.dtype | None) -> bool:
        same = self.weight_ih is weight_ih and self.weight_hh is weight_hh and self.dtype == dtype
        return same and self.key == _key(weight_ih, weight_hh)


class _Layers(NamedTuple):
    key: list[int]
    parameters: list[Tensor]
    packed: Tensor


# What decides whether torch.ops.llmkern.lstm_layers will do; the last ones it lacks altogether.
_options = itemgetter(
    "training",
    "dropout",
    "weight_dropout",
    "bidirectional",
    "proj_size",
    "layer_norm",
    "zoneout_h",
    "zoneout_c",
)
_data_ptr, _version = Tensor.data_ptr, attrgetter("_version")


def _key_of_all(own: dict[str, Any], parameters: list[Tensor]) -> list[int]:
    """What differs if a parameter has been replaced or written to: those that a module has, and those it had."""
    present = map(id, own.values())
    return [*present, *map(_data_ptr, parameters), *map(_version, parameters), _optimizer_steps]


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(torch.uint8)


def _filled_up(pieces: Sequence[Tensor]) -> Tensor:
    """Bytes beside one another, up to a multiple of 64."""
    padding = torch.zeros(-sum(map(len, pieces)) % 64, dtype=torch.uint8)
    return torch.cat([*pieces, padding])


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
