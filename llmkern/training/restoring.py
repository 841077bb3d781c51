# SPDX-License-Identifier: Apache-2.0
"""Whether the parts of a checkpoint are what the trainer that reads them would have written.

torch's own ``load_state_dict`` takes nearly anything, and fails in a later step. So each part is compared with its like
in the trainer. Every function here raises a ValueError or a TypeError that says where a part differs.
"""

import math
import typing
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from llmkern.models.building import shortened
from llmkern.training.state import TrainingState

_LARGEST = 1 << 62


def check_alike(mine: Any, theirs: Any, where: str, *, dtypes: bool = True) -> None:
    """The same nesting: keys, lengths, types; of tensors, shapes and dtypes. Numbers may differ, but must be some."""
    if isinstance(mine, Tensor):
        _expect(isinstance(theirs, Tensor), where, "a tensor", theirs)
        expected, got = (mine.dtype, list(mine.shape)), (theirs.dtype, list(theirs.shape))
        fits = expected == got if dtypes else mine.shape == theirs.shape
        _expect(fits, where, f"{expected[0]} of shape {expected[1]}", got)
    elif isinstance(mine, dict):
        _expect(isinstance(theirs, dict), where, "a dict", theirs)
        _expect(set(mine) == set(theirs), where, f"a dict of {shortened(list(mine))}", list(theirs))
        for key, part in mine.items():
            check_alike(part, theirs[key], f"{where}.{key}", dtypes=dtypes)
    elif isinstance(mine, (list, tuple)):
        same_kind = isinstance(theirs, (list, tuple)) and len(theirs) == len(mine)
        _expect(same_kind, where, f"{len(mine)} values", theirs)
        for number, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            check_alike(a, b, f"{where}[{number}]", dtypes=dtypes)
    elif _is_number(mine):
        _expect(_is_number(theirs), where, "a number", theirs)
    else:
        _expect(type(mine) is type(theirs), where, f"a {type(mine).__name__}", theirs)


def check_model(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    """The parameters and buffers of a model. Extra state may change its form, and is its module's own business."""
    extra = {name for name in mine if name.rpartition(".")[2] == "_extra_state"}
    plain = {name: None if name in extra else value for name, value in theirs.items()}
    check_alike(mine | dict.fromkeys(extra), plain, "model")


def completed(
    mine: dict[str, Any], theirs: Any, where: str, needed: Callable[[str], bool]
) -> dict[str, Any]:
    """Their values under my keys: what another version of torch has besides is left out, what it lacks is mine.

    Args:
        mine: a state_dict, or a part of one.
        theirs: the same of the checkpoint.
        where: what errors call it.
        needed: which keys the checkpoint must have.
    """
    _expect(isinstance(theirs, dict), where, "a dict", theirs)
    lacking = [key for key in mine if needed(key) and key not in theirs]
    _expect(not lacking, where, f"a dict with {shortened(lacking)}", list(theirs))
    whole = mine | {key: value for key, value in theirs.items() if key in mine}
    check_alike(mine, whole, where)
    return whole


def checked_state(saved: dict[str, Any], columns: int) -> TrainingState:
    """The books of a run whose lanes have so many columns."""
    types = typing.get_type_hints(TrainingState)
    _expect(set(saved) == set(types), "state", f"a dict of {shortened(list(types))}", list(saved))
    for name, value in saved.items():
        test, expected = _TESTS[types[name]]
        _expect(test(value), f"state.{name}", expected, value)
    state = TrainingState(**saved)
    _expect(state.position < columns, "state.position", f"less than {columns}", state.position)
    fits = (state.position == 0) == (state.tokens == 0)
    _expect(fits, "state.tokens", f"those of {state.position} columns", state.tokens)
    _expect(len(state.history) == state.epoch, "state.history", f"{state.epoch} epochs", saved)
    return state


def checked_optimizer(
    optimizer: Optimizer,
    make: Callable[[Iterable[nn.Parameter]], Optimizer],
    saved: dict[str, Any],
    *,
    stepped: bool,
) -> dict[str, Any]:
    """An optimizer's state_dict with which its next step can be taken.

    Args:
        optimizer: of the trainer.
        make: makes one with the same settings for other parameters.
        saved: the state_dict of the checkpoint.
        stepped: whether the run has taken a step.
    """
    own = optimizer.state_dict()["param_groups"]
    groups: Any = saved.get("param_groups")
    state: Any = saved.get("state")
    same_number = isinstance(groups, list) and len(groups) == len(own)
    _expect(same_number, "optimizer.param_groups", f"{len(own)} dicts", groups)
    changing = ("lr", "initial_lr", "params")
    groups = [
        completed(mine, theirs, "optimizer.param_groups", lambda name: name in changing)
        for mine, theirs in zip(own, groups, strict=True)
    ]
    for mine, theirs in zip(own, groups, strict=True):
        for name in set(mine) - {"lr", "initial_lr"}:
            _expect(mine[name] == theirs[name], f"optimizer.{name}", repr(mine[name]), theirs[name])
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    _expect(isinstance(state, dict), "optimizer.state", "a dict", state)
    forgotten = stepped and not state and _after_a_step(make, parameters[0])
    _expect(not forgotten, "optimizer.state", "what its steps have left", state)
    for index, entry in state.items():
        known = type(index) is int and 0 <= index < len(parameters)
        _expect(known, "optimizer.state", f"numbers of {len(parameters)} parameters", index)
        check_alike(_after_a_step(make, parameters[index]), entry, f"optimizer.state.{index}")
    return {"state": state, "param_groups": groups}


def _after_a_step(
    make: Callable[[Iterable[nn.Parameter]], Optimizer], parameter: nn.Parameter
) -> dict[str, Any]:
    """What the optimizer keeps of a parameter: seen on one of the same dtype and a single value."""
    probe = nn.Parameter(parameter.detach().new_zeros(1))
    probe.grad = torch.zeros_like(probe)
    optimizer = make([probe])
    optimizer.step()
    kept = dict(optimizer.state_dict()["state"].get(0, {}))
    for name, value in kept.items():
        if isinstance(value, Tensor) and value.dim() == 1:
            kept[name] = torch.empty_like(parameter, dtype=value.dtype, device="meta")
    return kept


def _expect(condition: bool, where: str, expected: str, got: Any) -> None:
    if not condition:
        raise ValueError(f"expected {where} to be {expected}, got {shortened(got)}")


def _is_number(value: Any) -> bool:
    """Not NaN, and of a size that arithmetic can take."""
    if type(value) is float:
        return not math.isnan(value)
    return type(value) is int and -_LARGEST < value < _LARGEST


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _LARGEST


def _is_sum(value: Any) -> bool:
    return _is_number(value) and math.isfinite(value)


def _is_record(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(name, str) and (part is None or _is_number(part)) for name, part in value.items()
    )


# By the types that TrainingState declares.
_TESTS: dict[Any, tuple[Callable[[Any], bool], str]] = {
    int: (_is_count, "an int >= 0"),
    float: (_is_sum, "a finite number"),
    float | None: (lambda value: value is None or _is_number(value), "a number or None"),
    int | None: (lambda value: value is None or _is_count(value), "an int >= 0 or None"),
    list[dict[str, Any]]: (
        lambda value: isinstance(value, list) and all(map(_is_record, value)),
        "a list of dicts of numbers",
    ),
}
