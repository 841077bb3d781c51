# SPDX-License-Identifier: Apache-2.0
"""A model in a folder: what is loaded is what was saved, and what does not fit is named."""

import json
import os
import shutil

import pytest
import safetensors.torch
import torch

from llmkern.models import LanguageModel, pretrained
from tests.models import toys

FILES = {"config.json", "model.safetensors", "tokenizer.json"}


@pytest.fixture
def saved(tmp_path):
    toys.talking_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    "options",
    [{}, {"tie_weights": True, "embedding_dim": 16}, {"bias": False, "num_layers": 1}],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_round_trip_is_exact(tmp_path, options, dtype):
    model = toys.talking_model(**options).to(dtype)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == FILES
    loaded = LanguageModel.from_pretrained(tmp_path)
    toys.assert_same_parameters(loaded, model)
    assert loaded.config == model.config
    assert (loaded.head.weight is loaded.embedding.weight) == model.config["tie_weights"]
    assert not loaded.training
    assert loaded.tokenizer.encode(toys.TEXT) == model.tokenizer.encode(toys.TEXT)
    ids = torch.randint(model.vocab_size, (2, 5))
    assert torch.equal(loaded(ids)[0], model(ids)[0])


def test_loading_spares_the_random_stream(saved):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    LanguageModel.from_pretrained(saved)
    assert torch.equal(torch.rand(2), expected)


def test_a_model_without_a_tokenizer(tmp_path):
    toys.model().save_pretrained(tmp_path)
    assert LanguageModel.from_pretrained(tmp_path).tokenizer is None
    assert {path.name for path in tmp_path.iterdir()} == FILES - {"tokenizer.json"}


def test_weights_of_another_tool_are_taken_as_they_are(saved):
    tensors = safetensors.torch.load_file(saved / "model.safetensors")
    safetensors.torch.save_file(tensors, saved / "model.safetensors")
    loaded = LanguageModel.from_pretrained(saved)
    assert torch.equal(loaded.embedding.weight, tensors["embedding.weight"])


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        LanguageModel.from_pretrained(saved)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        LanguageModel.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_cut_off_weights_are_corrupt(saved, share):
    path = saved / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ValueError, match=r"model\.safetensors is corrupt or cut off"):
        LanguageModel.from_pretrained(saved)


def test_one_changed_bit_in_the_weights_is_noticed(saved):
    path = saved / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="do not match its checksum"):
        LanguageModel.from_pretrained(saved)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b'{"vocab_size": 3}'])
def test_a_corrupt_configuration_is_named(saved, content):
    (saved / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json is not a model's configuration"):
        LanguageModel.from_pretrained(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 99}, "expected .* of format_version 1, got 99"),
        ({"model_class": "Tagger"}, "expected .* of model_class LanguageModel, got 'Tagger'"),
        ({"hidden_size": 20}, "are not from the same save"),
    ],
)
def test_a_configuration_of_something_else(saved, change, message):
    path = saved / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        LanguageModel.from_pretrained(saved)


def _replace_weights(folder, change):
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("head.bias"), r"missing \['head.bias'\], unexpected \[\]"),
        (lambda t: t.update(extra=torch.ones(1)), r"missing \[\], unexpected \['extra'\]"),
        (
            lambda t: t.update({"lstm.weight_hh_l1": torch.ones(64, 3)}),
            r"expected lstm.weight_hh_l1 of shape \[64, 16\], got \[64, 3\]",
        ),
    ],
)
def test_weights_that_do_not_fit(saved, change, message):
    _replace_weights(saved, change)
    with pytest.raises(ValueError, match=message):
        LanguageModel.from_pretrained(saved)


def test_a_configuration_without_a_constructor_argument_to_match(saved):
    _replace_weights(saved, lambda tensors: None)
    path = saved / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dropout": 2.0}))
    with pytest.raises(ValueError, match=r"does not describe a LanguageModel.*dropout"):
        LanguageModel.from_pretrained(saved)


def test_a_tokenizer_of_another_model(saved, tmp_path):
    toys.tokenizer(text="abcdefg").save(saved)
    with pytest.raises(
        ValueError, match=r"tokenizer\.json is not the tokenizer the model was saved"
    ):
        LanguageModel.from_pretrained(saved)
    toys.model(vocab_size=9).save_pretrained(tmp_path / "bare")
    toys.tokenizer(text="abcdefg").save(tmp_path / "bare")
    with pytest.raises(ValueError, match="vocab_size = 9, got 7"):
        LanguageModel.from_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="vocab_size = 23, got 7"):
        toys.model().save_pretrained(tmp_path / "x", toys.tokenizer(text="abcdefg"))


def test_a_save_cut_off_between_two_renames_is_noticed(saved, tmp_path, monkeypatch):
    """Whatever mixture of old and new files a crash leaves, loading fails; it never pairs them silently."""
    other = toys.talking_model(hidden_size=18, seed=1)
    other.tokenizer = toys.tokenizer(text=toys.TEXT + "g" * 1000)
    for renames in (1, 2):
        folder = tmp_path / str(renames)
        shutil.copytree(saved, folder)
        real, done = os.replace, []

        def crash(source, target, *, limit=renames, real=real, done=done):
            if len(done) == limit:
                raise KeyboardInterrupt
            done.append(target)
            real(source, target)

        monkeypatch.setattr(os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            other.save_pretrained(folder)
        monkeypatch.undo()
        assert {path.name for path in folder.iterdir()} == FILES
        with pytest.raises(ValueError, match=r"not the tokenizer|not from the same save"):
            LanguageModel.from_pretrained(folder)


def test_saving_into_something_that_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="could not make the folder"):
        toys.model().save_pretrained(tmp_path / "file" / "model")
    assert pretrained.FORMAT_VERSION == 1
