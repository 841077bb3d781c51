# SPDX-License-Identifier: Apache-2.0
"""Dropout (Srivastava et al. 2014) by masks that are drawn where they are used, never stored.

    y = x * keep / (1 - p)      keep is 0 with probability p and 1 otherwise

keep is a function of the seed and of an element's place (csrc/kernels/mask.h): the same on CPU and GPU, on any number
of threads, and again in the backward pass, which keeps nothing but the seed.
"""

import torch
from torch import Generator, Tensor

from llmkern.ops import _checks, _derivatives, _linear_derivatives, _seed

_OP = "dropout"
_OPERATOR = torch.ops.llmkern.dropout.default


def dropout(
    x: Tensor,
    p: float = 0.5,
    *,
    locked: bool = False,
    seed: int | Tensor | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """Zeroes elements with probability p and divides the others by 1 - p.

    Of a weight it is DropConnect (Wan et al. 2013; of an LSTM's recurrent weights, Merity et al. 2017).

    Args:
        x: any shape; float32, float64, bfloat16 or float16.
        p: in [0, 1]; at 1 everything becomes 0.
        locked: x[0], x[1], ... lose the same elements: with x [T, B, D] a mask that stays over the steps of a sequence
            (Gal & Ghahramani 2016, https://arxiv.org/abs/1512.05287).
        seed: an int, or int64 []; the same seed drops the same elements of an x of the same shape. None draws one from
            torch's generator.
        generator: what seed=None draws from; torch's default one on the CPU otherwise.

    Returns:
        A tensor of x's shape and dtype; x itself where p is 0.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: p is out of range, locked comes with x of less than two dimensions, seed is no single one, or comes
            with a generator.

    Example:
        >>> llmkern.ops.dropout(torch.ones(2, 6), 0.5, locked=True, seed=1).tolist()
        [[0.0, 0.0, 0.0, 2.0, 0.0, 0.0], [0.0, 0.0, 0.0, 2.0, 0.0, 0.0]]
    """
    _checks.check_tensor(_OP, "x", x)
    _checks.check_dtype(_OP, "x", x, _checks.ANY_FLOAT_DTYPES)
    if not 0 <= p <= 1:
        raise ValueError(f"llmkern.dropout: expected p in [0, 1], got {p}")
    if locked and x.dim() < 2:
        raise ValueError(
            f"llmkern.dropout: expected x of two dimensions at least beside locked, got {list(x.shape)}"
        )
    single = _seed.one(_OP, seed, generator, x.device)
    if p == 0:
        return x
    return _OPERATOR(x, single, p, x[0].numel() if locked and x.shape[0] > 0 else x.numel())


@torch.library.register_fake("llmkern::dropout")
def _dropout_fake(x: Tensor, seed: Tensor, p: float, period: int) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("llmkern::mask")
def _mask_fake(seed: Tensor, purpose: int, rows: int, columns: int, p: float) -> Tensor:
    return seed.new_empty((rows, columns), dtype=torch.bool)


def _save_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, seed, *ctx.options = inputs
    ctx.save_for_backward(seed)
    ctx.save_for_forward(seed)


def _backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    """The operator is linear, and its matrix diagonal."""
    (seed,) = ctx.saved_tensors
    return (_OPERATOR(grad, seed, *ctx.options),)


def _jvp(ctx, tangent: Tensor, *_):  # type: ignore[no-untyped-def]
    (seed,) = ctx.saved_tensors
    return _OPERATOR(tangent, seed, *ctx.options)


def _vmap(info, in_dims, x: Tensor, seed: Tensor, *options):  # type: ignore[no-untyped-def]
    """One seed drops the same elements of every x, like ``randomness="same"``; seeds of a batch each their own."""
    if in_dims[1] is None:
        return _OPERATOR(x.movedim(in_dims[0], 0), seed, *options), 0
    return _derivatives.one_by_one(_OPERATOR, info.batch_size, in_dims, (x, seed, *options))


_linear_derivatives.register(
    _OPERATOR, setup_context=_save_for_backward, backward=_backward, jvp=_jvp, vmap=_vmap
)
