# SPDX-License-Identifier: Apache-2.0
"""One process at a time in a run's folder, and an error that names it to the others."""

import contextlib
import json
import os
import socket
import sys
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any

from typing_extensions import Self

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK_NAME = ".llmkern-lock"
_MAX_BYTES = 4096


class RunLock:
    """Holds a folder as long as a ``with`` statement lasts.

    The lock is the kernel's (flock), so it ends with its process, however that ends. The file says who holds it:
    process, host and since when. Where the file system has no such locks the file itself is the lock, and one that a
    dead process of this host has left behind is taken over.

    Args:
        folder: an existing folder.
        show: say on standard error when the process before ended without leaving the folder in order.

    Raises:
        RuntimeError: another process, or another trainer of this one, is at work there; names it.
        OSError: the folder cannot be written to.
    """

    def __init__(self, folder: Path, *, show: bool = True) -> None:
        self._path = folder / LOCK_NAME
        self._show = show
        self._file: int | None = None

    def __enter__(self) -> Self:
        try:
            self._file = self._taken()
            predecessor = _read(self._file)
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, json.dumps(_myself()).encode(), 0)
        except OSError as error:
            raise OSError(
                error.errno,
                f"llmkern.Trainer: could not write {self._path}: {error.strerror}; nothing was changed",
            ) from error
        if predecessor and self._show:
            print(
                f"llmkern: {self._path.parent} was left by {_described(predecessor)}, which has ended; taking over",
                file=sys.stderr,
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._file is not None
        with contextlib.suppress(OSError):
            self._path.unlink()
        os.close(self._file)

    def _taken(self) -> int:
        """The file, open and held."""
        while True:
            file, is_new = _opened(self._path)
            owner = _read(file)
            is_held = _flocked(file)
            if is_held is None:
                is_held = is_new or _is_dead(owner)
            if is_held and _is_at(file, self._path):
                return file
            os.close(file)
            if not is_held:
                raise self._in_use(owner)
            # Its owner removed it between our two calls: what we hold is nobody's lock.

    def _in_use(self, owner: dict[str, Any]) -> RuntimeError:
        return RuntimeError(
            f"llmkern.Trainer: {self._path.parent} is in use by {_described(owner)}; wait for its end or train "
            f"elsewhere (its lock is {self._path})"
        )


def _opened(path: Path) -> tuple[int, bool]:
    """The file, and whether it was made for that."""
    while True:
        with contextlib.suppress(FileExistsError):
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), True
        with contextlib.suppress(FileNotFoundError):  # removed since
            return os.open(path, os.O_RDWR), False


def _flocked(file: int) -> bool | None:
    """Whether the kernel gave the lock; None where the system or the file system knows no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _myself() -> dict[str, Any]:
    since = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": since}


def _described(owner: dict[str, Any]) -> str:
    if not owner:
        return "another process"
    same = owner["pid"] == os.getpid() and owner["host"] == socket.gethostname()
    return f"process {owner['pid']}{' (this one)' if same else ''} on {owner['host']} since {owner['since']}"


def _read(file: int) -> dict[str, Any]:
    """Who the lock names; empty if it names no one, having been made a moment ago."""
    try:
        owner = json.loads(os.pread(file, _MAX_BYTES, 0))
        return {"pid": int(owner["pid"]), "host": str(owner["host"]), "since": str(owner["since"])}
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return {}


def _is_dead(owner: dict[str, Any]) -> bool:
    """Whether a process of this host has ended; of other hosts nothing is known."""
    if not owner or owner["host"] != socket.gethostname():
        return False
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return False


def _is_at(file: int, path: Path) -> bool:
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    mine = os.fstat(file)
    return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)
