# SPDX-License-Identifier: Apache-2.0
"""What torch must know of llmkern::lstm and its gradient: shapes of the results, first and second derivatives."""

import torch
from torch import Tensor

from llmkern.ops import _checks, _lstm_composite


@torch.library.register_fake("llmkern::lstm")
def _lstm_fake(  # type: ignore[no-untyped-def]
    input,
    h_0,
    c_0,
    weight_ih,
    weight_hh,
    bias_ih=None,
    bias_hh=None,
    weight_hr=None,
    norm_gates=None,
    norm_cell=None,
    lengths=None,
    reset=None,
    seed=None,
    packed=None,
    zoneout_h=0.0,
    zoneout_c=0.0,
    reverse=False,
    save_cells=False,
    save_gates=False,
):
    T, B, _ = input.shape
    H, P = c_0.shape[1], h_0.shape[1]
    wide = _checks.widened(input.dtype)
    norm = save_gates and norm_gates is not None
    return (
        input.new_empty(T, B, P),
        input.new_empty(B, P),
        input.new_empty(B, H),
        input.new_empty((T, B, H) if save_cells else (0,), dtype=wide),
        input.new_empty((T, B, 4 * H) if save_gates else (0,)),
        input.new_empty((2, T, B, 4 * H) if norm else (0,)),
        input.new_empty((T, B, 4) if norm else (0,), dtype=wide),
    )


@torch.library.register_fake("llmkern::lstm_backward")
def _lstm_backward_fake(  # type: ignore[no-untyped-def]
    grad_output,
    grad_h_n,
    grad_c_n,
    grad_cells,
    input,
    h_0,
    c_0,
    weight_ih,
    weight_hh,
    bias_ih,
    bias_hh,
    weight_hr,
    norm_gates,
    norm_cell,
    lengths,
    reset,
    seed,
    output,
    cells,
    gates,
    normalized,
    scales,
    zoneout_h=0.0,
    zoneout_c=0.0,
    reverse=False,
    weights=True,
):
    T, B, _ = input.shape
    dense = [input.new_empty(t.shape) for t in (input, h_0, c_0)]
    grad_gates = input.new_empty((0,) if weights else (T, B, weight_ih.shape[0]))
    bias = input.new_empty(weight_ih.shape[0])
    wanted = (weight_ih, weight_hh, bias, weight_hr, norm_gates, norm_cell)
    return (
        *dense,
        grad_gates,
        *[input.new_empty(t.shape if weights and t is not None else (0,)) for t in wanted],
    )


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
    grad_input, grad_h_0, grad_c_0, _, grad_ih, grad_hh, grad_bias, *grad_variant = (
        torch.ops.llmkern.lstm_backward.default(
            grad_output, grad_h_n, grad_c_n, grad_cells, *ctx.saved_tensors, *ctx.options
        )
    )
    bias, variant = ctx.saved_tensors[5], ctx.saved_tensors[7:10]
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


# Among the arguments of llmkern::lstm_backward: the gradients from above, what the layer computes with, and the masks.
_UPSTREAM, _LAYER, _MASKS = slice(0, 4), slice(4, 14), slice(14, 17)


def _save_for_second_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, zoneout_h, zoneout_c, reverse, weights = inputs
    ctx.options = {"zoneout_h": zoneout_h, "zoneout_c": zoneout_c, "reverse": reverse}
    ctx.weights = weights
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors[: _MASKS.stop])  # the rest are functions of them


def _second_backward(ctx, *grads):  # type: ignore[no-untyped-def]
    """Differentiates the gradients that the composite layer has; leaves a graph for those who go on."""
    tensors, go_on = ctx.saved_tensors, torch.is_grad_enabled()
    needed = ctx.needs_input_grad[: _LAYER.stop]
    with torch.enable_grad():
        variables = [_variable(t) for t in tensors[: _LAYER.stop]]
        upstream, layer = variables[_UPSTREAM], variables[_LAYER]
        wanted = [g is not None for g in grads]
        first = _first_gradients(upstream, layer, tensors[_MASKS], ctx.options, ctx.weights, wanted)
        by = [v if needs else None for v, needs in zip(variables, needed, strict=True)]
        return *_gradients(first, grads, by, create_graph=go_on), *[None] * 12


def _variable(tensor: Tensor | None) -> Tensor | None:
    """The tensor as something to differentiate by, which hangs on the graph that the tensor hangs on."""
    if tensor is None:
        return None
    return tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()


def _first_gradients(upstream, layer, masks, options, weights, wanted):  # type: ignore[no-untyped-def]
    """What llmkern::lstm_backward returns, as far as it is wanted, each a differentiable function of everything."""
    input, h_0, c_0, weight_ih, weight_hh, _, _, *variant = layer
    (T, B, _), dtype = input.shape, input.dtype
    shift = input.new_zeros(T, B, weight_ih.shape[0], dtype=_checks.widened(dtype))
    shift.requires_grad_()
    outputs = _lstm_composite.lstm(*layer, *masks, **options, shift=shift)
    # Those of the weights, or else that of the gates; that of a bias is the sum of the latter.
    by = [
        input,
        h_0,
        c_0,
        *((None, weight_ih, weight_hh, shift, *variant) if weights else (shift, *[None] * 6)),
    ]
    by = [b if wants else None for b, wants in zip(by, wanted, strict=True)]
    grads = _gradients(outputs, upstream, by, create_graph=True)
    grads[3] = None if grads[3] is None else grads[3].to(dtype)
    grads[6] = None if grads[6] is None else grads[6].sum((0, 1)).to(dtype)
    return grads


def _gradients(results, upstream, by, create_graph):  # type: ignore[no-untyped-def]
    """torch.autograd.grad over lists in which anything may be None."""
    used = [
        (r, u)
        for r, u in zip(results, upstream, strict=True)
        if r is not None and r.requires_grad and u is not None
    ]
    given = [b for b in by if b is not None]
    if not used or not given:
        return [None] * len(by)
    outputs, above = zip(*used, strict=True)
    found = iter(
        torch.autograd.grad(outputs, given, above, create_graph=create_graph, allow_unused=True)
    )
    return [None if b is None else next(found) for b in by]


torch.library.register_autograd("llmkern::lstm", _backward, setup_context=_save_for_backward)
torch.library.register_autograd(
    "llmkern::lstm_backward", _second_backward, setup_context=_save_for_second_backward
)
