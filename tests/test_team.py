# SPDX-License-Identifier: Apache-2.0
"""Workers that meet at a barrier, on pools that keep and that break the promise to run them side by side."""

import subprocess

from tests.native.programs import program


def test_teams_on_every_kind_of_pool():
    team = program("team", ["tests/native/team.cpp"], "-fsanitize=thread", "-DLLMKERN_ISA=generic")
    result = subprocess.run([team], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
