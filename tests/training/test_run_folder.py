# SPDX-License-Identifier: Apache-2.0
"""A run's folder: nothing of a user's is lost, and one process works there at a time."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from llmkern.models import LanguageModel
from llmkern.training import Trainer, TrainingArguments, load_checkpoint, lock
from llmkern.training.lock import LOCK_NAME, RunLock
from llmkern.training.run_folder import NAMES, check_folder
from tests.models import toys

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = toys.tokenizer()
IDS = toys.token_ids(TOKENIZER)


def trainer(folder, seed=1, **settings):
    defaults = {"batch_size": 8, "bptt": 12, "epochs": 1, "seed": seed, "tensorboard": False}
    return Trainer(
        toys.model(TOKENIZER.vocab_size, seed=seed),
        TrainingArguments(**(defaults | settings)),
        IDS[:800],
        IDS[800:],
        output_dir=folder,
        tokenizer=TOKENIZER,
        show_progress=False,
    )


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def finished(tmp_path):
    """A folder with a run that was trained to its end, and a file of the user's."""
    trainer(tmp_path / "run", tensorboard=True).train()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    (tmp_path / "run" / "tb" / "notes.txt").write_text("mine too")
    return tmp_path / "run"


def break_step(some_trainer, number, error):
    """Raises an error in optimizer step ``number``."""
    step = some_trainer.stepper.step

    def broken(inputs, targets, n):
        if n == number:
            raise error
        return step(inputs, targets, n)

    some_trainer.stepper.step = broken


@pytest.mark.parametrize(
    "error", [MemoryError("none left"), FloatingPointError(), KeyboardInterrupt()]
)
def test_a_run_that_fails_before_its_first_checkpoint_replaces_nothing(finished, error):
    before = contents(finished)
    second = trainer(finished, seed=2)
    break_step(second, 3, error)
    with pytest.raises(type(error)):
        second.train(overwrite=True)
    assert contents(finished) == before


def test_the_old_run_stays_until_the_new_one_has_its_first_checkpoint(finished):
    before = contents(finished)
    second = trainer(finished, seed=2, save_every_steps=4, log_every=1, tensorboard=True)
    step, seen = second.stepper.step, []

    def watching(inputs, targets, number):
        seen.append(contents(finished))
        return step(inputs, targets, number)

    second.stepper.step = watching
    second.train(overwrite=True)
    for number, found in enumerate(seen, 1):
        visible = {name: data for name, data in found.items() if not name.startswith(".llmkern-")}
        if number <= 4:
            assert visible == before
        else:
            assert [name for name in visible if name.startswith("checkpoint-")] == [
                f"checkpoint-{(number - 1) // 4 * 4:010d}.pt"
            ]
    after = contents(finished)
    assert after["notes.txt"] == b"mine"
    assert after["tb/notes.txt"] == b"mine too"
    old_events = {name for name in before if name.startswith("tb/events")}
    new_events = {name for name in after if name.startswith("tb/events")}
    assert new_events and not old_events & new_events
    assert not [name for name in after if name.startswith(".llmkern-")]
    logged = [json.loads(line) for line in after["log.jsonl"].splitlines()]
    assert [entry["step"] for entry in logged if entry["event"] == "train"] == list(range(1, 10))
    assert load_checkpoint(finished)["arguments"]["seed"] == 2
    assert LanguageModel.from_pretrained(finished).config["hidden_size"] == 16


def test_a_run_that_replaces_one_is_the_run_it_would_have_been(finished, tmp_path):
    trainer(finished, seed=2, save_every_steps=4).train(overwrite=True)
    trainer(tmp_path / "fresh", seed=2, save_every_steps=4).train()
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (finished / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes()
    for part in ("model", "optimizer", "state", "random"):
        mine, other = (load_checkpoint(f)[part] for f in (finished, tmp_path / "fresh"))
        assert str(mine) == str(other)


def test_files_that_only_the_old_run_had_go(tmp_path):
    """The new run writes no TensorBoard files and no tokenizer; nothing of the old one may be taken for its own."""
    trainer(tmp_path, tensorboard=True).train()
    second = trainer(tmp_path, seed=2)
    second.tokenizer = None
    second.train(overwrite=True)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"config.json", "model.safetensors", "log.jsonl", "checkpoint-0000000009.pt"}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", sorted(NAMES))
def test_files_that_no_run_made_are_refused_by_name(tmp_path, name, overwrite):
    if name in ("best.pt", "data.json"):
        pytest.skip("this run writes no such file")
    (tmp_path / name).write_text("mine")
    with pytest.raises(FileExistsError, match=f"has {name}, which .* nothing was changed"):
        trainer(tmp_path, tensorboard=True).train(overwrite=overwrite)
    assert contents(tmp_path) == {name: b"mine"}


