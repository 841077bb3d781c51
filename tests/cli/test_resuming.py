# SPDX-License-Identifier: Apache-2.0
"""What a resumed run may change and what it may not: the table in the docs, the code, and what the command does."""

import re
import shlex
import signal
from pathlib import Path

import pytest
import typer

from llmkern.cli import app
from llmkern.cli.presets import PRESETS
from llmkern.training import load_checkpoint
from llmkern.training.arguments import RESUMABLE
from llmkern.training.stepping import Stepper
from tests.cli.conftest import SMALL
from tests.conftest import ROOT
from tests.models import toys
from tests.training.test_resume import assert_same_run

# option -> the run's own value and another one; what a run was begun without is None.
FIXED = {
    "--tokenizer": ("char", "word"),
    "--vocab-size": (None, 300),
    "--min-frequency": (1, 2),
    "--lowercase": ("", "--no-lowercase"),
    "--unk": ("", "--no-unk"),
    "--valid-fraction": (0.2, 0.1),
    "--embedding-dim": (12, 13),
    "--hidden-size": (16, 17),
    "--num-layers": (1, 2),
    "--dropout": (0.25, 0),
    "--tied": ("--untied", ""),
    "--init-range": (0.2, 0.1),
    "--batch-size": (8, 9),
    "--bptt": (12, 13),
    "--optimizer": ("rmsprop", "sgd"),
    "--learning-rate": (0.01, 0.02),
    "--momentum": (0.5, 0.6),
    "--weight-decay": (0.1, 0),
    "--rmsprop-alpha": (0.9, 0.8),
    "--max-grad-norm": (2, 0),
    "--max-grad-value": (3, 1),
    "--lr-schedule": ("decay", "constant"),
    "--lr-decay": (0.5, 0.6),
    "--lr-decay-after": (2, 3),
    "--warmup-steps": (0, 3),
    "--schedule-steps": (None, 30),
    "--loss-reduction": ("sum_time", "mean"),
    "--precision": ("float32", "bf16"),
    "--seed": (7, 8),
    "--eval-batch-size": (4, 5),
}
FREE = {
    "--epochs": 3,
    "--max-steps": 4,
    "--max-seconds": 1000,
    "--patience": 5,
    "--eval-every-steps": 2,
    "--save-every-steps": 3,
    "--keep": 2,
    "--log-every": 1,
    "--tensorboard": "--no-tensorboard",
}


def words(option, value):
    if value is None:
        return []
    if isinstance(value, str) and (value == "" or value.startswith("--")):
        return [value or option]
    return [option, value]


def table():
    """The rows of the table in the docs: a list of options, and what it says of them."""
    page = (ROOT / "docs" / "language-model.md").read_text("utf-8")
    section = page.split("### What a resumed run may change")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if "`--" in line]
    return {row[1]: re.findall(r"`(--[a-z-]+)`", row[0]) for row in rows if len(row) == 2}


def test_the_table_in_the_docs_is_the_codes():
    rows = table()
    listed = [option for options in rows.values() for option in options]
    train = typer.main.get_command(app).commands["train"]
    known = [p.opts[0] for p in train.params if p.opts[0].startswith("--")]
    assert sorted(listed) == sorted(known)
    (free,) = (options for text, options in rows.items() if text.startswith("may change"))
    (fixed,) = (options for text, options in rows.items() if text.startswith("belong to the run"))
    assert free == list(FREE) == ["--" + name.replace("_", "-") for name in RESUMABLE]
    assert fixed == list(FIXED)


@pytest.fixture
def begun(llmkern):
    """A run of two steps in the folder ``run``, with everything said that can be."""
    own = [w for option, (value, _) in FIXED.items() for w in words(option, value)]
    done = llmkern("train", "text.txt", "--output", "run", *own, "--max-steps", 2, "--quiet")
    assert done.exit_code == 0, done.output
    return llmkern


def test_what_belongs_to_the_run_may_be_said_again(begun):
    own = [w for option, (value, _) in FIXED.items() for w in words(option, value)]
    free = [w for option, value in FREE.items() for w in words(option, value)]
    done = begun("train", "text.txt", "--output", "run", *own, *free, "--resume", "--quiet")
    assert done.exit_code == 0, done.output
    saved = load_checkpoint("run")
    assert saved["state"]["step"] == 4
    for option, value in FREE.items():
        name = option.strip("-").replace("-", "_")
        assert saved["arguments"][name] == (False if value == "--no-tensorboard" else value)
    assert saved["source"]["valid_fraction"] == 0.2


