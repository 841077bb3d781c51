# SPDX-License-Identifier: Apache-2.0
"""``llmkern train`` into a folder that holds something: nothing of a user's is lost."""

import json
from pathlib import Path

import pytest

from llmkern.models import LanguageModel
from llmkern.training import load_checkpoint
from llmkern.training.lock import RunLock
from tests.cli.conftest import SMALL
from tests.models import toys
from tests.training.test_run_folder import contents


@pytest.mark.parametrize(
    "options",
    [
        *(["--batch-size", 0], ["--batch-size", 5000], ["--tied"], ["--optimizer", "lion"]),
        *(
            ["--precision", "bf16", "--device", "cpu"],
            ["--device", "gpu9"],
            ["--valid-fraction", 2],
        ),
        *(["--tokenizer", "syllable"], ["--hidden-size", 0], ["--momentum", 0.5], ["--resume"]),
        *(["--eval-batch-size", 90], ["--preset", "huge"], ["missing.txt"]),
    ],
    ids=str,
)
def test_overwrite_with_wrong_options_deletes_nothing(trained, fails, options):
    before = contents(Path("run"))
    fails(2, "train", "text.txt", "--output", "run", "--overwrite", *SMALL, *options)
    assert contents(Path("run")) == before


def test_overwrite_that_diverges_deletes_nothing(trained, fails):
    before = contents(Path("run"))
    options = ["--learning-rate", 1e30, "--optimizer", "sgd", "--max-grad-norm", 0]
    message = fails(1, "train", "text.txt", "--output", "run", "--overwrite", *SMALL, *options)
    assert "expected a finite" in message
    assert contents(Path("run")) == before


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]], ids=str)
@pytest.mark.parametrize(
    "name", ["config.json", "log.jsonl", "tokenizer.json", "model.safetensors"]
)
def test_a_users_own_file_is_refused_by_name(llmkern, fails, name, overwrite):
    Path("mine").mkdir()
    Path("mine", name).write_text("mine")
    message = fails(2, "train", "text.txt", "--output", "mine", *SMALL, *overwrite)
    assert f"mine has {name}, which this run would write and no run" in message
    assert contents(Path("mine")) == {name: b"mine"}


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]], ids=str)
def test_a_saved_model_is_refused(llmkern, fails, overwrite):
    toys.talking_model().save_pretrained("mine")
    before = contents(Path("mine"))
    message = fails(2, "train", "text.txt", "--output", "mine", *SMALL, *overwrite)
    assert "mine has config.json, model.safetensors, tokenizer.json" in message
    assert contents(Path("mine")) == before


def test_overwrite_replaces_the_run(trained):
    Path("run/notes.txt").write_text("mine")
    done = trained("train", "text.txt", "--output", "run", *SMALL, "--overwrite", "--seed", 1)
    assert done.exit_code == 0, done.output
    assert trained("train", "text.txt", "--output", "new", *SMALL, "--seed", 1).exit_code == 0
    mine, other = contents(Path("run")), contents(Path("new"))
    for name in ("config.json", "tokenizer.json", "model.safetensors", "data.json"):
        assert mine[name] == other[name]
    assert mine["notes.txt"] == b"mine"
    assert sum(name.startswith("tb/") for name in mine) == 2  # before it was moved, and since


def test_the_same_training_makes_the_same_model_files(llmkern):
    for folder in ("a", "b"):
        done = llmkern("train", "text.txt", "--output", folder, *SMALL, "--seed", 7)
        assert done.exit_code == 0, done.output
    for name in ("config.json", "tokenizer.json", "model.safetensors", "data.json"):
        assert Path("a", name).read_bytes() == Path("b", name).read_bytes(), name


def test_a_folder_in_use_is_refused_with_the_name_of_its_owner(trained, fails):
    before = contents(Path("run"))
    with RunLock(Path("run")):
        for option in ("--resume", "--overwrite"):
            message = fails(1, "train", "text.txt", "--output", "run", "--quiet", option)
            assert "run is in use by process" in message
    assert contents(Path("run")) == before


def test_a_hostile_model_folder_is_one_line(trained, fails):
    config = json.loads(Path("run/config.json").read_text())
    for changes in ({"num_layers": 10**18}, {"hidden_size": 200_000}, {"x": [1] * 10**5}):
        Path("run/config.json").write_text(json.dumps(config | changes))
        for command in (["generate", "run"], ["evaluate", "run", "text.txt"]):
            message = fails(2, *command)
            assert "run/config.json" in message
            assert len(message) < 1500
    Path("run/config.json").write_text(json.dumps(config))
    LanguageModel.from_pretrained("run")
    assert load_checkpoint("run")["model_config"]["num_layers"] == 1
