# SPDX-License-Identifier: Apache-2.0
"""What a model carries from window to window: tensors and plain values in tuples, named tuples, lists and dicts."""

import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import Tensor

# A nesting of the above; its leaves are mostly tensors.
Hidden = Any

_LEAVES = (bool, int, float, str, type(None))
# The key that marks a named tuple in a checkpoint, where there is none: module and name of its class, and its values.
_NAMED, _VALUES = "llmkern.named_tuple", "values"


def detached(hidden: Hidden) -> Hidden:
    """The same state without its history: the gradient stops at the window's edge.

    Raises:
        TypeError: it is made of something else.
    """
    return _mapped(hidden, lambda tensor: tensor.detach(), lambda kind, parts: kind(*parts))


def packed(hidden: Hidden) -> Hidden:
    """The same state as a checkpoint can hold it."""

    def stored(kind: type, parts: list[Any]) -> dict[str, Any]:
        return {_NAMED: f"{kind.__module__}:{kind.__qualname__}", _VALUES: tuple(parts)}

    return _mapped(hidden, lambda tensor: tensor, stored)


def unpacked(stored: Any) -> Hidden:
    """The reverse of packed.

    Raises:
        TypeError: it is no packed state.
        ValueError: there is no such named tuple in this program.
    """
    if isinstance(stored, dict) and _NAMED in stored:
        parts = [unpacked(part) for part in stored[_VALUES]]
        kind = _class_named(str(stored[_NAMED]))
        if kind is None or len(kind._fields) != len(parts):
            raise ValueError(
                f"expected a named tuple {stored[_NAMED]} of {len(parts)} fields in this program, found none"
            )
        return kind(*parts)
    if isinstance(stored, dict):
        return type(stored)((key, unpacked(part)) for key, part in stored.items())
    if type(stored) in (tuple, list):
        return type(stored)(unpacked(part) for part in stored)
    return _mapped(stored, lambda tensor: tensor, lambda kind, parts: kind(*parts))


def _mapped(
    hidden: Hidden,
    of_tensor: Callable[[Tensor], Any],
    of_named: Callable[[type, list[Any]], Any],
) -> Any:
    """The same nesting with something done to its tensors and its named tuples."""
    kind = type(hidden)
    if isinstance(hidden, Tensor):
        return of_tensor(hidden)
    if kind in _LEAVES:
        return hidden
    if kind in (tuple, list):
        return kind(_mapped(part, of_tensor, of_named) for part in hidden)
    if kind in (dict, OrderedDict) and all(_is_key(key) for key in hidden):
        return kind((key, _mapped(part, of_tensor, of_named)) for key, part in hidden.items())
    if isinstance(hidden, tuple) and _class_named(f"{kind.__module__}:{kind.__qualname__}") is kind:
        return of_named(kind, [_mapped(part, of_tensor, of_named) for part in hidden])
    raise TypeError(
        "llmkern.Trainer: expected the state that loss returns to be made of tensors, numbers, texts and None in "
        "tuples, lists, dicts of str or int, and named tuples defined at the top of a module, which a checkpoint can "
        f"hold, got a {kind.__module__}.{kind.__qualname__}"
    )


def _is_key(key: Any) -> bool:
    return type(key) in (str, int) and key != _NAMED


def _class_named(name: str) -> Any:
    """The named tuple of this name, if its module is loaded. Nothing is imported: the name comes from a file."""
    module, _, qualified = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in qualified.split("."):
        found = getattr(found, part, None)
    is_named_tuple = (
        isinstance(found, type) and issubclass(found, tuple) and hasattr(found, "_fields")
    )
    return found if is_named_tuple else None
