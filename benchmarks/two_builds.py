# SPDX-License-Identifier: Apache-2.0
"""Times LSTM layers of two checkouts in turn, each built in place: what a change of the kernels costs or gains.

    python benchmarks/two_builds.py BEFORE AFTER [--output RESULTS.json] [--only decode]

Both run at the same time, in a process each that waits while the other one works; a case is timed in short turns, one
checkout after the other, and the medians of the turns are compared, with nn.LSTM of the same process beside them.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

TURNS, SECONDS = 9, 0.04

Step = Callable[[], object]


def decode(kind: str, H: int, B: int, dtype: str, T: int = 1) -> Step:
    """T steps without gradients through a module."""
    import torch

    import llmkern

    layer = (torch.nn if kind == "nn.LSTM" else llmkern.nn).LSTM(H, H, dtype=getattr(torch, dtype))
    x = torch.randn(T, B, H).to(layer.weight_hh_l0.dtype)
    state = torch.zeros(1, B, H).to(x), torch.zeros(1, B, H).to(x)
    held = ExitStack()  # before there were snapshots, each module kept one
    if kind == "snapshot" and hasattr(llmkern.nn, "snapshot_weights"):
        held.enter_context(llmkern.nn.snapshot_weights(layer))

    def run() -> object:
        with torch.no_grad():
            return layer(x, state), held

    return run


def train(kind: str, H: int, B: int, dtype: str, T: int = 35) -> Step:
    """A sequence forward and backward."""
    import torch

    import llmkern

    layer = (torch.nn if kind == "nn.LSTM" else llmkern.nn).LSTM(H, H, dtype=getattr(torch, dtype))
    x = torch.randn(T, B, H).to(layer.weight_hh_l0.dtype)

    def run() -> object:
        layer.zero_grad()
        return layer(x)[0].sum().backward()

    return run


def cells(kind: str, H: int, B: int, dtype: str, T: int = 35) -> Step:
    """A Python loop over a cell, forward and backward."""
    import torch

    import llmkern

    cell = (torch.nn if kind == "nn.LSTM" else llmkern.nn).LSTMCell(
        H, H, dtype=getattr(torch, dtype)
    )
    x = torch.randn(T, B, H).to(cell.weight_hh.dtype)

    def run() -> object:
        cell.zero_grad()
        state = None
        for step in x:
            state = cell(step, state)
        return state[0].sum().backward()

    return run


BUILDERS = {"decode": decode, "train": train, "cells": cells}
CASES: list[tuple[str, int, int, str, int]] = [
    *[("decode", H, 1, dtype, 1) for H in (512, 650, 1024) for dtype in ("float32", "bfloat16")],
    *[("decode", 512, B, "float32", 1) for B in (2, 4, 8, 20, 64)],
    *[("decode", 512, 1, "float32", T) for T in (2, 3, 4, 8, 35, 256)],
    ("decode", 512, 20, "float32", 35),
    *[("train", H, B, "float32", 35) for H in (200, 650) for B in (1, 20)],
    ("train", 512, 1, "float32", 1),
    *[("cells", 512, B, "float32", 35) for B in (1, 20)],
]
KINDS = {"decode": ("module", "snapshot", "nn.LSTM")}


def work() -> None:
    """Answers a line [family, kind, H, B, dtype, T] with the milliseconds of a step, over and over."""
    steps: dict[str, Step] = {}
    for line in sys.stdin:
        family, kind, H, B, dtype, T = json.loads(line)
        if line not in steps:
            steps.clear()
            steps[line] = BUILDERS[family](kind, H, B, dtype, T)
            steps[line]()
        calls, start = 0, time.perf_counter()
        while time.perf_counter() - start < SECONDS or calls < 2:
            steps[line]()
            calls += 1
        print((time.perf_counter() - start) / calls * 1e3, flush=True)


class Build:
    """A process that imports the llmkern of a checkout."""

    def __init__(self, checkout: str) -> None:
        code = "import runpy, sys; sys.path.insert(0, '.'); " + (
            f"runpy.run_path({str(Path(__file__).resolve())!r})['work']()"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=checkout,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def time(self, *case: Any) -> float:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(case), file=self._process.stdin, flush=True)
        return float(self._process.stdout.readline())


def compare(before: Build, after: Build, family: str, *sizes: Any) -> dict[str, Any]:
    result: dict[str, Any] = {"case": [family, *sizes]}
    for kind in KINDS.get(family, ("module", "nn.LSTM")):
        turns = [
            (before.time(family, kind, *sizes), after.time(family, kind, *sizes))
            for _ in range(TURNS)
        ]
        old, new = map(statistics.median, zip(*turns, strict=True))
        ratio = statistics.median(b / a for a, b in turns)
        result[kind] = {"before_ms": old, "after_ms": new, "after_over_before": ratio}
    return result


def _cpu() -> str:
    """The processor by the name that Linux gives it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("before")
    parser.add_argument("after")
    parser.add_argument("--output")
    parser.add_argument("--only", choices=BUILDERS)
    arguments = parser.parse_args()
    import torch

    import llmkern

    machine = {"torch": torch.__version__, **llmkern.info(), "cpu": _cpu()}
    before, after = Build(arguments.before), Build(arguments.after)
    results = []
    for family, H, B, dtype, T in CASES:
        if arguments.only in (None, family):
            results.append(compare(before, after, family, H, B, dtype, T))
            columns = [
                f"{kind} {r['before_ms']:.4f} -> {r['after_ms']:.4f} ms ({r['after_over_before']:.2f})"
                for kind, r in results[-1].items()
                if kind != "case"
            ]
            print(f"{family} H={H} B={B} T={T} {dtype}: " + ", ".join(columns), flush=True)
    if arguments.output:
        text = json.dumps({"machine": machine, "command": sys.argv, "results": results}, indent=1)
        Path(arguments.output).write_text(text + "\n")


if __name__ == "__main__":
    main()
