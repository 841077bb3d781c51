# SPDX-License-Identifier: Apache-2.0
"""Building a model that a file describes, when its size has been compared with the tensors that are there."""

import reprlib
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Model = TypeVar("Model", bound=nn.Module)

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# A constructor makes and fills each of its tensors in some twenty calls.
_CALLS_A_TENSOR, _CALLS = 64, 1024
_FILLING = ("normal_", "uniform_", "zero_", "fill_")
_QUOTED = 300
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _QUOTED
_REFUSALS = (
    *(TypeError, ValueError, ArithmeticError, LookupError, AttributeError),
    *(RuntimeError, MemoryError),
)


def build(
    model_class: type[Model],
    config: dict[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    described_by: str,
    stored_in: str,
) -> Model:
    """``model_class(**config)`` with the values of ``tensors``, in their floating-point dtype.

    Nothing is allocated before names, shapes and dtypes fit: a description asks for 640 GB, or for 10^18 layers, in a
    few bytes. So the model is built without storage first, and given up when it is larger than its tensors.

    Args:
        model_class: the class.
        config: its constructor's arguments.
        tensors: the model's parameters and buffers by name; of names that share one tensor, one is enough.
        described_by: what errors call the origin of config.
        stored_in: what errors call the origin of the tensors.

    Raises:
        ValueError: the constructor refuses config, or the tensors are not the model's.
    """
    try:
        with torch.device("meta"), _Limit(_CALLS + _CALLS_A_TENSOR * len(tensors)):
            outline = model_class(**config)
    except _REFUSALS as error:
        raise ValueError(
            f"{described_by} does not describe a {model_class.__name__}: {shortened(error)}"
        ) from error
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(
                f"{stored_in}: expected {shortened(name)} to be a tensor, got {shortened(tensor)}"
            )
    dtype = _floating_dtype(tensors, stored_in)
    _check_names(outline, tensors, stored_in)
    _check_tensors(outline.to(dtype), tensors, stored_in)
    with torch.random.fork_rng(devices=[]):  # the values are replaced: spare the caller's stream
        model = model_class(**config).to(dtype)
    state = model.state_dict()
    for name, tensor in tensors.items():
        state[name].copy_(tensor)
    return model


def shortened(value: object) -> str:
    """What an error quotes of a file: a line of it, whatever it holds."""
    text = str(value) if isinstance(value, BaseException) else _REPR.repr(value)
    line = " ".join(text.split()) or type(value).__name__
    return line if len(line) <= _QUOTED else f"{line[:_QUOTED]}..."


class _Limit(TorchFunctionMode):
    """Lets a constructor call so many functions of torch, and no more.

    Drawing values is skipped: there is no storage, and torch spends seconds on loading what can draw without it.
    """

    def __init__(self, calls: int) -> None:
        super().__init__()
        self._left = calls

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self._left -= 1
        if self._left < 0:
            raise ValueError("it has more parameters than there are tensors")
        if getattr(function, "__name__", None) in _FILLING:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


def _floating_dtype(tensors: Mapping[str, Tensor], stored_in: str) -> torch.dtype:
    found = {tensor.dtype: name for name, tensor in tensors.items() if tensor.is_floating_point()}
    if len(found) == 1 and next(iter(found)) in DTYPES:
        return next(iter(found))
    listed = ", ".join(f"{dtype} ({name})" for dtype, name in found.items()) or "none"
    raise ValueError(
        f"{stored_in}: expected tensors of one floating-point dtype among {', '.join(map(str, DTYPES))}, got {listed}"
    )


def _check_names(outline: nn.Module, tensors: Mapping[str, Tensor], stored_in: str) -> None:
    state = outline.state_dict(keep_vars=True)
    shared = {id(tensor) for name, tensor in state.items() if name in tensors}
    missing = [n for n, t in state.items() if n not in tensors and id(t) not in shared]
    unexpected = [name for name in tensors if name not in state]
    if missing or unexpected:
        raise ValueError(
            f"{stored_in} does not fit the model: missing {shortened(missing)}, unexpected {shortened(unexpected)}"
        )


def _check_tensors(outline: nn.Module, tensors: Mapping[str, Tensor], stored_in: str) -> None:
    state = outline.state_dict()
    for name, tensor in tensors.items():
        mine, theirs = state[name], tensor
        if mine.shape != theirs.shape:
            raise ValueError(
                f"{stored_in}: expected {name} of shape {list(mine.shape)}, got {list(theirs.shape)}"
            )
        if mine.dtype != theirs.dtype:
            raise ValueError(f"{stored_in}: expected {name} of {mine.dtype}, got {theirs.dtype}")
