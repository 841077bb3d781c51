# SPDX-License-Identifier: Apache-2.0
"""LSTM layer and cell (Hochreiter & Schmidhuber 1997, forget gate of Gers et al. 2000); gates in order i, f, g, o.

i, f, o = sigmoid(...)   g = tanh(...)   of   W_ih x_t + b_ih + W_hh h_{t-1} + b_hh
c_t = f * c_{t-1} + i * g
h_t = o * tanh(c_t)
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llmkern.ops import _autocast, _checks


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
    packed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs one LSTM layer in one direction over all steps.

    Args:
        input: [T, B, I], T at least 1; float32 or float64, on CUDA also bfloat16 or float16, whose sums and cell state
            are float32. Under autocast on CUDA every tensor is cast to its dtype.
        h_0, c_0: initial states, [B, H].
        weight_ih: [4*H, I], gates i, f, g, o. weight_hh: [4*H, H].
        bias_ih, bias_hh: [4*H], both or neither.
        reverse: run from the last step to the first; outputs stay at the step of their input.
        lengths: int64 [B], each in [0, T]: row b runs over its first lengths[b] steps alone, backwards from the last of
            them with ``reverse``. None: every row runs over all.
        packed: what :func:`lstm_pack` made of these weights, to save the copy at every call. It is not looked at
            whether the weights have changed since.

    Returns:
        output [T, B, H], 0 beyond a row's length, and the states after the last step that ran: h_n [B, H], c_n [B, H].

    Raises:
        TypeError: an argument is no tensor, or its dtype is another one.
        ValueError: a shape or a device does not fit.

    Example:
        >>> x, state = torch.randn(35, 20, 256), torch.zeros(20, 512)
        >>> w_ih, w_hh = torch.randn(2048, 256) / 16, torch.randn(2048, 512) / 23
        >>> output, h_n, c_n = llmkern.ops.lstm(x, state, state, w_ih, w_hh)
    """
    tensors = _validated("lstm", "T, B, I", input, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh)
    if lengths is not None:
        lengths = _valid_lengths(lengths, input)
    output, h_n, c_n, _, _ = torch.ops.llmkern.lstm.default(
        *tensors, lengths, packed, reverse, _differentiable(tensors)
    )
    return output, h_n, c_n


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
    step, *others = _validated(
        "lstm_cell", "B, I", input, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh
    )
    _, h_1, c_1, _, _ = torch.ops.llmkern.lstm.default(
        step.unsqueeze(0), *others, None, packed, False, _differentiable((step, *others))
    )
    return h_1, c_1


def lstm_pack(weight_ih: Tensor, weight_hh: Tensor) -> Tensor:
    """The weights in the order in which the CPU kernels read them, for ``lstm(..., packed=...)``.

    Args:
        weight_ih: [4*H, I]. weight_hh: [4*H, H]. On the CPU, float32 or float64.

    Returns:
        A vector as large as both. Under another instruction set (``llmkern.info()["cpu_isa"]``) it is not used.
    """
    return torch.ops.llmkern.lstm_pack.default(weight_ih.detach(), weight_hh.detach())


