# SPDX-License-Identifier: Apache-2.0
"""Progress from the first second while a text is read, in a terminal and without one."""

import io
import sys

import pytest
import torch

from llmkern.cli import corpus, reading
from llmkern.text import Splits, Tokenizer
from tests.models import toys


@pytest.fixture
def clock(monkeypatch):
    """``clock.append(3.0)`` makes it three seconds after the beginning."""
    times = [0.0]
    monkeypatch.setattr(reading.time, "monotonic", lambda: times[-1])
    return times


def test_a_line_after_a_second_and_then_every_ten(clock, capsys):
    with reading.reading("learning", 1000, show=True) as tell:
        for now, done in ((0.5, 100), (1.1, 200), (5.0, 500), (11.5, 900), (30.0, 1000)):
            clock.append(now)
            tell(done)
    assert capsys.readouterr().err.splitlines() == [
        "learning: 20% of 1,000 characters after 1 s",
        "learning: 90% of 1,000 characters after 12 s",
        "learning: 100% of 1,000 characters after 30 s",
    ]


def test_quiet_is_quiet(clock, capsys):
    with reading.reading("learning", 1000, show=False) as tell:
        clock.append(100.0)
        tell(500)
    assert capsys.readouterr() == ("", "")


def test_a_bar_in_a_terminal(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    with reading.reading("learning", 1000, show=True) as tell:
        assert "learning" in terminal.getvalue()  # before the first character
        tell(400)
        tell(1000)
        tell(1000)
    assert "\n\n" not in terminal.getvalue()


@pytest.mark.parametrize("kind", ["char", "word", "jieba", "bpe"])
def test_both_readings_of_a_corpus_are_shown(clock, capsys, kind):
    clock += [0.0]
    monotonic = iter(range(0, 10**6, 2))
    reading.time.monotonic = lambda: float(next(monotonic))
    tokenizer = corpus.train_tokenizer(Splits(toys.TEXT, None, None), kind=kind, show=True)
    corpus.encode(tokenizer, toys.TEXT, "the train text", show=True)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("learning the tokenizer: 100% of 960 characters after 2 s")
    assert lines[-1] == "reading the train text: 100% of 960 characters after 2 s"


def test_ids_take_four_bytes():
    encoded = corpus.encode(Tokenizer.train("ab", kind="char"), "abba", "the text")
    assert encoded.ids.dtype == torch.int32 and encoded.ids.tolist() == [0, 1, 1, 0]
    assert encoded.characters_per_token == 1.0
