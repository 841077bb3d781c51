# SPDX-License-Identifier: Apache-2.0
"""Files are replaced whole, all of a group or none."""

import errno
import os
import resource
import signal

import pytest

from llmkern._files import remove_temporaries, write_files

OLD = {"a.txt": b"old a", "b.txt": b"old b"}


@pytest.fixture
def folder(tmp_path):
    write_files(tmp_path, OLD)
    return tmp_path


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_replaces_all(folder):
    write_files(folder, {"a.txt": b"new", "c.txt": memoryview(b"third")})
    assert contents(folder) == {"a.txt": b"new", "b.txt": b"old b", "c.txt": b"third"}


def test_has_the_permissions_of_any_new_file(folder):
    plain = folder / "plain"
    plain.write_bytes(b"")
    assert (folder / "a.txt").stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize(
    "kind", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()]
)
def test_a_failure_changes_nothing_and_leaves_nothing(folder, monkeypatch, call, kind):
    def fail(*args):
        raise kind

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(type(kind)) as caught:
        write_files(folder, {"a.txt": b"new a", "b.txt": b"new b"})
    if isinstance(kind, OSError):
        assert caught.value.errno == errno.ENOSPC
        assert str(folder) in str(caught.value)
        assert "No space left on device; the previous file" in str(caught.value)
    assert contents(folder) == OLD


def test_a_real_write_that_fails_half_way(folder):
    """The system refuses to let the file grow, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        with pytest.raises(OSError, match=r"could not write .*b\.txt: File too large"):
            write_files(folder, {"a.txt": b"new a", "b.txt": bytes(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert contents(folder) == OLD


def test_removes_what_a_killed_process_left(folder):
    (folder / ".llmkern-model.safetensors.0a1b2c3d.tmp").write_bytes(b"half")
    (folder / "mine.tmp").write_bytes(b"mine")
    remove_temporaries(folder)
    assert contents(folder) == OLD | {"mine.tmp": b"mine"}
