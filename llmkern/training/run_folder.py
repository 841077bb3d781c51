# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: whose files are in it, and how one run replaces another without a moment that has neither.

A run that replaces another is written beside it, into a hidden folder, until it has a checkpoint with a step in it.
Then one rename decides: from there on the new run is the one that counts. Its files are moved into place and what only
the old one had is removed; a process that is killed in between leaves that to the next one that opens the folder. Files
that no run of ours made are never touched: a checkpoint names the files of its run.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Protocol

from typing_extensions import Self

from llmkern._files import flush_folder, remove_temporaries, write_files
from llmkern.models.building import shortened
from llmkern.models.pretrained import CONFIG_NAME, TOKENIZER_NAME, WEIGHTS_NAME
from llmkern.training.checkpoints import (
    is_checkpoint_name,
    list_checkpoints,
    read_outline,
    unusable,
)
from llmkern.training.lock import RunLock
from llmkern.training.run_log import DATA_NAME, LOG_NAME, TENSORBOARD_NAME

BEST_NAME = "best.pt"
# What a run can leave besides its checkpoints; its own list is among them.
NAMES = (
    *(TOKENIZER_NAME, CONFIG_NAME, WEIGHTS_NAME),
    *(BEST_NAME, DATA_NAME, LOG_NAME, TENSORBOARD_NAME),
)
_NEW, _SETTLING, _REMOVED = ".llmkern-new", ".llmkern-settling", "replaced.json"
_EVENTS = re.compile(rf"{TENSORBOARD_NAME}/events\.out\.tfevents\.[^/]+")


class Follower(Protocol):
    """Has files open in the folder, and lets go of them while they are moved."""

    def leave(self) -> None:
        """Closes them."""

    def enter(self, folder: Path) -> None:
        """Opens them where they are now."""


class RunFolder:
    """The folder that a run writes to, locked as long as a ``with`` statement lasts.

    Args:
        folder: the run's folder, made if need be; None for a run that leaves nothing.
        files: which of NAMES the run may write.
        resume: the run in the folder goes on.
        overwrite: the run in the folder is replaced.
        begun: the run has been in this folder before, in this process.
        show: say on standard error if another process left the folder in disorder.

    Attributes:
        path: where the run's files are now; None for none.
        files: those that are the run's.
        followers: who has files open there.

    Raises:
        FileNotFoundError: there is nothing to resume.
        FileExistsError: there is a run and neither resume nor overwrite; or files that no run made.
        RuntimeError: another process works there.
        OSError: the folder cannot be made or written to.
        ValueError: a checkpoint to be overwritten is none, or is corrupt.
    """

    def __init__(
        self,
        folder: Path | None,
        files: Iterable[str],
        *,
        resume: bool = False,
        overwrite: bool = False,
        begun: bool = False,
        show: bool = True,
    ) -> None:
        self.path = folder
        self.files = frozenset(files)
        self.followers: list[Follower] = []
        self._folder = folder
        self._resume, self._overwrite, self._begun = resume, overwrite, begun
        self._show = show
        self._lock: RunLock | None = None
        self._replaced: frozenset[str] | None = None

    def __enter__(self) -> Self:
        if self._folder is None:
            return self
        if self._resume and not self._folder.is_dir():
            raise _nothing_to_resume(self._folder)
        _make(self._folder)
        self._lock = RunLock(self._folder, show=self._show).__enter__()
        try:
            self._take(self._folder)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._lock is None:
            return
        if self._replaced is not None and self.path is not None:
            shutil.rmtree(self.path, ignore_errors=True)
        self._lock.__exit__(kind, error, trace)
        self._lock = None

    @property
    def is_beside_another(self) -> bool:
        """Whether the run that is to be replaced is still there."""
        return self._replaced is not None

    def settle(self) -> None:
        """Puts the run in the place of the one that it replaces, if it does; call it after a checkpoint worth that.

        Raises:
            OSError: files cannot be moved or removed.
        """
        if self._replaced is None:
            return
        assert self._folder is not None and self.path is not None
        for follower in self.followers:
            follower.leave()
        removed = sorted(_existing(self._folder, self._replaced) - _files_in(self.path))
        write_files(self.path, {_REMOVED: json.dumps(removed).encode()})
        os.rename(self.path, self._folder / _SETTLING)
        self.path, self._replaced = self._folder, None
        _finish_settling(self._folder)
        for follower in self.followers:
            follower.enter(self.path)

    def _take(self, folder: Path) -> None:
        _tidy(folder)
        if self._begun:
            return
        found = _check(folder, self.files, resume=self._resume, overwrite=self._overwrite)
        if self._resume:
            self.files |= found
        elif self._overwrite and list_checkpoints(folder):
            self._replaced = found
            self.path = folder / _NEW
            self.path.mkdir()


