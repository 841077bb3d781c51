# SPDX-License-Identifier: Apache-2.0
"""Every operator and layer keeps every promise on the CPU: see promises.py."""

import itertools

import pytest
import torch

from tests import promises

pytestmark = pytest.mark.usefixtures("one_thread")


# torch's own, the first time it is asked for derivatives in forward mode.
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@promises.every_promise_of(promises.OPS, promises.same_bits_on_any_number_of_threads)
def test_promise(promise, op):
    promise(op, "cpu")


class ZeroTangent(torch.autograd.Function):
    """A square whose derivative in forward mode is silently zero."""

    @staticmethod
    def forward(x):
        return x * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x * grad

    @staticmethod
    def jvp(ctx, tangent):
        return torch.zeros_like(tangent)


def ignoring_strides(x):
    return torch.as_strided(x, x.shape, (x.shape[1], 1)) * 2


CALLS = itertools.count()
BROKEN = [
    (promises.takes_any_strides, ignoring_strides),
    (promises.same_bits_on_every_run, lambda x: x + next(CALLS)),
    (promises.gradients_are_right, lambda x: x.detach() * x),
    (promises.has_forward_derivatives, ZeroTangent.apply),
]


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize(("promise", "forward"), BROKEN, ids=lambda p: getattr(p, "__name__", ""))
def test_broken_operators_are_seen(promise, forward):
    op = promises.Op("broken", forward, (promises.leaf(4, 3, dtype=torch.float64),))
    with pytest.raises((AssertionError, RuntimeError)):
        promise(op, "cpu")
