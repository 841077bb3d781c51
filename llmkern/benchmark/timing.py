# SPDX-License-Identifier: Apache-2.0
"""The stopwatch: correctness first, then all contenders in turn, round after round.

A shared machine drifts by tens of percent within seconds: clocks, neighbours, temperature. Contenders timed one after
the other would each meet another machine. Timed in turn they meet the same one, and a ratio taken inside each round
cancels what is left.
"""

import gc
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from llmkern.benchmark.case import OURS, Case, Workload, rival
from llmkern.benchmark.device import build, clock_of, first_line


@dataclass(frozen=True)
class Protocol:
    """How long to look.

    Args:
        seconds: time to spend on the rounds of a case.
        min_rounds: rounds even when they take longer than that.
        max_rounds: rounds at most.
        sample_seconds: a sample lasts at least this long; shorter calls are repeated within it.
    """

    seconds: float = 1.5
    min_rounds: int = 5
    max_rounds: int = 25
    sample_seconds: float = 0.02


@dataclass(frozen=True)
class Spread:
    """Median and interquartile range."""

    median: float
    iqr: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        if len(values) == 1:
            return cls(values[0], 0.0)
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(statistics.median(values), high - low)


@dataclass(frozen=True)
class Timing:
    """The samples of one contender: seconds a call, one for each round; ``calls`` calls made a sample."""

    samples: list[float]
    calls: int

    @cached_property
    def seconds(self) -> Spread:
        return Spread.of(self.samples)


@dataclass(frozen=True)
class Result:
    """What was measured of a case; llmkern is the first of ``timings``.

    ``copies`` sets of inputs were taken in turn; ``absent`` says why a peer took no part.
    """

    case: Case
    error: float
    timings: Mapping[str, Timing]
    copies: int = 1
    absent: Mapping[str, str] = field(default_factory=dict)

    def speedup(self, peer: str) -> Spread:
        """How many times as fast as the peer llmkern is, graph against graph: over the ratios of each round."""
        ours, theirs = self.timings[rival(peer)].samples, self.timings[peer].samples
        return Spread.of([b / a for a, b in zip(ours, theirs, strict=True)])


def check(case: Case, device: torch.device | str = "cpu") -> float:
    """Builds a case and verifies its results without timing anything.

    Args:
        case: what to verify.
        device: where.

    Returns:
        The largest error, in the measure of the case's own check.

    Raises:
        RuntimeError: a result is wrong.
    """
    workload = build(case, torch.device(device))
    with torch.inference_mode(not case.training):
        return _verified(case, workload)[1]


def measure(
    case: Case,
    protocol: Protocol | None = None,
    clock: Callable[[], float] | None = None,
    device: torch.device | str = "cpu",
) -> Result:
    """Verifies a case, then times it.

    Args:
        case: what to measure.
        protocol: how long.
        clock: seconds since whenever; None is the device's own.
        device: where.

    Returns:
        The samples of every contender.

    Raises:
        RuntimeError: a result is wrong; nothing was timed.
    """
    protocol = Protocol() if protocol is None else protocol
    workload = build(case, torch.device(device))
    clock = clock_of(torch.device(device)) if clock is None else clock
    with torch.inference_mode(not case.training):
        workload, error = _verified(case, workload)
        runs = {name: contender.run for name, contender in workload.contenders.items()}
        calls = {name: _calls_a_sample(run, protocol, clock) for name, run in runs.items()}
        samples: dict[str, list[float]] = {name: [] for name in runs}
        collecting = gc.isenabled()
        gc.disable()
        try:
            start, rounds = clock(), 0
            while rounds < protocol.min_rounds or (
                rounds < protocol.max_rounds and clock() - start < protocol.seconds
            ):
                for name, run in runs.items():
                    samples[name].append(_sample(run, calls[name], clock))
                rounds += 1
        finally:
            if collecting:
                gc.enable()
    timings = {name: Timing(samples[name], calls[name]) for name in runs}
    return Result(case, error, timings, workload.copies, workload.absent)


def _verified(case: Case, workload: Workload) -> tuple[Workload, float]:
    """The workload without the peers that cannot do it, and the largest error of the others."""
    names = list(workload.contenders)
    if names[0] != OURS:
        raise ValueError(
            f"llmkern.benchmark: expected {OURS!r} as the first contender, got {names[0]!r}"
        )
    tensors: dict[str, Any] = {}
    absent = dict(workload.absent)
    for name, contender in workload.contenders.items():
        try:
            tensors[name] = contender.tensors(contender.run())
        except RuntimeError as error:
            if name == rival(name):
                raise
            absent[name] = first_line(error)
    able = {name: workload.contenders[name] for name in tensors}
    try:
        return replace(workload, contenders=able, absent=absent), workload.check(tensors)
    except RuntimeError as error:
        raise RuntimeError(f"llmkern.benchmark: {case.family} {case.name}: {error}") from error


def _calls_a_sample(run: Callable[[], Any], protocol: Protocol, clock: Callable[[], float]) -> int:
    """How many calls make a sample long enough; the calls made to find out are the warm-up."""
    calls = 1
    while True:
        elapsed = _elapsed(run, calls, clock)
        if elapsed < 10 * protocol.sample_seconds:
            # The shorter of two: a hiccup must not pass for the duration of a call.
            elapsed = min(elapsed, _elapsed(run, calls, clock))
        if elapsed >= protocol.sample_seconds / 4:
            return max(1, math.ceil(protocol.sample_seconds * calls / elapsed))
        calls *= 4


def _sample(run: Callable[[], Any], calls: int, clock: Callable[[], float]) -> float:
    """Seconds a call.

    The first call after another contender finds that one's data in the caches. A call that is repeated within the
    sample is short enough to care, and cheap enough to be made once more, untimed.
    """
    if calls > 1:
        run()
    return _elapsed(run, calls, clock) / calls


def _elapsed(run: Callable[[], Any], calls: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(calls):
        run()
    return clock() - start
