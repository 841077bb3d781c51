# SPDX-License-Identifier: Apache-2.0
"""Whatever is wrong: one line on standard error, the right exit code, no traceback."""

import errno
import os
from pathlib import Path

import pytest
import torch

from llmkern.cli import COMMANDS
from llmkern.models import LanguageModel
from tests.cli.conftest import SMALL
from tests.models import toys


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_an_example(llmkern, name):
    done = llmkern(name, "--help")
    assert done.exit_code == 0
    assert f"Example: llmkern {name} " in done.stdout


def test_without_a_command_the_commands_are_listed(llmkern):
    done = llmkern()
    assert all(name in done.output for name in COMMANDS)
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frobnicate"], "No such command 'frobnicate'; see: llmkern --help"),
        (["train"], "Missing argument 'path'; see: llmkern train --help"),
        (["train", "text.txt"], "Missing option '--output'"),
        (["train", "text.txt", "--output", "run", "--epochs", "many"], "'--epochs'"),
        (["train", "text.txt", "--output", "run", "--colour"], "No such option: --colour"),
        (["generate", "run", "--temperature", "hot"], "'--temperature'"),
    ],
    ids=str,
)
def test_command_lines_that_cannot_be_read(fails, arguments, message):
    assert message.lower() in fails(2, *arguments).lower()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epochs", 0], "expected epochs to be an int >= 1, got 0"),
        (["--dropout", 1.5], "expected dropout in [0, 1), got 1.5"),
        (["--hidden-size", -1], "expected hidden_size to be an int >= 1, got -1"),
        (
            ["--optimizer", "lion"],
            "expected optimizer to be one of sgd, adam, adamw, rmsprop, got 'lion'",
        ),
        (["--tokenizer", "syllable"], "got 'syllable'"),
        (
            ["--preset", "huge"],
            "--preset: expected one of zaremba-small, char-rnn, founding, got huge",
        ),
        (["--tied"], "for tie_weights=True, got 12 and 16"),
        (["--valid-fraction", 1.5], "got 1.5"),
        (
            ["--batch-size", 5000],
            "expected train_ids of at least 2 * batch_size = 10000 tokens, got 864",
        ),
        (
            ["--eval-batch-size", 90],
            "valid_ids of at least 2 * eval_batch_size = 180 tokens, got 96",
        ),
        (
            ["--device", "gpu9"],
            "--device: expected a device of this machine such as cpu or auto, got 'gpu9'",
        ),
        (["--device", "cuda:77"], "got 'cuda:77'"),
        (["--resume"], "expected a checkpoint in run, found none"),
    ],
    ids=str,
)
def test_options_out_of_range(fails, options, message):
    assert message in fails(2, "train", "text.txt", "--output", "run", *SMALL, *options)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "missing.txt"),
        (b"", "an empty file"),
        (b"good \xff bad", "byte 0xFF at offset 5 (line 1, column 6)"),
        (b"\xff\xfea\x00", "got byte 0xFF at offset 0"),
    ],
)
@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_texts_that_cannot_be_read(trained, fails, command, content, message):
    if content is not None:
        Path("missing.txt").write_bytes(content)
    arguments = {
        "train": ["train", "missing.txt", "--output", "other", "--quiet"],
        "evaluate": ["evaluate", "run", "missing.txt"],
    }
    assert message in fails(2, *arguments[command])
    assert not Path("other").exists()


def test_output_that_cannot_be_written(fails):
    Path("file").write_text("x")
    message = fails(2, "train", "text.txt", "--output", "file/run", *SMALL)
    assert "could not make the folder file/run: Not a directory" in message


