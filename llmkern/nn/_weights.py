# SPDX-License-Identifier: Apache-2.0
"""How the LSTM modules get at their weights: as they are at every call, or as a snapshot that somebody asked for."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from llmkern import ops


def parameters_of(module: nn.Module, names: Sequence[str]) -> list[Any]:
    """The module's parameters of these names.

    Looked up where they mostly are: as attributes each takes half a microsecond, of a step that takes ten.
    """
    own = module._parameters
    return [own[name] if name in own else getattr(module, name) for name in names]


def is_arithmetic_alone() -> bool:
    """Whether nobody looks at a module's call beside its caller: no gradients, tracing, transform or autocast."""
    return not (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
    )


def is_plain(*tensors: Any) -> bool:
    """Whether these are tensors in this machine's memory, not subclasses with rules of their own."""
    return all(type(t) in (nn.Parameter, Tensor) and t.is_cpu for t in tensors)


class Snapshot:
    """The parameters of an LSTM's or LSTMCell's layers as they were when it was taken, the weights packed.

    It is read where no gradients are wanted and nobody else looks at the call (:func:`is_arithmetic_alone`), while the
    weights have the dtype that it was made of; the parameters are read everywhere else.

    Args:
        layers: for every layer and direction, what :func:`llmkern.ops.lstm` takes by these names; on the CPU.
        dtype: torch.int8 for 8 bits a weight; None: as they are.
    """

    def __init__(self, layers: Sequence[dict[str, Tensor]], dtype: torch.dtype | None) -> None:
        self.layers = [_packed(layer, dtype) for layer in layers]
        self._of = layers[0]["weight_hh"].dtype
        # As torch.ops.llmkern.lstm_layers takes them.
        self.flat = (
            [t for layer in self.layers for name, t in layer.items() if name != "packed"],
            [layer["packed"] for layer in self.layers],
        )

    def serves(self, weight_hh: Tensor) -> bool:
        """Whether it is to be read in place of parameters, one of which this is."""
        return weight_hh.dtype == self._of and weight_hh.is_cpu and is_arithmetic_alone()


def _packed(layer: dict[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    # The weights themselves are there for their shapes alone.
    kept = {name: t if name in _PACKED else t.detach().clone() for name, t in layer.items()}
    return {**kept, "packed": ops.lstm_pack(*(layer[name] for name in _PACKED), dtype=dtype)}


_PACKED = "weight_ih", "weight_hh"


def checked_dtype(module: str, dtype: torch.dtype | None) -> torch.dtype | None:
    """What weights may be quantised to."""
    if dtype not in (None, torch.int8):
        raise TypeError(f"llmkern.{module}: expected a dtype of torch.int8 or None, got {dtype}")
    return dtype


@contextmanager
def snapshot_weights(module: nn.Module) -> Iterator[None]:
    """Promises that parameters do not change: inside, every LSTM and LSTMCell of a module reads a copy of its own.

    The copy is taken on entry, in the order in which the CPU kernels read it, and forgotten on exit. Whatever is
    written to the parameters inside has no effect on calls without gradients (``torch.no_grad()``) until then; calls
    that record gradients, autocast, compiled and traced calls read the parameters as ever. Generation does this by
    itself.

    It pays for steps of one or a few rows, which read each weight once: the copy takes as much memory again as the
    weights, and saves the kernels from putting them in order at every step. Layers that are quantised already
    (``quantize_weights``) or whose weights are not in CPU memory stay as they are.

    Args:
        module: anything that holds LSTM or LSTMCell layers of llmkern, or one of them.

    Example:
        >>> with llmkern.nn.snapshot_weights(model), torch.no_grad():
        ...     for _ in range(100):
        ...         x, state = step(model, x, state)
    """
    modules: list[Any] = [*module.modules()]
    held = [m for m in modules if getattr(m, "_snapshot", False) is None]
    layers = {m: m._layers() for m in held}
    taken = [m for m in held if all(is_plain(*layer.values()) for layer in layers[m])]
    try:
        for m in taken:
            m._snapshot = Snapshot(layers[m], None)
        yield
    finally:
        for m in taken:
            m._snapshot = None
