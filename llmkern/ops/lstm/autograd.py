# SPDX-License-Identifier: Apache-2.0
"""First and second derivatives of llmkern::lstm, for autograd and for torch.func."""

from typing import Any

import torch

from llmkern.ops import _checks
from llmkern.ops._derivatives import vjp
from llmkern.ops.lstm import composite, vmap


def _save_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *parameters, _, zoneout_h, zoneout_c, reverse, save_cells, _ = inputs
    step_output, _, _, cells, *rest = output
    ctx.options = zoneout_h, zoneout_c, reverse
    ctx.saved = save_cells
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*rest)
    ctx.save_for_backward(*parameters, step_output, cells, *rest)


def _backward(ctx, grad_output, grad_h_n, grad_c_n, grad_cells, *_):  # type: ignore[no-untyped-def]
    if not ctx.saved:
        raise RuntimeError("llmkern.lstm: expected save_cells=True for a backward pass, got False")
    saved = ctx.saved_tensors  # once: a checkpoint computes them for a single look
    grad_input, grad_h_0, grad_c_0, _, grad_ih, grad_hh, grad_bias, *grad_variant = _run_backward(
        grad_output, grad_h_n, grad_c_n, grad_cells, *saved, *ctx.options, True
    )
    bias, variant = saved[5], saved[7:10]
    return (
        grad_input,
        grad_h_0,
        grad_c_0,
        grad_ih,
        grad_hh,
        # Two tensors: autograd may add into a gradient in place.
        *((None, None) if bias is None else (grad_bias, grad_bias.clone())),
        *[None if t is None else grad for t, grad in zip(variant, grad_variant, strict=True)],
        *[None] * 9,
    )


# Among the arguments of llmkern::lstm_backward: the gradients from above, what the layer computes with, its masks, and
# after what the forward pass saved, its numbers.
_UPSTREAM, _LAYER, _MASKS, _OPTIONS = slice(0, 4), slice(4, 14), slice(14, 17), slice(22, 26)
_SHIFT = 10  # after the layer's tensors: what composite.lstm adds to the gates


def _save_for_second_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    zoneout_h, zoneout_c, reverse, ctx.weights = inputs[_OPTIONS]
    ctx.options = {"zoneout_h": zoneout_h, "zoneout_c": zoneout_c, "reverse": reverse}
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        *inputs[: _MASKS.stop]
    )  # what the forward pass saved is a function of them


def _second_backward(ctx, *grads):  # type: ignore[no-untyped-def]
    """Differentiates the gradients of the composite layer; whoever asks for a graph of that gets one."""
    tensors = ctx.saved_tensors
    needed = [i for i, needs in enumerate(ctx.needs_input_grad[: _LAYER.stop]) if needs]
    wanted = [i for i, grad in enumerate(grads) if grad is not None]
    results = [None] * len(ctx.needs_input_grad)

    def first_gradients(*variables):  # type: ignore[no-untyped-def]
        given = list(tensors)
        for i, variable in zip(needed, variables, strict=True):
            given[i] = variable
        upstream, layer, masks = given[_UPSTREAM], given[_LAYER], given[_MASKS]
        return _first_gradients(upstream, layer, masks, ctx.options, ctx.weights, wanted)

    _, pullback = vjp(first_gradients, *[tensors[i] for i in needed])
    for i, grad in zip(needed, pullback(tuple(grads[i] for i in wanted)), strict=True):
        results[i] = grad
    return tuple(results)


def _first_gradients(upstream, layer, masks, options, weights, wanted):  # type: ignore[no-untyped-def]
    """Those of the results of llmkern::lstm_backward that are wanted, differentiable themselves."""
    (T, B, _), gates, dtype = layer[0].shape, layer[3].shape[0], layer[0].dtype
    shift = layer[0].new_zeros(T, B, gates, dtype=_checks.widened(dtype))
    # Where the layer has what a result is the gradient of. That of the gates is that of the shift; of a bias, its sum.
    places = {0: 0, 1: 1, 2: 2, 3: _SHIFT}
    if weights:
        places = {0: 0, 1: 1, 2: 2, 4: 3, 5: 4, 6: _SHIFT}
        places |= {i: i for i in (7, 8, 9) if layer[i] is not None}
    by = sorted({places[i] for i in wanted if i in places})
    used = [i for i, grad in enumerate(upstream) if grad is not None]

    def outputs_of(*variables):  # type: ignore[no-untyped-def]
        given = [*layer, shift]
        for i, variable in zip(by, variables, strict=True):
            given[i] = variable
        *tensors, shifted = given
        outputs = composite.lstm(*tensors, *masks, **options, shift=shifted)
        return tuple(outputs[i] for i in used)

    _, pullback = vjp(outputs_of, *[[*layer, shift][i] for i in by])
    found = dict(zip(by, pullback(tuple(upstream[i] for i in used)), strict=True))
    if weights and _SHIFT in found:
        found[_SHIFT] = found[_SHIFT].sum((0, 1))
    empty = layer[0].new_zeros(0)
    return tuple(found[places[i]].to(dtype) if i in places else empty for i in wanted)


torch.library.register_autograd("llmkern::lstm", _backward, setup_context=_save_for_backward)
torch.library.register_autograd(
    "llmkern::lstm_backward", _second_backward, setup_context=_save_for_second_backward
)


class RecordedLayer(torch.autograd.Function):
    """llmkern::lstm under autograd alone. What is registered would do the same, 0.1 ms later: at every call it looks
    for default values among the arguments.
    """

    @staticmethod
    def forward(ctx, *args):  # type: ignore[no-untyped-def]
        with torch._C._AutoDispatchBelowAutograd():
            output = torch.ops.llmkern.lstm.default(*args)
        _save_for_backward(ctx, args, output)
        return output

    backward = staticmethod(_backward)


class Layer(torch.autograd.Function):
    """llmkern::lstm under the transforms of torch.func, which no gradient registered with torch.library serves."""

    setup_context = staticmethod(_save_for_backward)
    backward = staticmethod(_backward)

    @staticmethod
    def forward(*args: Any) -> Any:
        return torch.ops.llmkern.lstm.default(*args)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return vmap.layer(Layer.apply, info, in_dims, *args)


class LayerBackward(torch.autograd.Function):
    """llmkern::lstm_backward under the transforms of torch.func."""

    setup_context = staticmethod(_save_for_second_backward)
    backward = staticmethod(_second_backward)

    @staticmethod
    def forward(*args: Any) -> Any:
        return torch.ops.llmkern.lstm_backward.default(*args)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return vmap.backward(LayerBackward.apply, info, in_dims, *args)


def _run_backward(*args: Any) -> Any:
    if torch._C._are_functorch_transforms_active():
        return LayerBackward.apply(*args)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return torch.ops.llmkern.lstm_backward.default(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.llmkern.lstm_backward.default(*args)
