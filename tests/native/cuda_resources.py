# SPDX-License-Identifier: Apache-2.0
"""What every CUDA kernel takes of a multiprocessor: registers, stack (where spills go) and static shared memory.

``python tests/native/cuda_resources.py`` writes the table that test_cuda_resources.py compares with the built library;
run it after a build for every architecture (``TORCH_CUDA_ARCH_LIST= make build``), and look at what changed.
"""

import csv
import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

import llmkern

TABLE = Path(__file__).with_name("cuda_resources.csv")


class Resources(NamedTuple):
    """Of one kernel on one architecture, by one version of nvcc; bytes for a thread, shared memory for a block."""

    kernel: str
    architecture: str
    nvcc: str
    registers: int
    stack: int
    local: int
    shared: int


def cuobjdump() -> str | None:
    """The disassembler: on PATH with the CUDA toolkit, or from the package nvidia-cuda-cuobjdump."""
    if found := shutil.which("cuobjdump"):
        return found
    spec = importlib.util.find_spec("nvidia")
    folders = list(spec.submodule_search_locations or []) if spec else []
    return next((str(p) for f in folders for p in Path(f).glob("*/bin/cuobjdump")), None)


def built() -> list[Resources]:
    """What the kernels of the installed library take; none in a CPU build."""
    nvcc = llmkern.info()["cuda_version"]
    if not nvcc:
        return []
    command = [
        cuobjdump() or "cuobjdump",
        "--dump-resource-usage",
        sys.modules["llmkern._C"].__file__,
    ]
    dump = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return sorted(_rows(dump, nvcc))


def _rows(dump: str, nvcc: str) -> Iterator[Resources]:
    demangled = subprocess.run(["c++filt"], input=dump, capture_output=True, text=True, check=True)
    architecture = kernel = ""
    for line in demangled.stdout.splitlines():
        if match := re.match(r"arch = (\w+)", line):
            architecture = match[1]
        elif match := re.match(r" Function (.+):$", line):
            kernel = _short(match[1])
        elif match := re.match(r"  REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, match.groups())
            yield Resources(kernel, architecture, nvcc, registers, stack, local, shared)


def _short(name: str) -> str:
    """ "rows<float, 256>" of "void llmkern::cuda::(anonymous namespace)::rows<float, 256>(llmkern::Rows<float>)"."""
    name = re.sub(r"llmkern::(cuda::)?(\(anonymous namespace\)::)?", "", name.removeprefix("void "))
    depth = 0
    for i, character in enumerate(name):
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "(" and depth == 0:
            return name[:i]
    return name


def table() -> list[Resources]:
    """The committed table."""
    with TABLE.open(newline="") as file:
        rows = csv.reader(file)
        next(rows)
        return [Resources(*row[:3], *map(int, row[3:])) for row in rows]


def write_table() -> None:
    with TABLE.open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(Resources._fields)
        rows.writerows(built())


if __name__ == "__main__":
    write_table()
    print(f"{TABLE}: {len(table())} rows, torch {torch.__version__}")