def test_a_full_disk(fails, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    message = fails(1, "train", "text.txt", "--output", "run", *SMALL)
    assert "could not write run/checkpoint-0000000000.pt: No space left on device" in message


def test_training_that_diverges(fails, monkeypatch):
    loss = LanguageModel.loss
    monkeypatch.setattr(LanguageModel, "loss", lambda *a: (loss(*a)[0] * float("nan"), None))
    message = fails(1, "train", "text.txt", "--output", "run", *SMALL)
    assert "expected a finite loss, got nan in step 1" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--momentum", 0.9], "expected momentum beside optimizer sgd or rmsprop alone"),
        (["--warmup-steps", 5], "expected warmup_steps beside lr_schedule cosine alone"),
        (["--preset", "zaremba-small", "--rmsprop-alpha", 0.5], "expected rmsprop_alpha beside"),
        (["--patience", 3, "--valid-fraction", 0], "expected a validation text for patience 3"),
        (
            ["--lr-schedule", "plateau", "--valid-fraction", 0],
            "for lr_schedule 'plateau', which has",
        ),
        (["--eval-every-steps", 3, "--valid-fraction", 0], "for eval_every_steps 3, which has no"),
        (["--valid-fraction", 0.2, "valid.txt"], "expected it left out where valid.txt is the"),
    ],
    ids=str,
)
def test_options_without_effect(fails, options, message):
    Path("valid.txt").write_text(toys.TEXT)
    assert message in fails(2, "train", "text.txt", "--output", "run", *SMALL, *options)
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("command", "method", "lower"),
    [
        (
            ["train", "text.txt", "--output", "other", *SMALL],
            "__init__",
            "--batch-size, --bptt, --hid",
        ),
        (["evaluate", "run", "text.txt"], "forward", "--batch-size"),
        (["generate", "run"], "hidden_states", "--num-return-sequences"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_too_little_memory(trained, fails, monkeypatch, command, method, lower):
    def greedy(*args, **options):
        raise RuntimeError(
            "DefaultCPUAllocator: can't allocate memory: tried to allocate 4294967296 bytes"
        )

    monkeypatch.setattr(LanguageModel, method, greedy)
    if command[0] == "generate":
        command = [*command, "--prompt", "the", "--num-return-sequences", 2]
    message = fails(1, *command)
    assert (
        f"out of memory, 4,294,967,296 bytes (4.0 GiB) more were asked for; lower {lower}"
        in message
    )


@pytest.mark.parametrize("command", [["evaluate", "run", "text.txt"], ["generate", "run"]], ids=str)
def test_models_that_cannot_be_used(trained, fails, command):
    weights = Path("run/model.safetensors")
    data = weights.read_bytes()
    weights.write_bytes(data[:-50])
    assert "run/model.safetensors is corrupt or cut off" in fails(2, *command)
    weights.write_bytes(data)
    toys.tokenizer(text="another text").save("run")
    assert "run/tokenizer.json is not the tokenizer the model was saved with" in fails(2, *command)
    Path("run/tokenizer.json").unlink()
    assert "found no file run/tokenizer.json" in fails(2, *command)
    Path("run/config.json").write_text("{")
    assert "run/config.json is not a model's configuration or is corrupt" in fails(2, *command)
    assert "found no file nowhere/config.json" in fails(2, command[0], "nowhere", *command[2:])


def test_a_model_without_a_tokenizer(fails):
    toys.model().save_pretrained("bare")
    for command in (["evaluate", "bare", "text.txt"], ["generate", "bare"]):
        assert "expected a tokenizer.json in bare, found none" in fails(2, *command)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "the Q"], "got 'Q' (U+0051) at position 4"),
        (["--temperature", -1], "expected temperature in [0, inf), got -1.0"),
        (["--top-p", 0], "expected top_p in (0, 1], got 0.0"),
        (["--max-new-tokens", 0], "expected max_new_tokens to be an int >= 1, got 0"),
        (["--stop", ""], "expected stop_strings to be texts that are not empty"),
    ],
    ids=str,
)
def test_generation_that_cannot_be_done(trained, fails, options, message):
    assert message in fails(2, "generate", "run", *options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-size", 0], "expected batch_size >= 1, got 0"),
        (["--batch-size", 9999], "got 960"),
        (["--split", "holdout"], "--split: expected one of train, valid, test, got holdout"),
        (["--split", "test"], "expected one of the splits of text.txt, train or valid, got test"),
    ],
    ids=str,
)
def test_evaluation_that_cannot_be_done(trained, fails, options, message):
    assert message in fails(2, "evaluate", "run", "text.txt", *options)


def test_a_corrupt_checkpoint_to_resume(trained, fails):
    (checkpoint,) = Path("run").glob("checkpoint-*.pt")
    checkpoint.write_bytes(checkpoint.read_bytes()[:500])
    message = fails(2, "train", "text.txt", "--output", "run", "--resume", "--quiet")
    assert f"{checkpoint} cannot be used: it is cut off or corrupt" in message
    torch.save({"format": "other"}, checkpoint)
    message = fails(2, "train", "text.txt", "--output", "run", "--resume", "--quiet")
    assert "it is not of the format llmkern.checkpoint" in message
