# SPDX-License-Identifier: Apache-2.0
"""What every operator promises on a GPU beyond tests/promises.py; each family's tests run all of these."""

from collections.abc import Sequence

import pytest
import torch

from tests import promises
from tests.promises import Op, assert_same_bits, leaf, moved, results

__all__ = ["Op", "assert_same_bits", "every_op", "every_promise", "leaf", "moved", "results"]

DEVICE = torch.device("cuda")
SIXTEEN_BIT = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, torch.float64, *SIXTEEN_BIT)
# Far longer than any call takes on the host: about half a second of a GPU's clock.
A_WHILE = 1_000_000_000


# ---- the promises: each takes an Op ----


def same_bits_on_every_run(op: Op) -> None:
    promises.same_bits_on_every_run(op, DEVICE)


def runs_on_the_current_stream(op: Op) -> None:
    """On a stream whose inputs are filled late: who does not wait for it reads zeros."""
    expected = results(op.forward, moved(op.arguments, DEVICE))
    sources = moved(op.arguments, DEVICE)
    late = [None if t is None else torch.zeros_like(t) for t in sources]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(A_WHILE // 10)
        for target, source in zip(late, sources, strict=True):
            if target is not None:
                target.copy_(source.detach())
                target.requires_grad_(source.requires_grad)
        got = results(op.forward, late)
    stream.synchronize()
    assert_same_bits(got, expected)


def runs_on_the_second_device(op: Op) -> None:
    """While the first one is current, before and after."""
    expected = results(op.forward, moved(op.arguments, "cuda:0"))
    with torch.cuda.device(0):
        got = results(op.forward, moved(op.arguments, "cuda:1"))
        assert torch.cuda.current_device() == 0
    assert {t.device.index for t in got} == {1}
    assert_same_bits(got, expected)


def can_be_captured_and_replayed(op: Op) -> None:
    """With other values in the same tensors, a graph gives what a call gives."""
    arguments = moved(op.arguments, DEVICE)
    expected = results(op.forward, arguments)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            results(op.forward, arguments)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = results(op.forward, arguments)
    for _ in range(2):
        for result in got:
            result.zero_()
        graph.replay()
        assert_same_bits(got, expected)
    with torch.no_grad():
        for t in arguments:
            if t is not None and t.is_floating_point():
                t.mul_(-0.5)
    graph.replay()
    replayed = [t.clone() for t in got]
    assert_same_bits(replayed, results(op.forward, arguments))


def compiles_in_one_graph(op: Op) -> None:
    arguments = moved(op.arguments, DEVICE)
    torch.compiler.reset()
    compiled = torch.compile(op.forward, fullgraph=True)
    assert_same_bits(results(compiled, arguments), results(op.forward, arguments))


def never_waits_for_the_gpu(op: Op) -> None:
    """The call returns while the GPU is still busy with what came before it; torch saw no synchronisation either."""
    arguments = moved(op.arguments, DEVICE)
    results(op.forward, arguments)  # constants come from the host once, memory from the driver
    torch.cuda.synchronize()
    busy = torch.cuda.Event()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(A_WHILE)
        busy.record()
        results(op.forward, arguments)
        assert not busy.query(), "the call waited for the GPU"
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()


PROMISES = [
    same_bits_on_every_run,
    runs_on_the_current_stream,
    pytest.param(
        runs_on_the_second_device,
        marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
    ),
    can_be_captured_and_replayed,
    # The compiler warns about settings and versions that are not this project's.
    pytest.param(compiles_in_one_graph, marks=pytest.mark.filterwarnings("default")),
    never_waits_for_the_gpu,
]
every_promise = pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.__name__)


def every_op(ops: Sequence[Op]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("op", ops, ids=str)
