# SPDX-License-Identifier: Apache-2.0
"""Every command and every example in README.md and docs/ runs as it is printed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
CORPUS = "The cat sat on the mat. The dog lay in the sun, and the bird sang a song.\n" * 40


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_run(page: Path, tmp_path: Path):
    (tmp_path / "corpus.txt").write_text(CORPUS, encoding="utf-8")
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path}
    blocks = re.findall(r"^```(bash|python)\n(.*?)^```$", page.read_text("utf-8"), re.M | re.S)
    assert blocks, f"{page.name} has nothing to run"
    for language, code in blocks:
        for package in re.findall(r"^import (\w+)", code, re.M):
            pytest.importorskip(package)
        if language == "bash":
            # The command of this very environment, whether or not it is on PATH.
            code = code.replace(
                "llmkern ", f"{sys.executable} -c 'from llmkern.cli import main; main()' "
            )
        command = ["bash", "-ec", code] if language == "bash" else [sys.executable, "-c", code]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"


def test_readme_links_exist():
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text("utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
