# SPDX-License-Identifier: Apache-2.0
"""Runs every case of the bench files through llmkern.benchmark, prints one table a family, and keeps the results.

The harness times all contenders of a case together, in turn, which pytest-benchmark's own loop cannot: it knows one
function a test. So the harness holds the stopwatch, and pytest-benchmark is handed llmkern's samples afterwards, by a
clock that replays them: its statistics, ``--benchmark-json`` and ``--benchmark-compare`` work on what was measured.
"""

import time
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import cached_property
from pathlib import Path

import pytest
import torch

from llmkern.benchmark import (
    OURS,
    Case,
    Ceilings,
    Protocol,
    Result,
    check,
    document,
    measure,
    measure_ceilings,
    measure_cuda_ceilings,
    summary,
    table,
    write_document,
)

RESULTS = Path(__file__).parent / "results"


class ReplayClock:
    """A clock that moves on by one recorded sample whenever it is told to."""

    def __init__(self) -> None:
        self._now = 0.0

    def __call__(self) -> float:
        return self._now

    def advance(self, samples: Iterator[float]) -> None:
        self._now += next(samples)


class Run:
    """What one pytest session measures."""

    def __init__(self, protocol: Protocol, device: torch.device) -> None:
        self.protocol = protocol
        self.device = device
        self.began = time.monotonic()
        self.results: list[Result] = []

    @cached_property
    def ceilings(self) -> Ceilings:
        return measure_cuda_ceilings() if self.device.type == "cuda" else measure_ceilings()


REPLAY = ReplayClock()
RUN = pytest.StashKey[Run]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("llmkern")
    group.addoption("--save", metavar="NAME", help="also write NAME.json, to be committed")
    group.addoption(
        "--results", metavar="FOLDER", type=Path, default=RESULTS, help="where to write"
    )
    group.addoption(
        "--device", choices=("cpu", "cuda"), default="cpu", help="where, and which cases"
    )
    group.addoption("--threads", type=int, help="number of threads; default: torch's")
    group.addoption(
        "--seconds", type=float, default=Protocol.seconds, help="time for the rounds of a case"
    )
    group.addoption("--stop-after", metavar="SECONDS", type=float, help="begin no case after that")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    device = torch.device(config.getoption("--device"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch finds no GPU")
    config.stash[RUN] = Run(Protocol(seconds=config.getoption("--seconds")), device)
    if config.getoption("--threads"):
        torch.set_num_threads(config.getoption("--threads"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every bench file has its cases in CASES, by device."""
    if "case" in metafunc.fixturenames:
        cases = metafunc.module.CASES[metafunc.config.getoption("--device")]
        metafunc.parametrize("case", cases, ids=str)


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker(pytest.mark.benchmark(timer=REPLAY))


def pytest_runtest_teardown(item: pytest.Item) -> None:
    limit, run = item.config.getoption("--stop-after"), item.config.stash[RUN]
    if limit is not None and time.monotonic() - run.began > limit:
        item.session.shouldstop = f"--stop-after {limit:g}: the other cases were not measured"


@pytest.fixture
def run_case(benchmark, request: pytest.FixtureRequest) -> Callable[[Case], None]:
    """``run_case(case)`` checks a case, times it, and keeps the result."""
    run = request.config.stash[RUN]

    def run_case(case: Case) -> None:
        torch.manual_seed(0)
        if benchmark.disabled:
            benchmark.pedantic(check, args=(case, run.device))
            return
        # Before the first case, so that the machine is as warm for one as for the other.
        ceilings = run.ceilings
        result = measure(case, run.protocol, device=run.device)
        run.results.append(result)
        samples = result.timings[OURS].samples
        benchmark.group = case.family
        benchmark.extra_info.update(summary(result, ceilings))
        benchmark.pedantic(REPLAY.advance, args=(iter(samples),), rounds=len(samples))

    return run_case


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config
) -> None:
    run = config.stash[RUN]
    if not run.results:
        return
    write = terminalreporter.write_line
    terminalreporter.section("llmkern and its peers")
    write(table(run.results, run.ceilings))
    results = document(run.results, run.ceilings, run.protocol)
    paths = [Path("local", f"{datetime.now():%Y-%m-%d-%H%M%S}.json")]
    name = config.getoption("--save")
    if name and exitstatus == pytest.ExitCode.OK:
        paths.append(Path(f"{name}.json"))
    elif name:
        write(f"\nnot saved as {name}: a run with failures is not one to commit")
    for path in paths:
        write_document(config.getoption("--results") / path, results)
        write(f"\nresults: {config.getoption('--results').name}/{path}")
