# SPDX-License-Identifier: Apache-2.0
"""Running the command in this process, on a small text."""

import pytest
from typer.testing import CliRunner

from llmkern.cli import app
from tests.models import toys

SMALL = (
    *("--embedding-dim", "12", "--hidden-size", "16", "--batch-size", "8", "--bptt", "12"),
    *("--epochs", "2", "--learning-rate", "0.01", "--log-every", "5", "--seed", "0", "--quiet"),
)


@pytest.fixture
def llmkern(tmp_path, monkeypatch):
    """``llmkern("train", ...)`` runs the command in a folder that holds text.txt."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    (tmp_path / "text.txt").write_text(toys.TEXT)
    runner = CliRunner()

    def run(*arguments):
        return runner.invoke(
            app, list(map(str, arguments)), prog_name="llmkern", catch_exceptions=False
        )

    return run


@pytest.fixture
def trained(llmkern):
    """The same, with a character model in the folder ``run``."""
    done = llmkern("train", "text.txt", "--output", "run", *SMALL)
    assert done.exit_code == 0, done.output
    return llmkern


@pytest.fixture
def fails(llmkern):
    """``fails(code, "train", ...)`` is the one line the command leaves on standard error."""

    def run(code, *arguments):
        done = llmkern(*arguments)
        assert done.exit_code == code, done.output
        assert done.stdout.strip() == ""
        lines = done.stderr.splitlines()
        assert len(lines) == 1, done.stderr
        assert lines[0].startswith("llmkern: error: ")
        return lines[0]

    return run
