# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: everything a run needs to go on as if it had never stopped, in one file.

A checkpoint is a dict of tensors, numbers, texts, lists and dicts in torch's zip format, with the name and the version
of the format in it. It is read with ``weights_only=True``, so a file from a stranger cannot run code.
"""

import contextlib
import io
import random
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmkern._files import check_readable, write_files
from llmkern.models.building import shortened

FORMAT = "llmkern.checkpoint"
VERSION = 2
_NAME = "checkpoint-{:010d}.pt"
_LOAD = "llmkern.load_checkpoint"
_PATTERN = re.compile(r"checkpoint-(\d{10})\.pt")


def save_checkpoint(folder: str | Path, step: int, content: dict[str, Any], *, keep: int) -> Path:
    """Writes a checkpoint, then removes all but the ``keep`` newest.

    Args:
        folder: an existing folder.
        step: how many optimizer steps were taken; names the file.
        content: what ``torch.load(weights_only=True)`` accepts.
        keep: how many checkpoints stay, at least 1.

    Returns:
        The file.

    Raises:
        OSError: it cannot be written; older checkpoints are unharmed.
        TypeError: the content could be written, but not read again; names what is to blame. Nothing was written.
    """
    path = Path(folder) / _NAME.format(step)
    _write_readable(path, {"format": FORMAT, "version": VERSION} | content)
    for old in list_checkpoints(folder)[:-keep]:
        old.unlink(missing_ok=True)
    return path


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Writes a state_dict for ``torch.load(path, weights_only=True)``.

    Raises:
        as save_checkpoint.
    """
    _write_readable(path, state)


def _write_readable(path: Path, content: dict[str, Any]) -> None:
    # Serialised in memory first: on a full disk torch's own writer fails with a message about positions.
    buffer = io.BytesIO()
    with _refusing(content):
        torch.save(content, buffer)
        buffer.seek(0)
        torch.load(buffer, map_location="meta", weights_only=True)  # without the values: quick
    write_files(path.parent, {path.name: buffer.getbuffer()})


def is_checkpoint_name(name: str) -> bool:
    """Whether a file of this name is taken for a checkpoint."""
    return _PATTERN.fullmatch(name) is not None


def list_checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints of a folder, oldest first."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if is_checkpoint_name(path.name))


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Reads a checkpoint.

    Args:
        path: the file, or a folder, whose newest checkpoint is read.
        device: where its tensors go.

    Raises:
        FileNotFoundError: there is none.
        OSError: it cannot be read.
        ValueError: the file is cut off, corrupt, or of another format or version; names it.
    """
    path = newest_checkpoint(path) if Path(path).is_dir() else Path(path)
    check_readable(path, _LOAD)
    _check_archive(path)
    with reading(path, "it is no checkpoint"):
        content = torch.load(path, map_location=device, weights_only=True)
    _check_format(path, content)
    if content.get("version") != VERSION:
        raise unusable(path, f"expected version {VERSION}, got {shortened(content.get('version'))}")
    return content  # type: ignore[no-any-return]


def newest_checkpoint(folder: str | Path) -> Path:
    """The newest checkpoint of a folder.

    Raises:
        FileNotFoundError: there is none.
    """
    found = list_checkpoints(folder)
    if not found:
        raise FileNotFoundError(f"{_LOAD}: expected a checkpoint in {folder}, found none")
    return found[-1]


def read_outline(path: Path) -> dict[str, Any]:
    """A checkpoint of any version, without the values of its tensors.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no checkpoint, or is cut off or corrupt; names it.
    """
    check_readable(path, _LOAD)
    with reading(path, "it is cut off or corrupt"), zipfile.ZipFile(path):
        pass
    with reading(path, "it is no checkpoint"):
        content = torch.load(path, map_location="meta", weights_only=True, mmap=True)
    _check_format(path, content)
    return content  # type: ignore[no-any-return]


@contextlib.contextmanager
def reading(path: Path, complaint: str) -> Iterator[None]:
    """Makes whatever the values in a checkpoint bring about one error that names the file.

    Raises:
        ValueError: in place of any other error.
    """
    try:
        yield
    except Exception as error:  # a damaged or hostile file can make torch and Python raise anything
        raise unusable(path, f"{complaint}: {shortened(error)}") from error


def unusable(path: Path, why: str) -> ValueError:
    """The error for a checkpoint, with what to do instead."""
    others = [other.name for other in list_checkpoints(path.parent) if other != path]
    hint = f"delete it to go on from {others[-1]}" if others else "there is no other in its folder"
    return ValueError(f"{_LOAD}: {path} cannot be used: {why}; {hint}")


def random_state() -> dict[str, Any]:
    """The state of Python's and torch's generators, on every device."""
    version, state, gauss = random.getstate()
    return {
        "python": [version, list(state), gauss],
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """The reverse of random_state; generators of devices this machine has not are left out."""
    version, values, gauss = state["python"]
    random.setstate((version, tuple(values), gauss))
    torch.set_rng_state(state["cpu"].cpu())
    for device, values in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(values.cpu(), device)


def _check_format(path: Path, content: Any) -> None:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise unusable(path, f"it is not of the format {FORMAT}")


def _check_archive(path: Path) -> None:
    """Compares every part with its checksum, which torch.load does not."""
    try:
        with zipfile.ZipFile(path) as archive:
            if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
                raise zipfile.BadZipFile("expected parts that are not compressed")
            damaged = archive.testzip()
    except (
        Exception
    ) as error:  # zipfile raises half a dozen classes, NotImplementedError among them
        raise unusable(path, f"it is cut off or corrupt: {shortened(error)}") from error
    if damaged is not None:
        raise unusable(
            path, f"it is corrupt: the checksum of its part {shortened(damaged)} is wrong"
        )


@contextlib.contextmanager
def _refusing(content: dict[str, Any]) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # pickle raises whatever the objects' own methods do
        if isinstance(error, MemoryError):
            raise
        blamed = next(_strangers(content, ""), "")
        raise TypeError(
            "llmkern.save_checkpoint: expected tensors, numbers, texts and None in lists, tuples and dicts, which can "
            f"be read again, got {blamed or shortened(error)}"
        ) from error


def _strangers(value: Any, where: str) -> Iterator[str]:
    """What a checkpoint cannot hold, by its place in the content."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _strangers(part, f"{where}.{key}" if where else str(key))
    elif type(value) in (list, tuple):
        for number, part in enumerate(value):
            yield from _strangers(part, f"{where}[{number}]")
    elif not isinstance(value, (Tensor, bool, int, float, str, bytes, type(None))):
        yield f"{where}, a {type(value).__name__}"
