# SPDX-License-Identifier: Apache-2.0
"""Workers that meet at a barrier, on pools that keep and that break the promise to run them side by side."""

import subprocess

from tests.conftest import ROOT


def test_teams_on_every_kind_of_pool(tmp_path):
    program = tmp_path / "team"
    command = [
        "g++",
        "-std=c++20",
        "-O1",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-pthread",
        "-fsanitize=thread",
    ]
    command += ["-DLLMKERN_ISA=generic", "-Icsrc", "tests/native/team.cpp", "-o", program]
    subprocess.run(command, cwd=ROOT, check=True)
    result = subprocess.run([program], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
