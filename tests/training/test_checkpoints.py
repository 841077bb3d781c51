# SPDX-License-Identifier: Apache-2.0
"""Checkpoint files: whole or refused by name; old ones go when new ones are safe."""

import errno
import os
import random

import pytest
import torch

from llmkern.training import checkpoints
from llmkern.training.checkpoints import list_checkpoints, load_checkpoint, save_checkpoint

CONTENT = {"values": torch.arange(5000.0), "number": 1 / 3, "nested": {"list": [1, None, "x"]}}


def test_round_trip(tmp_path):
    path = save_checkpoint(tmp_path, 12, CONTENT, keep=1)
    assert path.name == "checkpoint-0000000012.pt"
    for source in (path, tmp_path):
        loaded = load_checkpoint(source)
        assert torch.equal(loaded["values"], CONTENT["values"])
        assert loaded["number"] == 1 / 3
        assert loaded["nested"] == CONTENT["nested"]


def test_the_newest_stay_and_the_newest_is_read(tmp_path):
    for step in (9, 10, 100):
        save_checkpoint(tmp_path, step, {"step": step}, keep=2)
    (tmp_path / "checkpoint-notes.txt").write_text("mine")
    assert [path.name[-6:-3] for path in list_checkpoints(tmp_path)] == ["010", "100"]
    assert load_checkpoint(tmp_path)["step"] == 100
    assert (tmp_path / "checkpoint-notes.txt").exists()


def test_none_to_load(tmp_path):
    with pytest.raises(FileNotFoundError, match="found none"):
        load_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"found no file .*nowhere"):
        load_checkpoint(tmp_path / "nowhere")
    assert list_checkpoints(tmp_path / "nowhere") == []


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_a_cut_off_file_is_refused_with_a_way_out(tmp_path, share):
    save_checkpoint(tmp_path, 1, CONTENT, keep=9)
    path = save_checkpoint(tmp_path, 2, CONTENT, keep=9)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(
        ValueError, match=r"-0000000002\.pt cannot be used: it is cut off or corrupt"
    ):
        load_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"delete it to go on from checkpoint-0000000001\.pt"):
        load_checkpoint(tmp_path)


def test_one_changed_bit_is_noticed(tmp_path):
    path = save_checkpoint(tmp_path, 1, CONTENT, keep=1)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"checksum of its part .* is wrong; there is no other"):
        load_checkpoint(tmp_path)


def test_another_file_under_the_name(tmp_path):
    path = tmp_path / "checkpoint-0000000001.pt"
    torch.save({"weights": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"not of the format llmkern\.checkpoint"):
        load_checkpoint(path)
    torch.save({"format": checkpoints.FORMAT, "version": 99}, path)
    with pytest.raises(ValueError, match="expected version 2, got 99"):
        load_checkpoint(path)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_a_strangers_file_cannot_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "checkpoint-0000000001.pt"
    torch.save({"format": checkpoints.FORMAT, "version": checkpoints.VERSION, "evil": Evil()}, path)
    with pytest.raises(ValueError, match="it is no checkpoint"):
        load_checkpoint(path)
    assert not (tmp_path / "evil").exists()


def test_a_full_disk_leaves_the_old_ones(tmp_path, monkeypatch):
    old = save_checkpoint(tmp_path, 1, CONTENT, keep=1)
    before = old.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"could not write .*-0000000002\.pt: No space left"):
        save_checkpoint(tmp_path, 2, CONTENT, keep=1)
    assert list(tmp_path.iterdir()) == [old]
    assert old.read_bytes() == before


def test_random_numbers_go_on_where_they_were():
    state = checkpoints.random_state()
    expected = random.random(), torch.rand(3)
    random.random()
    checkpoints.set_random_state(state)
    assert random.random() == expected[0]
    assert torch.equal(torch.rand(3), expected[1])
