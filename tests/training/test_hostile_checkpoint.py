# SPDX-License-Identifier: Apache-2.0
"""A checkpoint that is damaged, or well-formed and wrong: one ValueError that names the file, or a run that goes on."""

import copy
import math
import shutil
import typing
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmkern.cli.resuming import resumed
from llmkern.training import (
    Trainer,
    TrainingArguments,
    checkpoints,
    list_checkpoints,
    restoring,
    snapshots,
)
from llmkern.training.state import TrainingState
from tests.models import toys

TOKENIZER = toys.tokenizer()
IDS = toys.token_ids(TOKENIZER)
FUZZ = settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def trainer(folder, **options):
    defaults = {"batch_size": 4, "bptt": 8, "epochs": 2, "tensorboard": False}
    return Trainer(
        toys.model(TOKENIZER.vocab_size, num_layers=1),
        TrainingArguments(**(defaults | options)),
        IDS[:200],
        IDS[200:240],
        output_dir=folder,
        tokenizer=TOKENIZER,
        show_progress=False,
    )


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A run that was stopped in its first epoch."""
    folder = tmp_path_factory.mktemp("run")
    trainer(folder, max_steps=3).train()
    return folder


@pytest.fixture
def stopped(original, tmp_path):
    shutil.copytree(original, tmp_path / "run")
    return tmp_path / "run"


def content_of(folder):
    return torch.load(list_checkpoints(folder)[-1], weights_only=True)


def write(folder, content):
    torch.save(content, list_checkpoints(folder)[-1])


def goes_on_or_is_refused(folder):
    """True if the run goes on; the only error allowed is one ValueError that names the file or its folder."""
    outcomes = []
    for go_on in (
        lambda: resumed(folder, {}, {}, {}),
        lambda: trainer(folder, max_steps=5).train(resume=True),
    ):
        try:
            go_on()
        except (ValueError, FileExistsError) as error:  # the latter where it disowns a file
            assert str(folder) in str(error), error
            assert len(str(error)) < 3000
            outcomes.append(False)
        else:
            outcomes.append(True)
    return outcomes[1]


def test_the_original_goes_on(stopped):
    assert goes_on_or_is_refused(stopped)


def places(value, path=()):
    """The way to every part of a nesting of dicts and lists."""
    if path:
        yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    elif isinstance(value, (list, tuple)):
        for number in range(min(len(value), 3)):
            yield from places(value[number], (*path, number))


def changed(value, path, change):
    """A copy with the part at ``path`` changed, or left out where ``change`` says so."""
    if not path:
        return change(value)
    parts = dict(value) if isinstance(value, dict) else dict(enumerate(value))
    new = changed(parts[path[0]], path[1:], change)
    if new is GONE:
        del parts[path[0]]
    else:
        parts[path[0]] = new
    return parts if isinstance(value, dict) else type(value)(parts.values())


GONE = object()
WRONG = {
    "gone": lambda value: GONE,
    "None": lambda value: None,
    "a text": lambda value: "x",
    "a list": lambda value: [value],
    "a dict": lambda value: {"x": value},
    "minus one": lambda value: -1,
    "huge": lambda value: 10**400,
    "not a number": lambda value: math.nan,
    "infinite": lambda value: math.inf,
    "a tensor": lambda value: torch.zeros(3, 2),
    "integers": lambda value: value.int() if isinstance(value, torch.Tensor) else 2**40,
    "one more": lambda value: (
        torch.cat([value.reshape(-1), value.reshape(-1)[:1]])
        if isinstance(value, torch.Tensor)
        else True
    ),
}


@FUZZ
@given(st.data())
def test_any_part_changed_in_any_way(original, tmp_path, data):
    content = content_of(original)
    path = data.draw(st.sampled_from(list(places(content))))
    how = data.draw(st.sampled_from(list(WRONG)))
    folder = tmp_path / "run"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(original, folder)
    write(folder, changed(content, path, WRONG[how]))
    goes_on_or_is_refused(folder)


@pytest.mark.parametrize(
    "path",
    [
        *(("version",), ("format",), ("model_class",), ("arguments",), ("data",), ("state",)),
        *(("model",), ("optimizer",), ("learning_rate",), ("random",), ("files",), ("hidden",)),
        *(("state", "step"), ("state", "position"), ("optimizer", "state"), ("random", "cpu")),
        *(("optimizer", "state", 0, "exp_avg"), ("model", "head.weight"), ("hidden", 0)),
        *(("arguments", "batch_size"), ("data", "train_ids"), ("learning_rate", "last_epoch")),
    ],
    ids=str,
)
@pytest.mark.parametrize("how", ["gone", "None", "a dict"])
def test_what_a_run_depends_on_is_not_guessed(stopped, path, how):
    write(stopped, changed(content_of(stopped), path, WRONG[how]))
    assert not goes_on_or_is_refused(stopped)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("version",), 3, "expected version 2, got 3"),
        (("version",), GONE, "expected version 2, got None"),
        (("state", "position"), 10**6, "expected state.position to be less than 50"),
        (("state", "position"), 0, "expected state.tokens to be those of 0 columns"),
        (("state", "loss_sum"), math.nan, "expected state.loss_sum to be a finite number"),
        (("optimizer", "param_groups", 0, "betas"), (0.1, 0.2), "optimizer.betas"),
        (("optimizer", "state"), {}, "optimizer.state to be what its steps have left"),
        (("optimizer", "state", 99), {}, "numbers of 7 parameters, got 99"),
        (("model", "head.bias"), torch.zeros(17).double(), r"torch\.float64 \(head\.bias\)"),
        (("model", "head.bias"), "x", r"expected 'head\.bias' to be a tensor, got 'x'"),
        (("model_config", "num_layers"), 10**18, "it has more parameters than there are tensors"),
        (("model_config", "hidden_size"), 200_000, r"expected lstm\.weight_ih_l0 of shape"),
        (("tokenizer",), "{}", "its tokenizer cannot be read"),
        (("source",), {"tokenizer": 3}, "its source is not that of a text"),
    ],
    ids=lambda value: "gone" if value is GONE else str(value),
)
def test_the_message_says_what_is_wrong(stopped, path, value, message):
    content = content_of(stopped)
    if path == ("optimizer", "state", 99):
        content["optimizer"]["state"][99] = value
    else:
        content = changed(content, path, lambda _: value)
    write(stopped, content)
    with pytest.raises(ValueError, match=rf"(?s)checkpoint-0000000003\.pt.*{message}"):
        resumed(stopped, {}, {}, {})
        trainer(stopped).train(resume=True)


@FUZZ
@given(st.randoms(use_true_random=False), st.booleans())
def test_any_bit_and_any_end_of_the_file(original, tmp_path, chance, cut):
    """Half of the bits in the last 2,000 bytes and in the pickled structure, where most classes of errors come from."""
    folder = tmp_path / "run"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(original, folder)
    path = list_checkpoints(folder)[-1]
    data = bytearray(path.read_bytes())
    size = len(data)
    place = chance.choice(
        [chance.randrange(size), chance.randrange(3000), size - 1 - chance.randrange(2000)]
    )
    if cut:
        del data[place:]
    else:
        data[place] ^= 1 << chance.randrange(8)
    path.write_bytes(data)
    assert not goes_on_or_is_refused(folder) or not cut


def with_pickle(path, change):
    """The same archive, checksums and all, with other bytes for its structure."""
    with zipfile.ZipFile(path) as archive:
        parts = {part.filename: archive.read(part) for part in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, change(data) if name.endswith("data.pkl") else data)


@FUZZ
@given(st.randoms(use_true_random=False))
def test_a_structure_of_any_bytes(original, tmp_path, chance):
    folder = tmp_path / "run"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(original, folder)

    def flip(data):
        data = bytearray(data)
        for _ in range(chance.choice([1, 1, 3])):
            data[chance.randrange(len(data))] = chance.randrange(256)
        return bytes(data)

    with_pickle(list_checkpoints(folder)[-1], flip)
    goes_on_or_is_refused(folder)


@pytest.mark.parametrize(
    "pickled",
    [
        b"",
        b"\x80\x02" + b"(" * 10**5,
        b"\x80\x02" + b"]" + b"(]" * 5000 + b"a" * 5000 + b".",
        b"\x80\xff.",
    ],
    ids=lambda pickled: repr(pickled[:6]),
)
def test_deep_and_strange_structures(stopped, pickled):
    with_pickle(list_checkpoints(stopped)[-1], lambda data: pickled)
    assert not goes_on_or_is_refused(stopped)


def test_a_compressed_archive_is_refused_before_it_is_unpacked(stopped):
    path = list_checkpoints(stopped)[-1]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\x00" * 10**6)
    with pytest.raises(ValueError, match="expected parts that are not compressed"):
        checkpoints.load_checkpoint(path)


def test_every_field_of_the_state_has_a_test():
    for name, hint in typing.get_type_hints(TrainingState).items():
        assert hint in restoring._TESTS, name


def test_a_checkpoint_in_another_dtype_is_another_model(stopped):
    run = trainer(stopped)
    run.model.double()
    with pytest.raises(
        ValueError, match=r"it is of another model: expected model\.embedding\.weight"
    ):
        run.train(resume=True)


@pytest.mark.parametrize("schedule", ["constant", "plateau"])
def test_a_checkpoint_by_another_version_of_torch_goes_on(original, tmp_path, schedule):
    """torch adds settings to its optimizers and schedulers as it grows."""
    ends = []
    for name, change in (("same", False), ("other", True)):
        folder = tmp_path / name
        trainer(folder, max_steps=3, lr_schedule=schedule).train()
        content = content_of(folder)
        if change:
            for group in content["optimizer"]["param_groups"]:
                del group["maximize"]
                group["of_the_future"] = "x"
            del content["learning_rate"]["_last_lr"]
            content["learning_rate"]["of_the_future"] = 3
            write(folder, content)
        trainer(folder, lr_schedule=schedule).train(resume=True)
        ends.append(content_of(folder)["model"])
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_state_in_fewer_bits_goes_on(stopped):
    """As autocast leaves it."""
    content = content_of(stopped)
    content["hidden"] = tuple(part.bfloat16() for part in content["hidden"])
    write(stopped, content)
    run = trainer(stopped)
    snapshots.restore(run, 50)
    assert run.stepper.hidden[0].dtype == torch.bfloat16


def test_changed_leaves_the_original_alone():
    value = {"a": [1, {"b": 2}], "c": (3, 4)}
    before = copy.deepcopy(value)
    assert changed(value, ("a", 1, "b"), lambda _: GONE) == {"a": [1, {}], "c": (3, 4)}
    assert changed(value, ("c", 1), lambda _: 5)["c"] == (3, 5)
    assert value == before
