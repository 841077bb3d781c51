# SPDX-License-Identifier: Apache-2.0
"""Autograd for a Python loop over an LSTM cell: the gradients of its weights come from one product over all steps.

Ordinarily every step would make gradients as large as the weights, and autograd would add them up: at H = 512 that
moves 17 MB a step, several times, where the step itself takes 1.3 ms. Here the weights reach the steps through one
autograd node, the hub. A step's backward hands back what its neighbours need, the gradients of its input and state, and
leaves what the weights need with the hub. Autograd runs the hub when all steps of a backward pass have run, since each
of them has an edge to it; what travels along that edge is nothing.

What is left with the hub is kept apart by backward passes (their ids), so that several losses, retained graphs and
threads do not meet; a pass that does not ask for the weights leaves nothing. Where the gradients are to be
differentiated in their turn, a step gives the gradients of its weights like any other operator.
"""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from llmkern.ops import _checks
from llmkern.ops._derivatives import in_forward_mode
from llmkern.ops.lstm.arguments import LAYER, MASKS, SAVED, UPSTREAM, Backward
from llmkern.ops.lstm.autograd import run_backward
from llmkern.ops.lstm.layer import WRONG_ARGUMENTS, error_in_arguments

Weights = Sequence[Tensor | None]
_STEP = torch.ops.llmkern.lstm_step.default
_STEP_BACKWARD = torch.ops.llmkern.lstm_step_backward.default


class LstmLoop:
    """Some steps of a graph over the same weights. It lives as long as one of these steps does.

    Args:
        weights: weight_ih, weight_hh, bias_ih, bias_hh; leaves, of one float dtype, on the CPU.
    """

    def __init__(self, weights: Weights) -> None:
        self.left: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}
        self._weights, self._noted = weights, _noted(weights)
        # The hub has `left` alone: with the loop itself it would keep itself alive.
        self._token = _Hub.apply(self.left, *weights)  # type: ignore[no-untyped-call]
        self.hub = self._token.grad_fn

    def is_of(self, weights: Weights) -> bool:
        same = all(map(operator.is_, self._weights, weights))
        return same and self._noted == _noted(weights)

    def step(self, input: Tensor, h_0: Tensor, c_0: Tensor) -> tuple[Tensor, Tensor]:
        """:func:`llmkern.ops.lstm_cell` with these weights."""
        state = input, h_0, c_0
        try:
            return _Step.apply(self, *state, self._token, *self._weights)  # type: ignore[no-any-return, no-untyped-call]
        except WRONG_ARGUMENTS as error:
            raise error_in_arguments(error, "lstm_cell", "B, I", *state, *self._weights) from None


def can_defer(weights: Weights) -> bool:
    """Whether a hub can stand for them: leaves, whose gradients nobody but autograd's end sees, and some wanted."""
    given = [w for w in weights if w is not None]
    plain = all(w.is_leaf and type(w) in (torch.nn.Parameter, Tensor) for w in given)
    return plain and any(w.requires_grad for w in given)


def _noted(weights: Weights) -> list[Any]:
    """What autograd notes down about a leaf, and what may change while a graph lives."""
    return [w if w is None else (w.requires_grad, w.dtype, w.shape) for w in weights]


class _Hub(Function):
    @staticmethod
    def forward(ctx, left, weight_ih, weight_hh, bias_ih, bias_hh):  # type: ignore[no-untyped-def]
        ctx.left = left
        ctx.has_bias = bias_ih is not None
        ctx.set_materialize_grads(False)
        return weight_ih.new_empty(0)

    @staticmethod
    def backward(ctx, _):  # type: ignore[no-untyped-def]
        steps = ctx.left.pop(torch._C._current_graph_task_id(), None)
        if not steps:
            return (None,) * 5
        grad_ih, grad_hh, grad_bias = torch.ops.llmkern.lstm_weight_gradients.default(
            *zip(*steps, strict=True)
        )
        # Two tensors: autograd may add into a gradient in place.
        biases = (grad_bias, grad_bias.clone()) if ctx.has_bias else (None, None)
        return None, grad_ih, grad_hh, *biases


class _Step(Function):
    # `token` is the edge to the hub. The weights are here for their gradients where these are differentiated again, and
    # so that autograd sees whether somebody has written into them.
    @staticmethod
    def forward(ctx, loop, input, h_0, c_0, token, *weights):  # type: ignore[no-untyped-def]
        with torch._C._AutoDispatchBelowAutograd():
            h_1, c_1, saved = _STEP(input, h_0, c_0, *weights)
        ctx.loop = loop
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, h_0, c_0, *weights, saved, h_1)
        return h_1, c_1

    @staticmethod
    def backward(ctx, grad_h, grad_c):  # type: ignore[no-untyped-def]
        if grad_h is None and grad_c is None:
            return (None,) * 9
        input, h_0, c_0, w_ih, w_hh, bias_ih, bias_hh, saved, h_1 = ctx.saved_tensors
        if torch.is_grad_enabled() or in_forward_mode():
            layer = input, h_0, c_0, w_ih, w_hh, bias_ih, bias_hh
            call = _layer_backward(grad_h, grad_c, layer, saved, h_1)
            needs = ctx.needs_input_grad
            call = call._replace(need_input=needs[1], weights=any(needs[5:]))
            return None, *_differentiable(call)
        loop = ctx.loop
        with torch._C._AutoDispatchBelowAutograd():
            grad_x, grad_h_0, grad_c_0, grad_gates = _STEP_BACKWARD(
                grad_h, grad_c, c_0, w_ih, w_hh, saved
            )
        if torch._C._will_engine_execute_node(loop.hub):
            steps = loop.left.setdefault(torch._C._current_graph_task_id(), [])
            # Detached: what an interrupted pass leaves behind must not hold the graph that holds it.
            steps.append((grad_gates, input.detach(), h_0.detach()))
        return None, grad_x, grad_h_0, grad_c_0, *[None] * 5


def _layer_backward(grad_h, grad_c, layer, saved, h_1) -> Backward:  # type: ignore[no-untyped-def]
    """A step's backward pass as that of a layer of one step, which has derivatives in its turn."""
    input, *others = layer
    cell = layer[2]
    wide = _checks.widened(cell.dtype)
    size = cell.numel() * wide.itemsize
    given: dict[str, Any] = dict.fromkeys((*UPSTREAM, *LAYER, *MASKS, *SAVED))
    given |= zip(LAYER, (input.unsqueeze(0), *others), strict=False)
    given |= {"grad_h_n": grad_h, "grad_c_n": grad_c, "output": h_1.unsqueeze(0)}
    given["cells"] = saved[:size].view(wide).view_as(cell).unsqueeze(0)
    given["gates"] = saved[size:].view(cell.dtype).view(1, len(cell), -1)
    given |= {"normalized": cell.new_empty(0), "scales": cell.new_empty(0, dtype=wide)}
    return Backward(**given)


def _differentiable(call: Backward) -> tuple[Tensor | None, ...]:
    """The gradients of a step's input, states, token and weights."""
    grads = run_backward(call)
    grad_x = grads.grad_input.squeeze(0) if call.need_input else None
    if not call.weights:
        return grad_x, grads.grad_h_0, grads.grad_c_0, *[None] * 5
    bias = grads.grad_bias
    biases = (None, None) if call.bias_ih is None else (bias, bias.clone())
    states = grads.grad_h_0, grads.grad_c_0
    return grad_x, *states, None, grads.grad_weight_ih, grads.grad_weight_hh, *biases
