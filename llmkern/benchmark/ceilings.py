# SPDX-License-Identifier: Apache-2.0
"""What this machine can do, measured in the same run as the kernels: arithmetic and the bandwidth of each memory level.

Everything here is the best of many runs of torch's own operators, hence a lower bound of the true ceiling: a kernel may
come out above 100 %. Data sheets are no help: a virtual machine knows neither its clock nor its share of the cache.
"""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from llmkern.benchmark.case import Case, Phase
from llmkern.benchmark.machine import cache_bytes

METHODS = {
    "peak": "best of torch.mm at 512 and 1024 and a 3x3 convolution of 128 channels, float32: a lower bound",
    "read": "best of Tensor.sum and Tensor.amax; at L2, each thread reads its own slice 64 times in one call",
    "copy": "best of Tensor.copy_, bytes counted both ways",
}


@dataclass(frozen=True)
class Level:
    """A memory level: its name, the bytes it holds for all threads together, and bytes/s."""

    name: str
    capacity: float
    read: float
    copy: float


@dataclass(frozen=True)
class Ceilings:
    """Measured limits: float32 operations a second, and the memory levels from near to far.

    ``load_average`` is that of the minute before: what the machine was doing besides.
    """

    threads: int
    load_average: float
    peak: float
    levels: tuple[Level, ...]

    def level(self, working_set: float) -> Level:
        """The nearest level that could hold so many bytes."""
        return next((x for x in self.levels if working_set <= x.capacity), self.levels[-1])

    def bandwidth(self, phase: Phase) -> float:
        level = self.level(phase.working_set)
        return level.read if phase.traffic == "read" else level.copy

    def floor(self, case: Case) -> float:
        """The least time of a case, in seconds: each phase at the slower of arithmetic and memory."""
        return sum(max(self._seconds(phase)) for phase in case.phases)

    def bound(self, case: Case) -> tuple[str, float]:
        """What binds the longest phase of a case, ("FMA", operations/s) or ("read L3", bytes/s)."""
        phase = max(case.phases, key=lambda phase: max(self._seconds(phase)))
        arithmetic, memory = self._seconds(phase)
        if arithmetic >= memory:
            return "FMA", self.peak
        name = f"{phase.traffic} {self.level(phase.working_set).name}"
        return name, self.bandwidth(phase)

    def _seconds(self, phase: Phase) -> tuple[float, float]:
        arithmetic = phase.flops / self.peak
        return arithmetic * phase.repeats, phase.bytes / self.bandwidth(phase) * phase.repeats


def measure_ceilings(seconds: float = 0.15) -> Ceilings:
    """Measures the machine with the current number of threads.

    Args:
        seconds: time for each of about ten probes.

    Returns:
        The ceilings.
    """
    threads, load_average = torch.get_num_threads(), os.getloadavg()[0]
    with torch.inference_mode():
        peak = max(flops / _best(run, seconds) for run, flops in _arithmetic_probes())
        levels = tuple(
            Level(name, capacity, _read(name, buffer, threads, seconds), _copy(buffer, seconds))
            for name, capacity, buffer in _buffers(threads)
        )
    return Ceilings(threads, load_average, peak, levels)


def _buffers(threads: int) -> Iterator[tuple[str, float, int]]:
    """(level, capacity, bytes of the buffer to measure with), near to far."""
    second, third = cache_bytes(2, threads), cache_bytes(3, threads)
    yield "L2", second, second // 2
    if third > second:
        yield "L3", third, third // 2
    yield "DRAM", float("inf"), min(max(4 * third, 64 << 20), 512 << 20)


def _arithmetic_probes() -> Iterator[tuple[Callable[[], Any], float]]:
    for n in (512, 1024):
        a, b, out = torch.rand(n, n), torch.rand(n, n), torch.empty(n, n)
        yield lambda a=a, b=b, out=out: torch.mm(a, b, out=out), 2.0 * n**3  # type: ignore[misc]
    image, kernel = torch.rand(1, 128, 34, 34), torch.rand(128, 128, 3, 3)
    yield lambda: F.conv2d(image, kernel), 2.0 * 128 * 128 * 9 * 32 * 32


def _read(level: str, buffer: int, threads: int, seconds: float) -> float:
    if level == "L2":
        # One pass over so little data lasts no longer than the call itself, so a call makes many passes.
        reads = 64 * threads
        rows = torch.rand(buffer // 4 // threads).expand(reads, -1)
        runs: list[Callable[[], Any]] = [lambda: rows.sum(1), lambda: rows.amax(1)]
        count = reads * rows.shape[1]
    else:
        data = torch.rand(buffer // 4)
        runs = [data.sum, data.amax]
        count = data.numel()
    return 4 * count / min(_best(run, seconds) for run in runs)


def _copy(buffer: int, seconds: float) -> float:
    source = torch.rand(buffer // 8)
    target = torch.empty_like(source)
    return 8 * source.numel() / _best(lambda: target.copy_(source), seconds)


def _best(run: Callable[[], Any], seconds: float) -> float:
    """The shortest of at least five runs."""
    best, end, runs = float("inf"), time.perf_counter() + seconds, 0
    while runs < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
        runs += 1
    return best
