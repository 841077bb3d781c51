# SPDX-License-Identifier: Apache-2.0
"""The same case on a CPU or on a GPU: where it is built, what a GPU adds to it, and which clock it is timed by.

A GPU adds two things. Inputs that a program would find in memory, not in the L2 cache, are built several times over and
taken in turn. And small work is also timed as a CUDA graph, without the host's part, which is longer than its own.
"""

import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from llmkern.benchmark.case import GRAPH, OURS, Case, Contender, Workload

# Input sets together are at least this many times the cache; that many sets are enough to outweigh any launch.
_CACHES, _MOST_COPIES = 3, 256


class EventClock:
    """Seconds on a GPU's own clock, by events; reading it waits for all work queued so far.

    Differences are added up: a single one since the start would be a float32 and lose the microseconds.
    """

    def __init__(self) -> None:
        self._seconds, self._last = 0.0, self._event()

    def __call__(self) -> float:
        event = self._event()
        self._seconds += self._last.elapsed_time(event) / 1e3
        self._last = event
        return self._seconds

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        return event


def clock_of(device: torch.device) -> Callable[[], float]:
    return EventClock() if device.type == "cuda" else time.perf_counter


def build(case: Case, device: torch.device) -> Workload:
    """Builds a case on a device; on a GPU with as many sets of inputs, and with the graphs, that it asks for."""
    if device.type != "cuda":
        with device:
            return case.build()
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    copies = copies_needed(case, cache)
    with device:
        workloads = [case.build() for _ in range(copies)]
    if case.graph:
        with torch.inference_mode(not case.training):
            workloads = [with_graphs(workload, captured) for workload in workloads]
    return in_turn(workloads)


def copies_needed(case: Case, cache: int) -> int:
    """How many sets of inputs make a cache of so many bytes useless."""
    if not case.cold:
        return 1
    return min(_MOST_COPIES, math.ceil(_CACHES * cache / case.bytes) + 1)


def in_turn(workloads: list[Workload]) -> Workload:
    """One workload of many: each run of a contender takes the next one's inputs, a check's runs the first one's."""
    first = workloads[0]
    contenders = {
        name: Contender(_rotating([w.contenders[name].run for w in workloads]), contender.tensors)
        for name, contender in first.contenders.items()
        if all(name in w.contenders for w in workloads)
    }
    absent = {name: why for w in workloads for name, why in w.absent.items()}
    return Workload(contenders, first.check, len(workloads), absent)


def _rotating(runs: list[Callable[[], Any]]) -> Callable[[], Any]:
    if len(runs) == 1:
        return runs[0]
    next_run = 0

    def run() -> Any:
        nonlocal next_run
        current = runs[next_run]
        next_run = (next_run + 1) % len(runs)
        return current()

    return run


def with_graphs(workload: Workload, capture: Callable[[Contender], Contender]) -> Workload:
    """Beside every contender that can be captured, the same as a graph; a peer that breaks is named as absent."""
    contenders, absent = dict(workload.contenders), dict(workload.absent)
    for name, contender in workload.contenders.items():
        if not contender.capturable:
            continue
        try:
            contenders[name + GRAPH] = capture(contender)
        except RuntimeError as error:
            if name == OURS:
                raise
            absent[name + GRAPH] = first_line(error)
    return Workload(contenders, workload.check, workload.copies, absent)


def captured(contender: Contender) -> Contender:
    """The contender as a CUDA graph that is replayed."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # handles, workspaces and constants are made before the capture
            contender.run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = contender.run()

    def replay() -> Any:
        graph.replay()
        return result

    return Contender(replay, contender.tensors)


def first_line(error: Exception) -> str:
    lines: Iterable[str] = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {next(iter(lines))[:200]}"
