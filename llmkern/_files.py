# SPDX-License-Identifier: Apache-2.0
"""Files: written so that no crash, full disk or Ctrl-C harms what was there before; read so that errors name them."""

import contextlib
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

_PREFIX = ".llmkern-"
_SUFFIX = ".tmp"


def write_files(folder: str | Path, contents: Mapping[str, bytes | bytearray | memoryview]) -> None:
    """Writes or replaces the files of a folder; a failure leaves them as they were.

    Every file is first written under a temporary name in the same folder and flushed to the disk; only then are all
    of them renamed, in the order given. (Killed between two renames, a process leaves some new and some old ones, each
    whole.) Data comes as bytes so that a failure is an OSError of this function, not an abort deep inside a
    serialiser.

    Args:
        folder: where to; made if need be.
        contents: file name -> its bytes.

    Raises:
        OSError: a file cannot be written (disk full, no permission); names it. The old files are as they were and no
            temporary file is left.
    """
    folder = Path(folder)
    written: dict[str, Path] = {}
    name = ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in contents.items():
            temporary = folder / f"{_PREFIX}{name}.{secrets.token_hex(4)}{_SUFFIX}"
            written[name] = temporary
            _write(temporary, data)
        for name, temporary in written.items():
            os.replace(temporary, folder / name)
        flush_folder(folder)
    except OSError as error:
        raise OSError(
            error.errno,
            f"llmkern.save: could not write {folder / name}: {error.strerror or error}; "
            "the previous file, if there was one, is unharmed",
        ) from error
    finally:
        for temporary in written.values():
            _remove(temporary)


def remove_temporaries(folder: str | Path) -> None:
    """Removes what a killed process left behind; for a folder that nobody else is writing to."""
    for path in Path(folder).glob(f"{_PREFIX}*{_SUFFIX}"):
        _remove(path)


def check_readable(path: Path, where: str) -> None:
    """Tells a missing file from one that cannot be read.

    Raises:
        FileNotFoundError: there is no such file, or it is a folder or a device; begins with ``where``.
        OSError: it cannot be read; likewise.
    """
    try:
        if not path.is_file():
            raise FileNotFoundError(f"{where}: found no file {path}")
        with open(path, "rb"):
            pass
    except FileNotFoundError:
        raise
    except OSError as error:
        raise type(error)(
            error.errno, f"{where}: could not read {path}: {error.strerror}"
        ) from error


def read_file(path: Path, where: str, limit: int) -> bytes:
    """A file of at most ``limit`` bytes.

    Raises:
        OSError: as check_readable.
        ValueError: it is larger.
    """
    check_readable(path, where)
    with open(path, "rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"{where}: expected {path} of at most {limit} bytes, got more")
    return content


def _remove(path: Path) -> None:
    """Cleans up, if it can: on a file system that has become read-only the error that matters is another."""
    with contextlib.suppress(OSError):
        path.unlink()


def _write(path: Path, data: bytes | bytearray | memoryview) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """A rename survives a power cut only once the folder itself is on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
