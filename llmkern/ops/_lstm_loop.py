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

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from llmkern.ops.lstm import explained

Weights = Sequence[Tensor | None]


class LstmLoop:
    """Some steps of a graph over the same weights. It lives as long as one of these steps does.

    Args:
        weights: weight_ih, weight_hh, bias_ih, bias_hh; leaves, of one float dtype, on the CPU.
        pack_backward: gives what ``torch.ops.llmkern.lstm_pack_backward`` makes of them, or None.
    """

    def __init__(self, weights: Weights, pack_backward: Callable[[], Tensor | None]) -> None:
        self.pack_backward = pack_backward
        self.left: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}
        self._weights, self._key = weights, _key(weights)
        # The hub has `left` alone: with the loop itself it would keep itself alive.
        self._token = _Hub.apply(self.left, *weights)  # type: ignore[no-untyped-call]
        self.hub = self._token.grad_fn

    def is_of(self, weights: Weights) -> bool:
        same = all(a is b for a, b in zip(self._weights, weights, strict=True))
        return same and self._key == _key(weights)

    def step(
        self, input: Tensor, h_0: Tensor, c_0: Tensor, packed: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """:func:`llmkern.ops.lstm_cell` with these weights."""
        state = input, h_0, c_0
        try:
            return _Step.apply(self, packed, *state, self._token, *self._weights)  # type: ignore[no-any-return, no-untyped-call]
        except Exception as error:
            raise explained(error, "lstm_cell", "B, I", *state, *self._weights) from None


def can_defer(weights: Weights) -> bool:
    """Whether a hub can stand for them: leaves, whose gradients nobody but autograd's end sees, and some wanted."""
    given = [w for w in weights if w is not None]
    plain = all(w.is_leaf and type(w) in (torch.nn.Parameter, Tensor) for w in given)
    return plain and any(w.requires_grad for w in given)


def _key(weights: Weights) -> list[tuple[Any, ...] | None]:
    """What autograd notes down about a leaf, and what may change about it while a graph lives."""
    return [None if w is None else (w.requires_grad, w.dtype, w.shape) for w in weights]


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
    def forward(ctx, loop, packed, input, h_0, c_0, token, *weights):  # type: ignore[no-untyped-def]
        with torch._C._AutoDispatchBelowAutograd():
            output, h_1, c_1, *saved = torch.ops.llmkern.lstm.default(
                input.unsqueeze(0),
                h_0,
                c_0,
                *weights,
                packed=packed,
                save_cells=True,
                save_gates=True,
            )
        ctx.loop = loop
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, h_0, c_0, *weights, output, *saved)
        return h_1, c_1

    @staticmethod
    def backward(ctx, grad_h, grad_c):  # type: ignore[no-untyped-def]
        if grad_h is None and grad_c is None:
            return (None,) * 10
        input, h_0, c_0, w_ih, w_hh, bias_ih, bias_hh, *saved = ctx.saved_tensors
        arguments = (None, grad_h, grad_c, None, input.unsqueeze(0), h_0, c_0, w_ih, w_hh)
        arguments = (*arguments, bias_ih, bias_hh, *[None] * 6, *saved)
        backward = torch.ops.llmkern.lstm_backward.default
        if torch.is_grad_enabled():
            grad_x, grad_h_0, grad_c_0, _, *grads = backward(*arguments)
            bias = (None, None) if bias_ih is None else (grads[2], grads[2].clone())
            return None, None, grad_x.squeeze(0), grad_h_0, grad_c_0, None, *grads[:2], *bias
        loop = ctx.loop
        with torch._C._AutoDispatchBelowAutograd():
            grad_x, grad_h_0, grad_c_0, grad_gates, *_ = backward(
                *arguments, weights=False, packed=loop.pack_backward()
            )
        if torch._C._will_engine_execute_node(loop.hub):
            steps = loop.left.setdefault(torch._C._current_graph_task_id(), [])
            # Detached: what an interrupted pass leaves behind must not hold the graph that holds it.
            steps.append((grad_gates.squeeze(0), input.detach(), h_0.detach()))
        return None, None, grad_x.squeeze(0), grad_h_0, grad_c_0, *[None] * 5
