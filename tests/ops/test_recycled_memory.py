# SPDX-License-Identifier: Apache-2.0
"""Large results lie in memory that earlier steps used: no step takes fresh memory, no two live tensors share any."""

import copy
import gc
import io
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmkern import ops

T, B, H, V = 160, 16, 128, 1024
MIB = 1 << 20

pytestmark = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11),
    reason="torch takes no memory of others before 2.11",
)


class Stats(NamedTuple):
    held: int
    idle: int
    mapped: int
    of_threads: int  # bytes
    threads: int


def stats() -> Stats:
    return Stats(*torch.ops.llmkern.memory_stats())


def in_use() -> int:
    return stats().held - stats().idle


@pytest.fixture(autouse=True)
def others() -> Iterator[int]:
    """Nothing is idle; bytes that other tests still use."""
    gc.collect()
    ops.empty_cache()
    yield in_use()
    ops.empty_cache()


@pytest.fixture
def layer() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    x, state = torch.randn(T, B, H, requires_grad=True), torch.zeros(B, H)
    return (x, state, state, *nn.LSTM(H, H).parameters())


def lstm_step(layer: tuple[Tensor, ...], **options: Any) -> tuple[Tensor, ...]:
    wanted = [layer[0], *layer[3:]]
    return torch.autograd.grad(ops.lstm(*layer, **options)[0].square().sum(), wanted)


