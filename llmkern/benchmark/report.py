# SPDX-License-Identifier: Apache-2.0
"""Results for people (a Markdown table a family) and for machines (one JSON document a run)."""

import json
import math
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from llmkern._files import write_files
from llmkern.benchmark.case import OURS, dtype_name, rival
from llmkern.benchmark.ceilings import FMA, TENSOR_CORES, Ceilings
from llmkern.benchmark.machine import command, gpu_facts, machine_facts, software_facts
from llmkern.benchmark.timing import Protocol, Result

_HEADER = ["case", "run", "ms", "IQR", "rate", "ceiling", "floor ms", "time/floor", "speed-up"]
_GOAL = "time/goal"  # a column beside time/floor where a case has a goal

_QUIET = 0.3  # load average that a machine at rest may show


def summary(result: Result, ceilings: Ceilings) -> dict[str, Any]:
    """Everything about one case, as JSON values: milliseconds, GFLOP/s, GB/s, ratios."""
    case, floor, (bound, limit) = (
        result.case,
        ceilings.floor(result.case),
        ceilings.bound(result.case),
    )
    goal = None if case.goal is None else case.goal(floor)
    work = case.flops if bound in (FMA, TENSOR_CORES) else case.bytes
    contenders = {}
    for name, timing in result.timings.items():
        seconds = timing.seconds.median
        contenders[name] = {
            "median_ms": seconds * 1e3,
            "iqr_ms": timing.seconds.iqr * 1e3,
            "rounds": len(timing.samples),
            "calls_a_sample": timing.calls,
            "gflop_s": case.flops / seconds / 1e9,
            "gb_s": case.bytes / seconds / 1e9,
            "of_ceiling": work / seconds / limit,
            "time_over_floor": seconds / floor,
            "time_over_goal": seconds / goal if goal else None,
            "tokens_s": case.tokens / seconds if case.tokens else None,
            "samples_ms": [float(f"{sample * 1e3:.5g}") for sample in timing.samples],
        }
        if name != rival(name):
            speedup = result.speedup(name)
            contenders[name] |= {"llmkern_speedup": speedup.median, "speedup_iqr": speedup.iqr}
    return {
        "family": case.family,
        "case": case.name,
        "training": case.training,
        "dtype": dtype_name(case.dtype),
        "input_sets": result.copies,
        "absent": dict(result.absent),
        "error": result.error,
        "flops": case.flops,
        "bytes": case.bytes,
        "bound": bound,
        "floor_ms": floor * 1e3,
        "goal_ms": goal * 1e3 if goal else None,
        "contenders": contenders,
    }


def document(results: Iterable[Result], ceilings: Ceilings, protocol: Protocol) -> dict[str, Any]:
    """A whole run, with all that is needed to judge it or to repeat it."""
    return {
        "command": command(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "threads": torch.get_num_threads(),
        "device": str(ceilings.device),
        "machine": machine_facts(),
        "gpu": gpu_facts(ceilings.device),
        "software": software_facts(),
        "protocol": vars(protocol),
        "ceilings": {
            "load_average_before": ceilings.load_average,
            "peak_gflop_s": {dtype_name(d): peak / 1e9 for d, peak in ceilings.peaks.items()},
            "levels": [
                {"name": x.name, "read_gb_s": x.read / 1e9, "copy_gb_s": x.copy / 1e9}
                for x in ceilings.levels
            ],
            "methods": dict(ceilings.methods),
        },
        "results": [summary(result, ceilings) for result in results],
    }


def write_document(path: str | Path, run: dict[str, Any]) -> None:
    """Writes a document as JSON, whole or not at all.

    Raises:
        OSError: it cannot be written; an older file is unharmed.
    """
    path = Path(path)
    text = json.dumps(run, indent=1, ensure_ascii=False, allow_nan=False)
    write_files(path.parent, {path.name: f"{text}\n".encode()})


def ceilings_text(ceilings: Ceilings) -> str:
    """The machine in one line."""
    levels = "; ".join(
        f"{x.name} read {x.read / 1e9:.0f}, copy {x.copy / 1e9:.0f} GB/s" for x in ceilings.levels
    )
    peaks = ", ".join(f"{dtype_name(d)} {peak / 1e9:.0f}" for d, peak in ceilings.peaks.items())
    cuda = ceilings.device.type == "cuda"
    what = torch.cuda.get_device_name(ceilings.device) if cuda else f"{ceilings.threads} threads"
    text = f"{what}; {peaks} GFLOP/s; {levels}"
    if not cuda and ceilings.load_average > _QUIET:
        text += (
            f"\nload average before the run {ceilings.load_average:.2f}: others disturb the figures"
        )
    return text


def table(results: Iterable[Result], ceilings: Ceilings) -> str:
    """Markdown: a table for each family, a row for each contender."""
    families: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        families.setdefault(result.case.family, []).append(summary(result, ceilings))
    parts = [ceilings_text(ceilings)]
    for family, cases in families.items():
        rows = [[*_HEADER], *(row for case in cases for row in _rows(case))]
        if any(case["goal_ms"] for case in cases):
            over = [_over_goal(x) for case in cases for x in case["contenders"].values()]
            for row, cell in zip(rows, [_GOAL, *over], strict=True):
                row.insert(_HEADER.index("speed-up"), cell)
        parts.append(f"### {family}\n\n{_markdown(rows)}")
        parts += [
            f"{case['case']}: no {peer}: {why}"
            for case in cases
            for peer, why in case["absent"].items()
        ]
    return "\n\n".join(parts)


def _rows(case: dict[str, Any]) -> Iterable[list[str]]:
    for name, x in case["contenders"].items():
        ours = name == OURS
        arithmetic = case["bound"] in (FMA, TENSOR_CORES)
        rate = f"{_digits(x['gflop_s'])} GFLOP/s" if arithmetic else f"{_digits(x['gb_s'])} GB/s"
        if x["tokens_s"]:
            rate += f", {_digits(x['tokens_s'])} tokens/s"
        yield [
            case["case"] if ours else "",
            name,
            _digits(x["median_ms"]),
            f"{x['iqr_ms'] / x['median_ms']:.0%}",
            rate,
            f"{_digits(x['of_ceiling'] * 100, 2)} % of {case['bound']}",
            _digits(case["floor_ms"]) if ours else "",
            _digits(x["time_over_floor"]),
            _verdict(x["llmkern_speedup"]) if "llmkern_speedup" in x else "",
        ]


def _over_goal(contender: dict[str, Any]) -> str:
    return _digits(contender["time_over_goal"]) if contender["time_over_goal"] else ""


def _verdict(speedup: float) -> str:
    shown = _digits(speedup)
    return f"{shown}x" + (" (slower)" if float(shown.replace(",", "")) < 1 else "")


def _digits(x: float, significant: int = 3) -> str:
    """That many digits, never an exponent: 0.000354, 1.28, 27.6, 4,354."""
    decimals = significant - 1 - math.floor(math.log10(abs(x))) if x else 0
    return f"{x:,.{max(0, decimals)}f}"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)