def check_folder(
    folder: Path, files: Iterable[str] = NAMES, *, resume: bool = False, overwrite: bool = False
) -> None:
    """Raises what RunFolder would, before there is anything else to do; makes no folder.

    Raises:
        as RunFolder.
    """
    if folder.is_dir():
        with RunLock(folder):
            _tidy(folder)
            _check(folder, frozenset(files), resume=resume, overwrite=overwrite)
    elif resume:
        raise _nothing_to_resume(folder)


def _check(folder: Path, files: frozenset[str], *, resume: bool, overwrite: bool) -> frozenset[str]:
    """The files of the run that is in the folder, if its checkpoints can be read."""
    checkpoints = list_checkpoints(folder)
    if resume and not checkpoints:
        raise _nothing_to_resume(folder)
    if checkpoints and not resume and not overwrite:
        raise FileExistsError(
            f"llmkern.Trainer: {folder} holds a run; give --resume (resume=True) to go on with it, "
            "--overwrite (overwrite=True) to replace it"
        )
    found: frozenset[str] = frozenset()
    for path in checkpoints[-1:] if resume else checkpoints:
        found |= _files_of(path)
    strangers = sorted(name for name in files - found if (folder / name).exists())
    if strangers:
        raise FileExistsError(
            f"llmkern.Trainer: {folder} has {', '.join(strangers)}, which this run would write and no run of a "
            "checkpoint there has made; nothing was changed: move them or train elsewhere"
        )
    return found


def _nothing_to_resume(folder: Path) -> FileNotFoundError:
    return FileNotFoundError(f"llmkern.Trainer: expected a checkpoint in {folder}, found none")


def _files_of(checkpoint: Path) -> frozenset[str]:
    """What a checkpoint says its run writes; all that a run can, where it was made before they said so."""
    files = read_outline(checkpoint).get("files", NAMES)
    if not isinstance(files, (list, tuple)) or not all(name in NAMES for name in files):
        raise unusable(
            checkpoint, f"expected its files to be names of a run's, got {shortened(files)}"
        )
    return frozenset(files)


def _existing(folder: Path, files: frozenset[str]) -> frozenset[str]:
    """The files, relative to the folder, of the run that is in it."""
    names = {path.name for path in list_checkpoints(folder)}
    for name in files:
        if name != TENSORBOARD_NAME:
            names |= {name} if (folder / name).is_file() else set()
        else:
            names |= {
                n for n in _files_in(folder / name, prefix=f"{name}/") if _EVENTS.fullmatch(n)
            }
    return frozenset(names)


def _files_in(folder: Path, prefix: str = "") -> frozenset[str]:
    """All files below a folder, as paths relative to it."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return frozenset(prefix + path.relative_to(folder).as_posix() for path in found)


def _tidy(folder: Path) -> None:
    """Does what a killed process had still to do."""
    shutil.rmtree(folder / _NEW, ignore_errors=True)
    if (folder / _SETTLING).is_dir():
        _finish_settling(folder)
    remove_temporaries(folder)


def _finish_settling(folder: Path) -> None:
    """Moves a run that has been decided for to its place; begun anew, it ends alike."""
    flush_folder(folder)
    source = folder / _SETTLING
    removed = _removed_names(source / _REMOVED)
    # The model's files first, in the order in which save_pretrained writes them: a reader sees one save or an error.
    order = {name: number for number, name in enumerate(NAMES)}
    for name in sorted(_files_in(source) - {_REMOVED}, key=lambda n: (order.get(n, len(order)), n)):
        (folder / name).parent.mkdir(exist_ok=True)
        os.replace(source / name, folder / name)
    for name in removed:
        (folder / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # it is the new run's, or holds what is not ours
        (folder / TENSORBOARD_NAME).rmdir()
    flush_folder(folder)
    shutil.rmtree(source)


def _removed_names(path: Path) -> list[str]:
    """The files that only the replaced run had. What is not the name of a run's file is left out."""
    if not path.is_file():
        return []
    names = map(str, json.loads(path.read_bytes()))
    files = [name for name in NAMES if name != TENSORBOARD_NAME]
    return [n for n in names if n in files or is_checkpoint_name(n) or _EVENTS.fullmatch(n)]


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            error.errno, f"llmkern.Trainer: could not make the folder {folder}: {error.strerror}"
        ) from error
