# SPDX-License-Identifier: Apache-2.0
"""What this machine can do, measured in the same run as the kernels: arithmetic and the bandwidth of each memory level.

Everything here is the best of many runs of torch's own operators, hence a lower bound of the true ceiling: a kernel may
come out above 100 %. Data sheets are no help: a virtual machine knows neither its clock nor its share of the cache.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from llmkern.benchmark.case import Case, Phase
from llmkern.benchmark.machine import cache_bytes

# The name of arithmetic as what binds a case, by the unit that does it.
FMA, TENSOR_CORES = "FMA", "tensor cores"
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
    """Measured limits: operations a second by dtype, and the memory levels from near to far.

    ``load_average`` is that of the minute before: what the machine was doing besides. ``methods`` says how all this
    was measured.
    """

    threads: int
    load_average: float
    peaks: Mapping[torch.dtype, float]
    levels: tuple[Level, ...]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    methods: Mapping[str, str] = field(default_factory=lambda: METHODS)

    def level(self, working_set: float) -> Level:
        """The nearest level that could hold so many bytes."""
        return next((x for x in self.levels if working_set <= x.capacity), self.levels[-1])

    def floor(self, case: Case) -> float:
        """The least time of a case, in seconds: each phase at the slower of arithmetic and memory."""
        return sum(max(self._seconds(case, phase)) for phase in case.phases)

    def bound(self, case: Case) -> tuple[str, float]:
        """What binds the longest phase of a case, ("FMA", operations/s) or ("read L3", bytes/s)."""
        phase = max(case.phases, key=lambda phase: max(self._seconds(case, phase)))
        arithmetic, memory = self._seconds(case, phase)
        if arithmetic >= memory:
            unit = FMA if case.dtype in (torch.float32, torch.float64) else TENSOR_CORES
            return unit, self.peaks[case.dtype]
        level, bandwidth = self._memory(case, phase)
        return f"{phase.traffic} {level.name}", bandwidth

    def _seconds(self, case: Case, phase: Phase) -> tuple[float, float]:
        arithmetic = phase.flops / self.peaks[case.dtype] if phase.flops else 0.0
        memory = phase.bytes / self._memory(case, phase)[1]
        return arithmetic * phase.repeats, memory * phase.repeats

    def _memory(self, case: Case, phase: Phase) -> tuple[Level, float]:
        """The level a phase finds its data in, and its bandwidth; only a GPU's cases are built to miss the caches."""
        cold = case.cold and self.device.type == "cuda"
        level = self.levels[-1] if cold else self.level(phase.working_set)
        return level, level.read if phase.traffic == "read" else level.copy


def measure_ceilings(seconds: float = 0.15) -> Ceilings:
    """Measures the processor with the current number of threads; :mod:`ceilings_cuda` measures a GPU.

    Args:
        seconds: time for each of about a dozen probes.

    Returns:
        The ceilings.
    """
    threads, load_average = torch.get_num_threads(), os.getloadavg()[0]
    with torch.inference_mode():
        peaks = {
            dtype: max(flops / _best(run, seconds) for run, flops in _arithmetic_probes(dtype))
            for dtype in (torch.float32, torch.bfloat16)
        }
        levels = tuple(
            Level(name, capacity, _read(name, buffer, threads, seconds), _copy(buffer, seconds))
            for name, capacity, buffer in _buffers(threads)
        )
    return Ceilings(threads, load_average, peaks, levels)


def _buffers(threads: int) -> Iterator[tuple[str, float, int]]:
    """(level, capacity, bytes of the buffer to measure with), near to far."""
    second, third = cache_bytes(2, threads), cache_bytes(3, threads)
    yield "L2", second, second // 2
    if third > second:
        yield "L3", third, third // 2
    yield "DRAM", float("inf"), min(max(4 * third, 64 << 20), 512 << 20)


def _arithmetic_probes(dtype: torch.dtype) -> Iterator[tuple[Callable[[], Any], float]]:
    for n in (512, 1024):
        a, b, out = (torch.ones(n, n, dtype=dtype) for _ in range(3))
        yield lambda a=a, b=b, out=out: torch.mm(a, b, out=out), 2.0 * n**3  # type: ignore[misc]
    image, kernel = (torch.ones(s, dtype=dtype) for s in ((1, 128, 34, 34), (128, 128, 3, 3)))
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
