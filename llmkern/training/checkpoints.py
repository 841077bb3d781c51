# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: everything a run needs to go on as if it had never stopped, in one file.

A checkpoint is a dict of tensors, numbers, texts, lists and dicts in torch's zip format, with the name and the version
of the format in it. It is read with ``weights_only=True``, so a file from a stranger cannot run code.
"""

import io
import pickle
import random
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from llmkern._files import write_files

FORMAT = "llmkern.checkpoint"
VERSION = 2
_NAME = "checkpoint-{:010d}.pt"
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
    """
    # Serialised in memory first: on a full disk torch's own writer fails with a message about positions.
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "version": VERSION} | content, buffer)
    path = Path(folder) / _NAME.format(step)
    write_files(folder, {path.name: buffer.getbuffer()})
    for old in list_checkpoints(folder)[:-keep]:
        old.unlink()
    return path


def list_checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints of a folder, oldest first."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _PATTERN.fullmatch(path.name))


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Reads a checkpoint.

    Args:
        path: the file, or a folder, whose newest checkpoint is read.
        device: where its tensors go.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is cut off, corrupt, or of another format or version.
    """
    path = Path(path)
    if path.is_dir():
        found = list_checkpoints(path)
        if not found:
            raise FileNotFoundError(
                f"llmkern.load_checkpoint: expected a checkpoint in {path}, found none"
            )
        path = found[-1]
    if not path.is_file():
        raise FileNotFoundError(f"llmkern.load_checkpoint: found no file {path}")
    _check_archive(path)
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        raise _unusable(path, f"it is no checkpoint: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise _unusable(path, f"it is not of the format {FORMAT}")
    if content["version"] != VERSION:
        raise _unusable(path, f"expected version {VERSION}, got {content['version']}")
    return content


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


def _check_archive(path: Path) -> None:
    """Compares every part with its checksum, which torch.load does not."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise _unusable(path, f"it is cut off or corrupt: {error}") from error
    if damaged is not None:
        raise _unusable(path, f"it is corrupt: the checksum of its part {damaged} is wrong")


def _unusable(path: Path, why: str) -> ValueError:
    others = [other.name for other in list_checkpoints(path.parent) if other != path]
    hint = f"delete it to go on from {others[-1]}" if others else "there is no other in its folder"
    return ValueError(f"llmkern.load_checkpoint: {path} cannot be used: {why}; {hint}")
