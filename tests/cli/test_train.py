# SPDX-License-Identifier: Apache-2.0
"""llmkern train: from a text to a run folder; presets, resuming, replacing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmkern.cli.presets import PRESETS
from llmkern.models import LanguageModel
from llmkern.training import TrainingArguments, list_checkpoints, load_checkpoint
from tests.cli.conftest import SMALL
from tests.models import toys
from tests.training.test_resume import assert_same_run

ROOT = Path(__file__).resolve().parents[2]


def test_a_file_in_a_run_folder_out(llmkern):
    done = llmkern("train", "text.txt", "--output", "deep/run", *SMALL)
    assert done.exit_code == 0
    assert "stopped by epochs after step 18, epoch 2" in done.stdout
    assert "llmkern generate deep/run" in done.stdout
    names = {path.name for path in Path("deep/run").iterdir()}
    files = {"config.json", "model.safetensors", "tokenizer.json", "log.jsonl", "tb", "data.json"}
    assert names == files | {"checkpoint-0000000018.pt"}
    epochs = [json.loads(line) for line in Path("deep/run/log.jsonl").read_text().splitlines()]
    best = min(e["valid_loss"] for e in epochs if e["event"] == "epoch")
    assert f"valid loss {best:.4f}" in done.stdout


def test_progress_and_sizes_go_to_standard_error(llmkern):
    done = llmkern("train", "text.txt", "--output", "run", *SMALL[:-1])
    parameters = LanguageModel.from_pretrained("run").num_parameters
    assert (
        f"tokens: train 864, valid 96; vocabulary 17 (char); parameters {parameters:,}"
        in done.stderr
    )
    assert "epoch 2/2 | train ppl" in done.stderr


def test_a_folder_with_splits_is_also_tested(llmkern):
    for split in ("train", "valid", "test"):
        Path("corpus").mkdir(exist_ok=True)
        Path(f"corpus/toy.{split}.txt").write_text(toys.TEXT)
    done = llmkern("train", "corpus", "--output", "run", "--tokenizer", "word", *SMALL)
    assert done.exit_code == 0
    assert "test loss" in done.stdout
    assert LanguageModel.from_pretrained("run").tokenizer.kind == "word"


@pytest.mark.parametrize("kind", ["char", "word", "bpe", "jieba"])
def test_every_tokenizer(llmkern, kind):
    options = ["--vocab-size", "300"] if kind == "bpe" else []
    limits = ["--max-steps", "2", "--batch-size", "2"]
    done = llmkern(
        "train", "text.txt", "--output", "run", "--tokenizer", kind, *options, *SMALL, *limits
    )
    assert done.exit_code == 0, done.output
    assert LanguageModel.from_pretrained("run").tokenizer.kind == kind


def test_characters_of_the_validation_text_are_known_too(llmkern):
    Path("text.txt").write_text(toys.TEXT + "Ω")
    assert llmkern("train", "text.txt", "--output", "run", *SMALL).exit_code == 0
    assert "Ω" in LanguageModel.from_pretrained("run").tokenizer.tokens
    options = ["--vocab-size", "10", "--overwrite"]
    assert llmkern("train", "text.txt", "--output", "run", *options, *SMALL).exit_code == 0
    assert LanguageModel.from_pretrained("run").tokenizer.tokens[0] == "<unk>"


def test_every_option_arrives(llmkern):
    options = {
        "num_layers": 2,
        "dropout": 0.25,
        "init_range": 0.05,
        "optimizer": "rmsprop",
        "rmsprop_alpha": 0.9,
        "momentum": 0.1,
        "weight_decay": 0.01,
        "max_grad_norm": 3.0,
        "max_grad_value": 2.0,
        "lr_schedule": "decay",
        "lr_decay": 0.5,
        "lr_decay_after": 2,
        "loss_reduction": "sum_time",
        "patience": 4,
        "seed": 9,
        "eval_batch_size": 4,
        "eval_every_steps": 2,
        "save_every_steps": 3,
        "keep": 2,
        "max_steps": 7,
        "max_seconds": 1000.0,
    }
    words = [w for name, value in options.items() for w in (f"--{name.replace('_', '-')}", value)]
    flags = ["--embedding-dim", 16, "--tied", "--no-tensorboard"]
    done = llmkern("train", "text.txt", "--output", "run", *SMALL, *words, *flags)
    assert done.exit_code == 0, done.output
    content = load_checkpoint("run")
    saved = content["arguments"] | content["model_config"]
    assert {name: saved[name] for name in options} == options
    assert saved["tie_weights"] is True
    assert saved["tensorboard"] is False
    assert len(list_checkpoints("run")) == 2


def test_a_preset_gives_way_to_another_schedule_or_optimizer(llmkern):
    options = ["--preset", "char-rnn", "--lr-schedule", "constant", "--optimizer", "adam"]
    sizes = ["--batch-size", 4, "--hidden-size", 8, "--max-steps", 1, "--quiet"]
    done = llmkern("train", "text.txt", "--output", "run", *options, *sizes)
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("kind", ["char", "word"])
def test_twenty_lines_train_with_the_default_settings(llmkern, kind):
    Path("text.txt").write_text("".join(toys.TEXT.splitlines(keepends=True)[:20]))
    line = ["train", "text.txt", "--output", "run", "--tokenizer", kind, "--epochs", 1]
    done = llmkern(*line, "--hidden-size", 16, "--embedding-dim", 16)
    assert done.exit_code == 0, done.output
    assert load_checkpoint("run")["state"]["step"] >= 4
    assert "batch size 1;" in done.stderr


def test_a_seed_is_drawn_printed_and_saved(llmkern):
    options = [*SMALL[:-3], "--max-steps", 2]
    assert "--seed" not in options
    seeds = []
    for run in ("a", "b"):
        done = llmkern("train", "text.txt", "--output", run, *options)
        seed = load_checkpoint(run)["arguments"]["seed"]
        assert f"; seed {seed}" in done.stdout
        assert f"; seed {seed}" in done.stderr
        seeds.append(seed)
    assert seeds[0] != seeds[1]
    llmkern("train", "text.txt", "--output", "c", *options, "--seed", seeds[0])
    assert_same_run("a", "c")


def test_zero_switches_clipping_off(llmkern):
    llmkern("train", "text.txt", "--output", "run", *SMALL, "--max-grad-norm", 0, "--max-steps", 1)
    assert load_checkpoint("run")["arguments"]["max_grad_norm"] is None


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_options_go_over_them(llmkern, name):
    preset = PRESETS[name]
    TrainingArguments(**preset.training)
    assert LanguageModel(50, **preset.model).num_parameters > 0
    sizes = (
        "--hidden-size",
        8,
        "--embedding-dim",
        8,
        "--batch-size",
        4,
        "--max-steps",
        1,
        "--quiet",
    )
    done = llmkern("train", "text.txt", "--output", "run", "--preset", name, *sizes)
    assert done.exit_code == 0, done.output
    content = load_checkpoint("run")
    assert content["arguments"]["bptt"] == preset.training["bptt"]
    assert content["arguments"]["learning_rate"] == preset.training["learning_rate"]
    assert content["arguments"]["batch_size"] == 4
    assert content["model_config"]["num_layers"] == preset.model["num_layers"]
    assert LanguageModel.from_pretrained("run").tokenizer.kind == preset.tokenizer["kind"]


def test_zaremba_small_is_the_published_configuration():
    preset = PRESETS["zaremba-small"]
    arguments = TrainingArguments(**preset.training)
    assert (arguments.batch_size, arguments.bptt, arguments.epochs) == (20, 20, 13)
    assert (arguments.optimizer, arguments.learning_rate, arguments.max_grad_norm) == (
        "sgd",
        1.0,
        5.0,
    )
    assert (arguments.lr_decay, arguments.lr_decay_after) == (0.5, 4)
    assert arguments.loss_reduction == "sum_time"
    assert LanguageModel(10_000, **preset.model).num_parameters == 4_653_200


def test_resumes_with_the_settings_of_the_run(trained):
    done = trained("train", "text.txt", "--output", "run", "--resume", "--epochs", 3, "--quiet")
    assert done.exit_code == 0, done.output
    trained("train", "text.txt", "--output", "whole", *SMALL, "--epochs", 3)
    assert_same_run("whole", "run")


def saved_after(step):
    """Whether the folder ``run`` has a later checkpoint."""
    return any(path.name > f"checkpoint-{step:010d}.pt" for path in list_checkpoints("run"))


def test_killed_in_mid_epoch_and_resumed_is_never_stopped(llmkern):
    """The real command in its own process, killed at no step in particular."""
    options = [*SMALL, "--epochs", "100000", "--save-every-steps", "5", "--seed", "3"]
    command = [sys.executable, "-c", "from llmkern.cli import main; main()", "train", "text.txt"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([*command, "--output", "run", *options], env=environment)
    while (
        process.poll() is None
        and len(Path("run").glob("checkpoint*") and list_checkpoints("run")) == 0
    ):
        time.sleep(0.01)
    while process.poll() is None and not saved_after(20):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    last = load_checkpoint("run")["state"]["step"]
    limit = ["--max-steps", str(last + 7)]
    assert (
        llmkern("train", "text.txt", "--output", "run", *options, *limit, "--resume").exit_code == 0
    )
    assert llmkern("train", "text.txt", "--output", "whole", *options, *limit).exit_code == 0
    assert_same_run("whole", "run")


def trains():
    """Whether the run in the folder ``run`` has taken its first steps."""
    log = Path("run/log.jsonl")
    return log.exists() and '"train", "step"' in log.read_text()


def test_interrupted_by_ctrl_c(llmkern):
    options = [*SMALL, "--epochs", "100000"]
    command = [sys.executable, "-c", "from llmkern.cli import main; main()", "train", "text.txt"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [*command, "--output", "run", *options],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while process.poll() is None and not trains():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130, err
    assert err == ""
    assert "stopped by interrupted after step" in out
    assert "llmkern train text.txt --output run --resume\n" in out
    LanguageModel.from_pretrained("run")


def test_a_run_is_replaced_only_when_asked(trained, fails):
    before = Path("run/model.safetensors").read_bytes()
    message = fails(2, "train", "text.txt", "--output", "run", *SMALL)
    assert "run holds a run; give --resume (resume=True) to go on with it, --overwrite" in message
    assert Path("run/model.safetensors").read_bytes() == before
    Path("run/notes.txt").write_text("mine")
    done = trained("train", "text.txt", "--output", "run", *SMALL, "--overwrite", "--seed", 1)
    assert done.exit_code == 0
    assert Path("run/notes.txt").exists()
    assert load_checkpoint("run")["arguments"]["seed"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--hidden-size", 20],
            "--resume: expected --hidden-size 16 as in the run's checkpoint, got --hidden-size 20",
        ),
        (["--tokenizer", "word"], "--resume: expected --tokenizer char as in the run's"),
        (["--bptt", 13], "--resume: expected --bptt 12 as in the run's checkpoint, got --bptt 13"),
        (["--overwrite"], "expected --resume or --overwrite, got both"),
    ],
    ids=str,
)
def test_resuming_is_no_other_run(trained, fails, options, message):
    assert message in fails(
        2, "train", "text.txt", "--output", "run", "--resume", "--quiet", *options
    )


def test_resuming_with_another_text(trained, fails):
    Path("other.txt").write_text(toys.TEXT.replace("cat", "tac"))
    message = fails(2, "train", "other.txt", "--output", "run", "--resume", "--quiet")
    assert "is of another text: expected train_ids of 864 tokens" in message
