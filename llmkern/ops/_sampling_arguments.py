# SPDX-License-Identifier: Apache-2.0
"""The arguments of llmkern.ops.sample: checked, and made into the tensors that the operator takes."""

import functools
import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import NamedTuple, cast

import torch
from torch import Tensor

from llmkern.ops import _checks, _seed

_OP = "sample"
_FLOAT_MAX = torch.finfo(torch.float32).max
LOGITS_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

Setting = float | Tensor
Ids = Tensor | Sequence[Sequence[int]]
Bias = Tensor | Mapping[int, float] | Sequence[Mapping[int, float]]


class _Range(NamedTuple):
    text: str
    low: float
    high: float
    open_low: bool = False  # low itself is out
    whole: bool = False

    def holds(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        return above and value <= self.high and (not self.whole or value == math.floor(value))


_LARGEST = math.nextafter(math.inf, 0)
# In the order of SampleSettings (csrc/kernels/sampling.h). The binding checks the same ranges: values of tensors are
# known only there.
_RANGES = {
    "temperature": _Range("in [0, inf)", 0, _LARGEST),
    "top_k": _Range("to be a whole number >= 0", 0, _LARGEST, whole=True),
    "top_p": _Range("in (0, 1]", 0, 1, open_low=True),
    "min_p": _Range("in [0, 1]", 0, 1),
    "typical_p": _Range("in (0, 1]", 0, 1, open_low=True),
    "repetition_penalty": _Range("in (0, 3.4e38]", 0, _FLOAT_MAX, open_low=True),
    "presence_penalty": _Range("in [-3.4e38, 3.4e38]", -_FLOAT_MAX, _FLOAT_MAX),
    "frequency_penalty": _Range("in [-3.4e38, 3.4e38]", -_FLOAT_MAX, _FLOAT_MAX),
}


SETTINGS = tuple(_RANGES)
_NUMBERS = "a number or a Tensor [B]"


def checked_setting(op: str, name: str, value: object, kind: str = "a number") -> float:
    """The value as a plain number, in the range of the setting ``name``; ``kind`` says what else ``op`` takes."""
    expected, value = _RANGES[name], _checks.plain_number(value)
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"llmkern.{op}: expected {name} to be {kind}, got {type(value).__name__}")
    if not expected.holds(float(value)):
        raise ValueError(f"llmkern.{op}: expected {name} {expected.text}, got {value}")
    return value  # type: ignore[return-value]


def settings(values: tuple[Setting, ...], logits: Tensor) -> Tensor:
    """float64 [1, 8] when all are plain numbers, else [B, 8]."""
    if not [value for value in values if type(value) is not float and type(value) is not int]:
        numbers = cast(tuple[float, ...], values)
        if torch.compiler.is_compiling() or type(logits) is not Tensor:
            return _number_settings(numbers, logits.device)
        return _cached_number_settings(numbers, logits.device)
    B, device = logits.shape[0], logits.device
    columns = []
    for name, value in zip(_RANGES, values, strict=True):
        if isinstance(value, Tensor):
            _seed.check_row_tensor(_OP, "logits", name, value, B, device)
            constant = _checks.constant(_OP, name, value)
            columns.append(constant.to(torch.float64).expand(B))
        else:
            number = float(checked_setting(_OP, name, value, _NUMBERS))
            columns.append(torch.full((B,), number, dtype=torch.float64, device=device))
    return torch.stack(columns, dim=1)


def _number_settings(values: tuple[float, ...], device: torch.device) -> Tensor:
    pairs = zip(_RANGES, values, strict=True)
    numbers = [float(checked_setting(_OP, name, v, _NUMBERS)) for name, v in pairs]
    return torch.tensor([numbers], dtype=torch.float64, device=device)


# A decoding loop passes the same numbers at every step.
_cached_number_settings = functools.lru_cache(maxsize=64)(_number_settings)


def forget_settings() -> None:
    """Frees the tensors of settings that were plain numbers."""
    _cached_number_settings.cache_clear()


class BiasTensors(NamedTuple):
    dense: Tensor | None = None
    """float32 [V] or [B, V]."""
    ids: Tensor | None = None
    """int64 [1, n] or [B, n], distinct in a row, padded with -1."""
    values: Tensor | None = None
    """float32, of the ids."""


_NO_BIAS = BiasTensors()


def bias(value: Bias | None, B: int, V: int, device: torch.device) -> BiasTensors:
    if value is None:
        return _NO_BIAS
    if isinstance(value, Mapping):
        return _sparse_bias([value], V, device)
    if isinstance(value, Sequence):
        if len(value) != B:
            raise ValueError(
                f"llmkern.sample: expected logit_bias with a mapping for each of B = {B} rows, got {len(value)}"
            )
        return _sparse_bias(value, V, device)
    _checks.check_tensor(_OP, "logit_bias", value)
    _checks.check_dtype(_OP, "logit_bias", value, LOGITS_DTYPES)
    _check_vocabulary("logit_bias", value, B, V, device)
    return BiasTensors(dense=_checks.constant(_OP, "logit_bias", value).float())


def _sparse_bias(rows: Sequence[Mapping[int, float]], V: int, device: torch.device) -> BiasTensors:
    n = max([0, *[len(row) for row in rows]])
    if n == 0:
        return _NO_BIAS
    for row in rows:
        for token in row:
            if not 0 <= token < V:
                raise IndexError(
                    f"llmkern.sample: expected ids in logit_bias in [0, V) = [0, {V}), got {token}"
                )
    ids = [[*row, *[-1] * (n - len(row))] for row in rows]
    values = [[*row.values(), *[0.0] * (n - len(row))] for row in rows]
    return BiasTensors(
        ids=torch.tensor(ids, dtype=torch.int64, device=device),
        values=torch.tensor(values, dtype=torch.float32, device=device),
    )


def mask(allowed: Tensor | None, B: int, V: int, device: torch.device) -> Tensor | None:
    """bool [V] or [B, V], or int32 [ceil(V / 32)] or [B, ceil(V / 32)]."""
    if allowed is None:
        return None
    _checks.check_tensor(_OP, "allowed", allowed)
    _checks.check_dtype(_OP, "allowed", allowed, (torch.bool, torch.int32))
    if allowed.dtype == torch.bool:
        _check_vocabulary("allowed", allowed, B, V, device)
    else:
        _check_vocabulary("allowed", allowed, B, (V + 31) // 32, device, "ceil(V / 32)")
    return allowed


def _check_vocabulary(
    name: str, tensor: Tensor, B: int, size: int, device: torch.device, letter: str = "V"
) -> None:
    if tensor.shape not in ((size,), (B, size)):
        raise ValueError(
            f"llmkern.sample: expected {name} of shape [{letter}] = [{size}] or [B, {letter}] = [{B}, {size}], "
            f"got {list(tensor.shape)}"
        )
    _seed.check_device(_OP, "logits", name, tensor, device)


def ids(name: str, value: Ids | None, B: int, batched: bool, device: torch.device) -> Tensor | None:
    """int64 [B, L]."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        rows = [torch.tensor(row, dtype=torch.int64) for row in value]
        value = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
        value = value.to(device)
    _checks.check_dtype(_OP, name, value, _checks.INDEX_DTYPES)
    _seed.check_device(_OP, "logits", name, value, device)
    if not batched and value.dim() == 1:
        value = value.unsqueeze(0)
    if value.dim() != 2 or value.shape[0] != B:
        raise ValueError(
            f"llmkern.sample: expected {name} of shape [B, L] = [{B}, L], got {list(value.shape)}"
        )
    return value if value.dtype == torch.int64 else value.to(torch.int64)
