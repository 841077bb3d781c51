# SPDX-License-Identifier: Apache-2.0
"""From Python through the CUDA bindings into the emulated kernels, in a process of its own: see operators.py."""

import os
import subprocess
import sys

from . import build


def test_operators_on_emulated_cuda():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-q",
        "tests/simt/operators.py",
    ]
    environment = os.environ | {"LLMKERN_SIMT": "plain", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, cwd=build.ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
