# SPDX-License-Identifier: Apache-2.0
"""What a run leaves to read: log.jsonl, one JSON object a line, and TensorBoard's event files."""

import json
import math
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from typing_extensions import Self

from llmkern._optional import require

LOG_NAME, TENSORBOARD_NAME = "log.jsonl", "tb"
DATA_NAME = "data.json"  # which texts a run was given; the trainer writes it beside them


class RunLog:
    """Writes events while a run lasts; use it in a ``with`` statement.

    Args:
        folder: the run's folder; None writes nothing.
        tensorboard: also write event files.
        size: keep so many bytes of an existing log, the part up to the checkpoint the run goes on from.
        step: the step of that checkpoint; TensorBoard hides what it has of later ones.
    """

    def __init__(self, folder: Path | None, *, tensorboard: bool, size: int, step: int) -> None:
        self._file: BinaryIO | None = None
        self._writer: Any = None
        self._tensorboard = tensorboard
        if folder is not None:
            # The step of a checkpoint is logged before it is saved: what follows it is purged.
            self._open(folder, purge_step=step + 1 if step else None)
            if self.size > size:
                assert self._file is not None
                self._file.truncate(size)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.leave()

    def leave(self) -> None:
        """Closes the files."""
        for file in (self._file, self._writer):
            if file is not None:
                file.close()
        self._file = self._writer = None

    def enter(self, folder: Path) -> None:
        """Goes on with the files, which have moved to another folder."""
        self._open(folder, purge_step=None)

    def _open(self, folder: Path, purge_step: int | None) -> None:
        try:
            self._file = open(folder / LOG_NAME, "ab")  # noqa: SIM115  (closed in leave)
            if self._tensorboard:
                board = require("torch.utils.tensorboard", "writes logs for TensorBoard")
                place = str(folder / TENSORBOARD_NAME)
                self._writer = board.SummaryWriter(place, purge_step=purge_step)
        except OSError as error:
            raise OSError(
                error.errno, f"llmkern.Trainer: could not write logs in {folder}: {error.strerror}"
            ) from error

    @property
    def size(self) -> int:
        """Bytes in the log."""
        return 0 if self._file is None else self._file.tell()

    def write(self, event: str, step: int, **values: Any) -> None:
        """Adds an event; numbers also go to TensorBoard as ``event/name``."""
        if self._file is None:
            return
        entry = {"event": event, "step": step} | {k: _plain(v) for k, v in values.items()}
        self._file.write((json.dumps(entry, ensure_ascii=False) + "\n").encode())
        self._file.flush()
        if self._writer is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)) and not isinstance(value, bool):
                    self._writer.add_scalar(f"{event}/{name}", value, step)


def _plain(value: Any) -> Any:
    """JSON has no infinity and no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