def test_another_value_is_another_run(begun, fails):
    for option, (own, other) in FIXED.items():
        message = fails(
            2, "train", "text.txt", "--output", "run", "--resume", "--quiet", *words(option, other)
        )
        assert "--resume: expected " in message, message
        shown = words(option, own) or ["no", option]
        assert " ".join(map(str, shown)) in message.replace(".0 ", " "), message


def test_the_whole_command_line_may_be_repeated(llmkern):
    line = ["train", "text.txt", "--output", "run", "--preset", "zaremba-small", "--quiet"]
    line += ["--hidden-size", 8, "--batch-size", 4, "--tokenizer", "char", "--max-steps"]
    assert llmkern(*line, 2).exit_code == 0
    done = llmkern(*line, 4, "--resume")
    assert done.exit_code == 0, done.output
    assert (
        load_checkpoint("run")["arguments"]["epochs"] == PRESETS["zaremba-small"].training["epochs"]
    )


@pytest.fixture
def interrupted(monkeypatch):
    """``interrupted(step)``: the next run gets a Ctrl-C in that step."""
    whole = Stepper.step

    def arm(at):
        def step(self, inputs, targets, number):
            if number == at:
                monkeypatch.setattr(Stepper, "step", whole)
                signal.raise_signal(signal.SIGINT)
            return whole(self, inputs, targets, number)

        monkeypatch.setattr(Stepper, "step", step)

    return arm


def printed_line(done):
    (line,) = (li for li in done.stdout.splitlines() if li.startswith("to go on: llmkern "))
    return shlex.split(line)[4:]


def test_the_printed_line_goes_on_with_the_same_run(llmkern, interrupted):
    """The schedule's horizon is the run's, the held out text too, and paths are quoted."""
    Path("a text.txt").write_text(toys.TEXT)
    options = ["--lr-schedule", "cosine", "--max-steps", 40, "--epochs", 80, "--lowercase"]
    options += ["--valid-fraction", 0.3, "--tied", "--embedding-dim", 16, "--device", "cpu"]
    begin = ["train", "a text.txt", *SMALL, *options, "--log-every", 1, "--output"]
    whole = llmkern(*begin, "whole")
    assert "stopped by max_steps after step 40" in whole.stdout
    interrupted(14)
    done = llmkern(*begin, "my run")
    assert done.exit_code == 130
    assert "try: llmkern generate 'my run'" in done.stdout
    again = llmkern(*printed_line(done), "--quiet")
    assert again.exit_code == 0, again.output
    assert "stopped by max_steps after step 40" in again.stdout
    assert_same_run("whole", "my run")
    assert "to go on" not in again.stdout  # its cosine has ended


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--max-steps", 3], "train text.txt --output run --resume --max-steps 6"),
        (["--max-seconds", 1e-9], "train text.txt --output run --resume"),
        (["--max-steps", 3, "--device", "cpu"], "--resume --device cpu --max-steps 6"),
        (
            ["--max-steps", 3, "--lr-schedule", "cosine", "--schedule-steps", 5],
            "--resume --max-steps 5",
        ),
        (["--max-steps", 3, "--lr-schedule", "cosine"], None),
        (["--epochs", 1], None),
        (["--patience", 1, "--optimizer", "sgd", "--learning-rate", 1e-30], None),
    ],
    ids=str,
)
def test_a_line_is_printed_where_it_does_something(llmkern, options, expected):
    done = llmkern("train", "text.txt", "--output", "run", *SMALL, *options)
    assert done.exit_code == 0, done.output
    if expected is None:
        assert "to go on" not in done.stdout
    else:
        assert done.stdout.endswith(f"{expected}\n")


def test_a_cosine_is_not_begun_again(llmkern, fails):
    cosine = ["--lr-schedule", "cosine", "--max-steps", 4]
    llmkern("train", "text.txt", "--output", "run", *SMALL, *cosine)
    resume = ["train", "text.txt", "--output", "run", "--resume", "--quiet", "--max-steps"]
    message = fails(2, *resume, 8)
    assert "expected epochs or max_steps to end the run at step 4 at the latest" in message
    assert load_checkpoint("run")["state"]["step"] == 4
    longer = [*cosine, "--schedule-steps", 8]
    llmkern("train", "text.txt", "--output", "run", *SMALL, *longer, "--overwrite")
    assert llmkern(*resume, 8).exit_code == 0
    whole = ["--lr-schedule", "cosine", "--max-steps", 8]
    llmkern("train", "text.txt", "--output", "whole", *SMALL, *whole)
    mine, theirs = (load_checkpoint(run)["model"] for run in ("run", "whole"))
    assert all((mine[name] == theirs[name]).all() for name in mine)
