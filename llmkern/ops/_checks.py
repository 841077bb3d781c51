# SPDX-License-Identifier: Apache-2.0
"""Argument checks shared by the operators: one form of message, ``llmkern.<op>: expected ..., got ...``."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOAT_DTYPES = (torch.float32, torch.float64)
ANY_FLOAT_DTYPES = (*FLOAT_DTYPES, torch.bfloat16, torch.float16)
INDEX_DTYPES = (torch.int32, torch.int64)


class ShapeError(ValueError, RuntimeError):
    """A value is wrong: ValueError; and RuntimeError, which is what torch's own layers raise then."""


class DtypeError(TypeError, ValueError, RuntimeError):
    """A dtype is wrong: TypeError; torch's layers raise one of the others, depending on the layer."""


def dtype_names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def plain_number(value: Any) -> Any:
    """The Python number in a numpy scalar, or in an array or a tensor without dimensions; anything else as it is."""
    if (
        type(value) is int or type(value) is float
    ):  # the compiler's too, which have no shape to ask for
        return value
    return value.item() if getattr(value, "shape", None) == () else value


def check_tensor(op: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"llmkern.{op}: expected {name} to be a Tensor, got {type(value).__name__}")


def constant(op: str, name: str, tensor: Tensor) -> Tensor:
    """The tensor for an operator without a derivative: detached.

    Autograd's users see from the results, which require no gradient, that there is none. To the transforms of
    torch.func and to forward mode they would look like constants, with a derivative of zero: there it raises.
    """
    if not torch.compiler.is_compiling() and _is_differentiated(tensor):
        raise NotImplementedError(
            f"llmkern.{op}: expected {name} that nobody differentiates, got one inside of a transform of torch.func or "
            f"in forward mode; there is no derivative: pass {name}.detach()"
        )
    return tensor.detach() if tensor.requires_grad else tensor


def _is_differentiated(tensor: Tensor) -> bool:
    if tensor.requires_grad and torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return True
    dual = forward_ad._current_level >= 0
    return dual and forward_ad.unpack_dual(tensor).tangent is not None


def float_dtypes(tensor: Tensor) -> Sequence[torch.dtype]:
    """What the kernels of the tensor's device compute with."""
    return ANY_FLOAT_DTYPES if tensor.is_cuda else FLOAT_DTYPES


def widened(dtype: torch.dtype) -> torch.dtype:
    """What values of the dtype are summed in."""
    return dtype if dtype in FLOAT_DTYPES else torch.float32


def size(tensor: Tensor, dim: int) -> int:
    """tensor.shape[dim], for a check: torch.jit.trace takes it for a constant, and shall not warn of that."""
    if not torch.jit.is_tracing():
        return tensor.shape[dim]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        return int(tensor.shape[dim])


def check_dtype(op: str, name: str, tensor: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    if tensor.dtype not in dtypes:
        raise DtypeError(
            f"llmkern.{op}: expected {name} of dtype {dtype_names(dtypes)}, got {dtype_names([tensor.dtype])}"
        )


def check_dim(op: str, name: str, tensor: Tensor, letters: str) -> None:
    """``letters`` names the expected shape, ``"T, B, I"``."""
    if tensor.dim() != letters.count(",") + 1:
        raise ShapeError(
            f"llmkern.{op}: expected {name} of shape [{letters}], got {list(tensor.shape)}"
        )


def check_shape(op: str, name: str, tensor: Tensor, letters: str, shape: Sequence[int]) -> None:
    """``letters`` names the sizes in ``shape``: ``("4*H, H", [512, 128])``."""
    if tuple(tensor.shape) != tuple(shape):
        raise ShapeError(
            f"llmkern.{op}: expected {name} of shape [{letters}] = {list(shape)}, got {list(tensor.shape)}"
        )


def check_same_device(op: str, tensors: dict[str, Tensor | None]) -> None:
    """Every tensor lives where the first one does."""
    (first, tensor), *others = ((n, t) for n, t in tensors.items() if t is not None)
    for name, other in others:
        if other.device != tensor.device:
            raise ShapeError(
                f"llmkern.{op}: expected every tensor on one device, got {first} on {tensor.device} "
                f"and {name} on {other.device}"
            )


def check_float_like(
    op: str, tensors: dict[str, Tensor | None], dtypes: Sequence[torch.dtype] | None = None
) -> None:
    """The first tensor is of one of the dtypes, or of one that the kernels of its device have, and the others share its
    dtype and device."""
    (first, tensor), *others = ((n, t) for n, t in tensors.items() if t is not None)
    check_tensor(op, first, tensor)
    check_dtype(op, first, tensor, float_dtypes(tensor) if dtypes is None else dtypes)
    for name, other in others:
        check_tensor(op, name, other)
        if other.dtype != tensor.dtype:
            raise DtypeError(
                f"llmkern.{op}: expected {name} of {first}'s dtype {dtype_names([tensor.dtype])}, "
                f"got {dtype_names([other.dtype])}"
            )
    check_same_device(op, tensors)
