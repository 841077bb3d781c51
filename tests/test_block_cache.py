# SPDX-License-Identifier: Apache-2.0
"""The cache of large blocks by itself, under the sanitizers; and torch versions that cannot take its blocks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.native import programs

CASES = (
    "blocks_come_back",
    "waste_is_bounded",
    "old_blocks_go",
    "many_blocks_are_kept",
    "idle_blocks_are_freed",
    "no_memory",
    "threads_share_it",
    "forks",
)
MISTAKES = ("read_after_giving_back", "read_behind_the_end")
SOURCES = ("csrc/ops/block_cache.cpp", "tests/native/block_cache.cpp")


@pytest.fixture(scope="module", params=["thread", "address"])
def sanitizer(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def program(sanitizer: str) -> Path:
    return programs.program(f"block_cache_{sanitizer}", SOURCES, f"-fsanitize={sanitizer}")


def run(program: Path, case: str) -> subprocess.CompletedProcess[str]:
    options = "allocator_may_return_null=1:detect_leaks=0"  # the process's cache is never freed
    environment = os.environ | {"ASAN_OPTIONS": options, "TSAN_OPTIONS": options}
    return subprocess.run(
        [program, case], env=environment, capture_output=True, text=True, timeout=600
    )


@pytest.mark.parametrize("case", CASES)
def test_blocks(program: Path, case: str) -> None:
    result = run(program, case)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("mistake", MISTAKES)
def test_address_sanitizer_still_sees_mistakes(sanitizer: str, program: Path, mistake: str) -> None:
    result = run(program, mistake)
    if sanitizer == "address":
        assert result.returncode != 0 and "use-after-poison" in result.stderr
    else:
        assert result.returncode == 0, result.stderr


TRAIN = """
import torch
from llmkern import ops
torch.manual_seed(0)
x, s = torch.randn(40, 16, 128, requires_grad=True), torch.zeros(16, 128)
layer = torch.nn.LSTM(128, 128)
ops.lstm(x, s, s, *layer.parameters())[0].sum().backward()
print(x.grad.double().sum().item(), torch.ops.llmkern.memory_stats()[2] > 0)
"""


def test_torch_without_blobs_allocates_itself(tmp_path: Path) -> None:
    """torch 2.10 has no torch_from_blob. Nor does a process in which another library defines it as address 0."""
    hidden = tmp_path / "hidden.so"
    source = '__asm__(".globl torch_from_blob\\n.set torch_from_blob, 0");'
    compiler = ["gcc", "-shared", "-x", "c", "-", "-o", str(hidden)]
    subprocess.run(compiler, input=source, text=True, check=True)
    found = []
    for preload in ({}, {"LD_PRELOAD": str(hidden)}):
        command = [sys.executable, "-c", TRAIN]
        result = subprocess.run(
            command, cwd=ROOT, env=os.environ | preload, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        found.append(result.stdout.split())
    assert found[0][0] == found[1][0]
    assert [recycled for _, recycled in found] == ["True", "False"]
