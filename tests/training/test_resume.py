# SPDX-License-Identifier: Apache-2.0
"""A resumed run is the run that was never stopped: the same parameters, history and log, to the bit."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from llmkern.models import LanguageModel
from llmkern.training import Trainer, TrainingArguments, list_checkpoints, load_checkpoint
from tests.models import toys

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = toys.tokenizer()
IDS = toys.token_ids(TOKENIZER)
OPTIMIZERS = {
    "sgd": {"optimizer": "sgd", "learning_rate": 0.5, "momentum": 0.9, "lr_schedule": "decay"},
    "adam": {"optimizer": "adam", "lr_schedule": "cosine", "warmup_steps": 5},
    "adamw": {"optimizer": "adamw", "weight_decay": 0.1, "lr_schedule": "plateau"},
    "rmsprop": {"optimizer": "rmsprop", "momentum": 0.5, "loss_reduction": "sum_time"},
}


def trainer(folder, model=None, train=IDS[:800], valid=IDS[800:], **settings):
    defaults = {"batch_size": 8, "bptt": 12, "epochs": 3, "save_every_steps": 4, "log_every": 2}
    defaults |= {"tensorboard": False, "seed": 5}
    return Trainer(
        model or toys.model(TOKENIZER.vocab_size, dropout=0.3),
        TrainingArguments(**(defaults | settings)),
        train,
        valid,
        output_dir=folder,
        tokenizer=TOKENIZER,
        show_progress=False,
    )


def log_without_times(folder):
    entries = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [
        {k: v for k, v in entry.items() if k not in ("tokens_per_second", "arguments")}
        for entry in entries
    ]


def assert_same_run(a, b):
    """Two run folders hold the same checkpoint, model and log."""
    mine, theirs = load_checkpoint(a), load_checkpoint(b)
    for part in ("model", "hidden", "optimizer", "learning_rate", "random", "data", "tokenizer"):
        assert_equal(mine[part], theirs[part], part)
    ignored = {"log_size"}  # the log names the limits, which may differ
    for name in set(mine["state"]) - ignored:
        assert_equal(mine["state"][name], theirs["state"][name], name)
    toys.assert_same_parameters(*map(LanguageModel.from_pretrained, (a, b)))


def assert_equal(a, b, where):
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


@pytest.mark.parametrize("settings", OPTIMIZERS.values(), ids=OPTIMIZERS)
# 27 steps, 9 an epoch: the first, in mid-epoch, at an epoch's end, in the last epoch
@pytest.mark.parametrize("stop", [1, 6, 9, 23])
def test_stopped_and_resumed_is_never_stopped(tmp_path, settings, stop):
    whole = trainer(tmp_path / "whole", **settings).train()
    total = 27  # keeps the horizon of the cosine
    first = trainer(tmp_path / "parts", max_steps=total, **settings)
    stop_after(first, stop)
    assert first.train().step == stop
    second = trainer(tmp_path / "parts", max_steps=total, **settings)
    resumed = second.train(resume=True)
    assert resumed.history == whole.history
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert log_without_times(tmp_path / "whole")[1:] == log_without_times(tmp_path / "parts")[1:]


def stop_after(some_trainer, steps):
    """A Ctrl-C during step number ``steps``."""
    step = some_trainer.stepper.step

    def interrupted(inputs, targets, number):
        if number == steps:
            signal.raise_signal(signal.SIGINT)
        return step(inputs, targets, number)

    some_trainer.stepper.step = interrupted


KILLED = """
    import os, signal, sys
    import torch
    from tests.training.test_resume import trainer

    run = trainer(sys.argv[1], keep=2)
    step = run.stepper.step

    def killed(inputs, targets, number):
        if number == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        return step(inputs, targets, number)

    run.stepper.step = killed
    run.train(resume=len(sys.argv) > 3)
"""


def test_killed_twice_in_mid_epoch_and_resumed_is_never_stopped(tmp_path):
    """kill -9 gives no chance to save: the run goes on from its last checkpoint, and its log is cut back."""
    folder = tmp_path / "killed"
    for step, options in ((7, []), (15, ["resume"])):
        command = [sys.executable, "-c", textwrap.dedent(KILLED), str(folder), str(step), *options]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert len(list_checkpoints(folder)) == 2
    assert load_checkpoint(folder)["state"]["step"] == 12
    (folder / ".llmkern-checkpoint-0000000016.pt.0123abcd.tmp").write_bytes(b"half of it")
    assert log_without_times(folder)[-1]["step"] == 14
    trainer(folder).train(resume=True)
    trainer(tmp_path / "whole").train()
    assert_same_run(tmp_path / "whole", folder)
    assert log_without_times(tmp_path / "whole") == log_without_times(folder)
    assert not list(folder.glob(".*"))


def test_a_finished_run_goes_on_with_more_epochs(tmp_path):
    trainer(tmp_path / "parts", epochs=2).train()
    again = trainer(tmp_path / "parts", epochs=2).train(resume=True)
    assert (again.stop_reason, again.step) == ("epochs", 18)
    trainer(tmp_path / "parts", epochs=3).train(resume=True)
    trainer(tmp_path / "whole", epochs=3).train()
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_full_disk_in_mid_run_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    fsync, calls = os.fsync, []

    def full(descriptor):
        calls.append(1)
        if len(calls) > 4:  # two files and their folders: steps 0 and 4
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        trainer(tmp_path / "parts").train()
    monkeypatch.undo()
    assert load_checkpoint(tmp_path / "parts")["state"]["step"] == 4
    assert not list((tmp_path / "parts").glob(".*"))
    trainer(tmp_path / "parts").train(resume=True)
    trainer(tmp_path / "whole").train()
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_after_a_corrupt_checkpoint_the_one_before_serves(tmp_path):
    trainer(tmp_path / "parts", keep=3, max_steps=10).train()
    newest = list_checkpoints(tmp_path / "parts")[-1]
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"-0000000010\.pt cannot be used.*-0000000009\.pt"):
        trainer(tmp_path / "parts").train(resume=True)
    newest.unlink()
    trainer(tmp_path / "parts").train(resume=True)
    trainer(tmp_path / "whole").train()
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bptt": 10}, "trained with other settings: expected bptt 12, got 10"),
        (
            {"train": IDS[1:801]},
            r"of another text: expected train_ids of 800 tokens with SHA-256 \w+",
        ),
        ({"valid": None}, r"expected valid_ids of \d+ tokens .* got none at all"),
        (
            {"model": toys.model(TOKENIZER.vocab_size, hidden_size=9)},
            r"(?s)of another model: .*lstm",
        ),
    ],
    ids=str,
)
def test_another_run_is_refused(tmp_path, changes, message):
    trainer(tmp_path, max_steps=5).train()
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **changes).train(resume=True)


def test_nothing_to_resume(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a checkpoint in"):
        trainer(tmp_path).train(resume=True)
    with pytest.raises(ValueError, match="expected an output_dir to resume from"):
        trainer(None).train(resume=True)