def _differentiable(tensors: Sequence[Tensor | None]) -> bool:
    """Whether there may be a backward pass, which needs what the forward pass computed on the way."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _valid_lengths(lengths: Tensor, input: Tensor) -> Tensor:
    T, B = input.shape[:2]
    _checks.check_tensor("lstm", "lengths", lengths)
    _checks.check_dtype("lstm", "lengths", lengths, _checks.INDEX_DTYPES)
    _checks.check_shape("lstm", "lengths", lengths, "B", [B])
    _checks.check_same_device("lstm", {"input": input, "lengths": lengths})
    if (
        lengths.is_cuda or torch.compiler.is_compiling()
    ):  # looking at the values would wait for them
        return lengths.clamp(0, T).to(torch.int64)
    wrong = ((lengths < 0) | (lengths > T)).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(
            f"llmkern.lstm: expected lengths in [0, T] = [0, {T}], got {lengths[row].item()} in row {row}"
        )
    return lengths.to(torch.int64)


def _validated(op: str, input_letters: str, *tensors: Tensor | None) -> tuple[Any, ...]:
    for name, tensor in zip(
        ("input", "h_0", "c_0", "weight_ih", "weight_hh"), tensors, strict=False
    ):
        _checks.check_tensor(op, name, tensor)
    cast = _autocast.cast(*tensors)
    _validate(op, input_letters, *cast)  # type: ignore[arg-type]
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
) -> None:
    required: dict[str, Tensor | None] = {"input": input, "h_0": h_0, "c_0": c_0}
    required |= {"weight_ih": weight_ih, "weight_hh": weight_hh}
    _checks.check_float_like(op, {**required, "bias_ih": bias_ih, "bias_hh": bias_hh})
    _checks.check_dim(op, "input", input, input_letters)
    _checks.check_dim(op, "weight_hh", weight_hh, "4*H, H")
    B, I, H = input.shape[-2], input.shape[-1], weight_hh.shape[1]  # noqa: E741
    for what, there in (("time step", input.dim() == 2 or input.shape[0]), ("hidden unit", H)):
        if not there:
            raise ValueError(
                f"llmkern.{op}: expected at least one {what}, got input of shape {list(input.shape)} "
                f"and weight_hh of shape {list(weight_hh.shape)}"
            )
    _checks.check_shape(op, "weight_hh", weight_hh, "4*H, H", [4 * H, H])
    _checks.check_shape(op, "weight_ih", weight_ih, "4*H, I", [4 * H, I])
    _checks.check_shape(op, "h_0", h_0, "B, H", [B, H])
    _checks.check_shape(op, "c_0", c_0, "B, H", [B, H])
    if (bias_ih is None) != (bias_hh is None):
        raise ValueError(f"llmkern.{op}: expected both bias_ih and bias_hh or neither, got one")
    for name, bias in (("bias_ih", bias_ih), ("bias_hh", bias_hh)):
        if bias is not None:
            _checks.check_shape(op, name, bias, "4*H", [4 * H])


@torch.library.register_fake("llmkern::lstm")
def _lstm_fake(  # type: ignore[no-untyped-def]
    input, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh, lengths, packed, reverse, save
):
    T, B, _ = input.shape
    H = weight_hh.shape[1]
    state = input.new_empty(B, H)
    saved = T if save else 0
    cells = input.new_empty(saved, B, H, dtype=_checks.widened(input.dtype))
    gates = input.new_empty(saved, B, 4 * H)
    return input.new_empty(T, B, H), state, torch.empty_like(state), cells, gates


@torch.library.register_fake("llmkern::lstm_backward")
def _lstm_backward_fake(  # type: ignore[no-untyped-def]
    grad_output,
    grad_h_n,
    grad_c_n,
    input,
    h_0,
    c_0,
    weight_ih,
    weight_hh,
    lengths,
    output,
    cells,
    gates,
    reverse,
):
    dense = [input.new_empty(t.shape) for t in (input, h_0, c_0, weight_ih, weight_hh)]
    return *dense, input.new_empty(weight_hh.shape[0])


def _save_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    input, h_0, c_0, weight_ih, weight_hh, bias_ih, _, lengths, _, ctx.reverse, ctx.saved = inputs
    step_output, _, _, cells, gates = output
    ctx.has_bias = bias_ih is not None
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(cells, gates)
    ctx.save_for_backward(input, h_0, c_0, weight_ih, weight_hh, lengths, step_output, cells, gates)


def _backward(ctx, grad_output, grad_h_n, grad_c_n, _cells, _gates):  # type: ignore[no-untyped-def]
    if not ctx.saved:
        raise RuntimeError("llmkern.lstm: expected save=True for a backward pass, got False")
    *grads, grad_bias = torch.ops.llmkern.lstm_backward.default(
        grad_output, grad_h_n, grad_c_n, *ctx.saved_tensors, ctx.reverse
    )
    if not ctx.has_bias:
        return *grads, *[None] * 6
    # Two tensors: autograd may add into a gradient in place.
    return *grads, grad_bias, grad_bias.clone(), *[None] * 4


def _refuse_double_backward(ctx, *grads):  # type: ignore[no-untyped-def]
    raise RuntimeError(
        "llmkern.lstm: expected a single backward pass, got a request for second derivatives; "
        "use torch.nn.LSTM where they are needed"
    )


torch.library.register_autograd("llmkern::lstm", _backward, setup_context=_save_for_backward)
torch.library.register_autograd("llmkern::lstm_backward", _refuse_double_backward)
