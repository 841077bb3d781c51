# SPDX-License-Identifier: Apache-2.0
"""The emulated tests execute the CUDA sources: line coverage by gcov, over everything this session ran."""

import json
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

from . import build

LEAST = 0.95
SOURCES = sorted(
    path.relative_to(build.ROOT) for path in build.ROOT.glob("csrc/kernels/cuda/*.cu*")
)


@pytest.fixture
def executed(write_coverage: Path) -> dict[Path, dict[int, bool]]:
    """For every source the lines that hold code, and whether any instantiation of them ran."""
    lines: dict[Path, dict[int, bool]] = defaultdict(dict)
    for counts in write_coverage.rglob("*.gcda"):
        notes = Path("/", counts.relative_to(write_coverage)).with_suffix(".gcno")
        shutil.copy(notes, counts.with_suffix(".gcno"))
        command = ["gcov", "--json-format", "--stdout", str(counts)]
        report = subprocess.run(command, capture_output=True, text=True, check=True, cwd=build.ROOT)
        for file in json.loads(report.stdout)["files"]:
            known = lines[Path(file["file"])]
            for line in file["lines"]:
                number = line["line_number"]
                known[number] = known.get(number, False) or line["count"] > 0
    return lines


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_lines_are_executed(executed, source):
    lines = executed[source]
    missed = [number for number, hit in sorted(lines.items()) if not hit]
    assert lines, f"{source} is in no binding of tests/simt/bindings"
    assert len(missed) <= (1 - LEAST) * len(lines), f"{source}: lines {missed} were not executed"
