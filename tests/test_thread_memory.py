# SPDX-License-Identifier: Apache-2.0
"""Working memory by thread, by itself, under the sanitizers: its holders, and who may free it."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.native import programs

CASES = (
    "two_holders",
    "one_after_another",
    "other_threads_have_their_own",
    "idle_threads_have_none",
    "idle_memory_is_freed",
    "memory_at_work_is_freed_later",
    "nobody_works",
    "everybody_at_once",
    "forks",
    "no_memory",
)
SOURCES = ("csrc/kernels/thread_memory.cpp", "tests/native/thread_memory.cpp")


@pytest.fixture(scope="module", params=["thread", "address"])
def program(request: pytest.FixtureRequest) -> Path:
    defines = ["-DLLMKERN_DEBUG", "-DLLMKERN_ISA=generic"]
    name = f"thread_memory_{request.param}"
    return programs.program(name, SOURCES, *defines, f"-fsanitize={request.param}")


@pytest.mark.parametrize("case", CASES)
def test_thread_memory(program: Path, case: str) -> None:
    options = "allocator_may_return_null=1:detect_leaks=0"  # the registry is never freed
    environment = os.environ | {"ASAN_OPTIONS": options, "TSAN_OPTIONS": options}
    command = [str(program), case]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
