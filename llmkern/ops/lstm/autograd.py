# SPDX-License-Identifier: Apache-2.0
"""First and second derivatives of llmkern::lstm, for autograd and for torch.func."""

from collections.abc import Sequence
from typing import Any

import torch

from llmkern.ops import _checks
from llmkern.ops._derivatives import in_forward_mode, register_autograd, saved_tensors, vjp
from llmkern.ops.lstm import composite, vmap
from llmkern.ops.lstm.arguments import (
    LAYER,
    MASKS,
    OPTIONS,
    PARAMETERS,
    SAVED,
    UPSTREAM,
    Backward,
    BackwardResults,
    Forward,
    ForwardResults,
)


def _named(values: Any, names: Sequence[str]) -> dict[str, Any]:
    return {name: getattr(values, name) for name in names}


def _save_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    call, results = Forward(*inputs), ForwardResults(*output)
    ctx.options = _named(call, OPTIONS)
    # The kernels of the CPU compute gates again; nobody computes cell states again.
    ctx.saved_enough = call.save_cells and (call.save_gates or not call.input.is_cuda)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(results.gates, results.normalized, results.scales)
    kept = _named(call, (*LAYER, *MASKS)) | _named(results, SAVED)
    ctx.save_for_backward(*kept.values())


def _backward(ctx, *grads):  # type: ignore[no-untyped-def]
    kept = dict(zip((*LAYER, *MASKS, *SAVED), saved_tensors(ctx), strict=True))
    if not ctx.saved_enough:
        kept |= _saved_again(Forward(**_without(kept, SAVED), **ctx.options))
    # Autograd leaves out trailing arguments that have their default values.
    needs = zip(Forward._fields, ctx.needs_input_grad, strict=False)
    wanted = {name for name, needed in needs if needed}
    upstream = dict(zip(UPSTREAM, grads, strict=False))
    weights, need_input = not wanted.isdisjoint(PARAMETERS), "input" in wanted
    call = Backward(**upstream, **kept, **ctx.options, weights=weights, need_input=need_input)
    results = run_backward(call)
    found = {
        name: getattr(results, f"grad_{name}")
        for name in wanted
        if not name.startswith("bias_")  # they share theirs
    }
    if "bias_ih" in wanted:
        found["bias_ih"] = results.grad_bias
    if "bias_hh" in wanted:
        # Two tensors: autograd may add into a gradient in place.
        found["bias_hh"] = results.grad_bias.clone() if "bias_ih" in wanted else results.grad_bias
    return tuple(found.get(name) for name in Forward._fields)


