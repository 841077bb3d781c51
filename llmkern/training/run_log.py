# SPDX-License-Identifier: Apache-2.0
"""What a run leaves to read: log.jsonl, one JSON object a line, and TensorBoard's event files."""

import json
import math
from pathlib import Path
from types import TracebackType
from typing import Any

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
        self._file = None
        self._writer: Any = None
        if folder is None:
            return
        if tensorboard:
            board = require("torch.utils.tensorboard", "writes logs for TensorBoard")
            # The step of a checkpoint is logged before it is saved: what follows it is purged.
            purge = step + 1 if step else None
            self._writer = board.SummaryWriter(str(folder / TENSORBOARD_NAME), purge_step=purge)
        self._file = open(folder / LOG_NAME, "ab")  # noqa: SIM115  (closed in __exit__)
        if self._file.tell() > size:
            self._file.truncate(size)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()
        if self._writer is not None:
            self._writer.close()

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
