# SPDX-License-Identifier: Apache-2.0
"""What is shown: a bar in a terminal, lines in a file, nothing when quiet."""

import io
import re
import sys

import pytest

from llmkern.training import Trainer, TrainingArguments, progress
from llmkern.training.progress import make_display
from tests.models import toys


def train(show_progress=True):
    words = toys.tokenizer()
    ids = toys.token_ids(words)
    arguments = TrainingArguments(batch_size=8, bptt=12, epochs=2, log_every=5, tensorboard=False)
    model = toys.model(words.vocab_size)
    Trainer(model, arguments, ids[:800], ids[800:], show_progress=show_progress).train()


def test_lines_where_there_is_no_terminal(capsys):
    train()
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert [line.split(" | ")[0] for line in lines] == [
        "step 5/18",
        "epoch 1/2",
        "step 10/18",
        "step 15/18",
        "epoch 2/2",
    ]
    assert [line.split(" | ")[1] for line in lines if "step" in line] == ["0:00:00 left"] * 3
    for part in ("epoch 1", "loss ", "ppl ", "tok/s", "lr 0.002"):
        assert part in lines[0]
    for part in ("train ppl ", "valid loss ", "valid ppl "):
        assert part in lines[1]


def test_quiet(capsys):
    train(show_progress=False)
    assert capsys.readouterr() == ("", "")


def test_the_time_left_is_that_of_the_steps_left(monkeypatch, capsys):
    clock = iter((1000.0, 1030.0))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    display = make_display(3640, 40, show=True)
    display.interval(50, epoch=1, loss=2.0, learning_rate=0.1, tokens_per_second=1e4, grad_norm=1.0)
    assert "step 50/3640 | 2:59:30 left | epoch 1" in capsys.readouterr().err


def test_a_pipe_that_has_closed_does_not_end_the_run(monkeypatch):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Closed())
    train()


def terminal(monkeypatch, columns=140):
    """Standard error as a terminal; pytest changes it between a fixture and its test."""

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", str(columns))
    return screen


def test_a_bar_in_a_terminal(monkeypatch):
    screen = terminal(monkeypatch)
    train()
    shown = screen.getvalue()
    for part in ("training", "18/18", "validating 100%", "epoch 2/2 | train ppl"):
        assert part in shown, part


@pytest.mark.parametrize("columns", [45, 80])
def test_step_count_and_time_left_fit_a_narrow_terminal(monkeypatch, columns):
    screen = terminal(monkeypatch, columns)
    display = make_display(123456, 40000, show=True)
    shown = {"loss": 2.0, "learning_rate": 0.00123, "tokens_per_second": 1e5, "grad_norm": 1.0}
    for step in range(40001, 40200, 60):
        display.step(step, epoch=1, **shown)
        display._progress.refresh()
    display.close()
    lines = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", screen.getvalue()).replace("\r", "\n").split("\n")
    last = [line for line in lines if line][-1]
    assert len(last) <= columns
    assert re.search(r"40181/123456 +\d+:\d\d:\d\d", last), last
    assert columns < 80 or "epoch 1 | loss 2.0000 | ppl 7.39" in last


def test_a_resumed_bar_begins_where_the_run_does(monkeypatch):
    screen = terminal(monkeypatch)
    display = make_display(100, 40, show=True)
    display.step(41, epoch=1, loss=2.0, learning_rate=0.1, tokens_per_second=1e4, grad_norm=1.0)
    display.close()
    assert "41/100" in screen.getvalue()
    assert "loss 2.0000 | ppl 7.39 | 10,000 tok/s | lr 0.1" in screen.getvalue()