def _without(values: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def _saved_again(call: Forward) -> dict[str, Any]:
    """What a forward pass that was recorded without gradients in mind (a trace, an exported program) did not save."""
    with torch.no_grad():
        results = run(call._replace(save_cells=True, save_gates=True))
    return _named(results, SAVED)


def _save_for_second_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    call = Backward(*inputs)
    ctx.options = _named(call, (*OPTIONS, "weights"))
    ctx.set_materialize_grads(False)
    # Without what the forward pass saved: it is a function of them.
    ctx.save_for_backward(*_named(call, (*UPSTREAM, *LAYER, *MASKS)).values())


def _second_backward(ctx, *grads):  # type: ignore[no-untyped-def]
    """Differentiates the gradients of the composite layer; whoever asks for a graph of that gets one."""
    given = dict(zip((*UPSTREAM, *LAYER, *MASKS), saved_tensors(ctx), strict=True))
    needs = zip(Backward._fields, ctx.needs_input_grad, strict=False)
    needed = [name for name, needs_grad in needs if needs_grad and name in given]
    wanted = [n for n, g in zip(BackwardResults._fields, grads, strict=True) if g is not None]

    def first_gradients(*variables):  # type: ignore[no-untyped-def]
        now = given | dict(zip(needed, variables, strict=True))
        return _first_gradients(now, ctx.options, wanted)

    _, pullback = vjp(first_gradients, *[given[name] for name in needed])
    upstream = BackwardResults(*grads)
    seconds = pullback(tuple(getattr(upstream, name) for name in wanted))
    found = dict(zip(needed, seconds, strict=True))
    return tuple(found.get(name) for name in Backward._fields)


def _first_gradients(given: dict[str, Any], options: dict[str, Any], wanted: list[str]):  # type: ignore[no-untyped-def]
    """Those of the results of llmkern::lstm_backward that are wanted, differentiable themselves."""
    options = dict(options)
    weights = options.pop("weights")
    (T, B, _), gates, dtype = (
        given["input"].shape,
        given["weight_ih"].shape[0],
        given["input"].dtype,
    )
    layer = {name: given[name] for name in (*LAYER, *MASKS)}
    layer["shift"] = given["input"].new_zeros(T, B, gates, dtype=_checks.widened(dtype))
    # The argument of composite.lstm that a result is the gradient of: that of the gates is that of the shift, of a
    # bias its sum.
    argument_of = {"grad_bias" if weights else "grad_gates": "shift"}
    for name in LAYER:
        if layer[name] is not None and (weights or name not in PARAMETERS):
            argument_of[f"grad_{name}"] = name
    by = sorted({argument_of[name] for name in wanted if name in argument_of})
    used = [i for i, name in enumerate(UPSTREAM) if given[name] is not None]

    def outputs_of(*variables):  # type: ignore[no-untyped-def]
        outputs = composite.lstm(**(layer | dict(zip(by, variables, strict=True))), **options)
        return tuple(outputs[i] for i in used)

    _, pullback = vjp(outputs_of, *[layer[name] for name in by])
    gradients = pullback(tuple(given[UPSTREAM[i]] for i in used))
    found = dict(zip(by, gradients, strict=True))
    if weights and "shift" in found:
        found["shift"] = found["shift"].sum((0, 1))
    empty = given["input"].new_zeros(0)
    results = [found.get(argument_of.get(name, "")) for name in wanted]
    return tuple(empty if grad is None else grad.to(dtype) for grad in results)


def _composite_backward(call: Backward) -> BackwardResults:
    """What llmkern::lstm_backward computes, by operations that have derivatives in forward mode."""
    given, options = _named(call, (*UPSTREAM, *LAYER, *MASKS)), _named(call, (*OPTIONS, "weights"))
    return BackwardResults(*_first_gradients(given, options, list(BackwardResults._fields)))


register_autograd(torch.ops.llmkern.lstm.default, _backward, _save_for_backward)
register_autograd(
    torch.ops.llmkern.lstm_backward.default, _second_backward, _save_for_second_backward
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


def run(call: Forward) -> ForwardResults:
    """The operator, by the shortest way that records what has to be recorded."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return ForwardResults(*torch.ops.llmkern.lstm.default(*call))
    if torch._C._are_functorch_transforms_active():
        return ForwardResults(*Layer.apply(*call))  # type: ignore[no-untyped-call]
    if torch.is_grad_enabled():
        return ForwardResults(*RecordedLayer.apply(*call))  # type: ignore[no-untyped-call]
    with torch._C._AutoDispatchBelowAutograd():
        return ForwardResults(*torch.ops.llmkern.lstm.default(*call))


def run_backward(call: Backward) -> BackwardResults:
    """llmkern::lstm_backward, or what has its derivatives where these are taken."""
    if in_forward_mode():
        return _composite_backward(call)
    if torch._C._are_functorch_transforms_active():
        return BackwardResults(*LayerBackward.apply(*call))  # type: ignore[no-untyped-call]
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return BackwardResults(*torch.ops.llmkern.lstm_backward.default(*call))
    with torch._C._AutoDispatchBelowAutograd():
        return BackwardResults(*torch.ops.llmkern.lstm_backward.default(*call))