def test_a_model_that_save_pretrained_wrote_is_refused(tmp_path):
    toys.talking_model().save_pretrained(tmp_path)
    before = contents(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match=r"has config\.json, model\.safetensors, token"):
            trainer(tmp_path).train(overwrite=overwrite)
    assert contents(tmp_path) == before


def test_a_file_that_the_old_run_did_not_make_is_no_part_of_it(tmp_path):
    """A module of the user's own beside a config.json of the user's own."""
    from tests.training.test_own_modules import Counting, own_trainer

    (tmp_path / "config.json").write_text("mine")
    own_trainer(Counting(), tmp_path).train()
    with pytest.raises(FileExistsError, match=r"has config\.json, which"):
        trainer(tmp_path).train(overwrite=True)
    own_trainer(Counting(), tmp_path).train(overwrite=True)
    assert (tmp_path / "config.json").read_text() == "mine"


def test_overwriting_a_folder_without_a_run_is_a_new_run(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    trainer(tmp_path).train(overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    LanguageModel.from_pretrained(tmp_path)


def test_a_checkpoint_that_cannot_be_read_is_not_overwritten(finished):
    (finished / "checkpoint-0000000001.pt").write_text("mine, by chance of this name")
    before = contents(finished)
    with pytest.raises(ValueError, match=r"checkpoint-0000000001\.pt cannot be used"):
        trainer(finished).train(overwrite=True)
    assert contents(finished) == before


def test_an_interrupt_before_the_first_step_replaces_nothing(finished):
    before = contents(finished)
    second = trainer(finished, seed=2)
    train = second._train_epoch

    def interrupted(session):
        signal.raise_signal(signal.SIGINT)
        return train(session)

    second._train_epoch = interrupted
    with pytest.raises(KeyboardInterrupt):
        second.train(overwrite=True)
    assert contents(finished) == before


def test_checking_early_makes_and_changes_nothing(finished, tmp_path):
    check_folder(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    before = contents(finished)
    with pytest.raises(FileExistsError, match="holds a run; give --resume"):
        check_folder(finished)
    check_folder(finished, overwrite=True)
    check_folder(finished, resume=True)
    with pytest.raises(FileNotFoundError, match="expected a checkpoint in"):
        check_folder(tmp_path, resume=True)
    assert contents(finished) == before


# --- kill -9 -----------------------------------------------------------------------------------------------------

KILLS = """
import os, shutil, signal, sys
from pathlib import Path

import torch

import torch._dynamo  # which an optimizer imports: once, not in every child

torch.set_num_threads(1)
from llmkern.training import list_checkpoints, load_checkpoint
from llmkern.training.run_folder import check_folder
from tests.training.test_run_folder import contents, trainer

WRITES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")
settings = {"seed": 2, "save_every_steps": 2, "max_steps": 5}
base, begun, stride = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])


def in_a_child(function):
    child = os.fork()
    if child == 0:
        try:
            function()
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def train(folder, at):
    seen = 0

    def count(event, arguments):
        nonlocal seen
        written = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (written and str(folder) in str(arguments[0])) or event in WRITES:
            seen += 1
            if seen == at:
                os.kill(os.getpid(), signal.SIGKILL)

    run = trainer(folder, **settings)
    sys.addaudithook(count)
    run.train(overwrite=True)


def check(folder):
    check_folder(folder, overwrite=True)  # does what the killed process had still to do
    if contents(folder) == contents(base / "old"):
        return
    if begun == "empty" and not list_checkpoints(folder):
        trainer(folder, **settings).train()  # nothing was lost, and nothing is in the way
        return
    assert load_checkpoint(folder)["arguments"]["seed"] == 2
    trainer(folder, **settings).train(resume=True)
    assert sorted(contents(folder)) == sorted(contents(base / "new"))
    mine, expected = load_checkpoint(folder), load_checkpoint(base / "new")
    for part in ("model", "optimizer", "learning_rate", "hidden"):
        assert str(mine[part]) == str(expected[part]), part
    assert contents(folder)["notes.txt"] == b"mine"


def make():
    (base / "old").mkdir()
    if begun == "over a run":
        trainer(base / "old", max_steps=7).train()
    (base / "old" / "notes.txt").write_bytes(b"mine")
    shutil.copytree(base / "old", base / "new")
    trainer(base / "new", **settings).train(overwrite=True)


assert in_a_child(make) == 0
at = 2
outcomes = []
while True:
    folder = base / f"killed-{at}"
    shutil.copytree(base / "old", folder)
    status = in_a_child(lambda: train(folder, at))
    assert status in (0, signal.SIGKILL), status
    assert in_a_child(lambda: check(folder)) == 0, at
    outcomes.append("old" if contents(folder) == contents(base / "old") else "new")
    if status == 0:
        break
    at += stride
print(at, outcomes.count("old"), outcomes.count("new"))
"""


@pytest.mark.parametrize(("begun", "stride"), [("over a run", 5), ("empty", 8)])
def test_killed_at_any_write_nothing_is_lost(tmp_path, begun, stride):
    """kill -9 before every fifth thing that a run does to the file system: the old or the new one is whole."""
    command = [sys.executable, "-c", KILLS, str(tmp_path), begun, str(stride)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    last, old, new = map(int, done.stdout.split())
    assert last > 30
    assert old >= (2 if begun == "over a run" else 0)
    assert new > 2


# --- two processes -----------------------------------------------------------------------------------------------


HOLD = """
import importlib.util, pathlib, sys

# By itself, without the package and torch: quick.
specification = importlib.util.spec_from_file_location("lock", sys.argv[1])
lock = importlib.util.module_from_spec(specification)
specification.loader.exec_module(lock)
with lock.RunLock(pathlib.Path(sys.argv[2])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other_process(finished):
    """A process that works in the folder until it is told to leave."""
    command = [sys.executable, "-c", HOLD, lock.__file__, str(finished)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.communicate()


def test_another_process_is_named(finished, other_process):
    before = contents(finished)
    owner = rf"is in use by process {other_process.pid} on {socket.gethostname()} since 20\d\d-"
    for options in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(RuntimeError, match=owner):
            trainer(finished).train(**options)
        with pytest.raises(RuntimeError, match=owner):
            check_folder(finished, **options)
    assert contents(finished) == before


def test_a_killed_process_holds_nothing(finished, other_process, capsys):
    other_process.kill()
    other_process.wait()
    assert (finished / LOCK_NAME).exists()
    resumed = trainer(finished, epochs=2)
    resumed._show_progress = True
    resumed.train(resume=True)
    message = capsys.readouterr().err
    assert f"was left by process {other_process.pid} on {socket.gethostname()} since" in message
    assert "taking over" in message
    assert not (finished / LOCK_NAME).exists()


def test_two_trainers_of_one_process(finished):
    first, second = trainer(finished, epochs=3), trainer(finished, epochs=3)
    step = first.stepper.step

    def intruded(inputs, targets, number):
        with pytest.raises(RuntimeError, match=rf"process {os.getpid()} \(this one\)"):
            second.train(resume=True)
        return step(inputs, targets, number)

    first.stepper.step = intruded
    assert first.train(resume=True).epoch == 3


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    """There the file is the lock: of a dead process of this host it is taken over, of others it is not."""

    def unsupported(file, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    path = tmp_path / LOCK_NAME
    with RunLock(tmp_path), pytest.raises(RuntimeError, match="in use by process"):
        RunLock(tmp_path).__enter__()
    assert not path.exists()
    dead = subprocess.Popen(["true"])
    dead.wait()
    owner = {"pid": dead.pid, "host": socket.gethostname(), "since": "2026-01-01"}
    path.write_text(json.dumps(owner))
    with RunLock(tmp_path, show=False):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    for stranger in (json.dumps(owner | {"host": "elsewhere"}), "", "[", '{"pid": []}'):
        path.write_text(stranger)
        with pytest.raises(RuntimeError, match="is in use by"):
            RunLock(tmp_path).__enter__()
        assert path.read_text() == stranger


def test_a_lock_that_is_removed_while_it_is_taken_is_taken_anew(tmp_path, monkeypatch):
    """Its owner removes it between our open and our flock: what we hold then is nobody's lock."""
    real, calls = lock.fcntl.flock, []

    def late(file, how):
        if not calls:
            (tmp_path / LOCK_NAME).unlink()
        calls.append(file)
        real(file, how)

    monkeypatch.setattr(lock.fcntl, "flock", late)
    with RunLock(tmp_path):
        assert len(calls) == 2
        assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == os.getpid()


# --- file systems that refuse ------------------------------------------------------------------------------------


def read_only(monkeypatch, folder):
    """As on a read-only file system, also for root: whatever writes below the folder fails, removing too."""
    real_open = os.open

    def refuse(path, *args, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    def opened(path, flags, *args, **options):
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            refuse(path)
        return real_open(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", opened)
    for name in ("unlink", "remove", "rename", "replace", "rmdir", "mkdir"):
        monkeypatch.setattr(os, name, refuse)
    monkeypatch.setattr(Path, "unlink", refuse)


@pytest.mark.parametrize("options", [{"resume": True}, {"overwrite": True}], ids=str)
def test_a_read_only_file_system_is_called_so(finished, monkeypatch, options):
    run = trainer(finished)
    read_only(monkeypatch, finished)
    with pytest.raises(OSError, match=r"could not write .*run.*: Read-only file system") as caught:
        run.train(**options)
    assert caught.value.errno == errno.EROFS


def test_cleaning_up_does_not_hide_the_error(tmp_path, monkeypatch):
    from llmkern import _files

    def refuse(path, *args, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(_files, "open", refuse, raising=False)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(OSError, match=r"llmkern\.save: could not write .*a\.txt: Read-only"):
        _files.write_files(tmp_path, {"a.txt": b"x"})