def loss_step(_: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x, weight = torch.ones(300, H, requires_grad=True), torch.ones(V, 2 * H)[:, :H].clone()
    loss = ops.linear_cross_entropy(x, weight.requires_grad_(), torch.arange(300))
    return torch.autograd.grad(loss, [x, weight])


def norm_step(layer: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    norms = torch.ones(2, 4 * H), torch.ones(2, H)
    return lstm_step(layer, norm_gates=norms[0], norm_cell=norms[1])


def cell_step(layer: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    wide = 1024
    h = c = torch.zeros(64, wide)
    weights = [torch.full((4 * wide, n), 1e-3, requires_grad=True) for n in (8, wide)]
    h, c = ops.lstm_cell(torch.ones(64, 8), h, c, *weights)
    return torch.autograd.grad(h.sum(), weights)


STEPS: dict[str, Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]] = {
    "lstm": lstm_step,
    "recompute": lambda layer: lstm_step(layer, recompute=True),
    "lengths": lambda layer: lstm_step(layer, lengths=torch.linspace(T, 5, B).long()),
    "norm": norm_step,
    "loss": loss_step,
    "cell": cell_step,
}


@pytest.mark.parametrize("name", STEPS)
def test_steady_steps_take_no_fresh_memory(
    name: str, layer: tuple[Tensor, ...], others: int
) -> None:
    step = STEPS[name]
    first = [grad.clone() for grad in step(layer)]
    # The first steps find blocks of other sizes, and of other tests; soon five steps in a row map none.
    for _ in range(10):
        before = stats()
        for _ in range(5):
            again = step(layer)
        if stats().mapped == before.mapped:
            break
    else:
        pytest.fail(f"expected steps that map no memory, got {before} and then {stats()}")
    assert stats().held >= others + 2 * MIB
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    del again
    assert in_use() == others  # everything has come back


def test_live_tensors_share_nothing(layer: tuple[Tensor, ...]) -> None:
    """Graphs that are kept, a second backward pass through one, and what is dropped in between."""
    outputs = [ops.lstm(layer[0] * (i + 1), *layer[1:])[0] for i in range(3)]
    copies = [output.clone() for output in outputs]
    first = torch.autograd.grad(outputs[0].sum(), layer[3:], retain_graph=True)
    kept = [grad.clone() for grad in first]
    outputs[1], copies[1] = outputs[2], copies[2]
    for scale in (5, 6):
        lstm_step((scale * layer[0].detach().requires_grad_(), *layer[1:]))
    second = torch.autograd.grad(outputs[0].sum(), layer[3:])
    for grads in (first, second):
        assert all(torch.equal(a, b) for a, b in zip(kept, grads, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(copies, outputs, strict=True))


def test_neighbours_do_not_agree_in_the_low_bits_of_their_addresses(
    layer: tuple[Tensor, ...],
) -> None:
    """A load of one would wait for a store into the other, 4 KiB or a multiple of it away."""
    outputs = [ops.lstm(*layer)[0] for _ in range(4)]
    places = [output.data_ptr() % 4096 // 64 for output in outputs]
    assert len(set(places)) == len(places)


def test_empty_cache_frees_what_is_idle_alone(layer: tuple[Tensor, ...], others: int) -> None:
    output = ops.lstm(*layer)[0]
    lstm_step(layer)
    alive = output.detach().clone()
    assert stats().idle > 0 and in_use() > others
    ops.empty_cache()
    assert stats().idle == 0 and in_use() > others
    assert torch.equal(output, alive)
    output.sum().backward()
    del output
    assert stats().idle > 0


def test_errors_give_back(others: int) -> None:
    """The kernels' dtype is looked at when the memory is there already."""
    x, weight = torch.ones(1024, 8, dtype=torch.int32), torch.ones(2048, 8, dtype=torch.int32)
    target = torch.zeros(1024, dtype=torch.int64)
    with pytest.raises(ValueError, match="float32, float64, bfloat16 or float16"):
        torch.ops.llmkern.linear_cross_entropy(x, weight, None, target, None, 1, -100, 0.0)
    assert stats().idle > 0 and in_use() == others


def test_other_threads_may_drop_results(layer: tuple[Tensor, ...], others: int) -> None:
    outputs = [ops.lstm(*layer)[0]]
    thread = threading.Thread(target=outputs.clear)
    thread.start()
    thread.join()
    assert stats().idle > 0 and in_use() == others


def test_threads_train_side_by_side(layer: tuple[Tensor, ...]) -> None:
    expected = lstm_step(layer)

    def same(_: int) -> bool:
        return all(torch.equal(a, b) for a, b in zip(expected, lstm_step(layer), strict=True))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(same, range(40)))


def test_hooks_and_checkpoints_on_saved_tensors(layer: tuple[Tensor, ...]) -> None:
    expected = lstm_step(layer)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy(), torch.from_numpy):
        hooked = lstm_step(layer)
    output = checkpoint(lambda x: ops.lstm(x, *layer[1:])[0], layer[0], use_reentrant=False)
    again = torch.autograd.grad(output.square().sum(), [layer[0], *layer[3:]])
    for grads in (hooked, again):
        assert all(torch.equal(a, b) for a, b in zip(expected, grads, strict=True))


def test_results_are_tensors_as_others(layer: tuple[Tensor, ...]) -> None:
    """Copied, stored, shared between processes, moved; but not resized: a step would lose its block."""
    output = ops.lstm(*layer)[0].detach()
    file = io.BytesIO()
    torch.save(output, file)
    file.seek(0)
    for other in (copy.deepcopy(output), torch.load(file)):
        assert torch.equal(other, output) and other.data_ptr() != output.data_ptr()
    expected = output.clone()
    assert torch.equal(output.share_memory_(), expected)  # its own memory has gone back
    with pytest.raises(RuntimeError, match="not resizable"):
        ops.lstm(*layer)[0].detach().resize_(2 * T, B, H)


def test_results_without_gradients_can_be_resized(layer: tuple[Tensor, ...], others: int) -> None:
    with torch.no_grad():
        output = ops.lstm(*layer)[0]
    assert output.resize_(2 * T, B, H).shape == (2 * T, B, H)
    assert stats().held == others


# ---- what threads keep


def infer(layer: tuple[Tensor, ...]) -> Tensor:
    with torch.no_grad():
        return ops.lstm(*layer)[0]


@pytest.mark.parametrize("threads", [1, 2])
def test_empty_cache_frees_what_threads_keep(
    layer: tuple[Tensor, ...], on_threads: Callable[..., Any], threads: int
) -> None:
    before = on_threads(threads, lambda: infer(layer))
    with ThreadPoolExecutor(1) as pool:  # a thread of the user's, idle now
        pool.submit(infer, layer).result()
        assert stats().of_threads > 0
        ops.empty_cache()
        assert stats().of_threads == 0
    assert torch.equal(infer(layer), before)
    ops.empty_cache()
    assert stats().idle == stats().of_threads == 0


def test_empty_cache_takes_nothing_from_threads_at_work(layer: tuple[Tensor, ...]) -> None:
    expected = lstm_step(layer)
    stop = threading.Event()

    def empty() -> int:
        times = 0
        while not stop.is_set():
            ops.empty_cache()
            times += 1
        return times

    def train() -> bool:
        steps = (lstm_step(layer) for _ in range(5))
        return all(
            torch.equal(*pair) for step in steps for pair in zip(step, expected, strict=True)
        )

    with ThreadPoolExecutor(3) as pool:
        emptied = pool.submit(empty)
        try:
            assert all([job.result() for job in [pool.submit(train), pool.submit(train)]])
        finally:
            stop.set()
        assert emptied.result() > 0
