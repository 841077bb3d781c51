# SPDX-License-Identifier: Apache-2.0
"""What torch.utils.flop_counter counts for the operators that multiply: as for the same products by torch.

Operators are asked by the names in their schemas. Work that a backward pass does again to save memory is not counted:
the numbers compare with those of a model of torch's own layers.
"""

from collections.abc import Callable
from math import prod
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

_ops = torch.ops.llmkern


def _formula(op: Any) -> Callable[[Callable[[Any, Any], int]], None]:
    """Registers f(arguments, results) for an operator: both by name, tensors as their shapes."""
    schema = op.default._schema
    defaults = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    names, results = ([a.name for a in side] for side in (schema.arguments, schema.returns))

    def register(f: Callable[[Any, Any], int]) -> None:
        @register_flop_formula(op)
        def count(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
            given = defaults | dict(zip(names, args, strict=False)) | kwargs
            return f(
                SimpleNamespace(**given),
                SimpleNamespace(**dict(zip(results, out_shape, strict=True))),
            )

    return register


def _product(*sizes: int) -> int:
    return 2 * prod(sizes)


@_formula(_ops.linear_logits)
def _linear_logits(given: Any, _: Any) -> int:
    (N, D), (V, _) = given.input, given.weight
    return _product(N, D, V)


@_formula(_ops.lstm)
def _lstm(given: Any, _: Any) -> int:
    (T, B, I), (_, P), (_, H) = given.input, given.h_0, given.c_0  # noqa: E741
    projection = 0 if given.weight_hr is None else _product(T * B, H, P)
    return _product(T * B, I + P, 4 * H) + projection


@_formula(_ops.lstm_backward)
def _lstm_backward(given: Any, results: Any) -> int:
    (T, B, I), (_, P), (_, H) = given.input, given.h_0, given.c_0  # noqa: E741
    through_time = _product(T * B, 4 * H, P)
    of_input, of_weights = (
        _product(T * B, 4 * H, columns) if prod(wanted) else 0
        for wanted, columns in ((results.grad_input, I), (results.grad_weight_hh, I + P))
    )
    projections = int(given.weight_hr is not None) + (prod(results.grad_weight_hr) > 0)
    return through_time + of_input + of_weights + projections * _product(T * B, P, H)


@_formula(_ops.lstm_step)
def _lstm_step(given: Any, _: Any) -> int:
    (B, I), (_, H) = given.input, given.h_0  # noqa: E741
    return _product(B, I + H, 4 * H)


@_formula(_ops.lstm_step_backward)
def _lstm_step_backward(given: Any, _: Any) -> int:
    (B, H), (_, I) = given.c_0, given.weight_ih  # noqa: E741
    return _product(B, 4 * H, H + I)


@_formula(_ops.lstm_weight_gradients)
def _lstm_weight_gradients(given: Any, _: Any) -> int:
    rows = sum(rows for rows, _ in given.grad_gates)
    return _product(rows, given.grad_gates[0][1], given.input[0][1] + given.previous[0][1])


@_formula(_ops.lstm_layers)
def _lstm_layers(given: Any, _: Any) -> int:
    *rows, I = given.input  # noqa: E741
    layers, H = given.h_0[0], given.h_0[-1]
    return _product(prod(rows), I + (2 * layers - 1) * H, 4 * H)


@_formula(_ops.linear_cross_entropy)
def _linear_cross_entropy(given: Any, results: Any) -> int:
    (N, D), (V, _) = given.input, given.weight
    return _product(N, D, V) * (2 if prod(results.input_gradient) else 1)


@_formula(_ops.linear_cross_entropy_backward)
def _linear_cross_entropy_backward(given: Any, results: Any) -> int:
    (N, D), (V, _) = given.input, given.weight
    wanted = results.grad_input, results.grad_weight
    return sum(_product(N, D, V) for grad in wanted if prod(grad))
