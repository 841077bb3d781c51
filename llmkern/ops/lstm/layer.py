# SPDX-License-Identifier: Apache-2.0
"""LSTM layer and cell (Hochreiter & Schmidhuber 1997, forget gate of Gers et al. 2000); gates in order i, f, g, o.

i, f, o = sigmoid(...)   g = tanh(...)   of   W_ih x_t + b_ih + W_hh h_{t-1} + b_hh
c_t = f * c_{t-1} + i * g
h_t = o * tanh(c_t)

Which way a call takes (the kernels are those of csrc; the composite layer is composite.py, in operations of torch):

    call                                            forward pass        its gradients       second derivatives
    lstm or lstm_cell on the CPU, any variant       kernel              kernel              composite
    lstm or lstm_cell on CUDA, plain or lengths     kernel              kernel              composite
    any other variant on CUDA                       composite           autograd's own      autograd's own
    forward mode (jvp, dual numbers), any device    composite           autograd's own      autograd's own
    torch.func: grad, vjp, jacrev, vmap             kernel, rows folded into one batch by vmap.py; autograd.Layer
    nn.LSTMCell in a loop, on the CPU               lstm_step: a product over all steps for the weights (loop.py)
    nn.LSTM, plain, without gradients, on the CPU   lstm_layers: all layers in one call
    compiled, exported, traced                      the operator, recorded by its name; gradients as above
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llmkern.ops import _autocast, _checks
from llmkern.ops._derivatives import in_forward_mode
from llmkern.ops.lstm import autograd, composite
from llmkern.ops.lstm.arguments import LAYER, Backward, BackwardResults, Forward, ForwardResults

# What goes wrong between here and the operator where an argument is no tensor, or another one than it should be.
WRONG_ARGUMENTS = AttributeError, RuntimeError, TypeError, ValueError


def lstm(
    input: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    reverse: bool = False,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    weight_hr: Tensor | None = None,
    norm_gates: Tensor | None = None,
    norm_cell: Tensor | None = None,
    zoneout_h: float = 0.0,
    zoneout_c: float = 0.0,
    seed: Tensor | None = None,
    packed: Tensor | None = None,
    recompute: bool = False,
    return_cells: bool = False,
) -> tuple[Tensor, ...]:
    """Runs one LSTM layer in one direction over all steps.

    Differentiable any number of times, under torch.func too. Second derivatives, derivatives in forward mode, and on
    CUDA projections, layer norm, zoneout, resets and ``return_cells`` have no kernels of their own: plain operations of
    torch take their place, step by step, and more slowly.

    Args:
        input: [T, B, I], T at least 1; float32, float64, bfloat16 or float16. Sums and cell state are float32 for
            16-bit types. Under autocast every tensor is cast to its dtype; on the CPU, as in torch, to the dtype of
            c_0 where that is wider, so that a float32 state stays one.
        h_0, c_0: initial states, [B, P] and [B, H]; P is H without a projection.
        weight_ih: [4*H, I], gates i, f, g, o. weight_hh: [4*H, P].
        bias_ih, bias_hh: [4*H], both or neither.
        reverse: run from the last step to the first; outputs stay at the step of their input.
        lengths: int64 [B], each in [0, T]: row b runs over its first lengths[b] steps alone, backwards from the last of
            them with ``reverse``. None: every row runs over all.
        reset: bool [T, B]: where set, the row's states are zero before that step.
        weight_hr: [P, H]: h_t = W_hr (o * tanh(c_t)) (Sak et al. 2014, https://arxiv.org/abs/1402.1128).
        norm_gates: [2, 4*H], gains of the layer-normalised products W_ih x_t and W_hh h_{t-1}. norm_cell: [2, H], gain
            and bias of the layer-normalised cell state that makes the output (Ba et al. 2016, as in
            Haste). Both or neither.
        zoneout_h, zoneout_c: probabilities that an element of the output and of the cell state keeps its value of the
            step before (Krueger et al. 2017, https://arxiv.org/abs/1606.01305).
        seed: int64 [], which makes the masks of zoneout. None: their expectation, as for evaluation.
        packed: what :func:`lstm_pack` made of these weights, to save the copy at every call. It is not looked at
            whether the weights have changed since. Those of int8 take the place of the weights.
        recompute: on the CPU, keep only outputs and cell states for the backward pass, a third of what it needs
            otherwise, and compute the gates again there.
        return_cells: return the cell states of all steps too.

    Returns:
        output [T, B, P], 0 beyond a row's length, and the states after the last step that ran: h_n [B, P], c_n [B, H].
        With ``return_cells`` also [T, B, H], float32 for 16-bit input.

    Raises:
        TypeError: an argument is no tensor, or its dtype is another one.
        ValueError: a shape, a device or a probability does not fit.

    Example:
        >>> x, state = torch.randn(35, 20, 256), torch.zeros(20, 512)
        >>> w_ih, w_hh = torch.randn(2048, 256) / 16, torch.randn(2048, 512) / 23
        >>> output, h_n, c_n = llmkern.ops.lstm(x, state, state, w_ih, w_hh)
    """
    required = input, h_0, c_0, weight_ih, weight_hh
    layer = (*required, bias_ih, bias_hh, weight_hr, norm_gates, norm_cell)
    masks = lengths, reset, seed, (zoneout_h, zoneout_c)
    variant = weight_hr is not None or norm_gates is not None or reset is not None
    variant = variant or zoneout_h > 0 or zoneout_c > 0 or return_cells
    if _beyond_kernels(input, variant):
        tensors = _validated("lstm", "T, B, I", *layer)
        valid = _valid_masks(input, *masks)
        results: Any = composite.lstm(*(*tensors, *valid, zoneout_h, zoneout_c, reverse))
        return _returned(results, weight_hr is not None, return_cells)
    try:
        tensors = _autocast.cast_recurrent(c_0, *layer)
        saves = _saves("lstm", tensors, packed)
        results = autograd.run(
            Forward(
                **dict(zip(LAYER, tensors, strict=True)),
                lengths=None if lengths is None else _valid_lengths(lengths, input),
                reset=reset,
                seed=seed,
                packed=packed,
                zoneout_h=zoneout_h,
                zoneout_c=zoneout_c,
                reverse=reverse,
                save_cells=saves or return_cells,
                save_gates=saves and not (recompute and input.device.type == "cpu"),
            )
        )
    except WRONG_ARGUMENTS as error:
        raise error_in_arguments(error, "lstm", "T, B, I", *layer, masks=masks) from None
    return _returned(results, weight_hr is not None, return_cells)


def _returned(results: Sequence[Tensor], projected: bool, return_cells: bool) -> tuple[Tensor, ...]:
    output, h_n, c_n, cells = results[:4]
    if projected:
        output, h_n = _autocast.cast(output, h_n)  # the projection is a product, and has its dtype
    return (output, h_n, c_n, cells) if return_cells else (output, h_n, c_n)


def lstm_cell(
    input: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    packed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of :func:`lstm`: input [B, I] and states [B, H] to the next states h_1, c_1 [B, H]."""
    layer = input, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh
    if _beyond_kernels(input, variant=False):
        step, *others = _validated("lstm_cell", "B, I", *layer)
        return composite.lstm(step.unsqueeze(0), *others)[1:3]
    try:
        step, *others = _autocast.cast_recurrent(c_0, *layer)
        saves = _saves("lstm_cell", (step, *others), packed)
        results = autograd.run(
            Forward(
                step.unsqueeze(0),
                **dict(zip(LAYER[1:7], others, strict=True)),
                packed=packed,
                save_cells=saves,
                save_gates=saves,
            )
        )
    except WRONG_ARGUMENTS as error:
        raise error_in_arguments(error, "lstm_cell", "B, I", *layer) from None
    return results.h_n, results.c_n


def lstm_pack(weight_ih: Tensor, weight_hh: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """The weights in the order in which the CPU kernels read them, for ``lstm(..., packed=...)``.

    Args:
        weight_ih: [4*H, I]. weight_hh: [4*H, P]. On the CPU.
        dtype: their own, or torch.int8 for float32 weights: each row of both is rounded to multiples of its largest
            magnitude / 127. Sums, states and everything else stay float32; there are no gradients.

    Returns:
        A vector about as large as both have in that dtype. It is made for the instruction set in use
        (``llmkern.info()["cpu_isa"]``); under another one the weights are packed anew at every call.

    Raises:
        TypeError: another dtype is asked for.
    """
    if dtype not in (None, weight_hh.dtype) and (dtype, weight_hh.dtype) != (
        torch.int8,
        torch.float32,
    ):
        raise TypeError(
            f"llmkern.lstm_pack: expected dtype {_checks.dtype_names([weight_hh.dtype])}, or int8 for float32 "
            f"weights, got {_checks.dtype_names([dtype])}"
        )
    return torch.ops.llmkern.lstm_pack.default(
        weight_ih.detach(), weight_hh.detach(), dtype == torch.int8
    )


def _beyond_kernels(input: Tensor, variant: bool) -> bool:
    """Whether this takes the composite layer: variants on CUDA, and derivatives in forward mode (torch.func.jvp)."""
    # Not every input is a tensor: the operator has still to say so.
    return (variant and getattr(input, "is_cuda", False)) or in_forward_mode()


def _saves(op: str, tensors: Sequence[Tensor | None], packed: Tensor | None) -> bool:
    """Whether there may be a backward pass, which needs what the forward pass computed on the way."""
    saves = any(t is not None and t.requires_grad for t in tensors)
    if not torch.is_grad_enabled():
        # A trace is the same whether it is made under no_grad or not: torch compares both, and either may be trained.
        return saves and torch.jit.is_tracing()
    if saves and packed is not None and packed.dtype == torch.int8:
        raise ValueError(
            f"llmkern.{op}: expected no gradients with int8 weights, got an argument that requires them; "
            "call it under torch.no_grad()"
        )
    return saves


def error_in_arguments(
    error: Exception, op: str, input_letters: str, *layer: Any, masks: Any = None
) -> Exception:
    """What is wrong with these arguments, or the error itself: the operator checks them too, but in its own words.

    So a call that is right pays for one set of checks, the operator's, which takes no time beside Python's.
    """
    try:
        _validated(op, input_letters, *layer)
        if masks is not None:
            _valid_masks(layer[0], *masks)
    except (TypeError, ValueError) as better:
        return better
    return error


def _valid_masks(
    input: Tensor,
    lengths: Tensor | None,
    reset: Tensor | None,
    seed: Tensor | None,
    zoneout: tuple[float, float],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if lengths is not None:
        lengths = _valid_lengths(lengths, input)
    if reset is not None:
        T, B = input.shape[:2]
        _checks.check_tensor("lstm", "reset", reset)
        _checks.check_dtype("lstm", "reset", reset, [torch.bool])
        _checks.check_shape("lstm", "reset", reset, "T, B", [T, B])
        _checks.check_same_device("lstm", {"input": input, "reset": reset})
    if seed is not None:
        _checks.check_tensor("lstm", "seed", seed)
        _checks.check_dtype("lstm", "seed", seed, [torch.int64])
        _checks.check_shape("lstm", "seed", seed, "", [])
        _checks.check_same_device("lstm", {"input": input, "seed": seed})
    for name, p in zip(("zoneout_h", "zoneout_c"), zoneout, strict=True):
        if not 0 <= p <= 1:
            raise ValueError(f"llmkern.lstm: expected {name} in [0, 1], got {p}")
    return lengths, reset, seed


def _valid_lengths(lengths: Tensor, input: Tensor) -> Tensor:
    T, B = input.shape[:2]
    _checks.check_tensor("lstm", "lengths", lengths)
    _checks.check_dtype("lstm", "lengths", lengths, _checks.INDEX_DTYPES)
    _checks.check_shape("lstm", "lengths", lengths, "B", [B])
    _checks.check_same_device("lstm", {"input": input, "lengths": lengths})
    if (
        lengths.is_cuda
        or torch.compiler.is_compiling()
        or torch._C._functorch.is_functorch_wrapped_tensor(lengths)
    ):
        # Looking at the values would wait for them, or cannot be done.
        return lengths.clamp(0, T).to(torch.int64)
    wrong = ((lengths < 0) | (lengths > T)).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(
            f"llmkern.lstm: expected lengths in [0, T] = [0, {T}], got {lengths[row].item()} in row {row}"
        )
    return lengths.to(torch.int64)


def _validated(op: str, input_letters: str, *tensors: Any) -> tuple[Any, ...]:
    for name, tensor in zip(
        ("input", "h_0", "c_0", "weight_ih", "weight_hh"), tensors, strict=False
    ):
        _checks.check_tensor(op, name, tensor)
    cast = _autocast.cast_recurrent(tensors[2], *tensors)
    _validate(op, input_letters, *cast)
    return cast


def _validate(
    op: str,
    input_letters: str,
    input: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None = None,
    norm_gates: Tensor | None = None,
    norm_cell: Tensor | None = None,
) -> None:
    required: dict[str, Tensor | None] = {"input": input, "h_0": h_0, "c_0": c_0}
    required |= {"weight_ih": weight_ih, "weight_hh": weight_hh}
    optional = {"bias_ih": bias_ih, "bias_hh": bias_hh, "weight_hr": weight_hr}
    optional |= {"norm_gates": norm_gates, "norm_cell": norm_cell}
    _checks.check_float_like(op, {**required, **optional}, _checks.ANY_FLOAT_DTYPES)
    _checks.check_dim(op, "input", input, input_letters)
    _checks.check_dim(op, "weight_hh", weight_hh, "4*H, H" if weight_hr is None else "4*H, P")
    B, I, P = input.shape[-2], input.shape[-1], weight_hh.shape[1]  # noqa: E741
    H = P if weight_hr is None else weight_hh.shape[0] // 4
    for what, there in (("time step", input.dim() == 2 or input.shape[0]), ("hidden unit", H * P)):
        if not there:
            raise _checks.ShapeError(
                f"llmkern.{op}: expected at least one {what}, got input of shape {list(input.shape)} "
                f"and weight_hh of shape {list(weight_hh.shape)}"
            )
    if weight_hr is None:
        _checks.check_shape(op, "weight_hh", weight_hh, "4*H, H", [4 * H, H])
        _checks.check_shape(op, "h_0", h_0, "B, H", [B, H])
    else:
        _checks.check_shape(op, "weight_hh", weight_hh, "4*H, P", [4 * H, P])
        _checks.check_shape(op, "weight_hr", weight_hr, "P, H", [P, H])
        _checks.check_shape(op, "h_0", h_0, "B, P", [B, P])
    _checks.check_shape(op, "weight_ih", weight_ih, "4*H, I", [4 * H, I])
    _checks.check_shape(op, "c_0", c_0, "B, H", [B, H])
    for pair in (("bias_ih", "bias_hh"), ("norm_gates", "norm_cell")):
        if (optional[pair[0]] is None) != (optional[pair[1]] is None):
            raise ValueError(
                f"llmkern.{op}: expected both {' and '.join(pair)} or neither, got one"
            )
    shapes = {"bias_ih": ("4*H", [4 * H]), "bias_hh": ("4*H", [4 * H])}
    shapes |= {"norm_gates": ("2, 4*H", [2, 4 * H]), "norm_cell": ("2, H", [2, H])}
    for name, (letters, shape) in shapes.items():
        tensor = optional[name]
        if tensor is not None:
            _checks.check_shape(op, name, tensor, letters, shape)


@torch.library.register_fake("llmkern::lstm")
def _lstm_fake(*args: Any, **kwargs: Any) -> Any:
    call = Forward(*args, **kwargs)
    input, c_0 = call.input, call.c_0
    _validate("lstm", "T, B, I", *[getattr(call, name) for name in LAYER])
    T, B, _ = input.shape
    H, P = c_0.shape[1], call.h_0.shape[1]
    wide = _checks.widened(input.dtype)
    norm = call.save_gates and call.norm_gates is not None
    return ForwardResults(
        output=input.new_empty(T, B, P),
        h_n=input.new_empty(B, P),
        c_n=input.new_empty(B, H),
        cells=input.new_empty((T, B, H) if call.save_cells else (0,), dtype=wide),
        gates=input.new_empty((T, B, 4 * H) if call.save_gates else (0,)),
        normalized=input.new_empty((2, T, B, 4 * H) if norm else (0,)),
        scales=input.new_empty((T, B, 4) if norm else (0,), dtype=wide),
    )


@torch.library.register_fake("llmkern::lstm_step")
def _lstm_step_fake(input, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh):  # type: ignore[no-untyped-def]
    size = c_0.numel() * (_checks.widened(c_0.dtype).itemsize + 4 * c_0.dtype.itemsize)
    saved = c_0.new_empty(size, dtype=torch.uint8)
    return c_0.new_empty(c_0.shape), c_0.new_empty(c_0.shape), saved


@torch.library.register_fake("llmkern::lstm_step_backward")
def _lstm_step_backward_fake(grad_h, grad_c, c_0, weight_ih, weight_hh, saved):  # type: ignore[no-untyped-def]
    B, H = c_0.shape
    return tuple(c_0.new_empty(B, n) for n in (weight_ih.shape[1], H, H, 4 * H))


@torch.library.register_fake("llmkern::lstm_layers")
def _lstm_layers_fake(input, h_0, c_0, parameters, packed, batch_first=False):  # type: ignore[no-untyped-def]
    _checks.check_same_device(
        "lstm", {"input": input, "h_0": h_0, "c_0": c_0, "weight_ih": parameters[0]}
    )
    output = input.new_empty(*input.shape[:-1], h_0.shape[-1])
    return output, input.new_empty(h_0.shape), input.new_empty(h_0.shape)


@torch.library.register_fake("llmkern::lstm_backward")
def _lstm_backward_fake(*args: Any, **kwargs: Any) -> Any:
    call = Backward(*args, **kwargs)
    (T, B, _), columns = call.input.shape, call.weight_ih.shape[0]
    variants = call.weight_hr, call.norm_gates, call.lengths, call.reset
    zoneout = call.zoneout_h > 0 or call.zoneout_c > 0
    plain = all(v is None for v in variants) and not zoneout

    def gradient_of(tensor: Tensor | None, wanted: bool = True) -> Tensor:
        return call.input.new_empty(tensor.shape if wanted and tensor is not None else (0,))

    return BackwardResults(
        grad_input=gradient_of(call.input, call.need_input),
        grad_h_0=gradient_of(call.h_0),
        grad_c_0=gradient_of(call.c_0),
        grad_gates=call.input.new_empty((T, B, columns) if plain and not call.weights else (0,)),
        grad_weight_ih=gradient_of(call.weight_ih, call.weights),
        grad_weight_hh=gradient_of(call.weight_hh, call.weights),
        grad_bias=call.input.new_empty(columns if call.weights else 0),
        grad_weight_hr=gradient_of(call.weight_hr, call.weights),
        grad_norm_gates=gradient_of(call.norm_gates, call.weights),
        grad_norm_cell=gradient_of(call.norm_cell, call.weights),
    )


@torch.library.register_fake("llmkern::lstm_weight_gradients")
def _lstm_weight_gradients_fake(grad_gates, input, previous):  # type: ignore[no-untyped-def]
    like, columns = grad_gates[0], grad_gates[0].shape[1]
    return (
        like.new_empty(columns, input[0].shape[1]),
        like.new_empty(columns, previous[0].shape[1]),
        like.new_empty(columns),
    )
