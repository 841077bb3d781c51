# SPDX-License-Identifier: Apache-2.0
"""What a run shows while it lasts: a bar in a terminal, plain lines elsewhere, nothing when asked to be quiet."""

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any, Protocol

from llmkern._optional import require
from llmkern.training.metrics import perplexity


class Display(Protocol):
    """What the trainer tells."""

    def step(self, step: int, **values: Any) -> None:
        """After every step: loss, learning_rate, tokens_per_second, epoch."""

    def interval(self, step: int, **values: Any) -> None:
        """After every ``log_every`` steps, likewise."""

    def note(self, text: str) -> None:
        """Something that lasts, such as "validating 40 %"."""

    def line(self, text: str) -> None:
        """Something to keep: the result of an epoch."""

    def close(self) -> None:
        """At the end."""


def make_display(total_steps: int, first_step: int, *, show: bool) -> Display:
    """The display for standard error as it is."""
    if not show:
        return Silence()
    display = Bar if sys.stderr.isatty() else Lines
    return display(total_steps, first_step)


class Silence:
    """Shows nothing."""

    def step(self, step: int, **values: Any) -> None: ...

    def interval(self, step: int, **values: Any) -> None: ...

    def note(self, text: str) -> None: ...

    def line(self, text: str) -> None: ...

    def close(self) -> None: ...


class Lines(Silence):
    """A line for each interval and each epoch: for files, pipes and the logs of batch systems."""

    def __init__(self, total_steps: int, first_step: int) -> None:
        self._total_steps = total_steps
        self._first_step = first_step
        self._began = time.monotonic()

    def interval(self, step: int, **values: Any) -> None:
        self.line(
            f"step {step}/{self._total_steps} | {self._time_left(step)} left | {_described(**values)}"
        )

    def line(self, text: str) -> None:
        _to_whoever_listens(lambda: print(text, file=sys.stderr, flush=True))

    def _time_left(self, step: int) -> str:
        """By the mean time of this call's steps, validation and saving included."""
        passed = time.monotonic() - self._began
        seconds = passed / max(1, step - self._first_step) * (self._total_steps - step)
        return str(timedelta(seconds=round(seconds)))


class Bar(Silence):
    """A bar with the time left, loss, perplexity, speed and learning rate, by rich.

    What does not fit into the terminal's width is cut from the end: step count and time left stay.
    """

    def __init__(self, total_steps: int, first_step: int) -> None:
        progress = require("rich.progress", "draws the progress bar")
        column = require("rich.table", "draws the progress bar").Column
        console = require("rich.console", "draws the progress bar").Console(stderr=True)
        self._progress = progress.Progress(
            progress.TextColumn("{task.description}", table_column=column(no_wrap=True)),
            progress.BarColumn(bar_width=20 if console.width >= 100 else 8),
            progress.MofNCompleteColumn(table_column=column(no_wrap=True)),
            progress.TimeRemainingColumn(table_column=column(no_wrap=True)),
            progress.TextColumn(
                "{task.fields[note]}",
                table_column=column(ratio=1, no_wrap=True, overflow="ellipsis"),
            ),
            console=console,
            expand=True,
        )
        self._task = self._progress.add_task(
            "training", total=total_steps, completed=first_step, note=""
        )
        self._progress.start()

    def step(self, step: int, **values: Any) -> None:
        self._progress.update(self._task, completed=step, note=_described(**values))

    def note(self, text: str) -> None:
        self._progress.update(self._task, note=text)

    def line(self, text: str) -> None:
        _to_whoever_listens(
            lambda: self._progress.console.print(text, highlight=False, markup=False)
        )

    def close(self) -> None:
        _to_whoever_listens(self._progress.stop)


def _to_whoever_listens(write: Callable[[], object]) -> None:
    """Writes to a terminal or a pipe that may have closed: that must not end a run before it has saved."""
    with suppress(OSError):
        write()


def _described(
    *, epoch: int, loss: float, learning_rate: float, tokens_per_second: float, **_: Any
) -> str:
    return (
        f"epoch {epoch} | loss {loss:.4f} | ppl {perplexity(loss):.2f} | "
        f"{tokens_per_second:,.0f} tok/s | lr {learning_rate:.3g}"
    )


def epoch_summary(record: dict[str, Any], epochs: int) -> str:
    """The line of a finished epoch."""
    parts = [
        f"epoch {record['epoch']}/{epochs}",
        f"train ppl {perplexity(record['train_loss']):.2f}",
    ]
    if record["valid_loss"] is not None:
        parts.append(f"valid loss {record['valid_loss']:.4f}")
        parts.append(f"valid ppl {perplexity(record['valid_loss']):.2f}")
    return " | ".join([*parts, f"lr {record['learning_rate']:.3g}"])


def validation_summary(step: int, total_steps: int, valid_loss: float) -> str:
    """The line of a validation between two ends of epochs."""
    return (
        f"step {step}/{total_steps} | valid loss {valid_loss:.4f} | "
        f"valid ppl {perplexity(valid_loss):.2f}"
    )
