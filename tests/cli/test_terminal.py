# SPDX-License-Identifier: Apache-2.0
"""The command in its surroundings: help, versions, encodings of all kinds, terminals that close."""

import contextlib
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import llmkern as package
from llmkern.cli import COMMANDS
from llmkern.cli.terminal import as_text
from llmkern.training import load_checkpoint
from tests.cli.conftest import SMALL
from tests.cli.test_train import ROOT, trains
from tests.models import toys


def started(*arguments, environment=(), **options):
    """The real command in its own process."""
    command = [sys.executable, "-m", "llmkern", *map(str, arguments)]
    variables = os.environ | {"PYTHONPATH": str(ROOT)} | dict(environment)
    return subprocess.Popen(command, env=variables, **options)


def test_the_version(llmkern):
    assert llmkern("--version").stdout == f"llmkern {package.__version__}\n"
    process = started("--version", stdout=subprocess.PIPE, text=True)
    assert process.communicate()[0] == f"llmkern {package.__version__}\n"
    assert process.returncode == 0


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_flags_look_like_flags(llmkern, name):
    shown = llmkern(*filter(None, [name]), "--help").stdout
    assert "--help" in shown
    assert "bool" not in shown.lower()


# A locale that holds ASCII alone, without Python's own cure for it.
ASCII = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


def test_what_the_terminal_cannot_show_is_replaced(llmkern, tmp_path):
    Path("text.txt").write_text("the cät sät on the mät.\n" * 40, encoding="utf-8")
    llmkern("train", "text.txt", "--output", "run", *SMALL)
    options = ["run", "--prompt", "the cät", "--max-new-tokens", "40", "--seed", "1"]
    expected = llmkern("generate", *options).stdout
    process = started(
        "generate", *options, environment=ASCII,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path,
    )  # fmt: skip
    out, err = process.communicate()
    assert (process.returncode, err) == (0, b"")
    assert out.decode() == expected.replace("ä", "?") != expected


def test_arguments_that_the_locale_could_not_decode():
    for text in ("the cät", "今天天气", "plain", "two\nlines"):
        assert as_text(text) == text
        undecoded = text.encode().decode("ascii", "surrogateescape")
        encoding = sys.getfilesystemencoding()
        assert as_text(undecoded) == text, encoding
    with pytest.raises(ValueError, match="expected an argument in UTF-8"):
        as_text("c\udce4t")


# Makes the terminal on standard input the one that the process belongs to, then becomes the command.
IN_ITS_TERMINAL = """
import fcntl, os, signal, sys, termios
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, "-m", "llmkern", *sys.argv[1:]])
"""


def test_a_terminal_that_closes_saves_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(toys.TEXT)
    options = ["train", "text.txt", "--output", "run", *SMALL[:-1], "--epochs", "100000"]
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", IN_ITS_TERMINAL, *options, "--save-every-steps", "0"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    os.set_blocking(ours, False)
    while process.poll() is None and not trains():
        drain(ours)
        time.sleep(0.01)
    os.close(ours)  # the kernel sends SIGHUP, and every write is an error from now on
    assert process.wait() >= 0  # it ended by itself, not by the signal
    assert load_checkpoint("run")["state"]["step"] >= 5


def drain(descriptor):
    with contextlib.suppress(BlockingIOError):
        os.read(descriptor, 2**16)


def test_under_nohup_a_run_outlives_its_terminal(llmkern):
    Path("text.txt").write_text(toys.TEXT)
    line = ["train", "text.txt", "--output", "run", *SMALL[:-1], "--epochs", "100000", "--quiet"]
    ignoring = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)  # noqa: E731
    process = started(*line, preexec_fn=ignoring, stdout=subprocess.PIPE)
    while process.poll() is None and not trains():
        time.sleep(0.01)
    before = load_checkpoint("run")["state"]["step"]
    process.send_signal(signal.SIGHUP)
    while process.poll() is None and load_checkpoint("run")["state"]["step"] < before + 18:
        time.sleep(0.01)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert b"stopped by interrupted" in process.communicate()[0]
