# SPDX-License-Identifier: Apache-2.0
"""What a run shows while it lasts: a bar in a terminal, plain lines elsewhere, nothing when asked to be quiet."""

import sys
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
    return Bar(total_steps, first_step) if sys.stderr.isatty() else Lines(total_steps)


class Silence:
    """Shows nothing."""

    def step(self, step: int, **values: Any) -> None: ...

    def interval(self, step: int, **values: Any) -> None: ...

    def note(self, text: str) -> None: ...

    def line(self, text: str) -> None: ...

    def close(self) -> None: ...


class Lines(Silence):
    """A line for each interval and each epoch: for files, pipes and the logs of batch systems."""

    def __init__(self, total_steps: int) -> None:
        self._total_steps = total_steps

    def interval(self, step: int, **values: Any) -> None:
        self.line(f"step {step}/{self._total_steps} | " + _described(**values))

    def line(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


class Bar(Silence):
    """A bar with loss, perplexity, speed, learning rate and the time left, by rich."""

    def __init__(self, total_steps: int, first_step: int) -> None:
        progress = require("rich.progress", "draws the progress bar")
        console = require("rich.console", "draws the progress bar").Console(stderr=True)
        self._progress = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(bar_width=20),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[note]}"),
            progress.TimeRemainingColumn(),
            console=console,
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
        self._progress.console.print(text, highlight=False, markup=False)

    def close(self) -> None:
        self._progress.stop()


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
