# SPDX-License-Identifier: Apache-2.0
"""A model folder from a stranger: loaded as it was saved, or refused by one error that names the file, at once."""

import json
import math
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import safetensors.torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmkern import _files
from llmkern.models import LanguageModel
from llmkern.models.pretrained import CONFIG_NAME, WEIGHTS_NAME
from tests.models import toys

ROOT = Path(__file__).resolve().parents[2]
FUZZ = settings(
    max_examples=150,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture
def saved(tmp_path):
    toys.talking_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def foreign(saved):
    """The same with weights that carry no metadata, so that nothing vouches for config.json."""
    path = saved / WEIGHTS_NAME
    safetensors.torch.save_file(safetensors.torch.load_file(path), path)
    return saved


def refused(folder, *names):
    """The message of the one error; it names one of the files."""
    with pytest.raises(ValueError, match=r"^llmkern\.") as caught:
        LanguageModel.from_pretrained(folder)
    message = str(caught.value)
    assert any(str(folder / name) in message for name in names), message
    assert len(message) < 2000
    return message


def change_config(folder, **changes):
    path = folder / CONFIG_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "changes",
    [
        *({"num_layers": 10**18}, {"num_layers": 10**30}, {"num_layers": 3}),
        *({"hidden_size": 200_000}, {"hidden_size": 10**18}, {"hidden_size": 10**30}),
        *({"vocab_size": 2**31}, {"vocab_size": 2**63}, {"embedding_dim": 10**9}),
    ],
    ids=str,
)
def test_sizes_are_compared_before_anything_is_allocated(foreign, changes):
    """Each of them is refused at once, and takes no memory to speak of."""
    change_config(foreign, **changes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(foreign, CONFIG_NAME, WEIGHTS_NAME)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10


def edited_header(path, edit):
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])


@pytest.mark.parametrize("dtype", ["I32", "U32", "F16", "F8_E4M3"])
def test_a_header_with_another_dtype(saved, dtype):
    """I32 has the width of F32: the bytes are unchanged, and so were names and shapes."""

    def edit(header):
        for name, entry in header.items():
            if name != "__metadata__":
                entry["dtype"] = dtype

    edited_header(saved / WEIGHTS_NAME, edit)
    refused(saved, WEIGHTS_NAME)


def test_the_dtype_is_part_of_the_checksum(tmp_path):
    """float16 and bfloat16 have one width, and both are dtypes a model may have."""
    toys.model().half().save_pretrained(tmp_path)

    def edit(header):
        for name, entry in header.items():
            if name != "__metadata__":
                entry["dtype"] = "BF16"

    edited_header(tmp_path / WEIGHTS_NAME, edit)
    assert "do not match its checksum" in refused(tmp_path, WEIGHTS_NAME)


def test_weights_of_several_dtypes(foreign):
    path = foreign / WEIGHTS_NAME
    tensors = safetensors.torch.load_file(path)
    tensors["head.bias"] = tensors["head.bias"].half()
    safetensors.torch.save_file(tensors, path)
    message = refused(foreign, WEIGHTS_NAME)
    assert "one floating-point dtype" in message
    assert "torch.float16 (head.bias)" in message
    safetensors.torch.save_file({n: t.int() for n, t in tensors.items()}, path)
    assert "got none" in refused(foreign, WEIGHTS_NAME)


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"vocab_size": ' + b"9" * 5000 + b"}",
        b" " * (2 << 20),
        b'{"format_version": 1, "model_class": "LanguageModel", "vocab_size": 1e999}',
        b'{"format_version": {}, "model_class": []}',
        b"null",
        b"\x00" * 50,
    ],
    ids=lambda content: repr(content[:12]),
)
def test_deep_and_huge_and_strange_json(foreign, content):
    (foreign / CONFIG_NAME).write_bytes(content)
    refused(foreign, CONFIG_NAME)


def test_damaged_metadata(saved):
    for value in ("{", "[" * 100_000, "NaN", ""):
        edited_header(
            saved / WEIGHTS_NAME,
            lambda header, v=value: header["__metadata__"].update(llmkern_config=v),
        )
        assert "are not from the same save" in refused(saved, CONFIG_NAME)


WRONG = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, -1, 2**31, 2**63, 10**18, 10**400, math.nan, math.inf, -0.0]),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=2), st.none(), max_size=1),
)
FIELDS = (
    *("format_version", "model_class", "vocab_size", "embedding_dim", "hidden_size", "num_layers"),
    *("dropout", "tie_weights", "bias", "init_range", "self", "device", "another"),
)


@FUZZ
@given(st.sampled_from(FIELDS), WRONG)
def test_any_value_in_any_field(foreign, field, value):
    """Refused, or it makes the same model: a dropout of False, say."""
    original = (foreign / CONFIG_NAME).read_text()
    try:
        change_config(foreign, **{field: value})
        loaded_or_refused(foreign)
    finally:
        (foreign / CONFIG_NAME).write_text(original)


def loaded_or_refused(folder):
    try:
        loaded = LanguageModel.from_pretrained(folder)
    except ValueError as error:
        assert str(folder) in str(error), error
    else:
        toys.assert_same_parameters(loaded, toys.talking_model())


@FUZZ
@given(
    st.sampled_from([CONFIG_NAME, WEIGHTS_NAME, "tokenizer.json"]),
    st.randoms(use_true_random=False),
    st.booleans(),
)
def test_any_bit_and_any_end(saved, name, chance, cut):
    """A flipped bit or a missing end of any file; half of them in the first 1,000 bytes, where the structure is."""
    path = saved / name
    original = path.read_bytes()
    data = bytearray(original)
    place = chance.randrange(chance.choice([len(data), min(len(data), 1000)]))
    if cut:
        del data[place:]
    else:
        data[place] ^= 1 << chance.randrange(8)
    try:
        path.write_bytes(data)
        loaded_or_refused(saved)
    finally:
        path.write_bytes(original)


def test_an_unreadable_file_is_not_called_missing(saved, monkeypatch):
    def denied(path, *args, real=open, **options):
        if str(path).endswith(WEIGHTS_NAME):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **options)

    monkeypatch.setattr(_files, "open", denied, raising=False)
    with pytest.raises(
        PermissionError, match=r"could not read .*model\.safetensors: Permission denied"
    ):
        LanguageModel.from_pretrained(saved)


def test_a_folder_in_place_of_a_file(saved):
    (saved / WEIGHTS_NAME).unlink()
    (saved / WEIGHTS_NAME).mkdir()
    with pytest.raises(FileNotFoundError, match=r"found no file .*model\.safetensors"):
        LanguageModel.from_pretrained(saved)


SAVE = """
    import sys
    from tests.models import toys

    toys.talking_model().save_pretrained(sys.argv[1])
"""


def test_the_same_model_makes_the_same_files(tmp_path):
    """Also in another process, whose hashes are seeded otherwise."""
    for name in ("a", "b"):
        toys.talking_model().save_pretrained(tmp_path / name)
    command = [sys.executable, "-c", textwrap.dedent(SAVE), str(tmp_path / "c")]
    subprocess.run(command, cwd=ROOT, check=True)
    for name in (CONFIG_NAME, WEIGHTS_NAME, "tokenizer.json"):
        contents = {(tmp_path / folder / name).read_bytes() for folder in "abc"}
        assert len(contents) == 1, name
    with safetensors.safe_open(tmp_path / "a" / WEIGHTS_NAME, framework="pt") as file:
        assert sorted(file.metadata()) == sorted(
            ["format", "llmkern_checksum", "llmkern_config", "llmkern_tokenizer"]
        )
