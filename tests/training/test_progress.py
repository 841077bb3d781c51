# SPDX-License-Identifier: Apache-2.0
"""What is shown: a bar in a terminal, lines in a file, nothing when quiet."""

import io
import sys

from llmkern.training import Trainer, TrainingArguments
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
    for part in ("epoch 1", "loss ", "ppl ", "tok/s", "lr 0.002"):
        assert part in lines[0]
    for part in ("train ppl ", "valid loss ", "valid ppl "):
        assert part in lines[1]


def test_quiet(capsys):
    train(show_progress=False)
    assert capsys.readouterr() == ("", "")


def terminal(monkeypatch):
    """Standard error as a terminal of 140 columns; pytest changes it between a fixture and its test."""

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "140")
    return screen


def test_a_bar_in_a_terminal(monkeypatch):
    screen = terminal(monkeypatch)
    train()
    shown = screen.getvalue()
    for part in ("training", "18/18", "validating 100%", "epoch 2/2 | train ppl"):
        assert part in shown, part


def test_a_resumed_bar_begins_where_the_run_does(monkeypatch):
    screen = terminal(monkeypatch)
    display = make_display(100, 40, show=True)
    display.step(41, epoch=1, loss=2.0, learning_rate=0.1, tokens_per_second=1e4, grad_norm=1.0)
    display.close()
    assert "41/100" in screen.getvalue()
    assert "loss 2.0000 | ppl 7.39 | 10,000 tok/s | lr 0.1" in screen.getvalue()
