# SPDX-License-Identifier: Apache-2.0
"""Every kernel again under AddressSanitizer and UndefinedBehaviorSanitizer, in a process of its own.

They see what the checkers do not: a thread's own arrays, signed overflow, bad shifts, misaligned pointers.
"""

import os
import subprocess
import sys

import pytest

from . import build


def library(name: str) -> str:
    command = [build.CXX, f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "LLMKERN_SIMT": "asan",
        # Python has neither; the sanitizer wants to be first, and to find __cxa_throw.
        "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so.6')}",
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    # Only this folder's conftest: torch is no part of these tests, and slow to load here.
    options = ["-p", "no:cacheprovider", "-q", "--capture=no", "--confcutdir", "tests/simt"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options, *arguments],
        cwd=build.ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_all_kernels_are_clean():
    result = run("tests/simt")
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]


PLANTED = {
    "own_array": "insufficient space for an object",
    "overflow": "signed integer overflow",
    "beside_global": "use-after-poison",
    "beside_dynamic_shared": "heap-buffer-overflow",
}


@pytest.mark.parametrize("kernel", PLANTED)
def test_planted_fault_is_reported(kernel):
    """Without this the test above might pass because nothing is looking."""
    result = run("tests/simt/planted_for_sanitizers.py", "-k", kernel)
    assert result.returncode != 0
    assert PLANTED[kernel] in result.stderr, result.stdout + result.stderr
    assert "faults/sanitizers.cu" in result.stderr
